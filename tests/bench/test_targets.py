"""A promise that is kept passes, one that is broken or was not measured fails."""

from __future__ import annotations

from dataclasses import replace

import pytest

from embedge.bench import Report
from embedge.bench.errors import BenchError
from embedge.bench.options import FULL
from embedge.bench.targets import TARGETS, check_targets, profile_for


def test_kept_promises_pass(report: Report) -> None:
    found = check_targets(report, [2, 3, 4, 5])

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

    lines = [check.line() for check in check_targets(broken, [4]) if not check.passed]

    assert lines == [
        "FAIL  target 4  search 32x32 times ORT's best int8: 0.97 (wanted at least 0.98)",
        "FAIL  target 4  search 32x32 times torch fp32: 2.69 (wanted at least 2.7)",
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_a_promise_that_was_not_measured_is_not_kept(target: int, report: Report) -> None:
    checks = check_targets(replace(report, rows=(), sizes={}), [target])

    assert [check.passed for check in checks] == [False]


def test_an_unknown_promise_is_refused(report: Report) -> None:
    with pytest.raises(BenchError, match="--target 9: known are 1, 2, 3, 4, 5"):
        check_targets(report, [9])
    with pytest.raises(BenchError, match="--target 9: known are 1, 2, 3, 4, 5"):
        profile_for([9], FULL)


def test_a_promise_measures_no_more_than_it_needs() -> None:
    speed, closeness, size = (profile_for([number], FULL) for number in (4, 2, 5))

    assert (speed.latency_tasks, speed.others, speed.eval_sets) == (None, True, 0)
    assert (closeness.latency_tasks, closeness.others, closeness.eval_sets) == (0, False, None)
    assert (closeness.texts, size.texts) == (FULL.texts, 64)
    assert speed.process_repeats == closeness.process_repeats == 0
