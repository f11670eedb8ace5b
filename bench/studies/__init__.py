"""Programs that are run by hand, one question each. They are not in the wheel."""
