"""One task: every system on the same texts, then all of them in turn on the clock."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.bench.measure.fidelity import batch_invariance, by_kind, fidelity
from embedge.bench.measure.latency import Times, alternate, percentiles, ratio
from embedge.bench.measure.quality import Quality, compare, quality, truncated
from embedge.bench.measure.texts import EvalSet, Text
from embedge.bench.options import Profile, Shape
from embedge.bench.systems.reference import Reference
from embedge.bench.systems.system import System, TorchSystem
from embedge.bench.systems.tokens import TextTokens

__all__ = [
    "TORCH_FP32",
    "TaskData",
    "latency",
    "reference_vectors",
    "single_texts",
    "vectors_against",
]

TORCH_FP32 = "torch fp32"
Vectors = NDArray[np.float32]
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """What a task is measured on.

    Attributes:
        texts: for fidelity.
        evaluations: labelled sets, the main one first.
        dims: dimensions to cut at, the full one included.
        normalize: whether a cut vector is scaled back to length 1.
    """

    texts: Sequence[Text]
    evaluations: Sequence[EvalSet] = ()
    dims: Sequence[int]
    normalize: bool = True


@dataclass(frozen=True, kw_only=True)
class ReferenceVectors:
    """What the unquantized model gives for a task's data.

    Attributes:
        texts: float32 ``[texts, dim]``.
        qualities: by evaluation set and dimension.
    """

    texts: Vectors
    qualities: dict[tuple[str, int], Quality] = field(default_factory=dict)


def reference_vectors(reference: Reference, data: TaskData) -> ReferenceVectors:
    """Return the yardstick's vectors and qualities for a task's data."""
    system = TorchSystem("reference", reference)
    return ReferenceVectors(
        texts=system.encode([text.text for text in data.texts]),
        qualities=_qualities(system, data),
    )


def vectors_against(
    system: System, data: TaskData, reference: ReferenceVectors, profile: Profile
) -> Figures:
    """Return the fields of a row that come from vectors: fidelity, quality, invariance."""
    texts = [text.text for text in data.texts]
    own = profile.torch_quality or system.name != TORCH_FP32
    ours = system.encode(texts) if own else reference.texts
    figures: Figures = {
        "fidelity": fidelity(ours, reference.texts, data.dims),
        "fidelity_by_kind": by_kind(ours, reference.texts, [text.kind for text in data.texts]),
        "quality": {},
    }
    qualities = _qualities(system, data) if own else reference.qualities
    for evaluation in data.evaluations:
        dims = {}
        for dim in data.dims:
            key = (evaluation.name, dim)
            interval = compare(evaluation, qualities[key], reference.qualities[key])
            values = {"value": qualities[key].value, "reference": reference.qualities[key].value}
            dims[str(dim)] = values | asdict(interval)
        figures["quality"][evaluation.name] = {
            "metric": evaluation.metric,
            "items": len(qualities[evaluation.name, data.dims[0]].items),
            "dims": dims,
        }
    if system.role != "torch" and profile.invariance:
        step = max(1, len(texts) // profile.invariance)
        figures["invariance"] = batch_invariance(system.encode, texts[::step][: profile.invariance])
    return figures


def latency(
    systems: Sequence[System],
    tokens: TextTokens,
    texts: Sequence[str],
    shapes: Sequence[Shape],
    profile: Profile,
    step: Callable[[str], None],
) -> dict[str, Figures]:
    """Return ``single`` and ``shapes`` of each system, timed in turn.

    Shapes of more tokens than the model takes are passed over.

    Args:
        systems: all that are compared.
        tokens: makes the ids that every system gets.
        texts: where the ids come from, and what is embedded one by one.
        shapes: of the token batches.
        profile: rounds and texts.
        step: told the name of what is about to be timed.
    """
    result: dict[str, Figures] = {s.name: {"single": {}, "shapes": {}} for s in systems}
    for shape in shapes:
        if shape.tokens > tokens.max_length:
            continue
        step(shape.name)
        ids, mask = tokens.exact(texts, shape.batch, shape.tokens)
        runs = {s.name: functools.partial(s.forward, ids, mask) for s in systems}
        times = alternate(runs, shape.rounds(profile.rounds), warm_up=profile.warm_up)
        for name, values in times.items():
            result[name]["shapes"][shape.name] = _shape_figures(shape, values, times)
    if not profile.singles:
        return result
    step("single texts")
    encode = {s.name: s.encode for s in systems}
    for name, figures in single_texts(encode, texts, profile).items():
        result[name]["single"] = figures
    return result


def single_texts(
    encode: Mapping[str, Callable[[Sequence[str], int], object]],
    texts: Sequence[str],
    profile: Profile,
) -> dict[str, Figures]:
    """Return ``p50_ms``, ``p95_ms`` and ``texts`` of texts one by one, tokenization included, by system.

    Args:
        encode: by the system's name, from texts and a batch size.
        texts: from which those of the profile are drawn.
        profile: how many.
    """
    chosen = texts[:: max(1, len(texts) // profile.singles)][: profile.singles]
    return {
        name: percentiles(values) | {"texts": len(chosen)}
        for name, values in _single_times(encode, chosen).items()
    }


def _single_times(
    encode: Mapping[str, Callable[[Sequence[str], int], object]], texts: Sequence[str]
) -> dict[str, Times]:
    """Return the time of each text alone by each system."""
    parts: dict[str, list[Times]] = {name: [] for name in encode}
    for number, text in enumerate(texts):
        runs = {name: functools.partial(call, [text], 1) for name, call in encode.items()}
        for name, times in alternate(
            runs, 1, warm_up=0, pause_s=0.01, block_s=0, seed=number
        ).items():
            parts[name].append(times)
    return {name: np.concatenate(times) for name, times in parts.items()}


def _shape_figures(shape: Shape, times_ms: Times, all_times: dict[str, Times]) -> Figures:
    median = float(np.median(times_ms))
    figures: Figures = {
        "median_ms": median,
        "p95_ms": float(np.percentile(times_ms, 95)),
        "rounds": len(times_ms),
        "texts_per_s": shape.batch / median * 1000,
        "tokens_per_s": shape.batch * shape.tokens / median * 1000,
        "times_as_fast_as": {other: ratio(theirs, times_ms) for other, theirs in all_times.items()},
    }
    return figures


def _qualities(system: System, data: TaskData) -> dict[tuple[str, int], Quality]:
    result = {}
    for evaluation in data.evaluations:
        columns = [
            _encode_unique(system, column, role)
            for column, role in zip(
                (evaluation.first, evaluation.second), evaluation.roles, strict=True
            )
        ]
        for dim in data.dims:
            first, second = (truncated(column, dim, data.normalize) for column in columns)
            result[evaluation.name, dim] = quality(evaluation, first, second)
    return result


def _encode_unique(system: System, texts: Sequence[str], role: str | None) -> Vectors:
    """Return the vectors of texts, each different text embedded once."""
    numbers: dict[str, int] = {}
    of = [numbers.setdefault(text, len(numbers)) for text in texts]
    vectors: Vectors = system.encode(list(numbers), role=role)[of]
    return vectors
