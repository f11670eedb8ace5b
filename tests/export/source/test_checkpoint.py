"""Weights are read exactly; what is damaged or missing is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from embedge.export.errors import CheckpointError
from embedge.export.source.checkpoint import Checkpoint
from tests.helpers.weight_files import TENSORS, write_model


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
