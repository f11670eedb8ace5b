"""Checks of single arguments, each with what would have been right."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from embedge.runtime.errors import EmbedgeValueError

__all__ = [
    "MAX_THREADS",
    "check_choice",
    "check_cosine",
    "check_flag",
    "check_pool_factor",
    "check_positive",
    "check_threads",
    "in_options",
    "listed",
]

MAX_THREADS = 1024  # more than machines have; ONNX Runtime ends with std::bad_alloc far above it


def check_positive(name: str, value: Any) -> int:
    """The value, a whole number of at least 1."""
    try:
        number = None if isinstance(value, bool) else value.__index__()
    except (AttributeError, TypeError):
        number = None
    if not isinstance(number, int) or number < 1:
        raise _refusal(name, value, "a whole number of at least 1")
    return number


def check_threads(name: str, value: Any) -> int:
    """The value, a whole number from 1 to :data:`MAX_THREADS`."""
    number = check_positive(name, value)
    if number > MAX_THREADS:
        raise _refusal(
            name,
            number,
            f"at most {MAX_THREADS}: the cores to use, or leave it out for those that this process has",
        )
    return number


def check_cosine(name: str, value: Any) -> float:
    """The value, a number above 0 and at most 1."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1:
        raise _refusal(name, value, "a number above 0 and at most 1")
    return float(value)


def check_pool_factor(name: str, value: Any) -> float:
    """The value, a finite number of at least 1."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 1 <= value < float("inf"):
        raise _refusal(name, value, "a number of at least 1, which leaves every vector")
    return float(value)


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """The value, one of some strings."""
    if not isinstance(value, str) or value not in choices:
        raise _refusal(name, value, f"one of {listed(choices)}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """The value, ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise _refusal(name, value, "True or False")
    return value


def in_options(message: str, arguments: Iterable[str], options: Mapping[str, str]) -> str:
    """A message with options in the place of arguments: ``batch_size``, ``precision="auto"``.

    Args:
        message: names arguments, where a quoted name is another thing.
        arguments: as the message has them.
        options: ``--batch-size`` by ``batch_size``; arguments without one stay. One that is ``True`` is a flag.
    """
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in options:
            option = " ".join(
                [options[name], *([value.strip('"')] if value not in ("", "True") else [])]
            )
            pattern = rf"""(?<![\w'"/.]){re.escape(argument)}(?![\w'"])"""
            only_first = argument.isalpha()  # "keep" may come again as a verb
            message = option.join(re.split(pattern, message, maxsplit=int(only_first)))
    return message


def listed(names: Iterable[str]) -> str:
    """Names as messages have them."""
    return ", ".join(names) or "none"


def _refusal(name: str, value: Any, expected: str) -> EmbedgeValueError:
    message = f"{name} is {value!r}; expected {expected}"
    return EmbedgeValueError(message, arguments=[name])
