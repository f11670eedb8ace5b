"""Maps from what one pass gives to the vectors of several tasks: a ridge regression, then a small network.

A map of a task is ``v = linear(x) + outer(gelu(inner(x)))``, scaled to length 1 where the model's vectors are. All
tasks share ``inner``. The ridge regression is exact; from there on everything is trained by Adam to the vectors of
the task's own adapter (distillation). The loss is ``1 - cosine``, plus the squared differences of the cosines in a
batch, so that neighbours stay neighbours.

Sources: Hoerl and Kennard, "Ridge Regression", 1970; Kingma and Ba, "Adam", arXiv 1412.6980; Park et al., "Relational
Knowledge Distillation", arXiv 1904.05068; Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import cos, pi, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

__all__ = ["TaskMaps", "fit_task_maps"]

Array = NDArray[np.float32]

_RIDGES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # a standardized input, of a text
_RELATION = 5.0  # weight of the differences of cosines
_BATCH = 256
_RATE, _LEAST_RATE = 1e-3, 1e-5
_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_WARM_UP = 20  # steps
_CHECKS = 20  # how often held-out texts are looked at


@dataclass(frozen=True, kw_only=True)
class TaskMaps:
    """The maps of several tasks, of inputs ``[texts, width]``.

    Attributes:
        tasks: names, in the order of the outputs.
        linear: float32 ``[width, tasks · dim]``.
        offset: float32 ``[tasks · dim]``.
        inner: float32 ``[width, hidden]``; ``hidden`` may be 0.
        inner_offset: float32 ``[hidden]``.
        outer: float32 ``[hidden, tasks · dim]``.
        normalize: whether the vectors are scaled to length 1.
    """

    tasks: tuple[str, ...]
    linear: Array
    offset: Array
    inner: Array
    inner_offset: Array
    outer: Array
    normalize: bool

    def __call__(self, x: Array) -> Array:
        """The vectors of inputs ``[texts, width]``, float32 ``[texts, tasks, dim]``."""
        y = x @ self.linear + self.offset
        if self.inner.shape[1]:
            y = y + _gelu(x @ self.inner + self.inner_offset) @ self.outer
        y = y.reshape(len(x), len(self.tasks), -1)
        return _unit(y)[0] if self.normalize else y


def fit_task_maps(
    x: Array,
    vectors: Mapping[str, Array],
    held_out: NDArray[np.bool_],
    *,
    hidden: int,
    steps: int,
    normalize: bool = True,
    seed: int = 0,
    told: Callable[[int], None] = lambda _: None,
) -> TaskMaps:
    """Fit maps; of all that were tried, those nearest to the vectors of held-out texts.

    Args:
        x: float32 ``[texts, width]``, what the maps get.
        vectors: by task float32 ``[texts, dim]``, what they should give.
        held_out: bool ``[texts]``: those that nothing is fitted on.
        hidden: width of the network; 0: the ridge regression alone.
        steps: of Adam.
        normalize: whether vectors have length 1.
        seed: of the network's first weights and of the batches' order.
        told: is called with the number of each step.

    Raises:
        ValueError: for arrays of other lengths, or without texts on either side.
    """
    if {len(v) for v in (held_out, *vectors.values())} != {len(x)} or held_out.all():
        raise ValueError("expected as many vectors as inputs, and some texts that are not held out")
    if not held_out.any():
        raise ValueError("expected some texts that are held out")
    mean, deviation = x[~held_out].mean(0), x[~held_out].std(0)
    scale = np.where(deviation > 1e-6, 1 / np.maximum(deviation, 1e-6), 0).astype(np.float32)
    z = (x - mean) * scale
    y = np.stack(list(vectors.values()), 1)
    start = _ridge(z, y, held_out, tuple(vectors), normalize=normalize)
    found = _train(z, y, held_out, start, hidden, steps, seed, told) if hidden else start
    return _of_plain_inputs(found, mean, scale)


def _of_plain_inputs(maps: TaskMaps, mean: Array, scale: Array) -> TaskMaps:
    """The same maps of inputs that are not standardized."""
    linear, inner = (scale[:, None] * matrix for matrix in (maps.linear, maps.inner))
    return TaskMaps(
        tasks=maps.tasks,
        linear=linear,
        offset=maps.offset - mean @ linear,
        inner=inner,
        inner_offset=maps.inner_offset - mean @ inner,
        outer=maps.outer,
        normalize=maps.normalize,
    )


def _ridge(
    z: Array, y: Array, held_out: NDArray[np.bool_], tasks: tuple[str, ...], *, normalize: bool
) -> TaskMaps:
    """The linear maps, of the penalty that is best for held-out texts."""
    flat = y.reshape(len(y), -1)
    fitted = z[~held_out].astype(np.float64)
    mean = flat[~held_out].mean(0)
    values, axes = np.linalg.eigh(fitted.T @ fitted)
    projected = axes.T @ (fitted.T @ (flat[~held_out] - mean))
    hidden = np.zeros((z.shape[1], 0), np.float32)

    def maps(penalty: float) -> TaskMaps:
        divisors = np.maximum(values, 0) + penalty * len(fitted) + 1e-9
        return TaskMaps(
            tasks=tasks,
            linear=(axes @ (projected / divisors[:, None])).astype(np.float32),
            offset=mean.astype(np.float32),
            inner=hidden,
            inner_offset=np.zeros(0, np.float32),
            outer=np.zeros((0, flat.shape[1]), np.float32),
            normalize=normalize,
        )

    return min(map(maps, _RIDGES), key=lambda found: _loss(found(z[held_out]), y[held_out]))


def _train(
    z: Array,
    y: Array,
    held_out: NDArray[np.bool_],
    start: TaskMaps,
    hidden: int,
    steps: int,
    seed: int,
    told: Callable[[int], None],
) -> TaskMaps:
    """Maps with a network, trained from linear ones."""
    generator = np.random.default_rng(seed)
    width, outputs = start.linear.shape
    first = generator.standard_normal((width, hidden)).astype(np.float32) / sqrt(width)
    weights = {
        "linear": start.linear.copy(),
        "offset": start.offset.copy(),
        "inner": first,
        "inner_offset": np.zeros(hidden, np.float32),
        "outer": np.zeros((hidden, outputs), np.float32),
    }

    def maps() -> TaskMaps:
        copies = {name: array.copy() for name, array in weights.items()}
        return TaskMaps(tasks=start.tasks, normalize=start.normalize, **copies)

    best, least = start, _loss(start(z[held_out]), y[held_out])
    moments = {name: (np.zeros_like(a), np.zeros_like(a)) for name, a in weights.items()}
    batches = _batches(np.flatnonzero(~held_out), generator)
    for step in range(1, steps + 1):
        rows = next(batches)
        gradients = _gradients(z[rows], y[rows], weights, normalize=start.normalize)
        rate = _rate(step, steps)
        for name, gradient in gradients.items():
            first_moment, second_moment = moments[name]
            _adam(weights[name], gradient, first_moment, second_moment, step, rate)
        told(step)
        if step % max(1, steps // _CHECKS) == 0 or step == steps:
            found = maps()
            loss = _loss(found(z[held_out]), y[held_out])
            if loss < least:
                best, least = found, loss
    return best


def _gradients(
    z: Array, y: Array, weights: Mapping[str, Array], *, normalize: bool
) -> dict[str, Array]:
    """The gradients of the loss of a batch, by the name of the weight."""
    inner = z @ weights["inner"] + weights["inner_offset"]
    hidden = _gelu(inner)
    output = z @ weights["linear"] + hidden @ weights["outer"] + weights["offset"]
    shaped = output.reshape(y.shape)
    v, norms = _unit(shaped) if normalize else (shaped, np.ones((1, 1, 1), np.float32))
    count, tasks, _ = y.shape
    gradient = -y / (count * tasks) if normalize else 2 * (v - y) / (count * tasks)
    by_task_v, by_task_y = v.transpose(1, 0, 2), y.transpose(1, 0, 2)
    wrong = by_task_v @ by_task_v.transpose(0, 2, 1) - by_task_y @ by_task_y.transpose(0, 2, 1)
    relation = (_RELATION * 4 / (count * count * tasks)) * (wrong @ by_task_v)
    gradient = gradient + relation.transpose(1, 0, 2)
    if normalize:
        gradient = (gradient - v * (v * gradient).sum(-1, keepdims=True)) / norms
    flat = gradient.reshape(count, -1)
    back = (flat @ weights["outer"].T) * _gelu_slope(inner)
    return {
        "linear": z.T @ flat,
        "offset": flat.sum(0),
        "inner": z.T @ back,
        "inner_offset": back.sum(0),
        "outer": hidden.T @ flat,
    }


def _loss(v: Array, y: Array) -> float:
    """Of vectors ``[texts, tasks, dim]``: one less their mean cosine to ``y``."""
    return float(1 - (_unit(v)[0] * _unit(y)[0]).sum(-1).mean())


def _adam(
    weight: Array, gradient: Array, first: Array, second: Array, step: int, rate: float
) -> None:
    """One step, in place."""
    first += (1 - _BETAS[0]) * (gradient - first)
    second += (1 - _BETAS[1]) * (gradient**2 - second)
    corrected = first / (1 - _BETAS[0] ** step)
    weight -= rate * corrected / (np.sqrt(second / (1 - _BETAS[1] ** step)) + _EPSILON)


def _rate(step: int, steps: int) -> float:
    """The learning rate: up over some steps, then down along a cosine."""
    if step <= _WARM_UP:
        return _RATE * step / _WARM_UP
    along = (step - _WARM_UP) / max(1, steps - _WARM_UP)
    return _LEAST_RATE + (_RATE - _LEAST_RATE) * (1 + cos(pi * along)) / 2


def _batches(rows: NDArray[np.intp], generator: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    size = min(_BATCH, len(rows))
    while True:
        order = generator.permutation(rows)
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def _unit(v: Array) -> tuple[Array, Array]:
    """Rows of length 1, and how long they were."""
    norms = np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12).astype(np.float32)
    return v / norms, norms


def _gelu(x: Array) -> Array:
    result: Array = x * (0.5 + 0.5 * erf(x / np.float32(sqrt(2))))
    return result


def _gelu_slope(x: Array) -> Array:
    density = np.exp(-x * x / 2) / np.float32(sqrt(2 * pi))
    result: Array = 0.5 + 0.5 * erf(x / np.float32(sqrt(2))) + x * density
    return result
