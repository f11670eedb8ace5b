"""How matmuls are split into tasks: the rule that the kernels have, and what the simulation says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from embedge.bench.studies import tasks
from embedge.bench.studies.tasks import IN_USE, RULES, Machine, Matmul, efficiency, split

LIBRARY = Path(__file__).parents[3] / "runtime" / "kernels" / "native" / "library.c"
ALONE = Machine(claim=0, wake=0, jitter=0)


def test_the_rule_in_use_is_that_of_the_kernels() -> None:
    found = re.search(
        r"enum \{ TASKS = (\d+), MIN_TASK_ROWS = (\d+), MIN_TASK_PRODUCTS = 1 << (\d+) \}",
        LIBRARY.read_text("utf-8"),
    )
    assert found is not None
    assert (int(found[1]), int(found[2]), 1 << int(found[3])) == IN_USE


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "matmul", [Matmul(1, 8, 1), Matmul(130, 384, 1000), Matmul(4096, 384, 384)]
)
def test_tasks_cover_the_product_once(rule: tasks.Rule, matmul: Matmul) -> None:
    found, blocks = split(matmul, rule)
    slabs = -(-matmul.columns // 48)
    assert sum(rows * slabs_of for rows, slabs_of in found) == matmul.rows * slabs
    assert len(found) % blocks == 0
    assert min(min(task) for task in found) > 0


def test_equal_tasks_that_cost_nothing_to_start_keep_all_threads_busy() -> None:
    matmul = Matmul(4096, 384, 64 * 48)
    assert efficiency(matmul, IN_USE, 64, ALONE) == pytest.approx(1)
    assert efficiency(matmul, IN_USE, 48, ALONE) == pytest.approx(512 / 48 / 11)
    assert efficiency(Matmul(512, 384, 48), tasks.Rule(1, 64), 4, ALONE) == pytest.approx(1 / 4)


@pytest.mark.parametrize(("threads", "least"), [(2, 0.97), (16, 0.94), (64, 1.0)])
def test_more_tasks_than_once_lose_little_on_few_threads_and_nothing_on_many(
    threads: int, least: float
) -> None:
    once = RULES[0]
    gains = [
        efficiency(matmul, IN_USE, threads, Machine())
        / efficiency(matmul, once, threads, Machine())
        for matmul in tasks.SHAPES.values()
    ]
    assert min(gains) > least - 0.01
    assert threads < 64 or max(gains) > 1.3


def test_the_command_prints_a_line_for_each_shape_and_number_of_threads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tasks.main(["--threads", "4", "8", "--jitter", "0"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.count("|") == 1 + len(RULES)
    assert len(lines) == 2 * len(tasks.SHAPES)
