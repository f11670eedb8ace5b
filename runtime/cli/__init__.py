"""The ``embedge`` command, one module a subcommand, and what they share: messages, streams, tables.

Nothing imports it but the ``__main__`` modules.
"""
