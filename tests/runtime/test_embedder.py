from __future__ import annotations

import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from embedge.runtime import (
    BundleError,
    Embedder,
    EmbedgeError,
    EmbedgeValueError,
    EmbedgeWarning,
    InferenceError,
    TextTooLongError,
)
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.encode import batch_size as batch_size_module
from embedge.runtime.encode.tokenizer import TextTokenizer
from embedge.runtime.sessions.session import GraphSession
from tests.helpers.threads import all_ended, workers

CLS, SEP, UNK = 2, 3, 1
FIRST_WORD = 4  # id of "w0"
TOLERANCE = 1e-6  # float32 sums of at most 16 tokens in another order


def ids(*words: int) -> list[int]:
    """Ids of the text "w<a> w<b> …" with its special tokens."""
    return [CLS, *(FIRST_WORD + word for word in words), SEP]


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def small_windows(monkeypatch: pytest.MonkeyPatch, *, first: int = 2) -> None:
    """Windows of 2, 8, 20, 20, … texts."""
    monkeypatch.setattr("embedge.runtime.encode.texts._FIRST_TEXTS", first)
    monkeypatch.setattr("embedge.runtime.encode.texts._WINDOW_TEXTS", 20)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ``(batch, tokens)`` of every run."""
    seen: list[tuple[int, int]] = []
    run = GraphSession.run

    def recording(self: GraphSession, output: str, inputs: Any) -> Any:
        seen.append(inputs["input_ids"].shape)
        return run(self, output, inputs)

    monkeypatch.setattr(GraphSession, "run", recording)
    return seen


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

        def watched(self: TextTokenizer, texts: Any) -> Any:
            with changed:
                read.append(len(texts))
                changed.notify_all()
            return tokenize(self, texts)

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


class TestDimensions:
    def test_truncation_cuts_and_normalizes_again(self, bundle: Any) -> None:
        model = Embedder(bundle.path)
        full, cut = model.encode("w1 w2"), model.encode("w1 w2", truncate_dim=3)
        np.testing.assert_allclose(cut, full[:3] / np.linalg.norm(full[:3]), atol=TOLERANCE, rtol=0)

    def test_truncation_only_cuts_where_the_source_does_not_normalize(
        self, make_bundle: Any
    ) -> None:
        model = Embedder(make_bundle(model={"normalize": False}).path)
        full = model.encode("w1 w2")
        np.testing.assert_array_equal(model.encode("w1 w2", truncate_dim=3), full[:3])
        unit = model.encode("w1 w2", truncate_dim=3, normalize_embeddings=True)
        assert np.linalg.norm(unit) == pytest.approx(1, abs=TOLERANCE)

    @pytest.mark.parametrize("dim", [2, 4, 8])
    def test_declared_dimensions_are_given(self, two_tasks: Any, dim: int) -> None:
        model = Embedder(two_tasks.path, precision="fp32")
        assert model.encode("w1", task="code", truncate_dim=dim).shape == (dim,)

    @pytest.mark.parametrize("dim", [3, 0, -1, 9, True, 2.0, "4"])
    def test_other_dimensions_are_refused_with_the_list(self, two_tasks: Any, dim: Any) -> None:
        with pytest.raises(EmbedgeValueError, match="the bundle has one of 2, 4, 8"):
            Embedder(two_tasks.path, precision="fp32").encode("w1", task="code", truncate_dim=dim)

    @pytest.mark.parametrize("dim", [0, -1, 9, True])
    def test_without_declared_dimensions_any_will_do_up_to_the_full_one(
        self, bundle: Any, dim: Any
    ) -> None:
        model = Embedder(bundle.path)
        assert model.encode("w1", truncate_dim=7).shape == (7,)
        with pytest.raises(EmbedgeValueError, match="the bundle has 1 to 8"):
            model.encode("w1", truncate_dim=dim)


class TestChoices:
    def test_a_task_is_needed_where_there_are_several(self, two_tasks: Any) -> None:
        with pytest.raises(
            EmbedgeValueError, match='retrieval, code; choose one, such as task="retr'
        ):
            Embedder(two_tasks.path, precision="fp32").encode("w1")

    def test_an_unknown_task_is_refused_with_the_list(self, two_tasks: Any) -> None:
        with pytest.raises(EmbedgeValueError, match="no task 'codes'; it has retrieval, code"):
            Embedder(two_tasks.path, precision="fp32").encode("w1", task="codes")

    def test_a_task_missing_at_a_precision_is_told_from_an_unknown_one(
        self, two_tasks: Any
    ) -> None:
        two_tasks.edit(lambda m: m["precisions"]["int4"]["graphs"].pop("code"))
        model = Embedder(two_tasks.path, precision="int4")
        assert model.tasks == ("retrieval",)
        with pytest.raises(EmbedgeValueError, match="'code' has no graph at precision 'int4'"):
            model.encode("w1", task="code")

    def test_precision_may_be_left_out_only_where_there_is_one(
        self, bundle: Any, two_tasks: Any
    ) -> None:
        assert Embedder(bundle.path).precision == "fp32"
        with pytest.raises(
            EmbedgeValueError, match='fp32, int4; choose one, such as precision="fp32"'
        ):
            Embedder(two_tasks.path)
        with pytest.raises(EmbedgeValueError, match="no precision 'int2'; it has fp32, int4"):
            Embedder(two_tasks.path, precision="int2")

    @pytest.mark.parametrize(
        "wrong",
        [
            {"batch_size": 0},
            {"batch_size": True},
            {"max_batch_tokens": -5},
            {"max_batch_tokens": 2.5},
            {"on_truncate": "cut"},
            {"normalize_embeddings": 1},
            {"prompt": 3},
            {"multi_vector": True},
        ],
        ids=str,
    )
    def test_wrong_options_are_value_errors_even_without_texts(
        self, bundle: Any, wrong: dict[str, Any]
    ) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", ".")) as caught:
            Embedder(bundle.path).encode([], **wrong)
        assert isinstance(caught.value, EmbedgeError)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"threads": 0},
            {"threads": True},
            {"max_sessions": 0},
            {"memory_limit": -1},
            {"memory_limit": "0GB"},
            {"memory_limit": "2 bananas"},
            {"device": "tpu"},
            {"verify": "maybe"},
        ],
        ids=str,
    )
    def test_wrong_arguments_of_the_embedder_are_refused(
        self, bundle: Any, wrong: dict[str, Any]
    ) -> None:
        with pytest.raises(EmbedgeValueError, match=next(iter(wrong))):
            Embedder(bundle.path, **wrong)

    def test_more_threads_than_any_machine_has_are_refused(self, bundle: Any) -> None:
        message = "threads is 1000000000; expected at most 1024"
        with pytest.raises(EmbedgeValueError, match=message):
            Embedder(bundle.path, threads=10**9)
        assert Embedder(bundle.path, threads=64).encode("w1").shape == (8,)

    def test_what_is_no_path_is_refused(self) -> None:
        with pytest.raises(EmbedgeValueError, match="bundle is None; expected the path of a"):
            Embedder(cast(Any, None))


class TestPrompts:
    @pytest.fixture
    def model(self, two_tasks: Any) -> Embedder:
        return Embedder(two_tasks.path, precision="fp32")

    def test_a_prompt_stands_before_the_text(self, model: Embedder) -> None:
        named = model.encode("w1", task="code", prompt_name="passage")
        np.testing.assert_array_equal(named, model.encode("passage: w1", task="code", prompt=""))
        np.testing.assert_array_equal(named, model.encode("w1", task="code", prompt="passage: "))

    def test_the_default_prompt_is_used_when_none_is_named(self, model: Embedder) -> None:
        np.testing.assert_array_equal(
            model.encode("w1", task="code"), model.encode("w1", task="code", prompt_name="query")
        )

    def test_query_and_document_use_their_prompts(self, model: Embedder) -> None:
        for encode, name in ((model.encode_query, "query"), (model.encode_document, "passage")):
            np.testing.assert_array_equal(
                encode("w1", task="code"), model.encode("w1", task="code", prompt_name=name)
            )

    def test_query_and_document_are_plain_without_prompts(self, bundle: Any) -> None:
        model = Embedder(bundle.path)
        np.testing.assert_array_equal(model.encode_query("w1"), model.encode("w1"))
        np.testing.assert_array_equal(model.encode_document(["w1"]), model.encode(["w1"]))

    def test_documents_do_not_get_the_queries_default_prompt(self, make_bundle: Any) -> None:
        model = Embedder(make_bundle(prompts={"query": "query: "}, default_prompt="query").path)
        np.testing.assert_array_equal(model.encode_document("w1"), model.encode("w1", prompt=""))
        np.testing.assert_array_equal(
            model.encode_document("w1", prompt_name="query"), model.encode_query("w1")
        )

    def test_an_unknown_prompt_is_refused_with_the_list(self, model: Embedder, bundle: Any) -> None:
        with pytest.raises(EmbedgeValueError, match="no prompt 'doc'; it has query, passage"):
            model.encode("w1", task="code", prompt_name="doc")
        with pytest.raises(EmbedgeValueError, match="no prompt 'query': it declares none"):
            Embedder(bundle.path).encode("w1", prompt_name="query")


class TestMultiVectors:
    def test_a_vector_per_token_without_padding(self, make_bundle: Any) -> None:
        tiny = make_bundle(multi_vector=True)
        model = Embedder(tiny.path)
        short, long = model.encode(["w1", "w1 w2 w3"], multi_vector=True)
        assert short.shape == (3, 4)
        assert long.shape == (5, 4)
        states = tiny.table[ids(1)] @ tiny.matrices["retrieval"]
        np.testing.assert_allclose(short, states[:, :4], atol=1e-5, rtol=0)
        one = model.encode("w1", multi_vector=True)
        np.testing.assert_array_equal(one, short)
        assert model.encode([], multi_vector=True) == []

    def test_similarity_is_late_interaction(self, make_bundle: Any) -> None:
        model = Embedder(make_bundle(multi_vector=True).path)
        parts = model.encode(["w1", "w1 w2 w3"], multi_vector=True)
        scores = model.similarity(parts, parts)
        by_hand = [[(a @ b.T).max(axis=1).sum() for b in parts] for a in parts]
        np.testing.assert_allclose(scores, by_hand, rtol=1e-5)

    def test_truncation_is_refused(self, make_bundle: Any) -> None:
        model = Embedder(make_bundle(multi_vector=True).path)
        with pytest.raises(EmbedgeValueError, match="truncate_dim is for single vectors"):
            model.encode("w1", multi_vector=True, truncate_dim=2)


def distinct(count: int, words: int) -> list[str]:
    """Texts of some words each, of which no two are the same."""
    rest = "w1 " * (words - 2) if words > 1 else ""
    return [f"{rest}w{i % 60} w{i // 60}" if words > 1 else f"w{i}" for i in range(count)]


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


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The ``(graph, threads)`` of every session, in the order of their opening."""
    seen: list[tuple[str, int]] = []
    init = GraphSession.__init__

    def recording(self: GraphSession, file: Path, session: Any, **options: Any) -> None:
        seen.append((file.stem, options["threads"]))
        init(self, file, session, **options)

    monkeypatch.setattr(GraphSession, "__init__", recording)
    return seen


INTEGER = {"activation_constants": {"a": {"dtype": "uint8", "full": 128, "reduced": 64}}}


class TestBatchesAtTheSameTime:
    @pytest.fixture
    def integer(self, make_bundle: Any) -> Any:
        """A small graph that lists itself as one with 8-bit products."""
        return make_bundle("integer", precisions={"int8": INTEGER}, model={"max_length": 100})

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

    def test_several_callers_share_the_threads(self, make_bundle: Any) -> None:
        tiny = make_bundle(tasks=("retrieval", "code"), precisions={"int8": INTEGER})
        model = Embedder(tiny.path, max_sessions=1, threads=2)
        texts = [f"w{i}" for i in range(60)]
        expected = {task: model.encode(texts, task=task) for task in model.tasks}
        failures: list[BaseException] = []

        def work(task: str) -> None:
            try:
                for count in (60, 1, 7) * 5:
                    vectors = model.encode(texts[:count], task=task, batch_size=8)
                    np.testing.assert_allclose(
                        vectors, expected[task][:count], atol=TOLERANCE, rtol=0
                    )
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(task,)) for task in model.tasks * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        assert failures == []

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
    def test_two_threads_share_an_embedder_that_keeps_one_session(self, two_tasks: Any) -> None:
        model = Embedder(two_tasks.path, precision="fp32", max_sessions=1, threads=1)
        texts = [f"w{i}" for i in range(40)]
        expected = {task: model.encode(texts, task=task) for task in model.tasks}
        failures: list[object] = []

        def work(task: str) -> None:
            try:
                for _ in range(10):
                    vectors = model.encode(texts, task=task, batch_size=8)
                    np.testing.assert_array_equal(vectors, expected[task])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(task,)) for task in model.tasks * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        assert failures == []

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


class TestFacts:
    def test_names_of_sentence_transformers_are_there(self, two_tasks: Any) -> None:
        model = Embedder(two_tasks.path, precision="fp32")
        assert model.tasks == ("retrieval", "code")
        assert model.dim == model.get_sentence_embedding_dimension() == 8
        assert model.max_seq_length == 16
        assert model.device == "cpu"
        assert repr(model) == f"Embedder('{two_tasks.path}', precision='fp32', device='cpu')"

    def test_images_are_refused_without_a_vision_tower(self, bundle: Any) -> None:
        with pytest.raises(EmbedgeValueError, match="no vision tower; it embeds: text"):
            Embedder(bundle.path).encode_image(["page.png"], task="retrieval")

    def test_a_progress_bar_counts_the_texts(
        self, bundle: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = Embedder(bundle.path)
        model.encode(["w1", "w2"], show_progress_bar=True)
        assert "2/2" in capsys.readouterr().err
        model.encode(["w1", "w2"])
        assert capsys.readouterr().err == ""


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


class TestDamagedGraphs:
    def test_values_that_are_not_finite_are_an_error(self, bundle: Any) -> None:
        file = bundle.path / "fp32/shared.bin"
        data = bytearray(file.read_bytes())
        data[4096:] = np.full((len(data) - 4096) // 4, np.nan, np.float32).tobytes()
        file.write_bytes(bytes(data))
        with pytest.raises(
            InferenceError, match=r"retrieval\.onnx: gave values that are not finite"
        ):
            Embedder(bundle.path).encode("w1")

    def test_vectors_of_another_length_than_the_manifest_says_are_an_error(
        self, bundle: Any
    ) -> None:
        bundle.edit(lambda m: m["model"].update(dim=9))
        with pytest.raises(
            BundleError, match=r"expected embedding of the shape \[1, 9\], found \[1, 8\]"
        ):
            Embedder(bundle.path).encode("w1")

    def test_other_inputs_than_the_manifest_says_are_an_error(self, bundle: Any) -> None:
        bundle.edit(lambda m: m["model"]["inputs"].append("token_type_ids"))
        with pytest.raises(BundleError, match=r"expected inputs .*token_type_ids, found"):
            Embedder(bundle.path).encode("w1")
