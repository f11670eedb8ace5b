"""The points of the trade-off: each way to run a bundle, what it costs and how much of the quality it keeps.

Rules:
    * Quality is that of the task's main labelled set. Its share is of the reference's at its full dimension in
      float32; the share's ends are those of the difference's 95 % interval.
    * Costs are what a limit is compared with: the 95th percentile of single texts, each by its slowest time, the
      throughput of the slower batches, the peak of memory, the longest start.
    * What takes images has points of texts and points of pages, each by the main set of its kind. A page's latency
      is of one page, its budget ``max_pixels``; other budgets than the source's are at the full dimension, float32.
    * A task that was not timed has the times of the first that was: its graph differs in its numbers alone.
    * A point lies on the Pareto front of its task and modality if no other is as good in everything and better in
      something.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from embedge.bench.report.report import Report, Row

__all__ = ["COSTS", "FLOAT32", "Configuration", "configurations", "index_bytes"]

FLOAT32 = "float32"
# What is spent, less is better; also the axes of the Pareto front beside the quality's share.
COSTS = ("latency_p95_ms", "memory_bytes", "disk_bytes", "index_bytes")
_MILLION = 1_000_000
_BITS = {FLOAT32: 32, "float16": 16, "int8": 8, "binary": 1, "binary+int8": 9}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to run one task, with its figures; ``None`` where something was not measured.

    Attributes:
        bundle: the folder's name.
        layout: ``"merged"`` or ``"shared"``.
        task: of the bundle.
        precision: of the graph.
        dim: to which vectors are cut.
        output_format: of the stored vectors.
        modality: what is embedded and searched, ``"text"`` or ``"image"``.
        max_pixels: to which pages are scaled down, ``None`` for texts.
        page_tokens: mean tokens of a page, ``None`` for texts.
        quality_set: name of the labelled set.
        metric: ``"ndcg@10"`` or ``"spearman"``.
        quality: value on the set, 0…1.
        reference: the unquantized model's value at its full dimension, as float32.
        share: of the reference's quality.
        share_low: lower end of its 95 % interval.
        share_high: upper end.
        latency_p50_ms: median of single texts or pages, milliseconds.
        latency_p95_ms: their 95th percentile.
        latency_slow_ms: that of the slowest time of each, with which a limit is compared.
        texts_per_s: of batches of :attr:`throughput_shape`, by the 95th percentile of their times.
        throughput_shape: texts x tokens.
        timed_on: the task whose times these are.
        cold_start_ms: from the start of Python to the first vector, the longest of the repeats.
        memory_bytes: peak of a process that embeds a text and a batch with this task alone.
        all_tasks_memory_bytes: peak of a process that does so with every task.
        disk_bytes: graph, weights, table of layers, tokenizer, manifest and card of this task alone.
        all_tasks_disk_bytes: those of all tasks at this precision.
        index_bytes: vectors of a million texts or pages.
        pareto: whether it lies on its task's front.
    """

    bundle: str
    layout: str
    task: str
    precision: str
    dim: int
    output_format: str = FLOAT32
    modality: str = "text"
    max_pixels: int | None = None
    page_tokens: float | None = None
    quality_set: str | None = None
    metric: str | None = None
    quality: float | None = None
    reference: float | None = None
    share: float | None = None
    share_low: float | None = None
    share_high: float | None = None
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    latency_slow_ms: float | None = None
    texts_per_s: float | None = None
    throughput_shape: str | None = None
    timed_on: str | None = None
    cold_start_ms: float | None = None
    memory_bytes: int | None = None
    all_tasks_memory_bytes: int | None = None
    disk_bytes: int | None = None
    all_tasks_disk_bytes: int | None = None
    index_bytes: int | None = None
    pareto: bool = False

    @property
    def name(self) -> str:
        """What it is, as messages have it: ``"int8, 256 dimensions, float32 vectors"``."""
        return f"{self.precision}, {self.dim} dimensions, {self.output_format} vectors"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)


def configurations(reports: Sequence[Report]) -> list[Configuration]:
    """Return every configuration of some reports, with the fronts over all of them."""
    return _with_fronts([found for report in reports for found in _of_report(report)])


def index_bytes(dim: int, output_format: str, vectors: int = _MILLION) -> int:
    """Return the bytes of a number of vectors; bits take whole bytes, each vector's on their own."""
    if output_format == "binary+int8":
        return index_bytes(dim, "binary", vectors) + index_bytes(dim, "int8", vectors)
    return vectors * -(-dim * _BITS[output_format] // 8)


def _of_report(report: Report) -> Iterator[Configuration]:
    own = [row for row in report.rows if row.precision is not None]
    for row in own:
        for dim in sorted(map(int, row.fidelity), reverse=True):
            base = _costs(report, row, own, dim)
            for output_format, at in _qualities(_main_set(row, "text"), dim):
                size = (
                    index_bytes(dim, output_format)
                    if not report.settings.get("late_interaction")
                    else None
                )
                yield replace(base, output_format=output_format, index_bytes=size, **at)
        yield from _pages(report, row, own)


def _costs(report: Report, row: Row, rows: Sequence[Row], dim: int) -> Configuration:
    timed = row if row.single else _timed(row, rows)
    process = report.process.get(row.system, {})
    whole = report.sizes.get(row.precision or "")
    common = report.settings.get("common_bytes", 0)
    layers = report.settings.get("layer_bytes", {}).get(row.precision, {}).get(row.task, 0)
    shape, figures = _throughput(timed)
    p95 = figures.get("p95_ms")
    return Configuration(
        bundle=report.bundle,
        layout=report.settings.get("layouts", {}).get(row.precision, "merged"),
        task=row.task,
        precision=row.precision or "",
        dim=dim,
        latency_p50_ms=timed.single.get("p50_ms"),
        latency_p95_ms=timed.single.get("p95_ms"),
        latency_slow_ms=_slow(timed.single),
        texts_per_s=int(shape.partition("x")[0]) / p95 * 1000 if p95 else None,
        throughput_shape=shape or None,
        timed_on=timed.task if timed.single else None,
        cold_start_ms=process.get("first_vector_longest_ms"),
        memory_bytes=process.get("after_first_task", {}).get("peak"),
        all_tasks_memory_bytes=process.get("after_batches", {}).get("peak"),
        disk_bytes=None if row.bytes_on_disk is None else row.bytes_on_disk + layers + common,
        all_tasks_disk_bytes=None if whole is None else whole + common,
    )


def _slow(times: dict[str, Any]) -> float | None:
    """Return what a limit on time is compared with; reports before 1.2 have the 95th percentile of one round."""
    return times.get("p95_slow_ms", times.get("p95_ms"))


def _timed(row: Row, rows: Sequence[Row]) -> Row:
    """Return the first row of the same system that was timed, else the row itself."""
    return next((other for other in rows if other.system == row.system and other.single), row)


def _throughput(row: Row) -> tuple[str, dict[str, Any]]:
    """Return the shape of most tokens and its figures."""
    if not row.shapes:
        return "", {}
    return max(row.shapes.items(), key=lambda item: _tokens(item[0]))


def _tokens(shape: str) -> int:
    batch, _, tokens = shape.partition("x")
    return int(batch) * int(tokens)


def _main_set(row: Row, modality: str) -> tuple[str, dict[str, Any]] | None:
    """Return the name and figures of a row's first set of a modality."""
    sets = row.quality.items()
    return next((one for one in sets if one[1].get("modality", "text") == modality), None)


def _pages(report: Report, row: Row, rows: Sequence[Row]) -> Iterator[Configuration]:
    """Yield the configurations of pages: at the source's budget as texts have them, and at each other budget."""
    measured = _main_set(row, "image")
    if measured is None or not row.images:
        return
    own = report.settings["image_budgets"][0]
    for budget, figures in row.images.items():
        smaller = int(budget) != own
        for dim in sorted(map(int, row.fidelity), reverse=True)[: 1 if smaller else None]:
            base = _page_costs(report, row, rows, dim, budget)
            found: Iterable[tuple[str, dict[str, Any]]] = _qualities(measured, dim)
            if smaller:
                fields = {"quality_set": measured[0], "metric": measured[1]["metric"]}
                at = figures["quality"][measured[1]["metric"]]
                found = [(FLOAT32, fields | _shares(at))]
            for output_format, its in found:
                size = index_bytes(dim, output_format)
                yield replace(base, output_format=output_format, index_bytes=size, **its)


def _page_costs(
    report: Report, row: Row, rows: Sequence[Row], dim: int, budget: str
) -> Configuration:
    """Return a row's costs with those of pages in place of those of texts."""
    measured = [r for r in (row, *rows) if "p95_ms" in r.images.get(budget, {})]
    timed = next((r for r in measured if r.system == row.system), None)
    times = timed.images[budget] if timed is not None else {}
    process = report.process.get(row.system, {}).get("pages", {})
    return replace(
        _costs(report, row, rows, dim),
        modality="image",
        max_pixels=int(budget),
        page_tokens=row.images[budget].get("tokens"),
        latency_p50_ms=times.get("p50_ms"),
        latency_p95_ms=times.get("p95_ms"),
        latency_slow_ms=_slow(times),
        texts_per_s=None,
        throughput_shape=None,
        timed_on=timed.task if timed is not None else None,
        cold_start_ms=process.get("first_vector_longest_ms"),
        memory_bytes=process.get("after_first_task", {}).get("peak"),
        all_tasks_memory_bytes=process.get("after_batches", {}).get("peak"),
    )


def _qualities(
    measured: tuple[str, dict[str, Any]] | None, dim: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each output format with the fields of its quality; none where nothing was labelled."""
    if measured is None:
        yield FLOAT32, {}
        return
    name, figures = measured
    full = max(figures["dims"], key=int)
    formats = figures.get("formats") or {FLOAT32: {full: figures["dims"][full]}}
    for output_format, dims in formats.items():
        if str(dim) in dims:
            fields = {"quality_set": name, "metric": figures["metric"]}
            yield output_format, fields | _shares(dims[str(dim)])


def _shares(at: dict[str, float]) -> dict[str, float | None]:
    whole = at["reference"]
    changes = {"share": at["difference"], "share_low": at["low"], "share_high": at["high"]}
    shares = {key: 1 + change / whole if whole > 0 else None for key, change in changes.items()}
    return {"quality": at["value"], "reference": whole, **shares}


def _with_fronts(found: Sequence[Configuration]) -> list[Configuration]:
    kinds = {(c.task, c.modality) for c in found}
    fronts = {kind: _front(c for c in found if (c.task, c.modality) == kind) for kind in kinds}
    return [replace(c, pareto=c in fronts[c.task, c.modality]) for c in found]


def _front(candidates: Iterable[Configuration]) -> set[Configuration]:
    """Return those that no other beats, of those that were measured on every axis that any was."""
    points = [(c, _axes(c)) for c in candidates if c.share is not None]
    axes = [i for i in range(len(COSTS) + 1) if any(p[i] is not None for _, p in points)]
    whole = [(c, [p[i] for i in axes]) for c, p in points if all(p[i] is not None for i in axes)]
    return {c for c, p in whole if not any(_beats(other, p) for _, other in whole)}


def _axes(c: Configuration) -> list[Any]:
    return [-c.share if c.share is not None else None, *(getattr(c, cost) for cost in COSTS)]


def _beats(one: list[Any], other: list[Any]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
