"""What is chosen meets every limit with its margin; where nothing does, the nearest is named with what it lacks."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embedge.bench import Report
from embedge.bench.errors import BenchArgumentError
from embedge.bench.report.choose import LIMITS, MARGINS, choose
from embedge.bench.report.configurations import configurations, index_bytes
from embedge.bench.report.write import report_json
from embedge.export import export_bundle
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.cli import choose as command
from embedge.runtime.cli.main import main
from tests.bench.conftest import example_row

# By precision: share of the reference's quality, p95 in ms, megabytes on disk, peak of memory in MB.
PRECISIONS = {
    "fp32": (1.0, 20.0, 90, 200),
    "int8": (0.99, 5.0, 23, 120),
    "int4": (0.96, 4.0, 14, 100),
}
CUT = {64: 1.0, 32: 0.98, 16: 0.9}  # share that a dimension keeps


def measured(task: str, precision: str, **changes: Any) -> Any:
    share, p95, megabytes, _ = PRECISIONS[precision]
    dims = {}
    for dim, kept in CUT.items():
        value = 0.8 * share * kept
        lost = value - 0.8
        ends = {"low": lost - 0.002 * (lost != 0), "high": lost + 0.002}
        dims[str(dim)] = {"value": value, "reference": 0.8, "difference": lost, **ends}
    values: dict[str, Any] = {
        "precision": precision,
        "bytes_on_disk": megabytes * 1_000_000,
        "single": {"p50_ms": p95 / 2, "p95_ms": p95, "texts": 10},
        "shapes": {"32x128": {"median_ms": 10 * p95, "p95_ms": 16 * p95, "rounds": 3}},
        "fidelity": {str(dim): {"cosine_mean": 1.0} for dim in CUT},
        "quality": {
            "held-out": {
                "metric": "ndcg@10",
                "items": 50,
                "dims": dims,
                "formats": {"float32": dims},
            }
        },
    }
    return example_row(f"embedge {precision}", "embedge", task, **values | changes)


@pytest.fixture
def whole(report: Report) -> Report:
    """Two tasks at three precisions, of which the second was not timed."""
    rows = [measured("search", precision) for precision in PRECISIONS]
    rows += [measured("code", precision, single={}, shapes={}) for precision in PRECISIONS]
    process = {
        f"embedge {name}": {
            "first_vector_ms": 300.0,
            "first_vector_longest_ms": 400.0,
            "after_first_task": {"peak": peak * 1_000_000},
            "after_batches": {"peak": 2 * peak * 1_000_000},
        }
        for name, (_, _, _, peak) in PRECISIONS.items()
    }
    sizes = {name: 2 * megabytes * 1_000_000 for name, (_, _, megabytes, _) in PRECISIONS.items()}
    settings = {"texts": 500, "common_bytes": 1_000_000, "device": "cpu"}
    return replace(report, rows=tuple(rows), process=process, sizes=sizes, settings=settings)


@pytest.mark.parametrize(
    ("bounds", "options", "expected"),
    [
        ({"memory": 1e9}, {}, ("fp32", 64)),
        ({"latency": 10.0}, {}, ("int8", 64)),
        ({"latency": 5.4}, {}, ("int4", 64)),  # 5 ms and the margin are 5.5
        ({"quality": 0.98}, {}, ("int8", 64)),  # the fastest of those
        ({"quality": 0.98}, {"prefer": "quality"}, ("fp32", 64)),
        ({"disk": 50e6}, {}, ("int8", 64)),  # both tasks: 46 MB and 1 MB of the tokenizer
        ({"disk": 46.5e6}, {}, ("int4", 64)),
        ({"disk": 24e6}, {"tasks": ["code"]}, ("int8", 64)),
        ({"memory": 230e6}, {}, ("int4", 64)),  # both tasks: twice the peak
        ({"memory": 230e6}, {"tasks": ["search"]}, ("fp32", 64)),
        ({"index": 128e6}, {}, ("fp32", 32)),
        (
            {"throughput": 350.0},
            {},
            ("int8", 64),
        ),  # 32 texts in 80 ms, less the margin: 363 a second
    ],
)
def test_the_best_that_meets_the_limits_is_chosen(
    bounds: dict[str, float], options: dict[str, Any], expected: tuple[str, int], whole: Report
) -> None:
    chosen = choose([whole], bounds, **options).candidate

    assert chosen is not None
    assert (chosen.precision, chosen.dim) == expected


def test_random_limits_are_all_met_with_their_margin_or_nothing_meets_them(whole: Report) -> None:
    generator = random.Random(0)
    ranges = {"memory": (5e7, 5e8), "latency": (1, 30), "quality": (0.8, 1), "index": (3e7, 3e8)}
    answered = 0
    for _ in range(200):
        some = generator.sample(sorted(ranges), generator.randint(1, 4))
        bounds = {figure: generator.uniform(*ranges[figure]) for figure in some}
        choice = choose([whole], bounds)
        if choice.candidate is None:
            assert choice.missed
            continue
        answered += 1
        worse = {"memory": 1.03, "latency": 1.1}
        for figure, bound in bounds.items():
            value = getattr(choice.candidate, figure) * worse.get(figure, 1)
            assert value >= bound if figure == "quality" else value <= bound
    assert answered > 20


def test_a_limit_that_nothing_meets_is_named_with_the_nearest(whole: Report) -> None:
    choice = choose([whole], {"memory": 50e6, "latency": 50.0}, tasks=["search"])

    assert choice.candidate is None
    assert choice.missed == (
        "nothing meets --max-memory 50 MB: the nearest is int4, 64 dimensions of tiny-bundle with 103 MB, of that "
        "3 % margin, 53 MB more than that",
    )


def test_limits_that_exclude_each_other_are_each_named_with_the_nearest(whole: Report) -> None:
    choice = choose([whole], {"quality": 0.98, "latency": 5.0}, tasks=["search"])

    assert choice.missed == (
        "with the other limits kept nothing meets --min-quality 98.00 %: the nearest is int4, 64 dimensions of "
        "tiny-bundle with 95.75 %, 2.25 % less than that",
        "with the other limits kept nothing meets --max-latency 5 ms: the nearest is int8, 64 dimensions of "
        "tiny-bundle with 5.5 ms, of that 10 % margin, 0.5 ms more than that",
    )


def test_what_was_not_measured_meets_no_limit(whole: Report) -> None:
    choice = choose([replace(whole, process={})], {"memory": 1e12})

    assert choice.candidate is None
    assert "peak memory was not measured; run `embedge bench`" in choice.missed[0]


def test_an_unknown_task_and_no_limit_are_refused(whole: Report) -> None:
    with pytest.raises(BenchArgumentError, match="--task poetry: not in the report"):
        choose([whole], {"memory": 1e9}, tasks=["poetry"])
    with pytest.raises(BenchArgumentError, match="choose needs a limit; expected one of --min-q"):
        choose([whole], {})


def test_reports_of_other_machines_or_of_one_name_are_refused(whole: Report) -> None:
    other = replace(whole, bundle="other", machine=whole.machine | {"gpu": "a GPU"})
    with pytest.raises(
        BenchArgumentError, match="of different machines cannot be compared: .*a GPU"
    ):
        choose([whole, other], {"memory": 1e9})
    with pytest.raises(BenchArgumentError, match="tiny-bundle: two reports are of bundles of this"):
        choose([whole, whole], {"memory": 1e9})


def test_a_front_holds_what_no_other_beats(whole: Report) -> None:
    front = [c for c in configurations([whole]) if c.pareto and c.task == "search"]

    # Each precision is better than the others in quality or in cost, each dimension in the index.
    assert len(front) == 9
    slower = replace(whole.rows[1], single={"p50_ms": 30.0, "p95_ms": 60.0}, bytes_on_disk=10**9)
    without = configurations([replace(whole, rows=(whole.rows[0], slower))])
    assert {c.precision for c in without if c.pareto} == {"fp32", "int8"}  # int8 has less memory
    dearer = {"embedge int8": whole.process["embedge fp32"]} | {
        name: figures for name, figures in whole.process.items() if name != "embedge int8"
    }
    beaten = configurations([replace(whole, rows=(whole.rows[0], slower), process=dearer)])
    assert {c.precision for c in beaten if c.pareto} == {"fp32"}


@pytest.mark.parametrize(
    ("dim", "output_format", "expected"),
    [
        (384, "float32", 1536e6),
        (384, "float16", 768e6),
        (384, "int8", 384e6),
        (20, "binary", 3e6),  # whole bytes
        (384, "binary+int8", 432e6),
    ],
)
def test_bytes_of_a_million_vectors(dim: int, output_format: str, expected: float) -> None:
    assert index_bytes(dim, output_format) == expected


def run(*arguments: str) -> int:
    return main(["choose", *arguments])


@pytest.fixture
def bundle(model: Path, tmp_path: Path) -> Path:
    """A bundle of one bare task."""
    out = tmp_path / "some" / "measured-bundle"
    return export_bundle(
        model, adapters={"code": None}, precisions=["fp32"], out=out, calibration="none"
    )


@pytest.fixture
def file(whole: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A report of this machine."""
    monkeypatch.setattr(command, "processor_name", lambda: "a processor")
    monkeypatch.setattr(command, "available_cores", lambda: 2)
    file = tmp_path / "report.json"
    file.write_text(report_json(whole), encoding="utf-8")
    return file


def test_the_command_prints_what_prepares_and_runs_it(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ("--max-latency", "10ms", "--min-quality", "0.9", "--max-index", "130MB")
    assert run(str(file), *limits, "--task", "code") == 0

    printed = capsys.readouterr().out
    assert printed.startswith("int4, 32 dimensions: best latency of the ")
    lines = [line.strip() for line in printed.splitlines()]
    assert "embedge subset tiny-bundle tiny-bundle-chosen --precision int4 --task code" in lines
    assert (
        "model = Embedder('tiny-bundle-chosen', precision='int4', threads=2, task='code')" in lines
    )
    assert "documents = model.encode_document(texts, truncate_dim=32)" in lines
    assert "queries = model.encode_query(questions, truncate_dim=32)" in lines
    assert "another machine" not in printed
    assert (
        "prepare it, where the folder tiny-bundle lies, of which `embedge inspect` shows" in printed
    )


@pytest.mark.slow
def test_the_folder_that_was_measured_is_found_beside_its_report_by_its_files(
    whole: Report, file: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = Manifest.from_dict(json.loads((bundle / "manifest.json").read_text())).files_sha256
    settings = whole.settings | {"files_sha256": digest}
    text = report_json(replace(whole, bundle=bundle.name, settings=settings))
    beside = bundle.parent / "bench-report" / "report.json"
    beside.parent.mkdir(exist_ok=True)
    beside.write_text(text, encoding="utf-8")

    assert run(str(beside), "--max-memory", "1GB", "--task", "code") == 0

    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "prepare it:" in lines
    assert str(bundle.parent) not in text
    assert any(line.startswith(f"embedge subset {bundle} ") for line in lines)

    beside.write_text(text.replace(digest, "0" * 64), encoding="utf-8")  # of other files
    assert run(str(beside), "--max-memory", "1GB", "--task", "code") == 0
    assert f"where the folder {bundle.name} lies, of which" in capsys.readouterr().out


def test_margins_stand_where_they_are_told(whole: Report) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    guide = Path("docs/guides/measuring.md").read_text("utf-8")
    for kind, shown in (("time", "10 % of times"), ("memory", "3 % of")):
        assert f"{(MARGINS[kind] - 1) * 100:.0f} %" == shown[: shown.index("%") + 1]
        assert shown in str(parser.description)
    assert "and 10 %" in guide
    assert "and 3 %" in guide
    assert {limit.margin for limit in LIMITS} == {1.0, *MARGINS.values()}


def test_a_limit_on_latency_is_compared_with_the_slowest_times(whole: Report) -> None:
    single = {"p50_ms": 1.0, "p95_ms": 2.0, "p95_slow_ms": 9.0, "texts": 10}
    rows = tuple(replace(row, single=single) for row in whole.rows)

    assert choose([replace(whole, rows=rows)], {"latency": 9.8}).candidate is None
    chosen = choose([replace(whole, rows=rows)], {"latency": 10.0}).candidate
    assert chosen is not None
    assert chosen.latency == 9.0


@pytest.mark.parametrize(
    ("output_format", "expected"),
    [
        ("binary", "queries = model.encode_query(questions, output_format='binary')"),
        ("int8", "documents = model.encode_document(texts, output_format='int8')"),
        ("int8", "embedge ranges tiny-bundle-chosen --texts FILE"),
        (
            "binary+int8",
            "rows, scores = search_binary(queries, binary, int8, ranges=ranges, top_k=10, "
            "similarity=model.similarity_fn_name)",
        ),
    ],
)  # fmt: skip
def test_what_runs_a_stored_format_is_printed(
    output_format: str, expected: str, whole: Report, file: Path, capsys: Any
) -> None:
    rows = []
    for row in whole.rows:
        its = dict(row.quality["held-out"])
        its["formats"] = {output_format: its["dims"]}
        rows.append(replace(row, quality={"held-out": its}))
    file.write_text(report_json(replace(whole, rows=tuple(rows))), encoding="utf-8")

    assert run(str(file), "--max-memory", "1GB", "--task", "code") == 0

    assert expected in [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_the_command_says_what_nothing_meets_and_fails(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(file), "--max-memory", "1MB") == 1
    assert "- nothing meets --max-memory 1 MB: the nearest is int4" in capsys.readouterr().out


def test_the_command_says_that_a_report_is_of_another_machine(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "processor_name", lambda: "another processor")
    assert run(str(file), "--max-memory", "1GB", "--json") == 0

    document = json.loads(capsys.readouterr().out)
    assert document["chosen"]["precision"] == "fp32"
    assert document["notes"][0].startswith(
        "times and memory are of another machine, a processor; this one is another processor"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-latency", "50"], "--max-latency '50': expected a time above 0 with ms or s"),
        (["--min-quality", "99"], "--min-quality '99': expected a share such as 0.99, above 0"),
        (["--max-memory", "much"], "--max-memory 'much': expected a number of bytes"),
        ([], "choose needs a limit"),
    ],
)
def test_a_limit_that_is_none_is_refused(
    arguments: list[str], message: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(file), *arguments) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "some.json"
    bad.write_text('{"a": 1}')

    assert run(str(bad), "--max-memory", "1GB") == 1
    assert "found JSON without report_version" in capsys.readouterr().err
    assert run(str(tmp_path / "none"), "--max-memory", "1GB") == 1
    assert "does not exist; expected a report.json of `embedge bench`" in capsys.readouterr().err


def test_every_limit_has_an_option() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = {name for action in parser._actions for name in action.option_strings}

    assert {limit.option for limit in LIMITS} <= options
