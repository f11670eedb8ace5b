"""The study of where a pass's time goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from embedge.bench.options import Shape
from embedge.bench.studies.operators import main, times_by_operator
from embedge.export import export_bundle
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.sessions import session as sessions


@pytest.fixture(scope="module")
def tiny_bundle(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("operators") / "bundle"
    return export_bundle(
        make_model(),
        adapters={"plain": None},
        precisions=["fp32", "int8"],
        calibration="none",
        out=out,
    )


@pytest.mark.parametrize(
    ("precision", "product"), [("fp32", "MatMul"), ("int8", "MatMulIntegerToFloat")]
)
def test_each_kind_of_node_has_a_time(precision: str, product: str, tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    task = next(iter(bundle.manifest.tasks))
    times = times_by_operator(bundle, precision, task, Shape(batch=2, tokens=8), threads=1, runs=3)
    assert any(name.startswith(product) for name in times)
    assert all(time > 0 for time in times.values()), times


def test_a_shared_graph_has_its_tasks_tensors(model: Path, adapter: Path, tmp_path: Path) -> None:
    out = export_bundle(
        model,
        adapters={"search": adapter},
        precisions=["int8"],
        calibration="none",
        layout="shared",
        out=tmp_path / "bundle",
    )
    times = times_by_operator(
        Bundle(out), "int8", "search", Shape(batch=2, tokens=8), threads=1, runs=2
    )
    assert any(name.startswith("MatMulIntegerToFloat") for name in times)


def test_sessions_of_later_have_no_profiler(tiny_bundle: Path) -> None:
    options_of = sessions.new_options
    main([str(tiny_bundle), "--precision", "int8", "--shapes", "1x4", "--runs", "1"])
    assert sessions.new_options is options_of
    assert not sessions.new_options(threads=1, exact=False).enable_profiling


def test_it_prints_a_share_of_products(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tiny_bundle), "--precision", "fp32", "int8", "--shapes", "1x4", "2x4", "--runs", "2"])
    printed = capsys.readouterr().out
    for title in ("fp32, ", "int8, "):
        assert printed.count(title) == 2
    assert printed.count("between nodes") == printed.count("products ") == 4


@pytest.mark.parametrize("wrong", [["--precision", "int3"], ["--task", "other"]])
def test_what_the_bundle_lacks_is_named(
    wrong: list[str], tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_bundle), *wrong]) == 1
    assert wrong[1] in capsys.readouterr().err
