"""A report survives JSON, its tables say what it holds, and the picture is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from embedge.bench import Report
from embedge.bench.errors import BenchError
from embedge.bench.report.tables import Table, comparison_table, main_table
from embedge.bench.report.write import markdown, write_report
from embedge.bench.targets import check_targets
from embedge.runtime.cli.table import table as text_table


def test_json_and_back_is_the_same_report(report: Report) -> None:
    again = Report.from_dict(json.loads(json.dumps(report.to_dict())))

    assert again == report
    assert next(iter(report.to_dict())) == "report_version"


def test_a_report_of_another_major_version_is_refused(report: Report) -> None:
    with pytest.raises(BenchError, match=r"expected 1\.2, found 2\.0"):
        Report.from_dict(report.to_dict() | {"report_version": "2.0"})


def test_keys_of_a_newer_minor_version_are_ignored(report: Report) -> None:
    newer = report.to_dict() | {"report_version": "1.9", "colour": "blue"}
    newer["rows"][0]["colour"] = "blue"

    assert Report.from_dict(newer) == report


def test_columns_of_a_table_are_aligned() -> None:
    table = Table(("task", "system", "MB"), (("a", "long name", "1.0"), ("b", "x", "100.0")))

    assert text_table([table.header, *table.rows], table.labels) == [
        "task  system        MB",
        "----  ---------  -----",
        "a     long name    1.0",
        "b     x          100.0",
    ]
    assert table.markdown().splitlines()[:2] == ["| task | system | MB |", "| --- | --- | ---: |"]


def test_a_line_holds_speed_and_quality_together(report: Report) -> None:
    cells = dict(zip(main_table(report.rows).header, main_table(report.rows).rows[2], strict=True))

    assert cells == {
        "task": "search",
        "system": "embedge int8",
        "MB": "23.0",
        "1 text p50/p95 ms": "2.5 / 4.0",
        "texts/s 32x32": "250",
        "x torch 32x32": "3.00",
        "x torch 32x128": "–",
        "cosine mean": "0.9995",
        "min": "0.9980",
        "top-10": "0.970",
        "quality": "80.00",
        "difference (95 % interval)": "-0.10 (-0.30 to +0.10)",
    }


def test_systems_stand_side_by_side_by_time_and_fidelity(report: Report) -> None:
    peer = report.rows[1]
    shapes = {"8x64": {"median_ms": 5.0, "times_as_fast_as": {"embedge int8": 0.8}}}
    table = comparison_table([replace(peer, shapes=shapes), report.rows[2]])

    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert cells["8x64 ms"] == "5.00"
    assert cells["8x64 / embedge int8"] == "1.25"
    assert [cells[name] for name in table.header[-4:]] == ["0.9995", "0.9980", "0.9990", "0.970"]
    assert dict(zip(table.header, table.rows[1], strict=True))["8x64 ms"] == "–"


def test_a_cosine_near_1_keeps_its_digits(report: Report) -> None:
    row = replace(report.rows[0], fidelity={"32": {"cosine_mean": 0.99999953, "cosine_min": 1.0}})

    assert main_table([row]).rows[0][7:9] == ("0.9999995", "1.0000000")


@pytest.mark.slow
def test_files_for_tools_people_and_eyes_are_written(report: Report, tmp_path: Path) -> None:
    files = write_report(
        report, tmp_path / "new" / "folder", [c.line() for c in check_targets(report, [5])]
    )

    assert [file.name for file in files] == [
        "report.json",
        "report.md",
        "report.png",
        "report.html",
    ]
    assert Report.from_dict(json.loads(files[0].read_text())) == report
    assert "only a part was measured" in files[1].read_text()
    assert "- pass  target 5  int8, all tasks" in files[1].read_text()
    assert files[2].read_bytes().startswith(b"\x89PNG")
    assert not list(files[0].parent.glob(".*"))  # no temporary file stays


def test_a_report_without_latency_still_has_every_file(report: Report, tmp_path: Path) -> None:
    rows = tuple(replace(row, single={}, shapes={}, quality={}) for row in report.rows)

    files = write_report(replace(report, rows=rows, process={}), tmp_path)

    assert all(file.stat().st_size for file in files)
    assert "## Batch x tokens" not in markdown(replace(report, rows=rows))
