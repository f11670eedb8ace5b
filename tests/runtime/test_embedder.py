"""What a caller of ``Embedder`` chooses and learns: dimensions, tasks, prompts, facts."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from embedge.runtime import (
    BundleError,
    Embedder,
    EmbedgeError,
    EmbedgeValueError,
    InferenceError,
)
from embedge.runtime.sessions.session_workers import RunSettings
from tests.helpers.tiny_texts import TOLERANCE, ids


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

    def test_documents_take_the_prompt_of_a_corpus_last(self, make_bundle: Any) -> None:
        model = Embedder(make_bundle(prompts={"corpus": "w2 "}).path)
        np.testing.assert_array_equal(model.encode_document("w1"), model.encode("w2 w1"))

    def test_a_task_for_one_role_has_its_own_prompt(self, make_bundle: Any) -> None:
        names = ("retrieval.query", "retrieval.passage")
        tiny = make_bundle(tasks=names, prompts=dict(zip(names, ("w1 ", "w2 "), strict=True)))
        model = Embedder(tiny.path)
        for encode, task, prompt in (
            (model.encode_query, "retrieval.query", [5]),
            (model.encode_document, "retrieval.passage", [6]),
            (model.encode_document, "retrieval.query", []),  # of the other role
        ):
            expected = tiny.expected(task, [2, *prompt, 7, 3])
            np.testing.assert_allclose(encode("w3", task=task), expected, atol=1e-6)

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


class TestTokens:
    def test_tokens_of_several_calls_run_together(self, two_tasks: Any) -> None:
        model = Embedder(two_tasks.path, precision="fp32", task="code")
        tokens = [
            *model.tokenize(["w1 w2", "w3"]),
            *model.tokenize("w4", role="document"),
            *model.tokenize("w5", prompt=""),
        ]
        assert [len(text) for text in tokens] == [5, 4, 4, 3]
        vectors = model.encode_tokens(tokens, truncate_dim=4)
        expected = [
            *model.encode(["w1 w2", "w3"], truncate_dim=4),
            model.encode_document("w4", truncate_dim=4),
            model.encode("w5", prompt="", truncate_dim=4),
        ]
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
        np.testing.assert_allclose(
            model.encode_tokens(tokens, truncate_dim=4, one_thread=True), expected, atol=1e-6
        )
        assert model.encode_tokens([]).shape == (0, 8)

    def test_how_many_calls_share_the_cores(self, two_tasks: Any) -> None:
        model = Embedder(two_tasks.path, precision="fp32", task="code", threads=3)
        assert model.calls_at_once() == model.calls_at_once("retrieval") == 1
        settings = RunSettings(batch_tokens=64, single_thread=True, single_thread_tokens=0)
        model._graphs.settings = lambda name: settings
        assert model.calls_at_once() == 3
        with pytest.raises(EmbedgeValueError, match="no task 'other'"):
            model.calls_at_once("other")

    def test_tokens_say_whether_they_were_cut(self, two_tasks: Any) -> None:
        model = Embedder(two_tasks.path, precision="fp32", task="code")
        short, long = model.tokenize(["w1", "w1 " * 30])
        assert (short.truncated, long.truncated, len(long)) == (False, True, 16)

    @pytest.mark.parametrize("tokens", [[[1, 2]], ["w1"], [np.array([1, 2])]])
    def test_what_tokenize_did_not_give_is_refused(self, tokens: Any, two_tasks: Any) -> None:
        model = Embedder(two_tasks.path, precision="fp32", task="code")
        with pytest.raises(EmbedgeValueError, match=r"tokens\[0\]: expected what tokenize gives"):
            model.encode_tokens(tokens)

    def test_a_text_without_tokens_is_a_zero_vector(self, make_bundle: Any) -> None:
        model = Embedder(make_bundle("bare", special_tokens=False).path)
        assert model.multi_vector_dim is None
        vectors = model.encode_tokens(model.tokenize(["", "w1"]))
        assert (vectors[0] == 0).all() and (vectors[1] != 0).any()
