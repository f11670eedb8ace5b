"""Batches, callers and graphs at the same time, and the memory that they take."""

from __future__ import annotations

import gc
import pickle
import weakref
from functools import partial
from typing import Any

import numpy as np
import pytest

from embedge.runtime import (
    Embedder,
    EmbedgeError,
    InferenceError,
)
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.encode import batch_size as batch_size_module
from embedge.runtime.sessions.session import GraphSession
from tests.helpers.threads import in_threads
from tests.helpers.tiny_texts import TOLERANCE, distinct, ids

INTEGER = {"activation_constants": {"a": {"dtype": "uint8", "full": 128, "reduced": 64}}}


class TestBatchesAtTheSameTime:
    @pytest.fixture
    def integer(self, make_bundle: Any) -> Any:
        """A small graph that lists itself as one with 8-bit products."""
        return make_bundle("integer", precisions={"int8": INTEGER}, model={"max_length": 100})

    @pytest.mark.slow
    def test_batches_that_run_together_give_what_each_text_gives_alone(
        self, integer: Any, shapes: list[tuple[int, int]]
    ) -> None:
        generator = np.random.default_rng(5)
        texts = [
            " ".join(f"w{generator.integers(60)}" for _ in range(generator.integers(1, 14)))
            for _ in range(300)
        ]
        alone = Embedder(integer.path, threads=1)
        expected = np.stack([alone.encode(text) for text in texts])
        shapes.clear()
        together = Embedder(integer.path, threads=4).encode(texts, batch_size=8)
        assert len(shapes) >= 300 / 8
        np.testing.assert_allclose(together, expected, atol=TOLERANCE, rtol=0)

    @pytest.mark.slow
    def test_several_callers_share_the_threads(self, make_bundle: Any) -> None:
        tiny = make_bundle(tasks=("retrieval", "code"), precisions={"int8": INTEGER})
        model = Embedder(tiny.path, max_sessions=1, threads=2)
        texts = [f"w{i}" for i in range(60)]
        expected = {task: model.encode(texts, task=task) for task in model.tasks}

        def work(task: str) -> None:
            for count in (60, 1, 7) * 5:
                vectors = model.encode(texts[:count], task=task, batch_size=8)
                np.testing.assert_allclose(vectors, expected[task][:count], atol=TOLERANCE, rtol=0)

        in_threads(*(partial(work, task) for task in model.tasks * 2))

    def test_a_graph_that_fails_in_a_thread_is_the_calls_error(
        self, integer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = Embedder(integer.path, threads=2)
        run = GraphSession.run

        def failing(self: GraphSession, output: str, inputs: Any) -> Any:
            if inputs["input_ids"].shape[1] == 4:
                raise InferenceError("the batch of 4 tokens failed")
            return run(self, output, inputs)

        texts = distinct(10, 3) + distinct(10, 2) + distinct(10, 1)
        with monkeypatch.context() as patch:
            patch.setattr(GraphSession, "run", failing)
            with pytest.raises(InferenceError, match="the batch of 4 tokens failed"):
                model.encode(texts, batch_size=10)
        assert model.encode(texts).shape == (30, 8)

    def test_several_texts_and_a_short_one_take_one_thread_each_and_a_long_one_all(
        self, integer: Any, opened: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With AMX; elsewhere any text that is alone takes all threads."""
        monkeypatch.setattr(batch_size_module, "has_amx", lambda: True)
        model = Embedder(integer.path, threads=2)
        assert opened == []
        model.encode(distinct(2, 90))
        model.encode("w1 " * 62)  # and two special tokens
        assert opened == [("retrieval", 1)]
        model.encode("w1 " * 63)
        model.encode(["w1", "w2"])
        assert opened == [("retrieval", 1), ("retrieval", 2)]
        monkeypatch.setattr(batch_size_module, "has_amx", lambda: False)
        opened.clear()
        model = Embedder(integer.path, threads=2)
        model.encode("w1")
        model.encode(distinct(200, 14), batch_size=1000)
        assert opened == [("retrieval", 2), ("retrieval", 1)]

    def test_one_thread_needs_one_session(
        self, integer: Any, opened: list[tuple[str, int]]
    ) -> None:
        model = Embedder(integer.path, threads=1)
        model.encode(["w1", "w2"])
        model.encode("w1 " * 90)
        assert opened == [("retrieval", 1)]

    @pytest.mark.parametrize("kind", ["large", "not 8-bit"])
    def test_other_graphs_have_one_session_and_larger_batches(
        self,
        integer: Any,
        bundle: Any,
        opened: list[tuple[str, int]],
        shapes: list[tuple[int, int]],
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
    ) -> None:
        texts = distinct(256, 14)  # 16 tokens each
        Embedder(integer.path, threads=2).encode(texts, batch_size=1000)
        assert shapes == [(32, 16)] * 8
        if kind == "large":
            monkeypatch.setattr("embedge.runtime.encode.batch_size.SMALL_GRAPH_BYTES", 100)
        shapes.clear()
        opened.clear()
        model = Embedder((integer if kind == "large" else bundle).path, threads=2)
        model.encode(texts, batch_size=1000)
        model.encode("w1")
        assert shapes == [(64, 16)] * 4 + [(1, 3)]
        assert opened == [("retrieval", 2)]

    def test_a_limit_without_room_for_two_sessions_leaves_one(
        self, integer: Any, opened: list[tuple[str, int]]
    ) -> None:
        size = Bundle(integer.path).graph_bytes("int8", "retrieval")
        texts = distinct(10, 80) + distinct(10, 2) + distinct(10, 1)
        expected = Embedder(integer.path, threads=2).encode(texts)
        for limit, sessions in ((2 * size - 1, 1), (2 * size, 2)):
            opened.clear()
            model = Embedder(integer.path, threads=2, memory_limit=limit)
            for count in (30, 1, 30):
                np.testing.assert_allclose(
                    model.encode(texts[:count]), expected[:count], atol=TOLERANCE, rtol=0
                )
            assert len(opened) == sessions

    def test_token_ids_go_the_way_of_texts(
        self, integer: Any, shapes: list[tuple[int, int]]
    ) -> None:
        model = Embedder(integer.path, threads=2)
        expected = model.encode(["w1", "w2 w3", "w4"])
        of_texts = list(shapes)
        shapes.clear()
        rows = [np.array(ids(*words)) for words in ((1,), (2, 3), (4,))]
        np.testing.assert_array_equal(model.run_ids(rows, task="retrieval"), expected)
        assert sorted(shapes) == sorted(of_texts)
        assert model.run_ids([]).shape == (0, 8)


class TestSessions:
    def test_an_embedder_that_is_deleted_closes_its_sessions_at_once(
        self, bundle: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alive: weakref.WeakSet[GraphSession] = weakref.WeakSet()
        init = GraphSession.__init__

        def recording(self: GraphSession, *arguments: Any, **options: Any) -> None:
            init(self, *arguments, **options)
            alive.add(self)

        monkeypatch.setattr(GraphSession, "__init__", recording)
        model = Embedder(bundle.path)
        model.encode("w1")
        assert len(alive) == 1
        gc.disable()  # nothing waits for it
        try:
            del model
            assert not alive
        finally:
            gc.enable()

    @pytest.mark.slow
    def test_two_threads_share_an_embedder_that_keeps_one_session(self, two_tasks: Any) -> None:
        model = Embedder(two_tasks.path, precision="fp32", max_sessions=1, threads=1)
        texts = [f"w{i}" for i in range(40)]
        expected = {task: model.encode(texts, task=task) for task in model.tasks}

        def work(task: str) -> None:
            for _ in range(10):
                vectors = model.encode(texts, task=task, batch_size=8)
                np.testing.assert_array_equal(vectors, expected[task])

        in_threads(*(partial(work, task) for task in model.tasks * 2))

    def test_a_limit_below_one_graph_is_refused_with_its_size(self, bundle: Any) -> None:
        for limit in (100, "0.1KB"):
            model = Embedder(bundle.path, memory_limit=limit)
            with pytest.raises(EmbedgeError, match=r"take \d+ bytes, above memory_limit \(100\)"):
                model.encode("w1")
        assert Embedder(bundle.path, memory_limit=1_000_000).encode("w1").shape == (8,)

    def test_it_travels_to_another_process_as_its_arguments(self, bundle: Any) -> None:
        model = Embedder(bundle.path, threads=1)
        copy = pickle.loads(pickle.dumps(model))
        np.testing.assert_array_equal(copy.encode("w1"), model.encode("w1"))


class TestMemory:
    def test_a_run_without_memory_is_one_error_that_says_what_to_lower(
        self, bundle: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = Embedder(bundle.path)
        model.encode("w1")

        class Full:
            def run(self, *_: Any) -> Any:
                raise RuntimeError("Failed to allocate memory\nfor requested buffer of size 7")

        make = GraphSession.run
        message = (
            r"failed on a batch of 1 × 4 tokens: Failed to allocate memory for requested buffer of "
            r"size 7; if memory ran out, lower max_batch_tokens, shorten the text"
        )

        def full(self: GraphSession, output: str, inputs: Any) -> Any:
            monkeypatch.setattr(self, "_session", Full())
            return make(self, output, inputs)

        monkeypatch.setattr(GraphSession, "run", full)
        with pytest.raises(InferenceError, match=message):
            model.encode("w1 w2")

    def test_short_texts_do_not_run_in_rows_of_a_long_one(
        self, bundle: Any, shapes: list[tuple[int, int]]
    ) -> None:
        texts = ["w1 " * 14, *distinct(20, 1)]
        Embedder(bundle.path).encode(texts, batch_size=50)
        assert shapes[0] == (3, 16)  # 26 tokens of padding; a third short text would make it 39
        assert sum(rows for rows, _ in shapes) == 21
