"""What a caller of sentence-transformers finds in ``Embedder``: defaults, prompts, token counts, names."""

from __future__ import annotations

import inspect
import pickle
import re
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from embedge.runtime import Embedder, EmbedgeValueError, EmbedgeWarning
from embedge.runtime.encode.request import CallOptions
from embedge.runtime.host.memory import parse_bytes
from embedge.runtime.options import EmbedderOptions, EncodeOptions, ImageOptions

TEXTS = ["w1 w2", "w3"]


class TestDefaults:
    def test_task(self, two_tasks: Any) -> None:
        without = Embedder(two_tasks.path, precision="fp32")
        model = Embedder(two_tasks.path, precision="fp32", task="code")
        assert (without.task, model.task) == (None, "code")
        code, retrieval = (without.encode(TEXTS, task=task) for task in ("code", "retrieval"))
        np.testing.assert_array_equal(model.encode(TEXTS), code)
        np.testing.assert_array_equal(model.encode(TEXTS, task="retrieval"), retrieval)
        query = without.encode_query(TEXTS, task="code")
        np.testing.assert_array_equal(model.encode_query(TEXTS), query)
        ids = [np.array([2, 5, 3])]
        np.testing.assert_array_equal(model.run_ids(ids), without.run_ids(ids, task="code"))
        with pytest.raises(EmbedgeValueError, match="no task 'cod'; it has retrieval, code"):
            Embedder(two_tasks.path, precision="fp32", task="cod")

    def test_the_only_task_is_the_default(self, bundle: Any) -> None:
        assert Embedder(bundle.path).task == "retrieval"

    def test_truncate_dim(self, two_tasks: Any) -> None:
        full = Embedder(two_tasks.path, precision="fp32", task="code")
        model = Embedder(two_tasks.path, precision="fp32", task="code", truncate_dim=4)
        assert (model.dim, model.get_embedding_dimension()) == (4, 4)
        assert full.get_sentence_embedding_dimension() == full.dim == 8
        np.testing.assert_array_equal(model.encode(TEXTS), full.encode(TEXTS, truncate_dim=4))
        np.testing.assert_array_equal(model.encode(TEXTS, truncate_dim=8), full.encode(TEXTS))
        with pytest.raises(EmbedgeValueError, match="truncate_dim is 3; .* one of 2, 4, 8"):
            Embedder(two_tasks.path, precision="fp32", truncate_dim=3)

    def test_truncate_dim_is_none_of_multi_vectors(self, make_bundle: Any) -> None:
        path = make_bundle(multi_vector=True).path
        model, full = Embedder(path, truncate_dim=2), Embedder(path)
        for found, expected in zip(
            model.encode(TEXTS, multi_vector=True),
            full.encode(TEXTS, multi_vector=True),
            strict=True,
        ):
            np.testing.assert_array_equal(found, expected)

    def test_prompts(self, two_tasks: Any) -> None:
        plain = Embedder(two_tasks.path, precision="fp32")
        model = Embedder(
            two_tasks.path,
            precision="fp32",
            task="code",
            prompts={"query": "w9 ", "other": "w8 "},
            default_prompt_name="other",
        )
        assert model.prompts == {"query": "w9 ", "passage": "passage: ", "other": "w8 "}
        assert model.default_prompt_name == "other"
        cases: list[tuple[dict[str, Any], str]]
        cases = [({}, "w8 "), ({"prompt_name": "passage"}, "passage: ")]
        for options, prompt in cases:
            expected = plain.encode(TEXTS, task="code", prompt=prompt)
            np.testing.assert_array_equal(model.encode(TEXTS, **options), expected)
        expected = plain.encode(TEXTS, task="code", prompt="w9 ")
        np.testing.assert_array_equal(model.encode_query(TEXTS), expected)
        assert plain.get_prompts("code") == {"query": "query: ", "passage": "passage: "}
        with pytest.raises(EmbedgeValueError, match="several tasks: retrieval, code; choose one"):
            _ = plain.prompts

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompts": "query: "}, "prompts: expected texts by name, .* found str"),
            ({"prompts": {"query": None}}, r"prompts\['query'\]: expected a string .* NoneType"),
            ({"default_prompt_name": "q"}, "task 'retrieval' has no prompt 'q'; it has query, pas"),
            ({"default_prompt_name": "q", "task": "code"}, "task 'code' has no prompt 'q'"),
        ],
    )
    def test_prompts_that_cannot_be_used(
        self, two_tasks: Any, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(EmbedgeValueError, match=message):
            Embedder(two_tasks.path, precision="fp32", **options)

    def test_defaults_are_pickled(self, two_tasks: Any) -> None:
        prompts = MappingProxyType({"query": "w9 "})
        model = Embedder(
            two_tasks.path, precision="fp32", task="code", truncate_dim=4, prompts=prompts
        )
        copy = pickle.loads(pickle.dumps(model))
        assert (copy.task, copy.dim, copy.prompts) == ("code", 4, model.prompts)


class TestCountTokens:
    def test_what_the_graph_would_get_uncut(self, two_tasks: Any) -> None:
        model = Embedder(two_tasks.path, precision="fp32", task="code")
        long = " ".join(["w1"] * 100)
        texts = ["w1 w2", "", long, "w1 \ud800"]
        assert model.count_tokens(texts, prompt="").tolist() == [4, 2, 102, 4]
        assert model.count_tokens(texts).tolist() == [5, 3, 103, 5]  # its default prompt
        assert model.count_tokens(texts, prompt_name="passage").tolist() == [5, 3, 103, 5]
        assert model.count_tokens("w1 w2") == 5
        assert model.count_tokens([]).tolist() == []

    @pytest.mark.parametrize("words", [1, 13, 14, 15, 28, 29, 200])
    def test_at_the_limit_whatever_ends_a_text(self, make_bundle: Any, words: int) -> None:
        text = " ".join(["w1"] * words)
        model = Embedder(make_bundle("eos", eos=3).path)
        assert model.count_tokens(text) == words + 3
        model = Embedder(make_bundle("bare", special_tokens=False).path)
        assert model.count_tokens(text) == words

    def test_it_tells_whether_a_text_is_cut(self, bundle: Any) -> None:
        model = Embedder(bundle.path)
        for words in (14, 15):
            text = " ".join(["w1"] * words)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                model.encode(text)
            assert bool(said) == (model.count_tokens(text) > model.max_seq_length)

    def test_what_is_no_text_is_refused(self, with_images: Any) -> None:
        model = Embedder(with_images.path, task="code")
        with pytest.raises(EmbedgeValueError, match=r"inputs\[0\]: expected a string, found Posix"):
            model.count_tokens([Path("a.png")])  # type: ignore[list-item]


class TestNames:
    def test_sentences_is_another_name_of_inputs(self, bundle: Any) -> None:
        model = Embedder(bundle.path)
        expected = model.encode(TEXTS)
        for encode in (model.encode, model.encode_query, model.encode_document):
            np.testing.assert_array_equal(encode(inputs=TEXTS), expected)
            np.testing.assert_array_equal(encode(sentences=TEXTS), expected)  # type: ignore
        for arguments, options in ((), {}), ((TEXTS,), {"sentences": TEXTS}):
            with pytest.raises(TypeError, match="inputs"):
                model.encode(*arguments, **options)  # type: ignore[call-overload]

    def test_misspelt_options_are_type_errors(self, bundle: Any) -> None:
        model = Embedder(bundle.path)
        for encode in (model.encode, model.encode_query, model.encode_document, model.encode_image):
            with pytest.raises(TypeError, match="unexpected keyword argument 'truncat_dim'"):
                encode(TEXTS, truncat_dim=4)  # type: ignore[call-overload]

    def test_options_are_the_same_wherever_they_are_stated(self) -> None:
        def defaults(function: Any) -> dict[str, Any]:
            parameters = inspect.signature(function).parameters.values()
            return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

        encode, of_images = defaults(Embedder.encode), defaults(Embedder.encode_image)
        of_overloads = {
            "multi_vector",
            "output_format",
            "convert_to_tensor",
        }  # what is returned follows from them
        assert {*EncodeOptions.__annotations__} == {*encode} - of_overloads
        assert {*ImageOptions.__annotations__} == {*of_images} - of_overloads
        checked = dict(vars(CallOptions()))
        del (
            checked["role"],
            checked["one_thread"],
        )  # told by which method is called, and the server's
        converted = {"convert_to_numpy": True, "convert_to_tensor": False}
        assert encode == {**checked, **converted, "show_progress_bar": None}
        assert {name: encode.get(name) for name in of_images} == of_images
        assert {*EmbedderOptions.__annotations__} == {*defaults(Embedder)}

    def test_similarity_names(self, bundle: Any, make_bundle: Any) -> None:
        assert Embedder(bundle.path).similarity_fn_name == "cosine"
        dot = make_bundle("dot", model={"similarity": "dot"})
        assert Embedder(dot.path).similarity_fn_name == "dot"

    def test_it_closes_and_opens_again(self, bundle: Any) -> None:
        with Embedder(bundle.path) as model:
            expected = model.encode(TEXTS)
            assert list(model._graphs._pool.names) == ["retrieval"]
        assert list(model._graphs._pool.names) == []
        np.testing.assert_array_equal(model.encode(TEXTS), expected)


class TestTables:
    """What is no list of texts but can be iterated gives other things than its texts."""

    ROWS: ClassVar = {"id": ["w7", "w8"], "text": TEXTS}

    @pytest.fixture
    def model(self, bundle: Any) -> Embedder:
        return Embedder(bundle.path)

    @pytest.mark.slow
    @pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow", "datasets"])
    def test_a_table_is_refused_and_the_advice_works(self, model: Embedder, library: str) -> None:
        module = pytest.importorskip(library)
        makers = {"pyarrow": "table", "datasets": "Dataset"}
        make = getattr(module, makers.get(library, "DataFrame"))
        table = make.from_dict(self.ROWS) if library == "datasets" else make(self.ROWS)
        with pytest.raises(EmbedgeValueError, match="found a table") as caught:
            model.encode(table)
        advice = str(caught.value).rpartition("such as ")[2]
        np.testing.assert_array_equal(
            model.encode(eval(advice, {"table": table})), model.encode(TEXTS)
        )

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({"w1", "w2"}, r"found set, which has no order; pass sorted\(inputs\)"),
            ({"a": "w1"}.keys(), "found dict_keys, which has no order"),
            (MappingProxyType({"a": "w1"}), r"found mappingproxy; pass list\(inputs.values\(\)\)"),
            (np.array([["w1", "w2"]]), r"array of shape \[1, 2\]; pass one column"),
            (np.array("w1"), r"array of shape \[\]; pass inputs.item\(\)"),
            (["w1", float("nan")], r"inputs\[1\]: .*found float, a missing value; fill or drop"),
            (["w1", None], r"inputs\[1\]: .*found NoneType, a missing value"),
            ([b"w1"], r"inputs\[0\]: .*found bytes; decode them"),
            (memoryview(b"w1"), r"inputs\[0\]: .*found int"),
        ],
    )
    def test_other_containers_are_refused(self, model: Embedder, inputs: Any, message: str) -> None:
        with pytest.raises(EmbedgeValueError, match=message):
            model.encode(inputs)

    def test_an_open_file_is_refused(self, model: Embedder, tmp_path: Path) -> None:
        (tmp_path / "texts").write_text("w1 w2\nw3\n")
        with open(tmp_path / "texts") as file:
            with pytest.raises(EmbedgeValueError, match=r"found a file .*; pass \[line.rstrip"):
                model.encode(file)  # type: ignore[call-overload]
            found = model.encode([line.rstrip() for line in file])
        np.testing.assert_array_equal(found, model.encode(TEXTS))

    def test_what_holds_one_text_after_the_other_is_taken(self, model: Embedder) -> None:
        expected = model.encode(TEXTS)
        inputs: Any
        for inputs in (tuple(TEXTS), iter(TEXTS), np.array(TEXTS), np.array(TEXTS, object)):
            np.testing.assert_array_equal(model.encode(inputs), expected)
        values: Any = dict(enumerate(TEXTS)).values()
        np.testing.assert_array_equal(model.encode(values), expected)

    @pytest.mark.parametrize("library", ["pandas", "polars"])
    def test_a_series_is_taken(self, model: Embedder, library: str) -> None:
        series = pytest.importorskip(library).Series(TEXTS)
        np.testing.assert_array_equal(model.encode(series), model.encode(TEXTS))

    def test_an_array_of_arrow_says_how(self, model: Embedder) -> None:
        array = pytest.importorskip("pyarrow").array(TEXTS)
        with pytest.raises(EmbedgeValueError, match=r"StringScalar; pass column.to_pylist\(\)"):
            model.encode(array)


class TestStringsThatNameImages:
    def warned(self, model: Embedder, inputs: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model.encode(inputs, task="code")
        return [str(w.message) for w in said if issubclass(w.category, EmbedgeWarning)]

    def test_a_path_or_url_is_embedded_as_text_with_a_warning(
        self, with_images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Image.new("RGB", (8, 8)).save("page.png")
        model = Embedder(with_images.path)
        for text in (
            "page.png",
            str(tmp_path / "page.png"),
            "https://example.org/page.PNG?width=3",
            "data:image/png;base64,AAAA",
        ):
            [said] = self.warned(model, ["w1", text, Path("page.png"), text])
            assert said.startswith("inputs[1]: ")
            assert "and 1 more" in said
            assert "encode_image" in said

    @pytest.mark.parametrize(
        "text",
        [
            "missing.png",
            "w1",
            "see https://example.org/page.png there",
            "https://a.org",
            "a/b",
            "/",
        ],
    )
    def test_other_texts_are_none(self, with_images: Any, text: str) -> None:
        assert self.warned(Embedder(with_images.path), [text, "\0", "a/\0"]) == []

    def test_a_bundle_of_texts_says_nothing(self, bundle: Any, tmp_path: Path) -> None:
        (tmp_path / "a.png").touch()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Embedder(bundle.path).encode(str(tmp_path / "a.png"))


@pytest.mark.parametrize("value", [["x"], {}, 1, {"x"}])
@pytest.mark.parametrize("name", ["task", "precision", "default_prompt_name"])
def test_arguments_that_are_no_names_are_refused(bundle: Any, name: str, value: Any) -> None:
    with pytest.raises(EmbedgeValueError, match=re.escape(repr(value))):
        Embedder(bundle.path, **{name: value})
    if name == "task":
        with pytest.raises(EmbedgeValueError, match=re.escape(repr(value))):
            Embedder(bundle.path).encode("w1", prompt_name=value)


def test_a_subclass_stays_one_when_it_is_pickled(bundle: Any) -> None:
    assert type(pickle.loads(pickle.dumps(Child(bundle.path)))) is Child


class Child(Embedder):
    pass


def test_any_number_of_bytes_is_read() -> None:
    assert parse_bytes("memory_limit", "9" * 400) == int("9" * 400)
    assert parse_bytes("memory_limit", "1.5 GiB") == 3 << 29
