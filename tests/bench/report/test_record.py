"""Figures go into manifest and card in one step each, and twice is the same as once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from embedge.bench import Report
from embedge.bench.errors import BenchError
from embedge.bench.report.record import record
from embedge.runtime.bundle.model_card import BENCH_END as END
from embedge.runtime.bundle.model_card import BENCH_START as START

MANIFEST = {
    "format_version": "1.0",
    "precisions": {"int8": {"graphs": {"search": "int8/search.onnx"}, "fidelity": {}}},
    "files": {},
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST, indent=2) + "\n")
    (tmp_path / "README.md").write_text(f"# Card\n\n{START}\nold\n{END}\n\nThe end.\n")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_figures_are_in_the_manifest_by_precision_and_task(report: Report, bundle: Path) -> None:
    record(report, bundle)

    manifest = json.loads((bundle / "manifest.json").read_text())
    figures = manifest["precisions"]["int8"]["fidelity"]["search"]
    assert list(manifest) == list(MANIFEST)
    assert figures["dims"]["32"]["cosine_mean"] == 0.9995
    assert figures["quality"]["held-out"]["32"]["difference"] == -0.001
    assert figures["texts"] == 500


def test_the_table_stands_between_the_markers_and_the_rest_stays(
    report: Report, bundle: Path
) -> None:
    record(report, bundle)

    card = (bundle / "README.md").read_text()
    assert card.startswith(f"# Card\n\n{START}\n")
    assert card.endswith(f"{END}\n\nThe end.\n")
    assert "| search | embedge int8 |" in card
    assert "ORT" not in card  # a card is about the bundle, not about others
    assert "old" not in card


def test_recording_twice_leaves_the_same_bytes(report: Report, bundle: Path) -> None:
    record(report, bundle)
    once = contents(bundle)
    record(report, bundle)

    assert contents(bundle) == once


def test_a_card_without_markers_gains_a_section_once(report: Report, bundle: Path) -> None:
    (bundle / "README.md").write_text("# Card\n")

    record(report, bundle)
    record(report, bundle)

    card = (bundle / "README.md").read_text()
    assert card.startswith("# Card\n\n## Measured\n")
    assert (card.count(START), card.count("## Measured")) == (1, 1)


def test_a_card_with_one_marker_is_refused_before_anything_is_written(
    report: Report, bundle: Path
) -> None:
    (bundle / "README.md").write_text(f"# Card\n{START}\n")
    before = contents(bundle)

    with pytest.raises(BenchError, match="once each, in this order, found 1 and 0"):
        record(report, bundle)

    assert contents(bundle) == before


def test_a_report_of_another_bundle_is_refused(report: Report, bundle: Path) -> None:
    other = json.dumps(MANIFEST).replace("search", "code")
    (bundle / "manifest.json").write_text(other)

    with pytest.raises(BenchError, match="no int8 graph of search"):
        record(report, bundle)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    report: Report, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    before = contents(bundle)
    monkeypatch.setattr(os, "fsync", full_disk)

    with pytest.raises(BenchError, match="No space left.*free some space"):
        record(report, bundle)

    assert contents(bundle) == before
