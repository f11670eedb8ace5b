"""Chooses among the configurations of a report under limits: what fits best, or which limit nothing meets.

Rules:
    * A figure is compared with a margin, so that a second measurement keeps the limit too: :data:`MARGINS`. Times
      differ from run to run with what else the machine does, its clock and where the system puts threads and pages;
      what is compared is already the slow end of several rounds, and the margin is for another hour. Peaks of memory
      differ by what the allocator keeps. Sizes are exact. Quality is the lower end of its interval: margins are of
      measuring, the interval is of which questions were asked.
    * Texts and pages are chosen apart: the modality is text unless pages alone have quality, or as it is asked for.
    * Several tasks together: the least quality, the longest times, the memory and the files of all.
    * What was not measured meets no limit.
    * Of those that meet all limits the best is taken: by quality, or by latency where the quality has a limit, or
      by what is preferred. Equal ones go on by the other costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from embedge.bench.errors import BenchArgumentError
from embedge.bench.report.configurations import FLOAT32, Configuration, configurations
from embedge.bench.report.report import Report

__all__ = [
    "LIMITS",
    "MARGINS",
    "PREFERENCES",
    "Candidate",
    "Choice",
    "Kept",
    "Limit",
    "candidates",
    "choose",
    "modality_of",
]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A configuration for all tasks that are asked for; ``None`` where something was not measured.

    Attributes:
        bundle: the folder's name.
        tasks: what it is for.
        precision: of the graphs.
        dim: to which vectors are cut.
        output_format: of the stored vectors.
        modality: ``"text"`` or ``"image"``.
        max_pixels: to which pages are scaled down, ``None`` for texts.
        searches: whether the first task was measured with queries and documents, not with pairs.
        share: least share of the reference's quality, 0…1.
        quality: lower end of its 95 % interval.
        latency: 95th percentile of single texts or pages, each by its slowest time, milliseconds.
        throughput: texts a second.
        start: to the first vector, milliseconds.
        memory: peak bytes.
        disk: bytes of the files.
        index: bytes of the vectors of a million texts.
    """

    bundle: str
    tasks: tuple[str, ...]
    precision: str
    dim: int
    output_format: str
    modality: str
    max_pixels: int | None
    searches: bool
    share: float | None
    quality: float | None
    latency: float | None
    throughput: float | None
    start: float | None
    memory: float | None
    disk: float | None
    index: float | None

    @property
    def name(self) -> str:
        """``"int8, 256 dimensions"``, with the vectors' format unless it is float32."""
        vectors = "" if self.output_format == FLOAT32 else f", {self.output_format} vectors"
        pages = "" if self.max_pixels is None else f", pages of at most {self.max_pixels:,} pixels"
        return f"{self.precision}, {self.dim} dimensions{vectors}{pages}"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return {**asdict(self), "tasks": list(self.tasks)}


def _bytes(value: float) -> str:
    return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def _milliseconds(value: float) -> str:
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms"


def _percent(value: float) -> str:
    return f"{value * 100:.2f} %"


def _per_second(value: float) -> str:
    return f"{value:.3g} texts/s"


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What can be limited.

    Attributes:
        option: of the command.
        figure: the attribute of :class:`Candidate`.
        what: it is, as messages have it.
        shown: a value with its unit.
        margin: by which factor a figure is made worse before it is compared.
        least: whether the limit is a least value.
    """

    option: str
    figure: str
    what: str
    shown: Callable[[float], str]
    margin: float = 1.0
    least: bool = False

    def cautious(self, candidate: Candidate) -> float | None:
        """Return the figure that is compared with the limit."""
        value: float | None = getattr(candidate, self.figure)
        if value is None:
            return None
        return value / self.margin if self.least else value * self.margin

    def excess(self, candidate: Candidate, bound: float) -> float | None:
        """Return by which part of the bound the candidate misses it, at most 0 if it is met."""
        value = self.cautious(candidate)
        if value is None:
            return None
        return (bound - value if self.least else value - bound) / max(bound, 1e-9)


MARGINS = {"time": 1.1, "memory": 1.03}
_TIME, _MEMORY = MARGINS["time"], MARGINS["memory"]
LIMITS = (
    Limit(
        option="--min-quality",
        figure="quality",
        what="share of the reference's quality, lower end of its interval",
        shown=_percent,
        least=True,
    ),
    Limit(
        option="--max-latency",
        figure="latency",
        what="95th percentile of one text or page",
        shown=_milliseconds,
        margin=_TIME,
    ),
    Limit(
        option="--min-throughput",
        figure="throughput",
        what="texts a second",
        shown=_per_second,
        margin=_TIME,
        least=True,
    ),
    Limit(
        option="--max-memory",
        figure="memory",
        what="peak memory",
        shown=_bytes,
        margin=_MEMORY,
    ),
    Limit(
        option="--max-start",
        figure="start",
        what="start to the first vector",
        shown=_milliseconds,
        margin=_TIME,
    ),
    Limit(option="--max-disk", figure="disk", what="files", shown=_bytes),
    Limit(option="--max-index", figure="index", what="vectors of a million texts", shown=_bytes),
)
_BY_FIGURE = {limit.figure: limit for limit in LIMITS}
PREFERENCES = ("quality", "latency", "memory", "disk", "index", "throughput")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One limit and what a candidate has."""

    limit: Limit
    bound: float
    value: float | None

    @property
    def line(self) -> tuple[str, str, str]:
        """The option with its bound, the figure, and what it is."""
        sign = "≥" if self.limit.least else "≤"
        found = "not measured" if self.value is None else self.limit.shown(self.value)
        return (
            f"{self.limit.option} {sign} {self.limit.shown(self.bound)}",
            found,
            self.limit.what,
        )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was found.

    Attributes:
        candidate: the best, ``None`` if nothing meets all limits.
        kept: each limit and the candidate's figure.
        preferred: what it is best by.
        fitting: how many meet all limits.
        of: how many there are.
        missed: where nothing fits, a sentence for each limit that is in the way.
    """

    candidate: Candidate | None
    kept: tuple[Kept, ...] = ()
    preferred: str = "quality"
    fitting: int = 0
    of: int = 0
    missed: tuple[str, ...] = ()


def choose(
    reports: Sequence[Report],
    bounds: Mapping[str, float],
    *,
    tasks: Sequence[str] | None = None,
    prefer: str | None = None,
    modality: str | None = None,
) -> Choice:
    """Return the best configuration under limits.

    Args:
        reports: of one machine.
        bounds: by the figure of :data:`LIMITS`: bytes, milliseconds, texts a second, share of quality.
        tasks: what it has to serve; ``None``: all of the reports.
        prefer: one of :data:`PREFERENCES`; ``None``: quality, or latency where quality has a limit.
        modality: ``"text"``, ``"image"``, or ``None``: as :func:`modality_of` says.

    Raises:
        BenchArgumentError: no limit, an unknown task, a modality that was not measured, two reports of one bundle,
            or of different machines.
    """
    _check_reports(reports)
    if not bounds:
        raise BenchArgumentError(
            f"choose needs a limit; expected one of {', '.join(limit.option for limit in LIMITS)}"
        )
    found = candidates(reports, tasks, modality)
    limits = [(limit, bounds[limit.figure]) for limit in LIMITS if limit.figure in bounds]
    preferred = prefer or ("latency" if "quality" in bounds else "quality")
    fitting = [c for c in found if all(_meets(limit, bound, c) for limit, bound in limits)]
    if not fitting:
        return Choice(candidate=None, of=len(found), missed=tuple(_missed(found, limits)))
    best = min(fitting, key=lambda c: _rank(c, preferred))
    kept = tuple(
        Kept(limit=limit, bound=bound, value=limit.cautious(best)) for limit, bound in limits
    )
    return Choice(
        candidate=best, kept=kept, preferred=preferred, fitting=len(fitting), of=len(found)
    )


def _check_reports(reports: Sequence[Report]) -> None:
    names = [report.bundle for report in reports]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BenchArgumentError(
            f"{', '.join(twice)}: two reports are of bundles of this name; name one of them, or rename a bundle's "
            "folder and measure it again"
        )
    machines = {
        tuple(r.machine.get(key) for key in ("processor", "threads", "gpu")) for r in reports
    }
    if len(machines) > 1:
        shown = "; ".join(
            f"{processor}, {threads} threads{f', {gpu}' if gpu else ''}"
            for processor, threads, gpu in sorted(machines, key=str)
        )
        raise BenchArgumentError(
            f"reports of different machines cannot be compared: {shown}; measure the bundles on one"
        )


def modality_of(reports: Sequence[Report]) -> str:
    """Return what a choice is of where nothing is said: pages if they alone have quality, else texts."""
    found = configurations(reports)
    measured = {c.modality for c in found if c.share is not None}
    return "image" if measured == {"image"} else "text"


def candidates(
    reports: Sequence[Report], tasks: Sequence[str] | None, modality: str | None = None
) -> list[Candidate]:
    """Return every configuration of a modality that serves some tasks, ``None``: all of the reports.

    Raises:
        BenchArgumentError: a task that no report has, or a modality.
    """
    kind = modality_of(reports) if modality is None else modality
    found = [c for c in configurations(reports) if c.modality == kind]
    if not found:
        raise BenchArgumentError(
            f"--modality {kind}: the report has none of it; run `embedge bench` with --eval TASK=PATH of queries and "
            "page images"
        )
    known = list(dict.fromkeys(c.task for c in found))
    unknown = [task for task in tasks or () if task not in known]
    if unknown:
        raise BenchArgumentError(
            f"--task {' '.join(unknown)}: not in the report, which has {', '.join(known) or 'none'}"
        )
    wanted = known if tasks is None else list(dict.fromkeys(tasks))
    groups: dict[tuple[str, str, int, str, int | None], list[Configuration]] = {}
    for c in found:
        if c.task in wanted:
            key = (c.bundle, c.precision, c.dim, c.output_format, c.max_pixels)
            groups.setdefault(key, []).append(c)
    return [
        _together(parts, everything=len(wanted) > 1)
        for parts in groups.values()
        if len(parts) == len(wanted)
    ]


def _together(parts: Sequence[Configuration], everything: bool) -> Candidate:
    """Return one candidate of the configurations of each task."""
    first = parts[0]
    of_all = "all_tasks_" if everything else ""
    return Candidate(
        bundle=first.bundle,
        tasks=tuple(part.task for part in parts),
        precision=first.precision,
        dim=first.dim,
        output_format=first.output_format,
        modality=first.modality,
        max_pixels=first.max_pixels,
        searches=first.metric == "ndcg@10",
        share=_worst(parts, "share", min),
        quality=_worst(parts, "share_low", min),
        latency=_worst(parts, "latency_slow_ms", max),
        throughput=_worst(parts, "texts_per_s", min),
        start=_worst(parts, "cold_start_ms", max),
        memory=_worst(parts, f"{of_all}memory_bytes", max),
        disk=_worst(parts, f"{of_all}disk_bytes", max),
        index=_worst(parts, "index_bytes", max),
    )


def _worst(
    parts: Sequence[Configuration], figure: str, worst: Callable[[list[Any]], Any]
) -> float | None:
    values = [getattr(part, figure) for part in parts]
    return None if None in values else float(worst(values))


def _meets(limit: Limit, bound: float, candidate: Candidate) -> bool:
    excess = limit.excess(candidate, bound)
    return excess is not None and excess <= 0


def _rank(candidate: Candidate, preferred: str) -> list[float]:
    """Return what is compared in order, less is better; what was not measured comes last."""
    order = [preferred, *(name for name in PREFERENCES if name != preferred)]
    return [_badness(candidate, name) for name in order]


def _badness(candidate: Candidate, figure: str) -> float:
    value: float | None = getattr(candidate, figure)
    if value is None:
        return float("inf")
    return -value if _BY_FIGURE[figure].least else value


def _missed(found: Sequence[Candidate], limits: Sequence[tuple[Limit, float]]) -> Iterator[str]:
    """Yield why nothing fits: limits that nothing meets; if there are none, what each costs beside the others."""
    alone = [
        (limit, bound)
        for limit, bound in limits
        if not any(_meets(limit, bound, candidate) for candidate in found)
    ]
    for limit, bound in alone:
        yield f"nothing meets {_shown(limit, bound)}: {_nearest(limit, bound, found)}"
    if alone:
        return
    for limit, bound in limits:
        others = [(other, its) for other, its in limits if other is not limit]
        rest = [c for c in found if all(_meets(other, its, c) for other, its in others)]
        if rest:
            yield (
                f"with the other limits kept nothing meets {_shown(limit, bound)}: "
                f"{_nearest(limit, bound, rest)}"
            )
        else:
            yield f"without {_shown(limit, bound)} the other limits exclude each other too"


def _shown(limit: Limit, bound: float) -> str:
    return f"{limit.option} {limit.shown(bound)}"


def _nearest(limit: Limit, bound: float, candidates: Sequence[Candidate]) -> str:
    """Return the nearest configuration and by how much it misses a limit."""
    measured = [c for c in candidates if limit.cautious(c) is not None]
    if not measured:
        return f"{limit.what} was not measured; {_HOW.get(limit.figure, _FULL_RUN)}"
    nearest = min(measured, key=lambda c: limit.excess(c, bound) or 0.0)
    value = limit.cautious(nearest)
    assert value is not None
    missing = limit.shown(abs(value - bound))
    words = "less" if limit.least else "more"
    reason = f", of that {(limit.margin - 1) * 100:.0f} % margin" if limit.margin > 1 else ""
    return (
        f"the nearest is {nearest.name} of {nearest.bundle} with {limit.shown(value)}{reason}, "
        f"{missing} {words} than that"
    )


_FULL_RUN = "run `embedge bench` without --shapes and --target"
_HOW = {"quality": "run `embedge bench` with --eval TASK=PATH for every task"}
