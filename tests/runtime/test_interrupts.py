"""An interrupt of a call at any moment: no graph stays in use, and the next call gives its vectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embedge.runtime import Embedder
from embedge.runtime.encode import batch_runner, prefetch, texts, vectors
from embedge.runtime.images import encode as images_module
from embedge.runtime.images import mixed
from embedge.runtime.sessions import pool, session_workers
from tests.helpers.interrupts import Interrupts, in_time, swallowed
from tests.helpers.pictures import picture
from tests.helpers.threads import none_added, workers

MODULES = (batch_runner, images_module, mixed, pool, prefetch, session_workers, texts, vectors)
FILES = tuple(module.__file__ for module in MODULES)
STEP = 7  # of the moments; all of them would take half a minute
INTEGER = {"activation_constants": {"a": {"dtype": "uint8", "full": 128, "reduced": 64}}}


def interrupt(model: Embedder, call: Callable[[], Any]) -> None:
    """Interrupts a call at every STEP-th moment, and looks at what is left."""
    expected = call()
    before = workers()
    for moment in itertools.count(0, STEP):
        interrupts = Interrupts(moment, FILES)
        interrupts.during(call)
        assert all(graph.users == 0 for graph in model._graphs._pool._graphs.values())
        if not interrupts.hit:
            break
    assert moment > 20 * STEP
    assert none_added(before)
    in_time(lambda: np.testing.assert_allclose(call(), expected, atol=1e-6, rtol=0))


@pytest.mark.slow
@swallowed
@pytest.mark.parametrize("precision", [{"fp32": {}}, {"int8": INTEGER}], ids=["fp32", "int8"])
def test_of_texts_in_windows(
    make_bundle: Any, monkeypatch: pytest.MonkeyPatch, precision: dict[str, Any]
) -> None:
    monkeypatch.setattr(texts, "_FIRST_TEXTS", 3)
    model = Embedder(make_bundle(precisions=precision).path, threads=2, max_sessions=1)
    inputs = [f"w{i % 7} w{i % 11}" for i in range(20)]
    interrupt(model, lambda: model.encode(inputs, batch_size=2))


@pytest.mark.slow
@swallowed
def test_of_images_and_texts(with_images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "_CHUNK_BYTES", 1)
    model = Embedder(with_images.path, task="code", max_sessions=1)
    inputs: list[Any] = [picture(8, 8), "w1", picture(12, 8), "w2 w3"]
    interrupt(model, lambda: model.encode(inputs))
