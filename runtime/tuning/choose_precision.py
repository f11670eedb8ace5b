"""Choosing a precision: the fastest on this machine that keeps the user's limits.

Rules:
    * A precision is left out that does not run on the device, lacks the graph of a task or the vision
      tower, has a graph above the memory limit, or recorded figures below the fidelity asked for, or
      none. Where all are, the error says why of each.
    * Without measurements the order is a fixed one, :data:`ORDER`, which is that of speed in batches on
      the machines of the lab notes.
    * If `embedge prepare` measured the first of that order on this machine with this number of threads,
      the fastest of those it measured is taken: by the geometric mean over the shapes that all of them
      have. Of precisions within 10 % of the fastest the first of the order is taken, so that noise
      does not decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp, log
from typing import Any

from embedge.runtime.bundle.contract import VISION
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.errors import EmbedgeValueError, log_info
from embedge.runtime.sessions.device import cuda_problem
from embedge.runtime.tuning.cache import Tuning

__all__ = ["AUTO", "choose_automatically"]

AUTO = "auto"
# On a busy machine ratios of medians of 18 rounds vary by 13 % (lab note 27), of means over shapes less.
MARGIN = 1.1
# Precisions of other names come last, in the manifest's order.
ORDER = {
    "cpu": ("int8", "int4-unpacked", "int4", "fp32"),
    "cuda": ("fp16", "int4-fp16"),
}

_UNRECORDED = "has no recorded fidelity of"


def choose_automatically(
    bundle: Bundle,
    tuning: Tuning,
    *,
    device: str,
    memory_limit: int | None = None,
    min_cosine: float | None = None,
) -> str:
    """The precision that is fastest under some limits; which one and why is logged.

    Args:
        bundle: whose precisions.
        tuning: what was measured on this machine's processor.
        device: "auto", "cpu" or "cuda".
        memory_limit: most bytes of one open graph, ``None``: no limit.
        min_cosine: lowest mean cosine to the unquantized model's vectors, of every task, at the full
            dimension, as `embedge bench --record` stored it; ``None``: any.

    Raises:
        EmbedgeValueError: if no precision keeps the limits, with the reason for each.
    """
    manifest = bundle.manifest
    devices = _usable_devices(manifest, device)
    problems = {
        precision: next(_problems(bundle, precision, devices, memory_limit, min_cosine), None)
        for precision in manifest.precisions
    }
    fitting = [precision for precision, problem in problems.items() if problem is None]
    left_out = [f"{precision} {problem}" for precision, problem in problems.items() if problem]
    if not fitting:
        advice = f"; {_how_to_record(bundle, devices)}" if _UNRECORDED in "".join(left_out) else ""
        raise EmbedgeValueError(
            f"{bundle.root}: no precision keeps the limits: {'; '.join(left_out)}{advice}",
            arguments=["memory_limit", "min_cosine"],
        )
    on = next(d for d in devices if any(d in manifest.precisions[p].devices for p in fitting))
    fitting = [p for p in fitting if on in manifest.precisions[p].devices]
    chosen, why = _fastest(_in_order(fitting, on), tuning if on == "cpu" else {})
    log_info("precision auto: %s on %s, %s", chosen, on, "; ".join([why, *left_out]))
    return chosen


def _usable_devices(manifest: Manifest, device: str) -> list[str]:
    """The devices to look at, the preferred first."""
    if device != "auto":
        return [device]
    has_kernels = any("cuda" in settings.devices for settings in manifest.precisions.values())
    return ["cuda", "cpu"] if has_kernels and cuda_problem() is None else ["cpu"]


def _problems(
    bundle: Bundle,
    precision: str,
    devices: Sequence[str],
    memory_limit: int | None,
    min_cosine: float | None,
) -> Iterator[str]:
    """Why a precision cannot be taken."""
    manifest = bundle.manifest
    settings = manifest.precisions[precision]
    if not set(devices) & set(settings.devices):
        yield f"does not run on {' or '.join(devices)}"
    missing = [task for task in manifest.tasks if task not in settings.graphs]
    if missing:
        yield f"has no graph of {', '.join(missing)}"
    if manifest.model.image is not None and settings.vision is None:
        yield "has no vision tower"
    if memory_limit is not None:
        names = [*settings.graphs, *([VISION] if settings.vision else [])]
        largest = max(bundle.graph_bytes(precision, name) for name in names)
        if largest > memory_limit:
            yield f"takes {largest} bytes, above memory_limit ({memory_limit})"
    if min_cosine is not None:
        yield from _infidelities(bundle, precision, min_cosine)


def _infidelities(bundle: Bundle, precision: str, min_cosine: float) -> Iterator[str]:
    settings = bundle.manifest.precisions[precision]
    for task in settings.graphs:
        found = _cosine_mean(settings.fidelity.get(task), bundle.manifest.model.dim)
        if found is None:
            yield f"{_UNRECORDED} {task}"
        elif found < min_cosine:
            yield f"has a mean cosine of {found} at {task}, below min_cosine ({min_cosine})"


def _how_to_record(bundle: Bundle, devices: Sequence[str]) -> str:
    """The command that measures fidelity, with the adapters that its reference needs."""
    manifest = bundle.manifest
    adapters = [f" --adapter {t}=FOLDER" for t, task in manifest.tasks.items() if task.adapter]
    device = "" if "cpu" in devices else f" --device {devices[0]}"
    return (
        f"to record it, run `embedge bench {bundle.root} --reference MODEL{''.join(adapters)}{device} "
        f"--record`, MODEL being {manifest.source.name}'s folder"
    )


def _cosine_mean(figures: Any, dim: int) -> float | None:
    """The figure in what `embedge bench --record` wrote of a task; ``None`` if there is none."""
    try:
        value = figures["dims"][str(dim)]["cosine_mean"]
    except (KeyError, TypeError):
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else None


def _in_order(precisions: Sequence[str], device: str) -> list[str]:
    order = ORDER[device]
    return sorted(precisions, key=lambda p: order.index(p) if p in order else len(order))


def _fastest(precisions: Sequence[str], tuning: Tuning) -> tuple[str, str]:
    """One of some precisions, given in their order, and why."""
    first = precisions[0]
    if first not in tuning:
        return first, "by the fixed order, as it was not measured here (`embedge prepare` does)"
    measured = [precision for precision in precisions if precision in tuning]
    common = set.intersection(*(set(tuning[p].milliseconds) for p in measured))
    means = {p: _geometric_mean([tuning[p].milliseconds[s] for s in common]) for p in measured}
    fastest = min(means.values())
    chosen = next(p for p in measured if means[p] <= fastest * MARGIN)
    listed = ", ".join(f"{p} {means[p]:.3g} ms" for p in measured)
    return chosen, f"measured over {len(common)} shapes: {listed}"


def _geometric_mean(values: Sequence[float]) -> float:
    return exp(sum(map(log, values)) / max(1, len(values)))
