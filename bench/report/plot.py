"""The picture: quality against latency, one point per precision and peer, bytes as its size."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from embedge.bench.report.report import Report, Row
from embedge.runtime.bundle.writing import replace_file

__all__ = ["plot"]

_COLOURS = {"embedge": "#c2410c", "torch": "#475569", "peer": "#2563eb"}
_LABELS = {"embedge": "embedge", "torch": "torch", "peer": "other runtimes"}


def plot(report: Report, file: Path) -> None:
    """Draw a panel per task and write a PNG.

    Points stand at their median latency for one text (left is better) and their quality on the
    task's main labelled set, or the mean cosine where there is none (up is better). Labels stand in
    a column of their own, in the order of the points, so they never overlap.

    Args:
        report: the figures; tasks without latency are left out.
        file: what to write.
    """
    tasks = [t for t in dict.fromkeys(r.task for r in report.rows) if _points(report, t)]
    tallest = max((len(_points(report, task)) for task in tasks), default=1)
    height = max(3.4, 0.5 * tallest + 1.4)
    figure = Figure(figsize=(9.6, height * max(1, len(tasks)) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(1, len(tasks)), 1, squeeze=False)[:, 0]
    for axis, task in zip(axes, tasks, strict=False):
        _panel(axis, task, _points(report, task))
    if not tasks:
        axes[0].text(0.5, 0.5, "no latency was measured", ha="center", va="center")
        axes[0].set_axis_off()
    else:
        figure.legend(handles=_legend(axes[0]), loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(
            f"{report.source.get('name')}: quality against latency; the area of a point is its size"
            " on disk",
            fontsize=11,
        )
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    replace_file(file, picture.getvalue())


def _points(report: Report, task: str) -> list[tuple[float, float, Row]]:
    """Return latency, quality and row of each system of a task that has both."""
    found = []
    for row in report.rows:
        value = _value(row)
        if row.task == task and row.single and value is not None:
            found.append((float(row.single["p50_ms"]), value, row))
    return sorted(found, key=lambda point: (-point[1], -point[0]))


def _value(row: Row) -> float | None:
    if row.main_quality:
        return float(row.main_quality["value"]) * 100
    cosine = row.full_fidelity.get("cosine_mean")
    return None if cosine is None else float(cosine)


def _panel(axis: Any, task: str, points: list[tuple[float, float, Row]]) -> None:
    for latency, value, row in points:
        megabytes = (row.bytes_on_disk or 0) / 1e6
        axis.scatter(
            latency,
            value,
            s=25 + 4 * megabytes,
            color=_COLOURS[row.role],
            alpha=0.55,
            linewidths=0,
            zorder=3,
        )
        axis.scatter(latency, value, s=9, color=_COLOURS[row.role], zorder=4)
    values = [value for _, value, _ in points]
    spread = max(max(values) - min(values), 1e-4 * max(values))
    axis.set_ylim(min(values) - 0.3 * spread, max(values) + 0.3 * spread)
    axis.set_xscale("log")
    latencies = [latency for latency, _, _ in points]
    axis.set_xlim(min(latencies) / 1.4, max(latencies) * 1.4)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    for i, (latency, value, row) in enumerate(points):
        size = f", {row.bytes_on_disk / 1e6:.0f} MB" if row.bytes_on_disk else ""
        axis.annotate(
            f"{row.system}{size}",
            xy=(latency, value),
            xycoords="data",
            xytext=(1.03, 1 - (i + 0.5) / len(points)),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=_COLOURS[row.role],
            arrowprops={
                "arrowstyle": "-",
                "color": _COLOURS[row.role],
                "lw": 0.6,
                "alpha": 0.5,
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 0,
            },
        )
    axis.set_title(task, loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel("one text, median ms (logarithmic)")
    axis.set_ylabel(_axis_name(points[0][2]))
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _axis_name(row: Row) -> str:
    if not row.quality:
        return "mean cosine to the reference"
    metric = next(iter(row.quality.values()))["metric"]
    return {"ndcg@10": "nDCG@10, points", "spearman": "Spearman, points"}[metric]


def _legend(axis: Any) -> list[Any]:
    return [
        axis.scatter([], [], s=60, color=colour, alpha=0.7, linewidths=0, label=_LABELS[role])
        for role, colour in _COLOURS.items()
    ]
