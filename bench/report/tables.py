"""The report's tables, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from embedge.bench.report.report import Report, Row

__all__ = [
    "Table",
    "alignment_table",
    "budget_table",
    "comparison_table",
    "dimension_table",
    "kind_table",
    "main_table",
    "page_table",
    "process_table",
    "shape_table",
]

_MISSING = "–"
_COSINES = ("cosine_mean", "cosine_min", "pair_spearman")


@dataclass(frozen=True)
class Table:
    """A header and rows of cells; the first ``labels`` columns are text, the others figures."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 2

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rule = ["---"] * self.labels + ["---:"] * (len(self.header) - self.labels)
        lines = [self.header, rule, *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main_table(rows: Sequence[Row]) -> Table:
    """Return a line per task and system: bytes, speed, fidelity, quality."""
    header = (
        "task",
        "system",
        "MB",
        "1 text p50/p95 ms",
        "texts/s 32x32",
        "x torch 32x32",
        "x torch 32x128",
        "cosine mean",
        "min",
        "top-10",
        "quality",
        "difference (95 % interval)",
    )
    return Table(header, tuple(_main_row(row) for row in rows))


def _main_row(row: Row) -> tuple[str, ...]:
    single, fidelity, quality = row.single, row.full_fidelity, row.main_quality
    shape = row.shapes.get("32x32", {})
    return (
        row.task,
        row.system,
        _number(row.bytes_on_disk and row.bytes_on_disk / 1e6, 1),
        f"{single['p50_ms']:.1f} / {single['p95_ms']:.1f}" if single else _MISSING,
        _number(shape.get("texts_per_s"), 0),
        _number(shape.get("times_as_fast_as", {}).get("torch fp32"), 2),
        _number(row.shapes.get("32x128", {}).get("times_as_fast_as", {}).get("torch fp32"), 2),
        _cosine(fidelity.get("cosine_mean")),
        _cosine(fidelity.get("cosine_min")),
        _number(fidelity.get("top10_overlap"), 3),
        _points(quality.get("value")),
        interval(quality) if quality else _MISSING,
    )


def shape_table(rows: Sequence[Row]) -> Table:
    """Return median ms of each shape, and how many times as fast as torch fp32 it is."""
    timed = [row for row in rows if row.shapes]
    shapes = list(dict.fromkeys(shape for row in timed for shape in row.shapes))
    header = ["task", "system"]
    for shape in shapes:
        header += [f"{shape} ms", "p95", "x torch"]
    lines = []
    for row in timed:
        line = [row.task, row.system]
        for shape in shapes:
            figures = row.shapes.get(shape, {})
            line.append(_number(figures.get("median_ms"), 2))
            line.append(_number(figures.get("p95_ms"), 2))
            line.append(_number(figures.get("times_as_fast_as", {}).get("torch fp32"), 2))
        lines.append(tuple(line))
    return Table(tuple(header), tuple(lines))


def comparison_table(rows: Sequence[Row]) -> Table:
    """Return a line per system: median ms of each shape and how many times embedge's, fidelity.

    Embedge's is that of its int8, else of its first precision.
    """
    own = [row for row in rows if row.role == "embedge"]
    yardstick = next((row for row in own if row.precision == "int8"), own[0] if own else None)
    name = yardstick.system if yardstick else "embedge"
    shapes = list(dict.fromkeys(shape for row in rows for shape in row.shapes))
    header = ["task", "system", "MB"]
    for shape in shapes:
        header += [f"{shape} ms", f"{shape} / {name}"]
    lines = []
    for row in rows:
        line = [row.task, row.system, _number(row.bytes_on_disk and row.bytes_on_disk / 1e6, 1)]
        for shape in shapes:
            figures = row.shapes.get(shape, {})
            times = figures.get("times_as_fast_as", {}).get(name)
            line.append(_number(figures.get("median_ms"), 2))
            line.append(_number(1 / times if times else None, 2))
        fidelity = row.full_fidelity
        line += [_cosine(fidelity.get(key)) for key in _COSINES]
        lines.append((*line, _number(fidelity.get("top10_overlap"), 3)))
    return Table((*header, "cosine mean", "min", "pair Spearman", "top-10"), tuple(lines))


def dimension_table(rows: Sequence[Row]) -> Table:
    """Return fidelity and quality of the bundle's own graphs at every dimension."""
    header = (
        *("task", "system", "dim", "cosine mean", "min", "pair Spearman", "top-10"),
        *("measured on", "quality", "reference", "difference (95 % interval)"),
    )
    lines = []
    for row in rows:
        if row.role != "embedge":
            continue
        for dim, fidelity in row.fidelity.items():
            start = (
                row.task,
                row.system,
                dim,
                _cosine(fidelity["cosine_mean"]),
                _cosine(fidelity["cosine_min"]),
                _cosine(fidelity["pair_spearman"]),
                _number(fidelity["top10_overlap"], 3),
            )
            if not row.quality:
                lines.append((*start, _MISSING, _MISSING, _MISSING, _MISSING))
            for name, figures in row.quality.items():
                at = figures["dims"][dim]
                label = f"{name} ({figures['metric']}, {figures['items']})"
                values = (_points(at["value"]), _points(at["reference"]), interval(at))
                lines.append((*start, label, *values))
    return Table(header, tuple(lines))


def kind_table(rows: Sequence[Row]) -> Table:
    """Return cosine mean / min by kind of text."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.fidelity_by_kind))
    header = ("task", "system", *kinds)
    lines = []
    for row in rows:
        cells = []
        for kind in kinds:
            at = row.fidelity_by_kind.get(kind)
            cells.append(
                f"{_cosine(at['cosine_mean'])} / {_cosine(at['cosine_min'])}" if at else _MISSING
            )
        lines.append((row.task, row.system, *cells))
    return Table(header, tuple(lines))


def page_table(rows: Sequence[Row]) -> Table:
    """Return nDCG@5 and @10 of each set of pages, by one vector a page and by one a token."""
    header = (
        *("task", "system", "set", "vectors", "nDCG@5", "difference (95 % interval)"),
        *("nDCG@10", "difference (95 % interval)"),
    )
    lines = []
    for row in rows:
        for name, figures in _page_sets(row):
            full = max(figures["dims"], key=int)
            single = {"ndcg@5": figures["ndcg@5"][full], "ndcg@10": figures["dims"][full]}
            label = f"{name} ({figures['items']} queries, {figures['pages']} pages)"
            multi = figures.get("multi_vector")
            for kind, at in (("one a page", single), ("one a token", multi)):
                if at:
                    lines.append((row.task, row.system, label, kind, *_depths(at)))
    return Table(header, tuple(lines), labels=4)


def budget_table(rows: Sequence[Row]) -> Table:
    """Return what each image budget costs and keeps."""
    header = (
        *("task", "system", "max_pixels", "tokens", "1 page p50/p95 ms"),
        *("nDCG@5", "difference (95 % interval)", "nDCG@10", "difference (95 % interval)"),
    )
    lines = []
    for row in rows:
        for budget, at in row.images.items():
            times = f"{at['p50_ms']:.0f} / {at['p95_ms']:.0f}" if "p95_ms" in at else _MISSING
            tokens = _number(at.get("tokens"), 0)
            quality = _depths(at["quality"]) if "quality" in at else (_MISSING,) * 4
            lines.append((row.task, row.system, budget, tokens, times, *quality))
    return Table(header, tuple(lines))


def alignment_table(rows: Sequence[Row]) -> Table:
    """Return mean cosines of pairs within and across texts and images, and the gap; the reference's first."""
    keys = (
        *("matched", "mismatched", "texts_matched", "texts_mismatched"),
        *("images_matched", "images_mismatched", "gap"),
    )
    header = (
        *("task", "system", "set", "text and image, matched", "mismatched"),
        *("two texts, matched", "mismatched", "two images, matched", "mismatched", "gap"),
    )
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if row.role == "torch":
            continue
        for name, figures in _page_sets(row):
            found = figures["alignment"]
            before = (
                row.task,
                "unquantized",
                name,
                *(_number(found["reference"][k], 4) for k in keys),
            )
            if before not in lines:
                lines.append(before)
            formats = found.get("formats", {}).items()
            for system, at in (
                (row.system, found["value"]),
                *((f"{row.system}, {kind} vectors", its) for kind, its in formats),
            ):
                lines.append((row.task, system, name, *(_number(at[k], 4) for k in keys)))
    return Table(header, tuple(lines), labels=3)


def _page_sets(row: Row) -> list[tuple[str, dict[str, Any]]]:
    sets = row.quality.items()
    return [(name, at) for name, at in sets if at.get("modality") == "image"]


def _depths(at: dict[str, Any]) -> tuple[str, ...]:
    cells = ((_points(at[k]["value"]), interval(at[k])) for k in ("ndcg@5", "ndcg@10"))
    return tuple(cell for pair in cells for cell in pair)


def process_table(report: Report) -> Table:
    """Return cold start, task switch and memory by system."""
    header = (
        *("system", "import s", "first vector s", "switch ms (open)", "switch ms (closed)"),
        *("resident MB", "of it anonymous", "file-mapped", "peak after batches"),
    )
    lines = []
    for system, figures in report.process.items():
        first, later = figures.get("after_first_vector", {}), figures.get("after_batches", {})
        memory = [first.get(k) for k in ("resident", "anonymous", "file_mapped")]
        memory.append(later.get("peak"))
        lines.append(
            (
                system,
                _number(figures["imported_ms"] / 1000, 2),
                _number(figures["first_vector_ms"] / 1000, 2),
                _number(figures.get("switch_graph_open_ms"), 1),
                _number(figures.get("switch_graph_closed_ms"), 1),
                *(_number(size and size / 1e6, 0) for size in memory),
            )
        )
    return Table(header, tuple(lines), labels=1)


def interval(figures: dict[str, float]) -> str:
    """Return a difference in points with its interval: ``-0.05 (-0.12 to +0.02)``."""
    difference, low, high = (figures[key] * 100 for key in ("difference", "low", "high"))
    return f"{difference:+.2f} ({low:+.2f} to {high:+.2f})"


def _number(value: float | None, digits: int) -> str:
    return _MISSING if value is None else f"{value:.{digits}f}"


def _points(value: float | None) -> str:
    return _MISSING if value is None else f"{value * 100:.2f}"


def _cosine(value: float | None) -> str:
    """Return enough digits to tell from 1: ``0.9987``, ``0.99995``, ``0.9999999``."""
    if value is None:
        return _MISSING
    for digits in (4, 5, 6, 7):
        if value < 1 - 10**-digits:
            return f"{value:.{digits}f}"
    return f"{value:.7f}"
