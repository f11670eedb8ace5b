"""The figures of a run, written for people and for tools."""
