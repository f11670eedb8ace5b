"""A promise that is kept passes, one that is broken or was not measured fails."""

from __future__ import annotations

from dataclasses import replace

import pytest

from embedge.bench import Report
from embedge.bench.errors import BenchError
from embedge.bench.targets import BARS, check_bars


def test_kept_promises_pass(report: Report) -> None:
    found = check_bars(report, [2, 3, 4, 5])

    assert [(check.what, check.passed) for check in found] == [
        ("search int8 mean cosine", True),
        ("search int8 on held-out, points lost", True),
        ("search int8 min cosine", True),
        ("search 32x32 rounds", True),
        ("search 32x32 times ORT's best int8", True),
        ("search 32x32 times torch fp32", True),
        ("int8, all tasks, of one fp32 backbone", True),
    ]


def test_a_promise_just_broken_fails_with_both_figures(report: Report) -> None:
    ours = report.rows[2]
    shape = ours.shapes["32x32"]
    slow = shape | {"times_as_fast_as": {"torch fp32": 2.69, "ORT a": 1.1, "ORT b": 0.97}}
    broken = replace(report, rows=(replace(ours, shapes={"32x32": slow}),))

    lines = [check.line() for check in check_bars(broken, [4]) if not check.passed]

    assert lines == [
        "FAIL  bar 4  search 32x32 times ORT's best int8: 0.97 (wanted at least 0.98)",
        "FAIL  bar 4  search 32x32 times torch fp32: 2.69 (wanted at least 2.7)",
    ]


@pytest.mark.parametrize("bar", BARS)
def test_a_promise_that_was_not_measured_is_not_kept(bar: int, report: Report) -> None:
    checks = check_bars(replace(report, rows=(), sizes={}), [bar])

    assert [check.passed for check in checks] == [False]


def test_an_unknown_promise_is_refused(report: Report) -> None:
    with pytest.raises(BenchError, match="--bar 9: known are 1, 2, 3, 4, 5"):
        check_bars(report, [9])
