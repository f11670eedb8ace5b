from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from embedge.runtime import BundleError, EmbedgeWarning, ManifestError
from embedge.runtime.bundle.contract import FORMAT_VERSION
from embedge.runtime.bundle.manifest import Manifest
from tests.helpers.images import SETTINGS

SHA = "ab" * 32

DOCUMENT: dict[str, Any] = {
    "format_version": FORMAT_VERSION,
    "producer": {"name": "embedge", "version": "0.1.0"},
    "source": {"name": "m", "model_type": "bert", "license": "apache-2.0", "sha256": SHA},
    "model": {
        "dim": 384,
        "pooling": "mean",
        "normalize": True,
        "max_length": 256,
        "matryoshka_dims": [64, 384],
        "truncate_dim": 64,
        "multi_vector_dim": None,
        "modalities": ["text"],
        "inputs": ["input_ids", "attention_mask", "token_type_ids"],
        "similarity": "cosine",
        "image": None,
    },
    "tokenizer": {
        "file": "tokenizer.json",
        "pad_token_id": 0,
        "append_eos_token_id": None,
        "truncation_side": "left",
    },
    "tasks": {
        "retrieval": {
            "prompts": {"query": "Query: "},
            "default_prompt": "query",
            "adapter": {"name": "lora", "sha256": SHA, "base_model": "m"},
        },
        "bare": {"prompts": {}, "default_prompt": None, "adapter": None},
    },
    "precisions": {
        "int8": {
            "graphs": {"retrieval": "int8/retrieval.onnx"},
            "vision": None,
            "devices": ["cpu"],
            "row_multiple": 2,
            "activation_constants": {
                "embedge.act_zero_point": {"dtype": "uint8", "full": 128, "reduced": 64}
            },
            "options": {"free": [1, {"a": None}]},
            "layers": {"retrieval": "int8/retrieval.layers.json"},
            "fidelity": {"retrieval": {"cosine_mean": 0.9995}},
        }
    },
    "files": {
        name: {"size": 1, "sha256": SHA}
        for name in ("tokenizer.json", "int8/retrieval.onnx", "int8/retrieval.layers.json")
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The document with the value at a dotted path replaced, or removed for ``...``."""
    document = copy.deepcopy(DOCUMENT)
    *parents, key = path.split("/")
    table = document
    for parent in parents:
        table = table[parent]
    if value is ...:
        del table[key]
    else:
        table[key] = value
    return document


def test_reading_and_writing_are_inverses_and_keep_the_order() -> None:
    written = Manifest.from_dict(DOCUMENT).to_dict()
    assert json.dumps(written) == json.dumps(DOCUMENT)
    assert Manifest.from_dict(written) == Manifest.from_dict(DOCUMENT)


def test_documents_of_version_1_0_have_no_images() -> None:
    document = changed("format_version", "1.0")
    del document["model"]["image"], document["precisions"]["int8"]["vision"]
    manifest = Manifest.from_dict(document)
    assert manifest.format_version == "1.0"
    assert manifest.model.image is None
    assert manifest.precisions["int8"].vision is None


def with_images() -> dict[str, Any]:
    document = changed("model/image", SETTINGS.to_dict())
    document["model"]["modalities"] = ["text", "image"]
    document["model"]["inputs"] = ["input_ids", "attention_mask", "position_ids", "pool_mask"]
    document["model"]["inputs"] += ["image_features", "image_positions"]
    document["precisions"]["int8"]["vision"] = "int8/vision.onnx"
    document["files"]["int8/vision.onnx"] = {"size": 1, "sha256": SHA}
    return document


def test_images_are_read_and_written() -> None:
    document = with_images()
    manifest = Manifest.from_dict(document)
    assert manifest.model.image is not None
    assert manifest.model.image.before_ids == (151644, 872, 198, 151652)
    assert manifest.precisions["int8"].vision == "int8/vision.onnx"
    assert json.dumps(manifest.to_dict()) == json.dumps(document)
    del document["precisions"]["int8"]["vision"]
    assert Manifest.from_dict(document).precisions["int8"].vision is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model/image", None, "model.inputs: expected attention_mask, input_ids and perhaps"),
        ("model/modalities", ["text"], "model.image: found an object, where modalities are ['te"),
        ("model/inputs", ["input_ids", "attention_mask"], "model.inputs: expected attention_mask,"),
        ("model/image/hidden_size", 0, "model.image.hidden_size: expected a whole number ≥ 1"),
        ("precisions/int8/vision", "../v.onnx", "is not a path inside the bundle"),
        ("precisions/int8/vision", "int8/v.onnx", "int8.vision: 'int8/v.onnx' is not listed in"),
        ("tasks/vision", {}, "precisions.int8.vision: a task has the name 'vision' as well"),
    ],
)
def test_what_does_not_fit_images_is_named(path: str, value: Any, message: str) -> None:
    document = with_images()
    *parents, key = path.split("/")
    table = document
    for parent in parents:
        table = table[parent]
    table[key] = value
    with pytest.raises(ManifestError) as caught:
        Manifest.from_dict(document)
    assert message in str(caught.value)


def test_a_vision_tower_needs_to_know_its_images() -> None:
    with pytest.raises(ManifestError, match=r"int8\.vision: expected null, as model\.image is"):
        Manifest.from_dict(changed("precisions/int8/vision", "int8/retrieval.onnx"))


def test_unknown_keys_are_ignored() -> None:
    document = changed("model/new_key", {"deep": 1})
    document["another"] = 3
    assert Manifest.from_dict(document) == Manifest.from_dict(DOCUMENT)


def test_keys_that_may_be_missing_have_defaults() -> None:
    document = copy.deepcopy(DOCUMENT)
    precision = document["precisions"]["int8"]
    for key in ("row_multiple", "activation_constants", "options", "layers", "fidelity"):
        del precision[key]
    parsed = Manifest.from_dict(document).precisions["int8"]
    assert parsed.row_multiple == 1
    assert parsed.activation_constants == parsed.options == parsed.layers == {}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model", ..., "model: missing"),
        ("model", [], "model: expected an object, found []"),
        ("model/dim", ..., "model.dim: missing"),
        ("model/dim", "384", 'model.dim: expected a whole number ≥ 1, found "384"'),
        ("model/dim", True, "model.dim: expected a whole number ≥ 1, found true"),
        ("model/dim", 0, "model.dim: expected a whole number ≥ 1, found 0"),
        ("model/normalize", 1, "model.normalize: expected true or false, found 1"),
        ("model/matryoshka_dims", [64, "x"], "model.matryoshka_dims[1]: expected a whole number"),
        ("model/matryoshka_dims", [512], "model.matryoshka_dims[0]: 512 is above model.dim, 384"),
        ("model/truncate_dim", 385, "model.truncate_dim: 385 is above model.dim, 384"),
        (
            "model/inputs",
            ["input_ids"],
            "model.inputs: expected attention_mask, input_ids and perhaps token_type_ids, found",
        ),
        ("model/inputs", [1], "model.inputs[0]: expected a string, found 1"),
        (
            "model/similarity",
            "l2",
            'model.similarity: expected one of cosine, dot, maxsim, meanmaxsim, found "l2"',
        ),
        (
            "tokenizer/truncation_side",
            "top",
            "tokenizer.truncation_side: expected one of right, left",
        ),
        ("tokenizer/pad_token_id", None, "tokenizer.pad_token_id: expected a whole number ≥ 0"),
        ("tasks", {}, "tasks: expected at least one, found none"),
        ("tasks/bare", 1, "tasks.bare: expected an object, found 1"),
        (
            "tasks/retrieval/default_prompt",
            "doc",
            "tasks.retrieval.default_prompt: 'doc' is not in prompts (query)",
        ),
        ("tasks/retrieval/prompts", {"query": 1}, "tasks.retrieval.prompts.query: expected a str"),
        ("precisions", {}, "precisions: expected at least one, found none"),
        ("precisions/int8/graphs", ..., "precisions.int8.graphs: missing"),
        (
            "precisions/int8/graphs/code",
            "int8/retrieval.onnx",
            "precisions.int8.graphs.code: no such task; tasks: retrieval, bare",
        ),
        (
            "precisions/int8/graphs/retrieval",
            "int8/other.onnx",
            "precisions.int8.graphs.retrieval: 'int8/other.onnx' is not listed in files",
        ),
        (
            "precisions/int8/activation_constants/embedge.act_zero_point/dtype",
            "int64",
            "precisions.int8.activation_constants.embedge.act_zero_point.dtype: expected one of",
        ),
        (
            "precisions/int8/activation_constants/embedge.act_zero_point/reduced",
            float("nan"),
            "embedge.act_zero_point.reduced: expected a number, found NaN",
        ),
        ("model/dim", 10**300, "model.dim: expected a whole number ≤ 1048576, found 1000"),
        ("model/max_length", 1 << 31, "model.max_length: expected a whole number ≤ 2147483647"),
        (
            "tokenizer/pad_token_id",
            1 << 64,
            "tokenizer.pad_token_id: expected a whole number ≤ 2147",
        ),
        (
            "precisions/int8/row_multiple",
            10**9,
            "int8.row_multiple: expected a whole number ≤ 4096",
        ),
        (
            "precisions/int8/activation_constants/embedge.act_zero_point/reduced",
            256,
            "embedge.act_zero_point.reduced: expected a value of uint8, found 256",
        ),
        (
            "precisions/int8/activation_constants/embedge.act_zero_point/full",
            0.5,
            "embedge.act_zero_point.full: expected a value of uint8, found 0.5",
        ),
        ("files/tokenizer.json/size", -1, "files.tokenizer.json.size: expected a whole number"),
        ("files/tokenizer.json/sha256", "xyz", "files.tokenizer.json.sha256: expected 64 hexa"),
        ("format_version", 1, "format_version: expected a string, found 1"),
        ("format_version", "one", "format_version: expected \"major.minor\", found 'one'"),
    ],
)
def test_a_wrong_key_is_named_with_its_path(path: str, value: Any, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.from_dict(changed(path, value))
    assert message in str(caught.value)
    assert str(caught.value).startswith("manifest.json: ")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../w.bin",
        "int8/../../w.bin",
        "",
        "a//b",
        "./a",
        "C:/w.bin",
        "a\\b",
        "a\0b",
        "a/",
        ".a",
        "~/a",
        "a\n",
        "-a",
        "ä",
        "a" * 129,
    ],
)
@pytest.mark.parametrize("key", ["tokenizer/file", "precisions/int8/graphs/retrieval"])
def test_a_path_that_leaves_the_bundle_is_refused(key: str, path: str) -> None:
    with pytest.raises(ManifestError, match="is not a path inside the bundle"):
        Manifest.from_dict(changed(key, path))


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "/home/me",
        "../../../home",
        "a\\b",
        "C:",
        "~",
        "-x",
        "a\n",
        "ä",
        "a" * 65,
    ],
)
@pytest.mark.parametrize("key", ["tasks", "precisions"])
def test_a_name_that_could_be_a_path_is_refused(key: str, name: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    document[key][name] = next(iter(document[key].values()))
    with pytest.raises(
        ManifestError, match=rf"^manifest\.json: {key}: .* is no name of a {key[:-1]}"
    ):
        Manifest.from_dict(document)


def test_names_that_export_allows_are_read() -> None:
    document = copy.deepcopy(DOCUMENT)
    for name in ("a", "v1.5", "text-matching", "0_x", "A" * 64, "a..b"):
        document["tasks"][name] = document["tasks"]["bare"]
        document["precisions"]["int8"]["graphs"][name] = f"int8/{name}.onnx"
        document["files"][f"int8/{name}.onnx"] = {"size": 1, "sha256": SHA}
    assert len(Manifest.from_dict(document).tasks) == 8


def test_a_listed_file_outside_the_bundle_is_refused() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["files"]["../w.bin"] = {"size": 1, "sha256": SHA}
    with pytest.raises(ManifestError, match=r"files: '\.\./w\.bin' is not a path inside"):
        Manifest.from_dict(document)


@pytest.mark.parametrize(
    ("version", "hint"), [("2.0", "upgrade embedge"), ("0.9", "export the bundle again")]
)
def test_another_major_version_is_refused(version: str, hint: str) -> None:
    with pytest.raises(BundleError, match=rf"reads version 1\.x, the bundle is {version}; {hint}"):
        Manifest.from_dict(changed("format_version", version))


def test_a_newer_minor_version_warns_and_is_read() -> None:
    with pytest.warns(EmbedgeWarning, match=r"format_version 1\.9 is newer than 1\.8"):
        manifest = Manifest.from_dict(changed("format_version", "1.9"))
    assert manifest.model.dim == 384
