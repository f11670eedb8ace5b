"""Runs of the vision tower: which images share them, and what is held meanwhile."""

from __future__ import annotations

import itertools
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.runtime import (
    Embedder,
    EmbedgeError,
    ImageError,
)
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.host.onnxruntime import open_session
from embedge.runtime.images import encode as pipeline
from embedge.runtime.images.patches import ImagePatches
from embedge.runtime.sessions.session import GraphSession
from tests.helpers.pictures import picture, pictures
from tests.helpers.threads import all_ended, in_threads, workers

CLS, SEP, FIRST_WORD = 2, 3, 4
TOLERANCE = 1e-5  # float32 sums in another order


class TestRuns:
    def test_images_of_one_number_of_patches_share_runs_of_the_vision_tower(
        self, model: Embedder, runs: list[tuple[str, tuple[int, ...]]]
    ) -> None:
        # 16 patches: three of 8 × 8; 32: 16 × 8 and 8 × 16
        images = [picture(*size) for size in ((8, 8), (16, 8), (8, 8), (8, 16), (8, 8), (4, 4))]
        model.encode_image(images, task="code")
        vision = [shape for name, shape in runs if name == "vision"]
        assert sorted(vision) == [(1, 4), (2, 32), (3, 16)]
        assert runs.index(("vision", (1, 4))) < min(
            place for place, (name, _) in enumerate(runs) if name == "code"
        )

    def test_runs_stay_below_the_patch_budget_but_take_one_image(
        self,
        with_images: Any,
        runs: list[tuple[str, tuple[int, ...]]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("embedge.runtime.encode.batch_size.CPU_BATCH_TOKENS_PER_THREAD", 20)
        model = Embedder(with_images.path, threads=2)
        images = [picture(8, 8, seed) for seed in range(5)] + [picture(28, 24)]
        model.encode_image(images, task="code")
        vision = [shape for name, shape in runs if name == "vision"]
        assert sorted(vision) == [(1, 16), (1, 168), (2, 16), (2, 16)]
        tokens = [shape for name, shape in runs if name == "code"]
        assert sum(rows for rows, _ in tokens) == 6
        assert all(rows == 1 or rows * length <= 40 for rows, length in tokens)

    def test_batch_size_bounds_both_graphs(
        self, model: Embedder, runs: list[tuple[str, tuple[int, ...]]]
    ) -> None:
        model.encode_image([picture(8, 8, seed) for seed in range(7)], task="code", batch_size=2)
        assert sum(shape[0] for name, shape in runs if name == "vision") == 7
        assert all(shape[0] <= 2 for _, shape in runs)

    @pytest.mark.parametrize("limit", [1, 700, 1 << 30])
    def test_features_and_patches_are_bounded_whatever_the_windows(
        self,
        model: Embedder,
        runs: list[tuple[str, tuple[int, ...]]],
        monkeypatch: pytest.MonkeyPatch,
        limit: int,
    ) -> None:
        images = pictures()
        expected = model.encode_image(images, task="code")
        runs.clear()
        monkeypatch.setattr(pipeline, "_WINDOW_BYTES", limit)
        monkeypatch.setattr(pipeline, "_CHUNK_BYTES", limit)
        np.testing.assert_allclose(
            model.encode_image(images, task="code"), expected, atol=TOLERANCE, rtol=0
        )
        phases = [name for name, _ in runs]
        turns = sum(a != b for a, b in itertools.pairwise(phases))
        assert {1: turns == 2 * len(images) - 1, 700: turns > 1, 1 << 30: turns == 1}[limit]

    def test_patches_of_two_chunks_are_held_at_most(
        self, model: Embedder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alive: weakref.WeakSet[Any] = weakref.WeakSet()
        most = [0]
        read = pipeline.ImagePipeline._read

        def watched(self: Any, *arguments: Any) -> Any:
            most[0] = max(most[0], len(alive))
            patches = read(self, *arguments)
            alive.add(patches)
            return patches

        monkeypatch.setattr(pipeline.ImagePipeline, "_read", watched)
        monkeypatch.setattr(ImagePatches, "__hash__", object.__hash__)
        monkeypatch.setattr(pipeline, "_CHUNK_BYTES", 3 * 16 * 24 * 4)  # three of 8 × 8
        model.encode_image([picture(8, 8, seed) for seed in range(30)], task="code")
        assert 0 < most[0] < 6  # those of the chunk in the graph, and of the one that is read

    def test_the_next_chunk_is_read_while_the_graph_runs(
        self, model: Embedder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[int] = []
        changed = threading.Condition()
        original = pipeline.ImagePipeline._read

        def watched(self: Any, image: Any, index: int, *arguments: Any) -> Any:
            with changed:
                read.append(index)
                changed.notify_all()
            return original(self, image, index, *arguments)

        run = GraphSession.run
        looked = [0]

        def waiting(self: GraphSession, output: str, inputs: Any) -> Any:
            if "pixel_values" in inputs:
                looked[0] += 1
                with changed:
                    assert changed.wait_for(lambda: len(read) > min(looked[0], 4), timeout=10)
                    assert len(read) <= looked[0] + 1
            return run(self, output, inputs)

        monkeypatch.setattr(pipeline.ImagePipeline, "_read", watched)
        monkeypatch.setattr(GraphSession, "run", waiting)
        monkeypatch.setattr(pipeline, "_CHUNK_BYTES", 1)  # an image each
        vectors = model.encode_image([picture(8, 8, seed) for seed in range(5)], task="code")
        assert read == [0, 1, 2, 3, 4]
        assert looked == [5]
        assert np.abs(vectors).max(axis=1).min() > 0

    @pytest.mark.slow
    def test_a_bad_image_of_a_later_chunk_is_named_and_leaves_no_thread(
        self, model: Embedder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipeline, "_CHUNK_BYTES", 1)
        images: list[Any] = [picture(8, 8, seed) for seed in range(4)]
        images[2] = b"not an image"
        before = workers()
        with pytest.raises(ImageError, match=r"images\[2\]: expected an image file") as caught:
            model.encode_image(images, task="code")
        assert caught.value.index == 2
        assert all_ended(before)

    def test_threads_give_what_each_image_gives_alone(self, make_bundle: Any) -> None:
        constants = {"a": {"dtype": "uint8", "full": 128, "reduced": 64}}
        precisions = {"int8": {"activation_constants": constants}}
        tiny = make_bundle("integer", images=True, precisions=precisions)
        images = pictures()
        vectors = Embedder(tiny.path, threads=3).encode_image(images)
        for vector, image in zip(vectors, images, strict=True):
            expected, _ = tiny.of_image("retrieval", image)
            np.testing.assert_allclose(vector, expected, atol=TOLERANCE, rtol=0)

    @pytest.mark.slow
    def test_two_threads_share_both_graphs_under_a_limit_for_one(self, with_images: Any) -> None:
        model = Embedder(with_images.path, max_sessions=1)
        images = pictures()
        expected = model.encode_image(images, task="code")

        def work() -> None:
            for _ in range(5):
                vectors = model.encode([*images, "w1"], task="code")[:-1]
                np.testing.assert_allclose(vectors, expected, atol=TOLERANCE, rtol=0)

        in_threads(*[work] * 4)


class TestLowMemory:
    @pytest.mark.slow
    def test_the_vision_tower_is_closed_before_the_tasks_graph_opens(
        self, with_images: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = Bundle(with_images.path)
        sizes = {name: bundle.graph_bytes("fp32", name) for name in ("vision", "code")}
        alive: weakref.WeakSet[GraphSession] = weakref.WeakSet()
        opened: list[tuple[str, list[str]]] = []
        init = GraphSession.__init__

        def opening(file: str, *options: Any) -> Any:
            opened.append((Path(file).stem, [session.file.stem for session in alive]))
            return open_session(file, *options)

        def recording(self: GraphSession, *arguments: Any, **options: Any) -> None:
            init(self, *arguments, **options)
            alive.add(self)

        monkeypatch.setattr("embedge.runtime.sessions.session.open_session", opening)

        monkeypatch.setattr(GraphSession, "__init__", recording)
        monkeypatch.setattr(pipeline, "_WINDOW_BYTES", 1)
        monkeypatch.setattr(pipeline, "_CHUNK_BYTES", 1)
        model = Embedder(with_images.path, memory_limit=max(sizes.values()))
        images = pictures()[:2]
        vectors = model.encode([*images, "w1"], task="code")
        # One session at a time, and the text finds the task's graph open.
        assert opened == [("vision", []), ("code", []), ("vision", []), ("code", [])]
        np.testing.assert_allclose(
            vectors, Embedder(with_images.path).encode([*images, "w1"], task="code"), atol=TOLERANCE
        )

    def test_a_limit_below_the_vision_tower_is_refused_with_its_size(
        self, with_images: Any
    ) -> None:
        size = Bundle(with_images.path).graph_bytes("fp32", "vision")
        model = Embedder(with_images.path, memory_limit=size - 1)
        with pytest.raises(EmbedgeError, match=rf"'vision' and its weights take {size} bytes"):
            model.encode_image(picture(8, 8), task="code")
