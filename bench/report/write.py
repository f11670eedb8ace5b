"""Writes a report: ``report.json`` for tools, ``report.md``, ``report.html`` and ``report.png`` for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from embedge.bench.report.configurations import configurations
from embedge.bench.report.html_page import html_page, page_data
from embedge.bench.report.plot import plot
from embedge.bench.report.report import REPORT_VERSION, Report
from embedge.bench.report.tables import (
    alignment_table,
    budget_table,
    comparison_table,
    dimension_table,
    kind_table,
    main_table,
    page_table,
    process_table,
    shape_table,
)
from embedge.runtime.bundle.writing import replace_file

__all__ = ["HOW_TO_COMPARE", "HOW_TO_READ", "report_json", "write_joined", "write_report"]

HOW_TO_READ = """\
Each row is one system on one task, all measured in one run with the same threads on the same texts.
The yardstick is the unquantized model in torch fp32 with the adapter applied by PEFT, unmerged.
MB: graph and weights of that task (what tasks share is counted in each). 1 text: a text embedded
alone, tokenization included. texts/s and "x torch": token batches of batch x tokens, the ids given;
every system once a round in turn, ratios round by round, their median; a peer is timed up to its
hidden states, embedge and torch to the finished vector. cosine, top-10: against the yardstick.
quality: nDCG@10 or Spearman in points; difference to the yardstick with its paired bootstrap."""

HOW_TO_COMPARE = """\
ms: median of a batch of batch x tokens, the ids given; every system once a round, in an order drawn for
each round, after a pause. "/ embedge …": its time over embedge's in the same round, the median; below 1 it
is faster than embedge. A peer is timed up to its hidden states, embedge and torch to the finished vector.
Fidelity is to the unquantized model in torch fp32: cosine, rank correlation of the similarities of all
pairs of texts, and how many of the ten nearest texts are the same."""


HOW_TO_READ_PAGES = """\
nDCG in points, of page images that questions ask for; by one vector a page, and by one a token with MaxSim. A budget
is the pixels that larger pages are scaled down to; its quality is compared with the unquantized model's at the
source's own budget. One page is timed alone, from the bytes of its file to its vector."""

HOW_TO_READ_ALIGNMENT = """\
Mean cosines of texts and images that belong together and that do not; two texts match where an image matches both.
gap: the distance of the mean text and the mean image, both of vectors of length 1."""


def write_report(report: Report, out: Path, checks: Sequence[str] = ()) -> list[Path]:
    """Write the four files and return their paths.

    Args:
        report: the figures.
        out: a folder, made if needed.
        checks: a line for each check of a target.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"report.{ending}" for ending in ("json", "md", "png", "html")]
    replace_file(files[0], report_json(report))
    replace_file(files[1], markdown(report, checks))
    plot(report, files[2])
    replace_file(files[3], html_page([report]))
    return files


def write_joined(reports: Sequence[Report], out: Path) -> list[Path]:
    """Write ``report.json`` and ``report.html`` of several bundles together and return their paths.

    Args:
        reports: one of each bundle.
        out: a folder, made if needed.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"report.{ending}" for ending in ("json", "html")]
    document = {"report_version": REPORT_VERSION, **page_data(reports)}
    replace_file(files[0], json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    replace_file(files[1], html_page(reports))
    return files


def report_json(report: Report) -> str:
    """Return the text of ``report.json``: the report, and its configurations, which follow from it."""
    found = [one.to_dict() for one in configurations([report])]
    document = report.to_dict() | {"configurations": found}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def markdown(report: Report, checks: Sequence[str] = ()) -> str:
    """Return the whole report in Markdown."""
    machine = report.machine
    on_gpu = f"{machine['gpu']} beside " if "gpu" in machine else ""
    parts = [
        f"# {report.bundle}: what each precision costs and buys",
        f"{report.source.get('name')}, {on_gpu}{machine.get('processor')}, {machine.get('threads')} threads"
        f" ({', '.join(machine.get('instructions', []))}), load {machine.get('load_1_min')}. "
        + ", ".join(f"{name} {number}" for name, number in report.versions.items()),
        HOW_TO_READ,
        "![quality against latency](report.png)",
        main_table(report.rows).markdown(),
    ]
    if any(row.shapes for row in report.rows):
        parts += ["## Batch x tokens", shape_table(report.rows).markdown()]
        parts += ["## Side by side", HOW_TO_COMPARE, comparison_table(report.rows).markdown()]
    parts += ["## At every dimension", dimension_table(report.rows).markdown()]
    if any(row.images for row in report.rows):
        parts += ["## Page images", HOW_TO_READ_PAGES, page_table(report.rows).markdown()]
        parts += [budget_table(report.rows).markdown()]
        parts += ["## Texts beside images", HOW_TO_READ_ALIGNMENT]
        parts += [alignment_table(report.rows).markdown()]
    parts += ["## By kind of text: cosine mean / min", kind_table(report.rows).markdown()]
    if report.process:
        parts += [
            "## A process of its own",
            "Seconds from the start of Python, the files already in the system's cache; switching "
            "to another task whose graph is open, and one that has to be opened first "
            "(`max_sessions=1`); memory after the first vector, and the peak after a batch of 32 "
            "with every task.",
            process_table(report).markdown(),
        ]
    parts += ["## Bytes", _sizes(report)]
    if checks:
        parts += ["## Targets", "\n".join(f"- {check}" for check in checks)]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


def _sizes(report: Report) -> str:
    whole = report.sizes.get("fp32_weights") or 1
    lines = [f"- one fp32 backbone: {whole / 1e6:.1f} MB"]
    for precision, size in report.sizes.items():
        if precision != "fp32_weights":
            lines.append(
                f"- {precision}, all tasks: {size / 1e6:.1f} MB, {size / whole:.2f} of that"
            )
    return "\n".join(lines)
