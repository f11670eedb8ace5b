"""What bitsandbytes has stored is read as floats; what is damaged, missing or of another kind is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedge.export.errors import CheckpointError
from embedge.export.source.checkpoint import Checkpoint
from embedge.quant.bitsandbytes import CODES, dynamic_map, quantize
from tests.helpers.weight_files import write_model

FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT_BITS = {"quant_method": "bitsandbytes", "load_in_8bit": True}
RNG = np.random.default_rng(0)
CODE = RNG.integers(0, 16, 6 * 50, np.uint8)
ABSMAX = RNG.uniform(0.5, 2, 5).astype(np.float32)
Tensors = dict[str, NDArray[Any]]


def four_bits(**state: Any) -> Tensors:
    """A Linear of shape [6, 50] as transformers saves it: five blocks, the last of 44."""
    settings = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [6, 50]} | state
    return {
        "x.weight": (CODE[::2] << 4 | CODE[1::2])[:, None],
        "x.weight.absmax": ABSMAX,
        "x.weight.quant_map": CODES["nf4"],
        "x.weight.quant_state.bitsandbytes__nf4": as_bytes(json.dumps(settings)),
        "x.bias": np.ones(6, np.float32),
    }


def as_bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def expected() -> NDArray[np.float32]:
    """One product a value, of the block that it lies in."""
    values = [CODES["nf4"][code] * ABSMAX[i // 64] for i, code in enumerate(CODE)]
    return np.array(values, np.float32).reshape(6, 50)


def test_four_bits_are_read_as_the_tensor_they_stand_for(tmp_path: Path) -> None:
    checkpoint = Checkpoint(
        write_model(tmp_path, four_bits(), quantization_config=FOUR_BITS)
    ).with_parts({"x": ("q", "k")})
    assert checkpoint.keys() == ("k.bias", "k.weight", "q.bias", "q.weight")
    assert checkpoint.shape("k.weight") == (3, 50) and checkpoint.is_float("k.weight")
    assert np.array_equal(checkpoint.read("q.weight"), expected()[:3])
    assert np.array_equal(checkpoint.read("k.weight", slice(1, 3)), expected()[4:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_are_rounded_to_the_dtype_of_the_state(dtype: str, tmp_path: Path) -> None:
    import ml_dtypes

    tensors = four_bits(dtype=dtype)
    checkpoint = Checkpoint(write_model(tmp_path, tensors, quantization_config=FOUR_BITS))
    rounded = expected().astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    assert np.array_equal(checkpoint.read("x.weight"), rounded.astype(np.float32))


def test_codes_lie_in_any_dtype(tmp_path: Path) -> None:
    tensors = four_bits()
    tensors["x.weight"] = tensors["x.weight"].reshape(-1).view(np.float16)[:, None]
    checkpoint = Checkpoint(write_model(tmp_path, tensors, quantization_config=FOUR_BITS))
    assert checkpoint.shape("x.weight") == (6, 50)
    assert np.array_equal(checkpoint.read("x.weight"), expected())


def test_maxima_of_double_quantization_are_restored(tmp_path: Path) -> None:
    codes, nested = quantize(ABSMAX - np.float32(1), dynamic_map(), 256)
    state = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1.0}
    tensors = four_bits(**state) | {
        "x.weight.absmax": codes,
        "x.weight.nested_absmax": nested,
        "x.weight.nested_quant_map": dynamic_map(),
    }
    checkpoint = Checkpoint(write_model(tmp_path, tensors, quantization_config=FOUR_BITS))
    maxima = dynamic_map()[codes] * nested[0] + np.float32(1)
    values = [CODES["nf4"][code] * maxima[i // 64] for i, code in enumerate(CODE)]
    assert checkpoint.keys() == ("x.bias", "x.weight")
    assert np.array_equal(checkpoint.read("x.weight").reshape(-1), np.array(values, np.float32))


def int8() -> Tensors:
    return {
        "x.weight": RNG.integers(-127, 128, (4, 5)).astype(np.int8),
        "x.SCB": np.array([1, 2, 0.5, 3], np.float32),
        "x.weight_format": np.zeros((), np.uint8),
        "x.bias": np.ones(4, np.float32),
    }


def test_rows_of_8_bits_are_read_as_the_tensor_they_stand_for(tmp_path: Path) -> None:
    tensors = int8()
    checkpoint = Checkpoint(write_model(tmp_path, tensors, quantization_config=EIGHT_BITS))
    values = tensors["x.weight"].astype(np.float64) * tensors["x.SCB"][:, None] / 127
    assert checkpoint.keys() == ("x.bias", "x.weight")
    assert checkpoint.read("x.weight") == pytest.approx(values, rel=1e-6)
    assert np.array_equal(
        checkpoint.read("x.weight", slice(1, 3)), checkpoint.read("x.weight")[1:3]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.weight.absmax": None}, "x.weight is stored in 4 bits, and x.weight.absmax is missing"),
        ({"x.weight": None}, "x.weight: has bitsandbytes' state among the weights and is missing"),
        ({"x.weight.absmax": ABSMAX[:4]}, r"absmax is F32 of shape \[4\], expected 5 numbers"),
        ({"x.weight": np.zeros((70, 1), np.uint8)}, r"x.weight has 70 bytes, expected 150"),
        ({"x.weight.quant_map": CODES["fp4"]}, "x.weight.quant_map is .*, expected bitsandbytes' nf4"),
        ({"blocksize": 48}, "blocksize is 48, expected 32 or 64"),
        ({"dtype": "float8"}, "dtype is 'float8', expected float32 or bfloat16 or float16"),
        ({"quant_type": "fp4"}, "quant_type is 'fp4', expected nf4"),
        ({"shape": "all"}, "shape is 'all', expected a list of sizes"),
        ({"nested_offset": 1.0}, "nested_blocksize is None, nested_dtype None"),
        ({"x.weight.quant_state.bitsandbytes__nf4": as_bytes("{")}, "expected a JSON object"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    own = {k: v for k, v in change.items() if not k.startswith("x.")}
    changed = four_bits(**own) | {k: v for k, v in change.items() if k.startswith("x.")}
    tensors = {key: value for key, value in changed.items() if value is not None}
    folder = write_model(tmp_path, tensors, quantization_config=FOUR_BITS)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_maxima_that_are_not_finite_are_named(tmp_path: Path) -> None:
    tensors = int8()
    tensors["x.SCB"][2] = np.inf
    folder = write_model(tmp_path, tensors, quantization_config=EIGHT_BITS)
    with pytest.raises(CheckpointError, match=r"'x\.SCB' holds inf at \[2\]"):
        Checkpoint(folder)


def test_an_order_of_a_gpu_is_refused(tmp_path: Path) -> None:
    tensors = int8() | {"x.weight_format": np.array(2, np.uint8)}
    folder = write_model(tmp_path, tensors, quantization_config=EIGHT_BITS)
    with pytest.raises(CheckpointError, match=r"x\.weight_format is \[2\], expected 0"):
        Checkpoint(folder)


@pytest.mark.parametrize("settings", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}])
def test_other_methods_are_refused_by_name(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = write_model(tmp_path, quantization_config=settings)
    with pytest.raises(CheckpointError, match=f"quant_method '{settings['quant_method']}'"):
        Checkpoint(folder)


def test_floats_under_a_configuration_of_bitsandbytes_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, quantization_config=FOUR_BITS)
    with pytest.raises(CheckpointError, match="none of them is in its format; delete .* nf4"):
        Checkpoint(folder)


def test_another_format_than_the_configurations_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, four_bits(), quantization_config=EIGHT_BITS)
    with pytest.raises(CheckpointError, match=r"asks for int8, and x\.weight is stored as nf4"):
        Checkpoint(folder)


def test_a_configuration_that_asks_for_nothing(tmp_path: Path) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": False}
    folder = write_model(tmp_path, four_bits(), quantization_config=settings)
    with pytest.raises(CheckpointError, match="asks for neither 4 nor 8 bits, and x"):
        Checkpoint(folder)


def test_maxima_are_restored_when_a_tensor_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedge.export.source.safetensors_file import SafetensorsFile

    read: list[str] = []
    original = SafetensorsFile.read

    def noted(file: SafetensorsFile, key: str, rows: slice | None = None) -> Any:
        read.append(key)
        return original(file, key, rows)

    monkeypatch.setattr(SafetensorsFile, "read", noted)
    checkpoint = Checkpoint(write_model(tmp_path, four_bits(), quantization_config=FOUR_BITS))
    assert read == ["x.weight.quant_map"]
    for _ in range(2):
        assert np.array_equal(checkpoint.read("x.weight"), expected())
    assert read == ["x.weight.quant_map", "x.weight.absmax"]


def test_codes_without_a_configuration_are_refused_where_they_are_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_model(tmp_path, four_bits()))
    with pytest.raises(
        CheckpointError, match=r"'x\.weight' is U8, expected F16.*quantization_config"
    ):
        checkpoint.read("x.weight")
