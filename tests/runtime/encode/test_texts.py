"""Vectors of texts, whatever windows and batches they go through."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedge.runtime import (
    Embedder,
    EmbedgeValueError,
    EmbedgeWarning,
    InferenceError,
    TextTooLongError,
)
from embedge.runtime.encode.tokenizer import TextTokenizer
from embedge.runtime.sessions.session import GraphSession
from tests.helpers.threads import all_ended, workers
from tests.helpers.tiny_texts import CLS, FIRST_WORD, SEP, TOLERANCE, UNK, distinct, ids


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def small_windows(monkeypatch: pytest.MonkeyPatch, *, first: int = 2) -> None:
    """Windows of 2, 8, 20, 20, … texts."""
    monkeypatch.setattr("embedge.runtime.encode.texts._FIRST_TEXTS", first)
    monkeypatch.setattr("embedge.runtime.encode.texts._WINDOW_TEXTS", 20)


class TestResult:
    def test_vectors_are_those_of_the_graph_in_the_texts_order(self, bundle: Any) -> None:
        texts = ["w1", "w1 w2 w3 w4", "w5 w6", "w7 w7 w7"]
        vectors = Embedder(bundle.path).encode(texts, batch_size=2)
        expected = [ids(1), ids(1, 2, 3, 4), ids(5, 6), ids(7, 7, 7)]
        assert vectors.dtype == np.float32
        assert vectors.shape == (4, 8)
        for vector, tokens in zip(vectors, expected, strict=True):
            np.testing.assert_allclose(
                vector, bundle.expected("retrieval", tokens), atol=TOLERANCE, rtol=0
            )

    def test_one_string_gives_one_vector(self, bundle: Any) -> None:
        model = Embedder(bundle.path)
        assert model.encode("w1").shape == (8,)
        np.testing.assert_array_equal(model.encode("w1"), model.encode(["w1"])[0])

    def test_no_text_gives_no_vector(self, bundle: Any) -> None:
        model = Embedder(bundle.path)
        assert model.encode([]).shape == (0, 8)
        assert model.encode([], truncate_dim=3).shape == (0, 3)
        assert model.encode([]).dtype == np.float32

    @pytest.mark.parametrize("kind", [tuple, np.array, iter], ids=["tuple", "array", "iterator"])
    def test_any_collection_of_strings_will_do(
        self, bundle: Any, kind: Callable[[list[str]], Any]
    ) -> None:
        model = Embedder(bundle.path)
        np.testing.assert_array_equal(model.encode(kind(["w1", "w2"])), model.encode(["w1", "w2"]))

    @pytest.mark.slow
    def test_a_vector_does_not_depend_on_its_batch_or_place(self, two_tasks: Any) -> None:
        generator = np.random.default_rng(0)
        texts = [
            " ".join(f"w{generator.integers(60)}" for _ in range(generator.integers(1, 14)))
            for _ in range(50)
        ]
        for precision in ("fp32", "int4"):
            model = Embedder(two_tasks.path, precision=precision)
            alone = np.stack([model.encode(text, task="code") for text in texts])
            order = generator.permutation(len(texts))
            mixed = model.encode([texts[i] for i in order], task="code", batch_size=7)
            assert min(map(cosine, alone[order], mixed)) >= 0.999999

    def test_texts_with_the_same_tokens_run_once(
        self, make_bundle: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = Embedder(make_bundle(multi_vector=True).path, threads=1)
        texts = ["w1 w2", "w3", " w1  w2", "w3", "w1 w2", "w4"]
        expected = np.stack([model.encode(text) for text in texts])
        rows: list[int] = []
        run = GraphSession.run

        def counted(session: GraphSession, output: str, inputs: Any) -> Any:
            rows.append(len(inputs["input_ids"]))
            return run(session, output, inputs)

        monkeypatch.setattr(GraphSession, "run", counted)
        found = model.encode(texts)
        np.testing.assert_array_equal(found, expected)
        assert sum(rows) == 3
        first, _, third, *_ = model.encode(texts, multi_vector=True)
        np.testing.assert_array_equal(first, third)
        first += 1
        assert not np.array_equal(first, third)

    def test_windows_are_one_call(
        self, bundle: Any, monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, int]]
    ) -> None:
        texts = [f"w{i % 60}" + " w1" * (i // 60) for i in range(83)]
        model = Embedder(bundle.path)
        whole = model.encode(texts, batch_size=100)
        small_windows(monkeypatch)
        shapes.clear()
        np.testing.assert_allclose(
            model.encode(texts, batch_size=100), whole, atol=TOLERANCE, rtol=0
        )
        assert [rows for rows, _ in shapes] == [2, 8, 20, 20, 20, 13]

    def test_texts_with_the_same_tokens_run_once_whatever_the_windows(
        self,
        make_bundle: Any,
        monkeypatch: pytest.MonkeyPatch,
        shapes: list[tuple[int, int]],
    ) -> None:
        model = Embedder(make_bundle(multi_vector=True).path)
        texts = [f"w{i % 7}" for i in range(50)]
        alone = np.stack([model.encode(text) for text in texts])
        small_windows(monkeypatch)
        shapes.clear()
        np.testing.assert_allclose(model.encode(texts), alone, atol=TOLERANCE, rtol=0)
        assert sum(rows for rows, _ in shapes) == 7
        first, *_, last = model.encode([*texts, "w0"], multi_vector=True)
        np.testing.assert_array_equal(first, last)
        first += 1
        assert not np.array_equal(first, last)

    def test_long_texts_make_windows_of_fewer(
        self, bundle: Any, monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, int]]
    ) -> None:
        monkeypatch.setattr("embedge.runtime.encode.texts._WINDOW_CHARACTERS", 6)
        small_windows(monkeypatch, first=3)
        texts = [f"w{i}" for i in range(10, 19)] + ["w1 w2 w3 w4"] * 2
        model = Embedder(bundle.path)
        vectors = model.encode(texts)
        assert [rows for rows, _ in shapes] == [2, 2, 2, 2, 2]  # the last text runs with the first
        for vector, text in zip(vectors, texts, strict=True):
            np.testing.assert_allclose(vector, model.encode(text), atol=TOLERANCE, rtol=0)

    def test_the_next_window_is_read_while_the_graph_runs(
        self, bundle: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small_windows(monkeypatch)
        read: list[int] = []
        changed = threading.Condition()
        tokenize = TextTokenizer.__call__

        def watched(self: TextTokenizer, texts: Any, *rest: Any) -> Any:
            with changed:
                read.append(len(texts))
                changed.notify_all()
            return tokenize(self, texts, *rest)

        run = GraphSession.run
        windows = [0]

        def waiting(self: GraphSession, output: str, inputs: Any) -> Any:
            windows[0] += 1
            with changed:
                assert changed.wait_for(lambda: len(read) > min(windows[0], 3), timeout=10)
                assert len(read) <= windows[0] + 1
            return run(self, output, inputs)

        monkeypatch.setattr(TextTokenizer, "__call__", watched)
        monkeypatch.setattr(GraphSession, "run", waiting)
        Embedder(bundle.path).encode([f"w{i}" for i in range(45)], batch_size=100)
        assert read == [2, 8, 20, 15]
        assert windows == [4]

    @pytest.mark.slow
    @pytest.mark.parametrize("place", [1, 3, 44])
    def test_a_text_of_any_window_is_named_by_its_place(
        self, bundle: Any, monkeypatch: pytest.MonkeyPatch, place: int
    ) -> None:
        small_windows(monkeypatch)
        texts = [f"w{i}" for i in range(45)]
        texts[place] = "w1 " * 20
        model = Embedder(bundle.path)
        message = rf"inputs\[{place}\] is longer than 16 tokens"
        before = workers()
        with pytest.raises(TextTooLongError, match=message):
            model.encode(texts, on_truncate="error")
        assert all_ended(before)
        with pytest.warns(EmbedgeWarning, match=message):
            model.encode(texts)

    @pytest.mark.slow
    def test_a_graph_that_fails_leaves_no_thread(
        self, bundle: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small_windows(monkeypatch)
        model = Embedder(bundle.path)

        def failing(self: GraphSession, output: str, inputs: Any) -> Any:
            raise InferenceError("it failed")

        monkeypatch.setattr(GraphSession, "run", failing)
        before = workers()
        with pytest.raises(InferenceError, match="it failed"):
            model.encode([f"w{i}" for i in range(45)])
        assert all_ended(before)


class TestTexts:
    @pytest.mark.parametrize(
        ("text", "tokens"),
        [
            ("", [CLS, SEP]),
            (" \t\n ", [CLS, SEP]),
            ("w1\ud800 w2", [CLS, UNK, FIRST_WORD + 2, SEP]),
            ("🙂 w3", [CLS, UNK, FIRST_WORD + 3, SEP]),
        ],
        ids=["empty", "whitespace", "lone surrogate", "emoji"],
    )
    def test_odd_texts_have_a_vector(self, bundle: Any, text: str, tokens: list[int]) -> None:
        vector = Embedder(bundle.path).encode(text)
        np.testing.assert_allclose(
            vector, bundle.expected("retrieval", tokens), atol=TOLERANCE, rtol=0
        )

    def test_a_text_without_tokens_is_a_zero_vector_and_a_warning(self, make_bundle: Any) -> None:
        model = Embedder(make_bundle(special_tokens=False).path)
        with pytest.warns(EmbedgeWarning, match=r"2 of 3 texts have no tokens .* inputs\[1\]"):
            vectors = model.encode(["w1", "", " "])
        assert np.abs(vectors[0]).max() > 0
        np.testing.assert_array_equal(vectors[1:], np.zeros((2, 8)))
        with pytest.warns(EmbedgeWarning):
            np.testing.assert_array_equal(model.encode(""), np.zeros(8))

    def test_an_appended_end_token_counts_towards_the_limit(
        self, make_bundle: Any, shapes: list[tuple[int, int]]
    ) -> None:
        tiny = make_bundle(special_tokens=False, eos=SEP)
        model = Embedder(tiny.path)
        np.testing.assert_allclose(
            model.encode("w1"), tiny.expected("retrieval", [5, SEP]), atol=TOLERANCE, rtol=0
        )
        model.encode("w1 " * 40, on_truncate="ignore")
        assert shapes[-1] == (1, 16)

    @pytest.mark.slow
    def test_100_000_characters_are_cut_at_the_limit_with_one_warning(self, bundle: Any) -> None:
        model = Embedder(bundle.path)
        long = ("w1 " * 40_000)[:100_000]
        with pytest.warns(EmbedgeWarning, match=r"inputs\[1\] is longer than 16 tokens"):
            vectors = model.encode(["w2", long])
        np.testing.assert_allclose(
            vectors[1], bundle.expected("retrieval", ids(*[1] * 14)), atol=TOLERANCE, rtol=0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.encode(long)

    @pytest.mark.parametrize("prefix", [[], [2, 3]], ids=["no prompt", "prompt"])
    def test_a_text_loses_its_start_where_the_bundle_says_so(
        self, bundle: Any, prefix: list[int]
    ) -> None:
        bundle.edit(lambda manifest: manifest["tokenizer"].update(truncation_side="left"))
        model = Embedder(bundle.path)
        prompt = " ".join(f"w{i}" for i in prefix) + " "
        with pytest.warns(EmbedgeWarning, match=r"inputs\[1\] is longer than 16 tokens"):
            vectors = model.encode(["w7", " ".join(f"w{i}" for i in range(40))], prompt=prompt)
        expected = [ids(*prefix, 7), ids(*range(26, 40))]
        for vector, tokens in zip(vectors, expected, strict=True):
            np.testing.assert_allclose(
                vector, bundle.expected("retrieval", tokens), atol=TOLERANCE, rtol=0
            )

    def test_on_truncate_error_names_the_text_and_ignore_is_silent(self, bundle: Any) -> None:
        model = Embedder(bundle.path)
        with pytest.raises(TextTooLongError, match=r"inputs\[1\] is longer than 16 tokens"):
            model.encode(["w1", "w1 " * 15], on_truncate="error")
        model.encode("w1 " * 15, on_truncate="ignore")
        model.encode("w1 " * 14, on_truncate="error")  # 16 with its special tokens: fits

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            (["w1", 3], r"inputs\[1\]: expected a string, found int"),
            (["w1", None], r"inputs\[1\]: expected a string, found NoneType"),
            (["w1", ["w2"]], r"inputs\[1\]: expected a string, found list"),
            (b"w1", "inputs: expected a string or a list of strings, found bytes"),
            (None, "inputs: expected a string or a list of strings, found NoneType"),
            ({"a": 1}, "inputs: expected a string or a list of strings, found dict"),
        ],
    )
    def test_what_is_no_string_is_named(self, bundle: Any, inputs: Any, message: str) -> None:
        with pytest.raises(EmbedgeValueError, match=message):
            Embedder(bundle.path).encode(inputs)


class TestBatches:
    def test_batches_stay_below_both_limits(
        self, bundle: Any, shapes: list[tuple[int, int]]
    ) -> None:
        texts = distinct(5, 10) + distinct(20, 1)
        Embedder(bundle.path).encode(texts, batch_size=8, max_batch_tokens=30)
        assert all(rows <= 8 and rows * tokens <= 30 for rows, tokens in shapes)
        assert sum(rows for rows, _ in shapes) == 25

    def test_one_text_above_the_token_limit_runs_alone(
        self, bundle: Any, shapes: list[tuple[int, int]]
    ) -> None:
        Embedder(bundle.path).encode(distinct(2, 3), max_batch_tokens=1)
        assert shapes == [(1, 5), (1, 5)]

    def test_rows_are_padded_to_the_multiple_that_a_kernel_needs(
        self, two_tasks: Any, shapes: list[tuple[int, int]]
    ) -> None:
        model = Embedder(two_tasks.path, precision="int4")
        vector = model.encode("w1", task="code", prompt="")
        assert shapes == [(1, 4)]
        np.testing.assert_allclose(
            vector, two_tasks.expected("code", ids(1)), atol=TOLERANCE, rtol=0
        )

    def test_token_types_are_given_to_graphs_that_take_them(self, make_bundle: Any) -> None:
        tiny = make_bundle(token_type_ids=True)
        np.testing.assert_allclose(
            Embedder(tiny.path).encode("w1"),
            tiny.expected("retrieval", ids(1)),
            atol=TOLERANCE,
            rtol=0,
        )
