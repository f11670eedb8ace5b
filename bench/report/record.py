"""Writes a report's figures into the bundle it measured: the manifest and the model card.

    manifest.json   precisions.<p>.fidelity.<task>
    README.md       the table between the two markers; at the end, with the markers, if they lack
    report.json     the whole report, which `embedge choose` reads

Each file is replaced in one step, and the same report twice leaves the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedge.bench.errors import BenchError
from embedge.bench.report.report import Report, Row
from embedge.bench.report.tables import main_table
from embedge.bench.report.write import report_json
from embedge.runtime.bundle.contract import REPORT
from embedge.runtime.bundle.json_object import json_text
from embedge.runtime.bundle.model_card import BENCH_END, BENCH_START
from embedge.runtime.bundle.writing import replace_file

__all__ = ["record"]


def record(report: Report, bundle: Path) -> None:
    """Write the figures into the bundle.

    Args:
        report: of this bundle.
        bundle: its folder.

    Raises:
        BenchError: the manifest is not that of the report, or the card has one marker of two, or they
            cannot be written.
    """
    manifest_file, card_file = bundle / "manifest.json", bundle / "README.md"
    manifest = _with_figures(json.loads(manifest_file.read_text(encoding="utf-8")), report)
    card = card_file.read_text(encoding="utf-8") if card_file.exists() else ""
    card = _with_table(card, _card_section(report))  # before anything is written
    try:
        replace_file(manifest_file, json_text(manifest))
        replace_file(card_file, card)
        replace_file(bundle / REPORT, report_json(report))
    except OSError as error:
        raise BenchError(
            f"{bundle}: the figures could not be recorded: {error.strerror or error}; free some space "
            "or make the folder writable, and run the bench again"
        ) from error


def _with_figures(manifest: dict[str, Any], report: Report) -> dict[str, Any]:
    for row in report.rows:
        if row.precision is None:
            continue
        precision = manifest.get("precisions", {}).get(row.precision)
        if precision is None or row.task not in precision["graphs"]:
            raise BenchError(
                f"the bundle has no {row.precision} graph of {row.task}, which the report "
                "measured; run the bench on this bundle"
            )
        precision.setdefault("fidelity", {})[row.task] = _figures(row, report)
    return manifest


def _figures(row: Row, report: Report) -> dict[str, Any]:
    quality = {
        name: {
            "metric": figures["metric"],
            "items": figures["items"],
            **{dim: _rounded(at) for dim, at in figures["dims"].items()},
        }
        for name, figures in row.quality.items()
    }
    return {
        "reference": "torch fp32, adapter applied by PEFT, unmerged",
        "texts": report.settings.get("texts"),
        "dims": {dim: _rounded(at) for dim, at in row.fidelity.items()},
        "quality": quality,
    }


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 7) for name, value in figures.items()}


def _card_section(report: Report) -> str:
    rows = [row for row in report.rows if row.role in ("embedge", "torch")]
    machine = report.machine
    texts = [
        "Measured against the unquantized model in torch fp32, its adapter applied by PEFT: "
        f"{report.settings.get('texts')} texts, {machine.get('threads')} threads of "
        f"{machine.get('gpu') or machine.get('processor')}. Quality is nDCG@10 or Spearman in points.",
        main_table(rows).markdown(),
    ]
    if report.notes:
        texts.append("\n".join(f"- {note}" for note in report.notes))
    return "\n\n".join(texts)


def _with_table(card: str, section: str) -> str:
    block = f"{BENCH_START}\n\n{section}\n\n{BENCH_END}"
    counts = (card.count(BENCH_START), card.count(BENCH_END))
    if counts == (0, 0):
        return f"{card.rstrip()}\n\n## Measured\n\n{block}\n".lstrip()
    start, end = card.find(BENCH_START), card.find(BENCH_END)
    if counts != (1, 1) or end < start:
        raise BenchError(
            f"README.md of the bundle: expected {BENCH_START} and {BENCH_END} once each, in this order, found "
            f"{counts[0]} and {counts[1]}; restore or remove both"
        )
    return card[:start] + block + card[end + len(BENCH_END) :]
