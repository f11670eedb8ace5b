"""Readers of the text that the example adapters are trained and measured on, one per file."""
