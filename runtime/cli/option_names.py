"""Messages name Python's arguments; a command's user gave options.

Replaced outside of quotes, for the arguments that the command has as options:
    truncate_dim        --truncate-dim      names of several words, anywhere
    precision="auto"    --precision auto    any name with a value in double quotes
    threads is 0        --threads is 0      any name that begins the message
"""

from __future__ import annotations

import argparse
import re

__all__ = ["OptionNames"]


class OptionNames:
    """Puts a command's options into messages; before a command is known, nothing."""

    def __init__(self) -> None:
        self._pattern: re.Pattern[str] | None = None

    def take(self, parser: argparse.ArgumentParser) -> None:
        """Goes by the options of a command's parser from now on."""
        options = re.findall(r"--([a-z][a-z0-9-]*)", parser.format_usage())
        names = [option.replace("-", "_") for option in options]
        name = "|".join(names) or "(?!)"
        long_name = "|".join(n for n in names if "_" in n) or "(?!)"
        free, end = r"""(?<![\w'"`./=-])""", r"""(?![\w'"`./=-])"""
        self._pattern = re.compile(
            rf'{free}(?P<set>{name})="(?P<value>[^"]*)"|{free}(?P<long>{long_name}){end}'
            rf"|^(?P<first>{name})(?= is )"
        )

    def put_into(self, message: str) -> str:
        """The message with options in the place of arguments."""
        return message if self._pattern is None else self._pattern.sub(_option, message)


def _option(found: re.Match[str]) -> str:
    name = found["set"] or found["long"] or found["first"]
    value = "" if found["set"] is None else f" {found['value']}"
    return f"--{name.replace('_', '-')}{value}"
