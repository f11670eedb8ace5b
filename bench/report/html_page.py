"""The report as one HTML file: no network, and every figure in the JSON that it holds.

page/page.html   the frame; its script makes the tables and the chart from the JSON
page/style.css   light and dark, wide and narrow
page/script.js   filters, limits, sorting, chart
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from embedge.bench.report.choose import MARGINS, modality_of
from embedge.bench.report.configurations import configurations
from embedge.bench.report.report import Report

__all__ = ["html_page", "page_data"]

_FOLDER = Path(__file__).with_name("page")
# What could end the element that holds the JSON, or begin another in it.
_ESCAPES = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}


def page_data(reports: Sequence[Report]) -> dict[str, Any]:
    """Return what the page holds: ``reports``, ``configurations`` of all of them, the ``margins`` of limits, and
    the ``modality`` that is shown first.
    """
    return {
        "modality": modality_of(reports),
        "margins": MARGINS,
        "reports": [report.to_dict() for report in reports],
        "configurations": [found.to_dict() for found in configurations(reports)],
    }


def html_page(reports: Sequence[Report]) -> str:
    """Return the page of some reports, UTF-8 HTML without a reference to another file."""
    names = ", ".join(report.bundle for report in reports)
    data = json.dumps(_finite(page_data(reports)), ensure_ascii=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        data = data.replace(character, escape)
    return Template(_part("page.html")).substitute(
        title=html.escape(f"{names}: what each configuration costs and keeps"),
        style=_part("style.css"),
        script=_part("script.js"),
        data=data,
        time=f"{(MARGINS['time'] - 1) * 100:.0f}",
        memory=f"{(MARGINS['memory'] - 1) * 100:.0f}",
    )


def _finite(value: Any) -> Any:
    """Return a document with ``None`` for numbers that JSON does not have: a browser reads no NaN."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _part(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
