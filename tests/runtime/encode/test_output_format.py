"""Codes in the place of float vectors: of texts, of tokens, of images, by ranges of a bundle or of a call."""

from __future__ import annotations

import csv
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedge import (
    Embedder,
    EmbedgeImportError,
    EmbedgeValueError,
    EmbedgeWarning,
    FingerprintError,
    ManifestError,
    calibrate_ranges,
    dequantize_embeddings,
    subset_bundle,
)
from embedge.runtime.bundle.contract import FORMAT_VERSION
from embedge.runtime.cli.main import main
from tests.helpers.command import Capture, error_line

Array = NDArray[Any]
TEXTS = [f"w{i} w{i * 7 % 60} w{i * 13 % 60}" for i in range(60)]


def formula(vectors: Array, ranges: Array) -> Array:
    """8-bit codes as sentence-transformers 6 computes them."""
    steps = (ranges[1] - ranges[0]) / 255
    codes: Array = np.clip(np.floor((vectors - ranges[0]) / steps), 0, 255).astype(np.uint8)
    return codes


def made_of(vectors: Array, name: str, ranges: Array) -> Array:
    """Codes of a format."""
    unsigned = formula(vectors, ranges)
    bits = np.packbits(vectors > 0, axis=-1)
    by_name: dict[str, Any] = {
        "int8": (unsigned.astype(int) - 128).astype(np.int8),
        "uint8": unsigned,
        "binary": (bits.astype(int) - 128).astype(np.int8),
        "ubinary": bits,
        "float16": vectors.astype(np.float16),
        "float32": vectors,
    }
    codes: Array = by_name[name]
    return codes


@pytest.fixture
def ranged(two_tasks: Any) -> Any:
    """Two tasks with ranges of their own."""
    with pytest.warns(EmbedgeWarning, match="ranges of 60 texts"):
        calibrate_ranges(two_tasks.path, TEXTS, precision="fp32")
    return two_tasks


def opened(bundle: Any, **options: Any) -> Embedder:
    return Embedder(bundle.path, **{"precision": "fp32", "task": "code", **options})


class TestFormats:
    @pytest.mark.parametrize("dim", [8, 4])
    @pytest.mark.parametrize("name", ["int8", "uint8", "binary", "ubinary", "float16", "float32"])
    def test_codes_are_those_of_the_float_vectors(self, ranged: Any, name: str, dim: int) -> None:
        model = opened(ranged)
        ranges = model.get_output_ranges(truncate_dim=dim)
        inputs: Any
        for inputs in (TEXTS, TEXTS[3], [TEXTS[3], TEXTS[3]]):
            expected = made_of(model.encode(inputs, truncate_dim=dim), name, ranges)
            codes = model.encode(inputs, truncate_dim=dim, output_format=name)
            assert codes.dtype == expected.dtype
            np.testing.assert_array_equal(codes, expected)

    @pytest.mark.parametrize("dim", [8, 4, 2])
    def test_ranges_of_the_bundle_hold_other_texts_at_every_dimension(
        self, ranged: Any, dim: int
    ) -> None:
        model = opened(ranged, task="retrieval")
        vectors = model.encode([f"w{i}" for i in range(60)], truncate_dim=dim, prompt="")
        low, high = model.get_output_ranges(truncate_dim=dim)
        assert ((low <= vectors) & (vectors <= high)).mean() > 0.97
        codes = model.encode_document(TEXTS, truncate_dim=dim, output_format="int8")
        back = dequantize_embeddings(codes, "int8", [low, high])
        floats = model.encode_document(TEXTS, truncate_dim=dim)
        assert np.abs(back - floats).max() < 0.02

    def test_ranges_are_of_the_task_and_a_call_may_have_others(self, ranged: Any) -> None:
        model = opened(ranged)
        code, retrieval = (model.get_output_ranges(task) for task in ("code", "retrieval"))
        assert not np.allclose(code, retrieval)
        wide = np.stack([np.full(8, -4), np.full(8, 4)])
        codes = model.encode(TEXTS, output_format="uint8", ranges=wide)
        np.testing.assert_array_equal(codes, formula(model.encode(TEXTS), wide.astype(np.float32)))

    def test_a_text_without_tokens_is_the_code_of_zero(self, make_bundle: Any) -> None:
        bundle = make_bundle(special_tokens=False)
        ranges = [[-1.0] * 8, [1.0] * 8]
        model = Embedder(bundle.path)
        with pytest.warns(EmbedgeWarning, match="no tokens"):
            codes = model.encode(["", "w1"], output_format="uint8", ranges=ranges)
        assert codes[0].tolist() == [127] * 8
        assert model.encode([], output_format="ubinary").shape == (0, 1)

    def test_tokens_and_images_have_codes_too(self, with_images: Any) -> None:
        model = Embedder(with_images.path, task="code")
        picture = np.random.default_rng(1).integers(0, 255, (40, 40, 3), np.uint8)
        for call in (model.encode, model.encode_image):
            floats = call([picture])
            codes = call([picture], output_format="binary")
            np.testing.assert_array_equal(codes.view(np.uint8) ^ 128, np.packbits(floats > 0, 1))
        [tokens] = model.encode_image([picture], multi_vector=True)
        [codes] = model.encode_image([picture], multi_vector=True, output_format="ubinary")
        np.testing.assert_array_equal(codes, np.packbits(tokens > 0, 1))
        wide = np.stack([np.full(8, -4), np.full(8, 4)]).astype(np.float32)
        codes = model.encode_image([picture], output_format="uint8", ranges=wide)
        np.testing.assert_array_equal(codes, formula(model.encode_image([picture]), wide))
        ids = model.tokenize(TEXTS)
        np.testing.assert_array_equal(
            model.encode_tokens(ids, output_format="float16"),
            model.encode(TEXTS).astype(np.float16),
        )

    def test_images_are_not_coded_by_the_ranges_of_texts(self, with_images: Any) -> None:
        with pytest.warns(EmbedgeWarning, match="ranges of"):
            calibrate_ranges(with_images.path, TEXTS)
        model = Embedder(with_images.path, task="code")
        assert model.encode(TEXTS, output_format="int8").dtype == np.int8
        picture = np.zeros((40, 40, 3), np.uint8)
        inputs: Any
        for inputs, call in (
            ([picture], model.encode_image),
            (["w1", picture], model.encode),
            ([picture], model.encode_document),
        ):
            with pytest.raises(EmbedgeValueError, match="ranges are of the task's texts"):
                call(inputs, output_format="int8")

    def test_multi_vectors_have_ranges_of_their_own_and_are_pooled(self, make_bundle: Any) -> None:
        bundle = make_bundle(multi_vector=True)
        with pytest.warns(EmbedgeWarning, match="ranges of"):
            calibrate_ranges(bundle.path, TEXTS)
        model = Embedder(bundle.path)
        ranges = model.get_output_ranges(multi_vector=True)
        assert ranges.shape == (2, 4)
        floats: Any = model.encode(TEXTS, multi_vector=True)
        codes = model.encode(TEXTS, multi_vector=True, output_format="uint8")
        for one, other in zip(floats, codes, strict=True):
            np.testing.assert_array_equal(other, formula(one, ranges))
        pooled: Any = model.encode_document(TEXTS, multi_vector=True, pool_factor=2)
        assert {len(part) for part in floats} == {5}
        assert {len(part) for part in pooled} == {3}

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            ({"output_format": "int4"}, "one of float32, float16, int8, uint8, binary, ubinary"),
            ({"output_format": "int8"}, "embedge ranges BUNDLE --task code --texts FILE"),
            ({"output_format": "binary", "ranges": [[0.0] * 8] * 2}, "ranges are for the formats"),
            ({"output_format": "int8", "ranges": [[0.0] * 3] * 2}, "expected the shape [2, 8]"),
            ({"pool_factor": 2}, "expected multi_vector=True"),
            ({"pool_factor": 0.5}, "a number of at least 1"),
            ({"convert_to_numpy": False}, "list(vectors) gives a list"),
        ],
        ids=str,
    )
    def test_what_cannot_be_is_refused_before_anything_runs(
        self, two_tasks: Any, call: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(EmbedgeValueError) as caught:
            opened(two_tasks).encode([], **call)
        assert message in str(caught.value)

    def test_queries_are_not_pooled(self, make_bundle: Any) -> None:
        model = Embedder(make_bundle(multi_vector=True).path)
        with pytest.raises(EmbedgeValueError, match="for documents"):
            model.encode_query("w1", multi_vector=True, pool_factor=2)


class TestFingerprint:
    def test_each_format_and_each_range_has_one_of_its_own(self, ranged: Any) -> None:
        model = opened(ranged)
        names = ["float32", "float16", "int8", "uint8", "binary", "ubinary"]
        found = [model.fingerprint(output_format=name) for name in names]
        found.append(model.fingerprint(output_format="int8", ranges=[[-9.0] * 8, [9.0] * 8]))
        assert len({*found}) == len(found)
        assert model.fingerprint() == found[0]
        assert not {"format", "ranges"} & model.fingerprint_parts().keys()

    def test_an_index_of_another_format_is_told_by_name(self, ranged: Any) -> None:
        model = opened(ranged)
        with pytest.raises(FingerprintError) as caught:
            model.check_fingerprint(model.fingerprint(output_format="binary"))
        assert caught.value.differing == ("format",)
        with pytest.raises(FingerprintError) as caught:
            model.check_fingerprint(
                model.fingerprint_parts(output_format="int8"),
                output_format="int8",
                ranges=[[-9.0] * 8, [9.0] * 8],
            )
        assert caught.value.differing == ("ranges",)


class TestRangesOfABundle:
    def test_the_manifest_keeps_them_for_all_precisions_and_subsets(
        self, ranged: Any, tmp_path: Path
    ) -> None:
        of = [Embedder(ranged.path, precision=p, task="code") for p in ("fp32", "int4")]
        np.testing.assert_array_equal(of[0].get_output_ranges(), of[1].get_output_ranges())
        part = subset_bundle(ranged.path, tmp_path / "part", tasks=["code"])
        np.testing.assert_array_equal(
            Embedder(part, precision="int4").get_output_ranges(), of[0].get_output_ranges()
        )
        assert ranged.manifest()["format_version"] == FORMAT_VERSION

    def test_an_older_bundle_gets_the_version_that_has_them(self, bundle: Any) -> None:
        bundle.edit(lambda m: m.update(format_version="1.5", kept="as it is"))
        with pytest.warns(EmbedgeWarning, match="ranges of"):
            calibrate_ranges(bundle.path, TEXTS)
        document = bundle.manifest()
        assert document["format_version"] == FORMAT_VERSION
        assert document["kept"] == "as it is"
        text = (bundle.path / "manifest.json").read_text()
        assert max(len(line) for line in text.splitlines() if "lowest" in line) > 60  # on a line

    def test_they_are_the_texts_widened_by_half(self, ranged: Any) -> None:
        model = opened(ranged)
        prompted = [
            ("", "query: ", "passage: ")[index % 3] + text for index, text in enumerate(TEXTS)
        ]
        vectors = model.encode(prompted, prompt="")
        width = np.ptp(vectors, axis=0)
        expected = [vectors.min(0) - width / 2, vectors.max(0) + width / 2]
        np.testing.assert_allclose(model.get_output_ranges(), expected, rtol=1e-3)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"highest": [1.0] * 7}, "highest: expected as many numbers as lowest has, 8, found 7"),
            ({"lowest": [2.0] * 8}, "highest[0]: "),
            ({"lowest": [0.0] * 7 + ["x"]}, "lowest[7]: expected a number"),
            ({"lowest": 3}, "lowest: expected a list of numbers, found int"),
            ({"mean_square": [-1.0] * 8}, "mean_square[0]: expected a number of at least 0"),
        ],
        ids=str,
    )
    def test_wrong_ones_are_told_by_their_place(
        self, bundle: Any, change: dict[str, Any], message: str
    ) -> None:
        good = {"lowest": [-1.0] * 8, "highest": [1.0] * 8, "mean_square": [0.1] * 8, "vectors": 9}
        bundle.edit(lambda m: m["tasks"]["retrieval"].update(output_ranges={**good, **change}))
        with pytest.raises(ManifestError) as caught:
            Embedder(bundle.path)
        assert f"tasks.retrieval.output_ranges.{message}" in str(caught.value)

    def test_ranges_of_another_length_are_told(self, bundle: Any) -> None:
        short = {"lowest": [-1.0], "highest": [1.0], "mean_square": [0.1], "vectors": 9}
        bundle.edit(lambda m: m["tasks"]["retrieval"].update(output_ranges=short))
        with pytest.raises(ManifestError, match="expected 8 numbers, found 1"):
            Embedder(bundle.path)

    def test_tasks_that_have_some_keep_them_unless_named(self, two_tasks: Any) -> None:
        with pytest.warns(EmbedgeWarning, match="ranges of 60 texts"):
            assert [*calibrate_ranges(two_tasks.path, TEXTS, tasks=["code"])] == ["code"]
        kept = two_tasks.manifest()["tasks"]["code"]
        others = [f"{text} w3" for text in TEXTS]
        with pytest.warns(EmbedgeWarning):
            assert [*calibrate_ranges(two_tasks.path, others)] == ["retrieval"]
        assert two_tasks.manifest()["tasks"]["code"] == kept
        with pytest.warns(EmbedgeWarning):
            calibrate_ranges(two_tasks.path, others, tasks=["code"])
        assert two_tasks.manifest()["tasks"]["code"]["output_ranges"] != kept["output_ranges"]
        with (
            pytest.warns(EmbedgeWarning),
            pytest.raises(EmbedgeValueError, match="some of retrieval, code, found 'chat'"),
        ):
            calibrate_ranges(two_tasks.path, TEXTS, tasks=["chat"])

    def test_each_task_runs_at_a_precision_that_it_has(self, two_tasks: Any) -> None:
        def leave_out(manifest: Any) -> None:
            del manifest["precisions"]["int4"]["graphs"]["code"]
            del manifest["precisions"]["fp32"]["graphs"]["retrieval"]

        two_tasks.edit(leave_out)
        with pytest.warns(EmbedgeWarning, match="ranges of 60 texts"):
            taken = calibrate_ranges(two_tasks.path, TEXTS)
        assert taken == {"retrieval": "int4", "code": "fp32"}
        assert all(task["output_ranges"] for task in two_tasks.manifest()["tasks"].values())

    def test_the_command_takes_them(self, bundle: Any, tmp_path: Path, capsys: Capture) -> None:
        texts = tmp_path / "texts.jsonl"
        texts.write_text("".join(json.dumps({"t": text}) + "\n" for text in TEXTS * 2))
        call = ["ranges", str(bundle.path), "--texts", str(texts), "--field", "t"]
        assert main(call) == 0
        assert capsys.readouterr().out.endswith("ranges of 120 texts for retrieval (fp32)\n")
        assert Embedder(bundle.path).encode("w1", output_format="int8").dtype == np.int8
        assert main(["ranges", str(bundle.path), "--texts", str(tmp_path / "none")]) == 1
        assert "none: No such file" in error_line(capsys)
        assert main(call) == 2
        message = error_line(capsys)
        assert "--task: expected one without ranges, found none among retrieval" in message
        assert "or pass --overwrite for all" in message
        assert main([*call, "--overwrite"]) == 0
        assert capsys.readouterr().out.endswith("retrieval (fp32)\n")
        texts.write_text('{"t": "w1"}\n')
        assert main([*call, "--task", "retrieval"]) == 2
        assert "--texts: expected at least two" in error_line(capsys)


class TestTheCommandEmbed:
    @pytest.mark.parametrize("name", ["int8", "ubinary", "float16"])
    @pytest.mark.parametrize("end", [".npy", ".jsonl", ".csv", ".parquet"])
    def test_codes_are_written_as_they_are(
        self, ranged: Any, tmp_path: Path, name: str, end: str
    ) -> None:
        source, target = tmp_path / "in", tmp_path / f"out{end}"
        source.write_text("\n".join(TEXTS))
        call = ["embed", str(ranged.path), "--precision", "fp32", "--task", "code"]
        call += ["--input", str(source), "--output", str(target), "--output-format", name]
        assert main(call) == 0
        expected = opened(ranged).encode(TEXTS, output_format=name)
        if end == ".npy":
            found = np.load(target)
            assert found.dtype == expected.dtype
        elif end == ".parquet":
            column = pytest.importorskip("pyarrow.parquet").read_table(target).column("embedding")
            assert str(column.type.value_type) == {"float16": "halffloat"}.get(
                name, expected.dtype.name
            )
            found = np.array(column.to_pylist(), expected.dtype)
        elif end == ".csv":
            lines = list(csv.reader(target.read_text().splitlines()))[1:]
            found = np.array([json.loads(row[-1]) for row in lines], expected.dtype)
        else:
            rows = [json.loads(line)["embedding"] for line in target.read_text().splitlines()]
            found = np.array(rows, expected.dtype)
        np.testing.assert_array_equal(found, expected)

    def test_ranges_come_from_a_file_or_are_missed_by_name(
        self, bundle: Any, tmp_path: Path, capsys: Capture
    ) -> None:
        (tmp_path / "in").write_text("w1\n")
        file = tmp_path / "ranges.npy"
        np.save(file, np.stack([np.full(8, -1), np.full(8, 1)]))
        call = ["embed", str(bundle.path), "--input", str(tmp_path / "in")]
        call += ["--output-format", "uint8", "--fingerprint", str(tmp_path / "kind")]
        assert main([*call, "--ranges", str(file)]) == 0
        [row] = capsys.readouterr().out.splitlines()
        wide = np.array([[-1] * 8, [1] * 8], np.float32)
        [expected] = formula(Embedder(bundle.path).encode(["w1"]), wide)
        assert json.loads(row)["embedding"] == expected.tolist()
        assert json.loads((tmp_path / "kind").read_text())["parts"]["format"] == "uint8"
        assert main(call) == 2
        assert "pass --ranges, float [2, 8]" in error_line(capsys)
        file.write_bytes(b"no array")
        assert main([*call, "--ranges", str(file)]) == 1
        assert "expected a .npy file" in error_line(capsys)


class TestSentenceTransformersHabits:
    def test_tensors_where_torch_is(self, ranged: Any) -> None:
        torch = pytest.importorskip("torch")
        model = opened(ranged)
        tensor = model.encode(TEXTS, convert_to_tensor=True)
        assert isinstance(tensor, torch.Tensor)
        np.testing.assert_array_equal(tensor.numpy(), model.encode(TEXTS))
        assert model.encode_query("w1", convert_to_tensor=True).shape == (8,)

    def test_without_torch_the_message_has_the_way_out(
        self, bundle: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        model = Embedder(bundle.path)
        with pytest.raises(EmbedgeImportError, match="leave it out for NumPy's arrays"):
            model.encode("w1", convert_to_tensor=True)
        assert model.encode("w1", convert_to_numpy=True).shape == (8,)

    @pytest.mark.parametrize(
        ("option", "place"),
        [
            ("precision", "output_format"),
            ("device", "it is Embedder's"),
            ("output_value", "multi_vector=True"),
            ("pool", "threads"),
            ("token_pooling", "pool_factor"),
        ],
    )
    def test_arguments_that_are_elsewhere_are_told(
        self, bundle: Any, option: str, place: str
    ) -> None:
        call: Any = Embedder(bundle.path).encode_document
        with pytest.raises(TypeError, match=f"takes no {option}: .*{place}"):
            call("w1", **{option: None})

    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("start_multi_process_pool", "one Embedder uses all cores"),
            ("encode_multi_process", "docs/guides/serving.md"),
            ("get_max_seq_length", "max_seq_length is an attribute"),
            ("to", "device="),
        ],
    )
    def test_methods_that_are_elsewhere_are_told(self, bundle: Any, name: str, place: str) -> None:
        model = Embedder(bundle.path)
        assert not hasattr(model, name)
        with pytest.raises(AttributeError, match=f"no attribute '{name}'; .*{place}"):
            getattr(model, name)
        with pytest.raises(AttributeError, match=r"no attribute 'other'$"):
            getattr(model, "other")  # noqa: B009 - for type checkers there is none

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_texts_are_cut_at_a_shorter_length_that_was_set(self, bundle: Any, side: str) -> None:
        bundle.edit(lambda m: m["tokenizer"].update(truncation_side=side))
        model = Embedder(bundle.path)
        before = model.fingerprint()
        model.max_seq_length = 4
        assert model.max_seq_length == 4
        with pytest.warns(EmbedgeWarning, match="longer than 4 tokens"):
            cut = model.encode("w1 w2 w3 w4")
        whole = Embedder(bundle.path)
        np.testing.assert_array_equal(cut, whole.encode("w1 w2" if side == "right" else "w3 w4"))
        assert whole.max_seq_length == 16
        assert model.fingerprint() != before
        parts = model.fingerprint_parts()
        assert parts["max_length"] == 4
        again = pickle.loads(pickle.dumps(model))
        assert again.max_seq_length == 4
        np.testing.assert_array_equal(again.encode("w1 w2 w3 w4", on_truncate="ignore"), cut)
        model.max_seq_length = 16
        np.testing.assert_array_equal(model.encode("w1 w2 w3 w4"), whole.encode("w1 w2 w3 w4"))
        assert model.fingerprint() == before

    @pytest.mark.parametrize("length", [0, 2, 17, True, "8", 7.5])
    def test_no_longer_texts_than_the_model_takes(self, bundle: Any, length: Any) -> None:
        model = Embedder(bundle.path)
        with pytest.raises(EmbedgeValueError, match="max_seq_length is"):
            model.max_seq_length = length
        with pytest.raises(EmbedgeValueError, match="max_seq_length is"):
            Embedder(bundle.path, max_seq_length=length)
        assert model.max_seq_length == 16
