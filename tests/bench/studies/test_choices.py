"""The study draws limits from a report, chooses, and measures each choice again as the report was measured."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embedge.bench import BenchOptions, Report, run, run_bench
from embedge.bench.measure import latency
from embedge.bench.options import Profile, Shape
from embedge.bench.report.choose import LIMITS, candidates
from embedge.bench.report.write import report_json
from embedge.bench.studies import choices
from embedge.export import export_bundle

pytestmark = pytest.mark.slow
SMALL = Profile(
    texts=12, rows=None, rounds=1, singles=5, invariance=0, process_repeats=1, torch_quality=False,
    others=False, single_rounds=2,
)  # fmt: skip


def process_figures(job: Mapping[str, Any], repeats: int) -> dict[str, Any]:
    """What children would say; their times and memory are another test's."""
    peak = {"fp32": 2e8, "int8": 1e8}[job["precision"]] if "precision" in job else 3e8
    memory = {"after_first_task": {"peak": peak}, "after_batches": {"peak": peak}}
    times = {"imported_ms": 1.0, "first_vector_ms": 2.0, "first_vector_longest_ms": 2.0}
    return {**times, **memory, "after_first_vector": {}}


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    options: dict[str, Any] = {"precisions": ["fp32", "int8"], "calibration": "none"}
    return export_bundle(model, adapters={"search": None}, out=out, **options)


@pytest.fixture(scope="module")
def measured(bundle: Path, model: Path) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure_process", process_figures)
        return run_bench(
            BenchOptions(
                bundle=bundle,
                reference=model,
                threads=1,
                profile=SMALL,
                shapes=[Shape(batch=2, tokens=8)],
            )
        )


def test_texts_and_rounds_are_those_of_the_report(
    measured: Report, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "measure_process", process_figures)
    timed: list[tuple[int, int]] = []

    def one_by_one(runs: Any, items: Any, rounds: int, skip: int = 0) -> Any:
        timed.append((len(items), rounds))
        return original(runs, items, rounds, skip)

    original = latency.one_by_one
    monkeypatch.setattr(choices, "one_by_one", one_by_one)
    found = candidates([measured], None, "text")
    chosen = next(c for c in found if c.precision == "int8")

    again = choices.measure_again(chosen, bundle, measured, {})

    assert timed == [(5, 2)]
    assert set(again) == {"disk", "start", "latency", "throughput", "index", "memory"}
    assert (again["memory"], again["index"]) == (1e8, chosen.index)
    assert chosen.disk is not None
    assert 0.9 * chosen.disk < again["disk"] <= chosen.disk  # a part's manifest is shorter
    bounds = choices.random_bounds(measured, random.Random(0), None)
    assert set(bounds) <= {limit.figure for limit in LIMITS}


@pytest.mark.parametrize(("again", "status"), [(5.0, 1), (3.0, 0)])
def test_a_broken_limit_is_told_with_the_load(
    again: float,
    status: int,
    measured: Report,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "report.json"
    fast = {"p50_ms": 1.0, "p95_ms": 2.0, "p95_slow_ms": 3.0}
    rows = tuple(replace(row, single=fast) for row in measured.rows)
    idle = measured.machine | {"load_1_min": -9.0}
    file.write_text(report_json(replace(measured, rows=rows, machine=idle)), encoding="utf-8")
    monkeypatch.setattr(choices, "measure_again", lambda *_: {"latency": again})
    monkeypatch.setattr(choices, "random_bounds", lambda *_: {"latency": 4.0})

    assert choices.main([str(bundle), str(file), "--sets", "1"]) == status

    out = capsys.readouterr().out
    assert ("BROKEN" in out) == bool(status)
    assert "busier than the report's -9.0" in out
    assert f"{1 - status} of 1 choices keep their limits" in out
