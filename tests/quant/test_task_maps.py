"""Maps between tasks: what Adam follows is torch's gradient, what ridge finds is numpy's, and a network goes beyond."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from embedge.quant import task_maps
from embedge.quant.task_maps import fit_task_maps

Array = NDArray[Any]


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def every(count: int, of: int) -> NDArray[np.bool_]:
    return np.arange(of) % count == 0


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_torchs(normalize: bool) -> None:
    z, y = normal(0, 16, 9), unit(normal(1, 16, 2, 6))
    shapes = {
        "linear": (9, 12),
        "offset": (12,),
        "inner": (9, 5),
        "inner_offset": (5,),
        "outer": (5, 12),
    }
    weights = {name: normal(seed, *shape) for seed, (name, shape) in enumerate(shapes.items(), 2)}
    found = task_maps._gradients(z, y, weights, normalize=normalize)
    t: dict[str, Any] = {
        n: torch.tensor(w, dtype=torch.float64, requires_grad=True) for n, w in weights.items()
    }
    x, expected = torch.tensor(z, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    hidden = torch.nn.functional.gelu(x @ t["inner"] + t["inner_offset"])
    v = (x @ t["linear"] + t["offset"] + hidden @ t["outer"]).reshape(16, 2, 6)
    if normalize:
        v = torch.nn.functional.normalize(v, dim=-1)
    loss = torch.zeros((), dtype=torch.float64)
    for task in range(2):
        a, b = v[:, task], expected[:, task]
        near = 1 - (a * b).sum(-1) if normalize else (a - b).square().sum(-1)
        loss = loss + near.mean() + task_maps._RELATION * (a @ a.T - b @ b.T).square().mean()
    (loss / 2).backward()  # type: ignore[no-untyped-call]
    for name in shapes:
        gradient = t[name].grad.numpy()
        assert np.abs(found[name] - gradient).max() < 1e-5 * np.abs(gradient).max(), name


def test_what_is_linear_is_found_and_offsets_and_dead_inputs_do_no_harm() -> None:
    x = normal(0, 600, 12) * np.float32(3) + np.float32(7)
    x[:, 4] = 2.5  # the same for all
    matrices = {"a": normal(1, 12, 6), "b": normal(2, 12, 6)}
    vectors = {name: unit((x - 7) @ m) for name, m in matrices.items()}
    plain = {name: (x - 7) @ m for name, m in matrices.items()}
    maps = fit_task_maps(x, plain, every(10, 600), hidden=0, steps=1, normalize=False)
    fresh = normal(3, 50, 12) * np.float32(3) + np.float32(7)
    fresh[:, 4] = 2.5
    for row, (name, matrix) in enumerate(matrices.items()):
        found = unit(maps(fresh)[:, row])
        assert (found * unit((fresh - 7) @ matrix)).sum(-1).min() > 0.9999, name
    normalized = fit_task_maps(x, vectors, every(10, 600), hidden=0, steps=1)
    assert np.abs(np.linalg.norm(normalized(fresh), axis=-1) - 1).max() < 1e-5


def test_a_penalty_is_that_of_ridge_regression() -> None:
    x, y = normal(0, 200, 8), unit(normal(1, 200, 4))
    held_out = every(5, 200)
    maps = fit_task_maps(x, {"a": y}, held_out, hidden=0, steps=1, normalize=False)
    fitted, mean = x[~held_out].astype(np.float64), y[~held_out].mean(0)
    z = (fitted - fitted.mean(0)) / fitted.std(0)
    found = []
    for penalty in task_maps._RIDGES:
        system = z.T @ z + penalty * len(z) * np.eye(8)
        matrix = np.linalg.solve(system, z.T @ (y[~held_out] - mean))
        found.append(((x - fitted.mean(0)) / fitted.std(0)) @ matrix + mean)
    nearest = min(np.abs(one - maps(x)[:, 0]).max() for one in found)
    assert nearest < 1e-5


@pytest.mark.slow
def test_a_network_finds_what_no_matrix_does() -> None:
    x = normal(0, 3000, 6)
    y = unit(np.concatenate([np.abs(x), x], axis=1))
    held_out = every(10, 3000)
    line = fit_task_maps(x, {"a": y}, held_out, hidden=0, steps=1)
    told: list[int] = []
    both = fit_task_maps(x, {"a": y}, held_out, hidden=48, steps=400, told=told.append)
    fresh = normal(9, 400, 6)
    expected = unit(np.concatenate([np.abs(fresh), fresh], axis=1))
    losses = [1 - (m(fresh)[:, 0] * expected).sum(-1).mean() for m in (line, both)]
    assert losses[1] < losses[0] / 4, losses
    assert told == list(range(1, 401))


def test_training_never_gives_worse_maps_than_it_began_with() -> None:
    x = normal(0, 120, 40)
    y = unit(x @ normal(1, 40, 8))
    held_out = every(4, 120)
    line = fit_task_maps(x, {"a": y}, held_out, hidden=0, steps=1)
    both = fit_task_maps(x, {"a": y}, held_out, hidden=64, steps=60)
    cosines = [(m(x[held_out])[:, 0] * y[held_out]).sum(-1).mean() for m in (line, both)]
    assert cosines[1] >= cosines[0] - 1e-6


def test_arrays_of_other_lengths_and_nothing_to_fit_on_are_refused() -> None:
    x, y = normal(0, 20, 3), normal(1, 20, 4)
    for held_out in (np.zeros(20, bool), np.ones(20, bool), np.zeros(19, bool)):
        with pytest.raises(ValueError, match="held out"):
            fit_task_maps(x, {"a": y}, held_out, hidden=0, steps=1)
    with pytest.raises(ValueError, match="as many"):
        fit_task_maps(x, {"a": y[:-1]}, every(2, 20), hidden=0, steps=1)
