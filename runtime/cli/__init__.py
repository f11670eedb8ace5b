"""The ``embedge`` command, one module a subcommand. Nothing imports it."""
