"""How a message of the library becomes one of the command."""

from __future__ import annotations

import pytest

from embedge.runtime.cli.messages import in_options, printable

OPTIONS = {
    "batch_size": "--batch-size",
    "precisions": "--precision",
    "task": "--task",
    "keep": "--keep",
}


@pytest.mark.parametrize(
    ("message", "arguments", "expected"),
    [
        ("batch_size is 0", ["batch_size"], "--batch-size is 0"),
        ('such as task="code"', ['task="code"'], "such as --task code"),
        ("pass keep=True, or leave it", ["keep=True"], "pass --keep, or leave it"),
        ("precisions: expected fp32", ["precisions"], "--precision: expected fp32"),
        (
            "above batch_size; raise batch_size",
            ["batch_size"],
            "above --batch-size; raise --batch-size",
        ),
        ("keep 'x': keep it at fp32", ["keep"], "--keep 'x': keep it at fp32"),
        ("no task 'batch_size'", ["batch_size"], "no task 'batch_size'"),
        ("/tmp/batch_size: no bundle", ["batch_size"], "/tmp/batch_size: no bundle"),
        ("batch_sizes and my_batch_size", ["batch_size"], "batch_sizes and my_batch_size"),
        ("max_sessions is 0", ["max_sessions"], "max_sessions is 0"),
        ("batch_size is 0", [], "batch_size is 0"),
        (r'task="a\1b"', [r'task="a\1b"'], r"--task a\1b"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_stand_where_arguments_are_named(
    message: str, arguments: list[str], expected: str
) -> None:
    assert in_options(message, arguments, OPTIONS) == expected


def test_control_characters_are_escaped() -> None:
    assert printable("für 愛") == "für 愛"
    assert printable("a\x1b[2J\u202eb\n") == "a\\x1b[2J\\u202eb\\n"
