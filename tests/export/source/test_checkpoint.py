"""A model folder is read tensor by tensor; a damaged or foreign one is a named error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from embedge.export.errors import CheckpointError, ExportError
from embedge.export.source.checkpoint import Checkpoint

TENSORS = {
    "b.weight": np.arange(12, dtype=np.float32).reshape(3, 4) - 5.5,
    "a.bias": np.array([1e-3, -2, 3e4], np.float32),
    "a.empty": np.zeros((0, 4), np.float32),
    "c.scalar": np.array(2.5, np.float32),
}


def write_model(
    folder: Path, tensors: dict[str, NDArray[Any]] | None = None, **config: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"} | config))
    save_file(TENSORS if tensors is None else tensors, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, layout: dict[str, list[str]], **extra: str) -> Path:
    """Write ``layout``, file name to tensor names, and an index of it plus ``extra``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    for name, keys in layout.items():
        save_file({key: TENSORS[key] for key in keys}, folder / name)
    weight_map = {key: name for name, keys in layout.items() for key in keys} | extra
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def raw_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_tensors_are_read_as_written(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_model(tmp_path))

    assert checkpoint.keys() == ("a.bias", "a.empty", "b.weight", "c.scalar")
    for key, value in TENSORS.items():
        assert checkpoint.has(key)
        assert checkpoint.shape(key) == value.shape
        assert checkpoint.read(key).dtype == np.float32
        assert np.array_equal(checkpoint.read(key), value)
    assert not checkpoint.has("d")


def test_what_is_read_is_a_fresh_array(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_model(tmp_path))

    checkpoint.read("b.weight")[:] = 0

    assert np.array_equal(checkpoint.read("b.weight"), TENSORS["b.weight"])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_every_finite_half_precision_number_is_read_exactly(dtype: Any, tmp_path: Path) -> None:
    numbers = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    numbers = numbers[np.isfinite(numbers.astype(np.float32))]

    checkpoint = Checkpoint(write_model(tmp_path, {"x": numbers.reshape(2, -1)}))

    assert np.array_equal(
        checkpoint.read("x").reshape(-1).view(np.uint32), numbers.astype(np.float32).view(np.uint32)
    )  # also the sign of zero


def test_float64_is_rounded_and_integers_are_refused(tmp_path: Path) -> None:
    tensors = {"x": np.array([0.1, 1e-300]), "position_ids": np.arange(3)}
    checkpoint = Checkpoint(write_model(tmp_path, tensors))

    assert np.array_equal(checkpoint.read("x"), np.array([0.1, 0], np.float32))
    assert checkpoint.is_float("x") and not checkpoint.is_float("position_ids")
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors: tensor 'position_ids' is I64, expected F16, BF16",
    ):
        checkpoint.read("position_ids")


def test_shards_read_like_one_file_and_have_the_same_hash(tmp_path: Path) -> None:
    whole = Checkpoint(write_model(tmp_path / "whole"))

    split = Checkpoint(
        write_shards(
            tmp_path / "split",
            {"m-2.safetensors": ["a.bias", "c.scalar"], "m-1.safetensors": ["b.weight", "a.empty"]},
        )
    )

    assert split.keys() == whole.keys()
    assert all(np.array_equal(split.read(key), whole.read(key)) for key in whole.keys())
    assert split.sha256() == whole.sha256()


@pytest.mark.parametrize(
    "change",
    [
        {"b.weight": TENSORS["b.weight"].reshape(4, 3)},
        {"b.weight": TENSORS["b.weight"].astype(np.float16)},
        {"b.weight": np.nextafter(TENSORS["b.weight"], np.float32(9))},
        {"other": TENSORS["b.weight"]},
    ],
    ids=["shape", "dtype", "value", "name"],
)
def test_the_hash_depends_on_names_dtypes_shapes_and_values(
    change: dict[str, Any], tmp_path: Path
) -> None:
    first = Checkpoint(write_model(tmp_path / "first")).sha256()

    assert Checkpoint(write_model(tmp_path / "second", TENSORS | change)).sha256() != first


def test_tensors_that_the_index_forgets_are_read_from_the_files_it_names(tmp_path: Path) -> None:
    write_shards(tmp_path, {"m-1.safetensors": ["a.bias", "b.weight"]})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.bias": "m-1.safetensors"}}))

    assert np.array_equal(Checkpoint(tmp_path).read("b.weight"), TENSORS["b.weight"])


def test_the_transformer_may_lie_in_the_folder_that_modules_json_names(tmp_path: Path) -> None:
    write_model(tmp_path / "0_Transformer", hidden_size=4)
    (tmp_path / "modules.json").write_text(
        '[{"idx": 0, "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]'
    )

    checkpoint = Checkpoint(str(tmp_path))

    assert checkpoint.config["hidden_size"] == 4
    assert checkpoint.path == tmp_path
    assert checkpoint.transformer_path == tmp_path / "0_Transformer"


WHOLE = raw_file({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}, bytes(12))
DAMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it holds 0 bytes, fewer than the 8 of a header length"),
    "cut in the header": (WHOLE[:30], r"the header should be \d+ bytes, the file has 30"),
    "cut in the tensors": (WHOLE[:-1], r"its tensors end at byte \d+, the file has \d+"),
    "bytes left over": (WHOLE + b"x", r"its tensors end at byte \d+, the file has \d+"),
    "an endless header": (
        b"\xff" * 16,
        r"the header should be 18446744073709551615 bytes, the file has 16",
    ),
    "a header that is no JSON": (raw_file(b"{"), "the header is not JSON"),
    "a header that is no text": (raw_file(b"\xff\xfe"), "the header is not JSON"),
    "a header that is no object": (raw_file([]), "the header is not a JSON object"),
    "the same name twice": (
        raw_file(b'{"x": {}, "x": {"dtype": "F32"}}'),
        "the key 'x' occurs twice, with different values",
    ),
    "offsets shorter than the shape": (
        raw_file({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)),
        r"tensor 'x' of shape \[3\] and dtype F32 needs 12 bytes, its offsets give it 8",
    ),
    "offsets beyond the file": (
        raw_file({"x": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}}, bytes(12)),
        r"tensor 'x' begins at byte \d+ of the file, expected",
    ),
    "overlapping tensors": (
        raw_file(
            {
                k: {"dtype": "F32", "shape": [2], "data_offsets": o}
                for k, o in [("x", [0, 8]), ("y", [4, 12])]
            },
            bytes(12),
        ),
        "tensor 'y' begins at byte",
    ),
    "negative offsets": (
        raw_file({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
        "entry of tensor 'x'",
    ),
    "offsets backwards": (
        raw_file({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}),
        "needs 4 bytes",
    ),
    "a negative shape": (
        raw_file({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
        "entry of tensor 'x'",
    ),
    "a shape of text": (
        raw_file({"x": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}),
        "entry of tensor 'x'",
    ),
    "no offsets": (
        raw_file({"x": {"dtype": "F32", "shape": [1]}}),
        "entry of tensor 'x' makes no sense",
    ),
    "an entry that is no object": (raw_file({"x": 3}), "entry of tensor 'x' makes no sense"),
    "a dtype that is no text": (
        raw_file({"x": {"dtype": [], "shape": [], "data_offsets": [0, 4]}}),
        "entry of tensor 'x'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_when_the_model_is_opened(damage: str, tmp_path: Path) -> None:
    content, expected = DAMAGES[damage]
    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(CheckpointError, match=expected) as caught:
        Checkpoint(tmp_path)

    assert str(caught.value).startswith(
        f"{tmp_path / 'model.safetensors'}: not a complete safetensors file: "
    )
    assert str(caught.value).endswith("; the file is truncated or damaged, fetch or save it again")


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    write_model(tmp_path)
    header = {"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    (tmp_path / "model.safetensors").write_bytes(raw_file(header, b"1"))

    with pytest.raises(CheckpointError, match="tensor 'x' has the dtype 'F4', known are BOOL, "):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_nan_and_infinity_are_named_with_their_place(
    value: float, dtype: Any, tmp_path: Path
) -> None:
    weight = np.ones((3, 4), dtype)
    weight[1, 2] = value
    checkpoint = Checkpoint(write_model(tmp_path, {"w": weight}))

    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("w")

    assert str(caught.value) == (
        f"{tmp_path / 'model.safetensors'}: tensor 'w' holds {value} "
        "at [1, 2], expected finite numbers"
    )


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_model(tmp_path))

    for ask in (checkpoint.read, checkpoint.shape, checkpoint.is_float):
        with pytest.raises(
            CheckpointError, match=r"the weights have no tensor 'd'; they have 4 others"
        ):
            ask("d")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"m-1.safetensors": ["a.bias"], "m-2.safetensors": ["b.weight"]})
    (tmp_path / "m-2.safetensors").unlink()

    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)

    assert str(caught.value) == (
        f"{tmp_path / 'model.safetensors.index.json'}: 1 of 2 weight files are missing: "
        "m-2.safetensors; fetch the model again"
    )


def test_tensors_that_are_not_where_the_index_says_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"m-1.safetensors": ["a.bias"]}, gone="m-1.safetensors")

    with pytest.raises(
        CheckpointError,
        match=r"1 tensors are not in the files that it names: gone in m-1\.safetensors",
    ):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "..\\secret", "C:secret"]
)
def test_an_index_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    write_shards(tmp_path, {"m-1.safetensors": ["a.bias"]}, secret=name)

    with pytest.raises(CheckpointError, match="leaves the model folder; this is refused"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map_is_named(index: str, tmp_path: Path) -> None:
    write_shards(tmp_path, {"m-1.safetensors": ["a.bias"]})
    (tmp_path / "model.safetensors.index.json").write_text(index)

    with pytest.raises(
        CheckpointError, match=r"index\.json: expected a weight_map from tensor names to file names"
    ):
        Checkpoint(tmp_path)


def prepare_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def prepare_adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "has no weights; expected model.safetensors, or",
    ),
    "pickled weights": (
        prepare_pickle,
        r"only pickled weights.*trust them: python -c .*save_file",
    ),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "has no config.json; expected a model folder",
    ),
    "an adapter": (prepare_adapter, "holds a PEFT adapter, not a model; .* --adapter NAME="),
    "broken config": (lambda f: (f / "config.json").write_text("{"), r"config\.json: is not JSON"),
    "config of bytes": (
        lambda f: (f / "config.json").write_bytes(b"\xff"),
        r"config\.json: is not JSON",
    ),
    "config that is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "expected a JSON object, found list",
    ),
    "classes that are no list": (
        lambda f: (f / "config.json").write_text('{"architectures": 16}'),
        "architectures is 16, expected a list of class names",
    ),
    "quantized weights": (
        lambda f: (f / "config.json").write_text(
            '{"quantization_config": {"quant_method": "gptq"}}'
        ),
        "already quantized .* original float weights",
    ),
    "modules that are no list": (
        lambda f: (f / "modules.json").write_text("{}"),
        "expected a list of modules",
    ),
    "modules that leave the folder": (
        lambda f: (f / "modules.json").write_text('[{"path": "../other"}]'),
        "'../other' leaves the model folder",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_folder_that_cannot_be_used_says_why(case: str, tmp_path: Path) -> None:
    prepare, expected = UNUSABLE[case]
    prepare(write_model(tmp_path))

    with pytest.raises(CheckpointError, match=expected) as caught:
        Checkpoint(tmp_path)

    assert isinstance(caught.value, (ExportError, ValueError))
    assert str(tmp_path) in str(caught.value)


def test_a_source_that_is_neither_folder_nor_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="no such folder; name a local model folder, or a hub id"
    ):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="^not-here: no such folder"):
        Checkpoint("not-here")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a model folder, found a file"):
        Checkpoint(tmp_path / "file")


@pytest.mark.parametrize(
    ("offline", "advice"),
    [
        (
            True,
            "and the hub's cache does not hold it; nothing is fetched, because HF_HUB_OFFLINE is set: "
            "unset it, or download the model elsewhere and name its folder",
        ),
        (
            False,
            "and it could not be fetched from the hub as an id (OSError: no route); check the name and "
            "the network, or download the model elsewhere and name its folder",
        ),
    ],
)
def test_a_hub_id_that_cannot_be_fetched_is_one_line_with_one_advice(
    monkeypatch: pytest.MonkeyPatch, offline: bool, advice: str
) -> None:
    import huggingface_hub.constants

    def fail(hub_id: str, **patterns: list[str]) -> str:
        raise OSError("no route\n\nSet HF_HUB_OFFLINE=0.")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)

    with pytest.raises(CheckpointError) as caught:
        Checkpoint("some-organization/no-such-model")

    assert str(caught.value) == (f"some-organization/no-such-model: no such folder here, {advice}")


def test_a_hub_id_without_the_hubs_client_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    with pytest.raises(CheckpointError, match=r"not installed; run: pip install huggingface_hub"):
        Checkpoint("organization/name")


def test_a_hub_id_is_fetched_without_pickles_and_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    write_model(tmp_path / "3b0c")
    asked = {}

    def snapshot_download(hub_id: str, **patterns: list[str]) -> str:
        asked[hub_id] = patterns
        return str(tmp_path / "3b0c")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    assert Checkpoint("organization/some-model").name == "some-model"
    patterns = asked["organization/some-model"]
    assert not any(
        wanted.endswith((".bin", ".py", ".pt", "*")) for wanted in patterns["allow_patterns"]
    )


@pytest.mark.parametrize(
    ("folder", "card", "named", "expected"),
    [
        ("my-model", "", None, "my-model"),
        ("model", "", "org/the-parent", "the-parent"),
        ("model", "", "/home/someone/runs/final-3/", "final-3"),
        (
            "model",
            "---\nlicense: mit\n# note\n---\n\n# all-MiniLM-L6-v2\n",
            "org/the-parent",
            "all-MiniLM-L6-v2",
        ),
        ("model", "# org/tiny-bert\ntext", "org/the-parent", "tiny-bert"),
        ("model", "# A model for everyone\n# x-1\n", "org/the-parent", "the-parent"),
        ("model", "# Introduction\n", "org/the-parent", "the-parent"),
        ("models--org--small-e5/snapshots/0a1b2c", "# e5-large", "org/the-parent", "small-e5"),
    ],
)
def test_the_name_is_short_and_never_a_path(
    folder: str, card: str, named: str | None, expected: str, tmp_path: Path
) -> None:
    write_model(tmp_path / folder, _name_or_path=named)
    (tmp_path / folder / "README.md").write_text(card)

    assert Checkpoint(tmp_path / folder).name == expected


@pytest.mark.parametrize(
    "plant",
    [os.mkfifo, Path.mkdir, lambda p: p.symlink_to("nowhere")],
    ids=["fifo", "folder", "link"],
)
def test_a_model_card_that_cannot_be_read_is_not_taken_for_none(
    plant: Callable[[Path], None], tmp_path: Path
) -> None:
    write_model(tmp_path)
    plant(tmp_path / "README.md")
    with pytest.raises(CheckpointError, match=r"README\.md: cannot be read: .*or remove it"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: 'mit' # really\n---\n", "mit"),
        ("---\nlicense:\n- mit\n- apache-2.0\ntags:\n- x\n---\n", "mit, apache-2.0"),
        ("---\nlicense: [mit, gpl-3.0]\n---\n", "mit, gpl-3.0"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "qwen-research"),
        ("---\nlicense: other\n---\n", "other"),
        ("\ufeff---\nlicense: mit\n---\n", "mit"),
        ("---\nmodel:\n  license: mit\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("license: mit\n", None),
        (None, None),
    ],
)
def test_the_license_is_the_model_cards(
    card: str | None, expected: str | None, tmp_path: Path
) -> None:
    write_model(tmp_path)
    if card is not None:
        (tmp_path / "README.md").write_text(card, encoding="utf-8")

    assert Checkpoint(tmp_path).card.license == expected
