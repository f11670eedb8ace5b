"""Mutation fuzzing, by name: ``python -m tests.fuzz.source --seed 1 --count 2000`` from the root folder."""
