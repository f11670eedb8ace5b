"""Weights that a checkpoint stores in bitsandbytes' formats, read as the float tensors that they stand for.

Beside the codes of a Linear's ``X.weight`` there are, as transformers saves them:

    4 bits (nf4, fp4)
        X.weight                                  the codes, two a byte, in any dtype (bnb_4bit_quant_storage)
        X.weight.absmax                           maxima of the blocks; 8-bit codes with double quantization
        X.weight.quant_map                        float32 [16], the fractions
        X.weight.nested_absmax, .nested_quant_map maxima of the maxima, and float32 [256]
        X.weight.quant_state.bitsandbytes__nf4    JSON as bytes: shape, dtype, blocksize, nested_offset, …
    LLM.int8
        X.weight                                  int8 [out, in]
        X.SCB                                     maxima of the rows
        X.weight_format                           the order of the codes in memory; 0, row by row

Values are those of bitsandbytes' ``dequantize_4bit`` and ``int8_vectorwise_dequant`` to the bit. 4-bit values are
float32 products that are rounded to the dtype of the state: that in which the model was loaded when it was
quantized. bitsandbytes' matmuls may round them once more, to their compute dtype, as they round their inputs;
that belongs to the arithmetic of a run, and is not repeated here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.export.errors import CheckpointError
from embedge.export.source.safetensors_file import (
    SafetensorsFile,
    StoredTensors,
    check_finite,
    row_range,
)
from embedge.quant.bitsandbytes import (
    CODES,
    NESTED_BLOCK,
    ROUND,
    dequantize,
    dequantize_int8,
    unpack,
)
from embedge.runtime.bundle.json_object import parse_json

__all__ = ["BLOCK_SIZES", "check_quantization", "dequantized"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_SCALES = ".SCB"
_ORIGINAL = "export from the original float weights"

Numbers = Callable[[], NDArray[np.float32]]  # read when they are asked for


@dataclass(frozen=True, kw_only=True)
class _FourBits:
    """A tensor in blocks of 4 bits, read as :class:`SafetensorsFile` reads."""

    file: SafetensorsFile
    key: str
    kind: str
    size: tuple[int, ...]
    dtype: str
    block_size: int
    maxima: Numbers

    @cached_property
    def absmax(self) -> NDArray[np.float32]:
        """Of the blocks, float32 ``[blocks]``."""
        return self.maxima()

    @property
    def path(self) -> Path:
        return self.file.path

    def shape(self, key: str) -> tuple[int, ...]:
        return self.size

    def is_float(self, key: str) -> bool:
        return True

    def read(self, key: str, rows: slice | None = None) -> NDArray[np.float32]:
        first, last = row_range(rows, self.size)
        width = prod(self.size[1:])
        codes = unpack(self.file.stored_bytes(self.key), first * width, last * width)
        values = dequantize(codes, self.absmax, CODES[self.kind], self.block_size, first * width)
        values = ROUND[self.dtype](values).reshape(last - first, *self.size[1:])
        return check_finite(values, f"{self.path}: tensor {self.key!r}", first, CheckpointError)


@dataclass(frozen=True, kw_only=True)
class _Int8Rows:
    """A matrix of LLM.int8, read as :class:`SafetensorsFile` reads."""

    file: SafetensorsFile
    key: str
    absmax: NDArray[np.float32]

    @property
    def path(self) -> Path:
        return self.file.path

    def shape(self, key: str) -> tuple[int, ...]:
        return self.file.shape(self.key)

    def is_float(self, key: str) -> bool:
        return True

    def read(self, key: str, rows: slice | None = None) -> NDArray[np.float32]:
        shape = self.shape(key)
        first, last = row_range(rows, shape)
        codes = self.file.stored_bytes(self.key).view(np.int8).reshape(shape)
        values = dequantize_int8(codes[first:last], self.absmax[first:last])
        return check_finite(values, f"{self.path}: tensor {self.key!r}", first, CheckpointError)


def check_quantization(config: Mapping[str, Any], file: Path) -> None:
    """Refuse a ``quantization_config`` of a method other than bitsandbytes'.

    Args:
        config: the content of config.json.
        file: where it lies, for the message.

    Raises:
        CheckpointError: naming the method.
    """
    settings = config.get("quantization_config")
    if not settings:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method is None and isinstance(settings, dict) and _asked(settings) is not None:
        return  # as transformers wrote it at first
    if method != "bitsandbytes":
        raise CheckpointError(
            f"{file}: the weights are already quantized (quantization_config has quant_method {method!r}); "
            f"expected floats, or bitsandbytes' 4-bit or 8-bit format: {_ORIGINAL}"
        )


def _asked(settings: Mapping[str, Any]) -> str | None:
    """The format that a configuration of bitsandbytes names: "nf4", "fp4" or "int8"."""
    if settings.get("load_in_4bit", settings.get("_load_in_4bit")):
        return str(settings.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if settings.get("load_in_8bit", settings.get("_load_in_8bit")) else None


def dequantized(
    files: Mapping[str, SafetensorsFile], config: Mapping[str, Any], file: Path
) -> dict[str, StoredTensors]:
    """Return what reads each tensor: its file, or what restores it.

    Args:
        files: the file of each stored tensor.
        config: the content of config.json.
        file: where that lies, for messages.

    Raises:
        CheckpointError: config.json says that bitsandbytes quantized the weights, and they are not in the
            format that it names, or a part of one is missing or damaged.
    """
    found: dict[str, StoredTensors] = dict(files)
    settings = config.get("quantization_config")
    if not settings:
        return found
    kinds = dict[str, str]()  # a tensor of each format
    for key in files:
        if match := _STATE.fullmatch(key):
            weight, kind = match.groups()
            found[weight] = _four_bits(files, weight, kind)
            kinds.setdefault(kind, weight)
            _drop(found, (key, *(f"{weight}.{part}" for part in _PARTS)))
        elif key.endswith(_SCALES) and _is_int8(files, key):
            weight = f"{key.removesuffix(_SCALES)}.weight"
            found[weight] = _int8_rows(files, weight, key)
            kinds.setdefault("int8", weight)
            _drop(found, (key, f"{weight}_format"))
    asked = _asked(settings)
    named = asked or "neither 4 nor 8 bits"
    if not kinds:
        raise CheckpointError(
            f"{file}: quantization_config says that bitsandbytes quantized the weights ({named}), and none of them "
            "is in its format; delete quantization_config where they are the original floats, and give "
            f"--base-quantization {asked or 'nf4'} where adapters were trained on them quantized"
        )
    if other := {kind: weight for kind, weight in kinds.items() if kind != asked}:
        kind, weight = next(iter(other.items()))
        raise CheckpointError(
            f"{file}: quantization_config asks for {named}, and {weight} is stored as {kind}; expected one format: "
            "is config.json of the same model as the weights? Fetch the model again"
        )
    return found


def _drop(found: dict[str, StoredTensors], keys: Iterable[str]) -> None:
    for key in keys:
        found.pop(key, None)


def _is_int8(files: Mapping[str, SafetensorsFile], scales: str) -> bool:
    weight = f"{scales.removesuffix(_SCALES)}.weight"
    return weight in files and files[weight].dtype(weight) == "I8"


def _int8_rows(files: Mapping[str, SafetensorsFile], weight: str, scales: str) -> _Int8Rows:
    file, shape = files[weight], files[weight].shape(weight)
    layout = f"{weight}_format"
    if layout in files:
        order = files[layout].stored_bytes(layout)
        if order.size != 1 or order[0]:
            raise CheckpointError(
                f"{file.path}: {layout} is {order.tolist()}, expected 0: {weight} row by row, and not in an order "
                "that a GPU multiplies; load and save the model with bitsandbytes 0.45 or later"
            )
    if len(shape) != 2 or files[scales].shape(scales) != shape[:1]:
        raise CheckpointError(
            f"{file.path}: {scales} has the shape {list(files[scales].shape(scales))}, expected a number for "
            f"each row of {weight}, whose shape is {list(shape)}; fetch the model again"
        )
    return _Int8Rows(file=file, key=weight, absmax=files[scales].read(scales))


def _four_bits(files: Mapping[str, SafetensorsFile], weight: str, kind: str) -> _FourBits:
    if weight not in files:
        raise CheckpointError(
            f"{weight}: has bitsandbytes' state among the weights and is missing itself; fetch the model again"
        )
    state_key = f"{weight}.quant_state.bitsandbytes__{kind}"
    place = f"{files[state_key].path}: {state_key}"
    state = _state(files[state_key].stored_bytes(state_key).tobytes(), kind, place)
    shape, block_size = tuple(state["shape"]), state["blocksize"]
    blocks = -(-prod(shape) // block_size)
    file = files[weight]
    packed = file.stored_bytes(weight).size
    if packed != -(-prod(shape) // 2):
        raise CheckpointError(
            f"{file.path}: {weight} has {packed} bytes, expected {-(-prod(shape) // 2)} for the shape "
            f"{list(shape)} in {state_key}; fetch the model again"
        )
    table = _part(files, weight, "quant_map", 16)()
    if not np.array_equal(table, CODES[kind]):
        raise CheckpointError(
            f"{file.path}: {weight}.quant_map is {table.tolist()}, expected bitsandbytes' {kind}, "
            f"{CODES[kind].tolist()}; {_ORIGINAL}"
        )
    if "nested_offset" in state:
        maxima = _nested(files, weight, state, blocks, place)
    else:
        maxima = _part(files, weight, "absmax", blocks)
    return _FourBits(
        file=file,
        key=weight,
        kind=kind,
        size=shape,
        dtype=state["dtype"],
        block_size=block_size,
        maxima=maxima,
    )


def _nested(
    files: Mapping[str, SafetensorsFile],
    weight: str,
    state: Mapping[str, Any],
    blocks: int,
    place: str,
) -> Numbers:
    """What restores the blocks' maxima, float32 ``[blocks]``, from double quantization."""
    size, offset = state.get("nested_blocksize"), state["nested_offset"]
    if size != NESTED_BLOCK or state.get("nested_dtype") != "float32" or type(offset) is not float:
        raise CheckpointError(
            f"{place}: nested_blocksize is {size!r}, nested_dtype {state.get('nested_dtype')!r} and nested_offset "
            f"{offset!r}, expected {NESTED_BLOCK}, 'float32' and a number; {_ORIGINAL}"
        )
    key = f"{weight}.absmax"
    codes = _file(files, weight, key).stored_bytes(key)
    if files[key].dtype(key) != "U8" or codes.size != blocks:
        raise CheckpointError(
            f"{files[key].path}: {key} has {codes.size} numbers of {files[key].dtype(key)}, expected {blocks} of "
            "U8; fetch the model again"
        )
    nested = _part(files, weight, "nested_absmax", -(-blocks // size))
    table = _part(files, weight, "nested_quant_map", 256)
    return lambda: dequantize(codes, nested(), table(), size) + np.float32(offset)


def _file(files: Mapping[str, SafetensorsFile], weight: str, key: str) -> SafetensorsFile:
    if key not in files:
        raise CheckpointError(
            f"{files[weight].path}: {weight} is stored in 4 bits, and {key} is missing; fetch the model again"
        )
    return files[key]


def _part(files: Mapping[str, SafetensorsFile], weight: str, part: str, count: int) -> Numbers:
    """What reads a float32 ``[count]`` beside the weight."""
    key = f"{weight}.{part}"
    file = _file(files, weight, key)
    if file.dtype(key) != "F32" or prod(file.shape(key)) != count:
        raise CheckpointError(
            f"{file.path}: {key} is {file.dtype(key)} of shape {list(file.shape(key))}, expected {count} numbers "
            "of F32; fetch the model again"
        )
    return lambda: file.read(key).reshape(-1)


def _state(text: bytes, kind: str, place: str) -> dict[str, Any]:
    """The state of a tensor, checked."""
    try:
        state = parse_json(text)
    except ValueError as problem:
        raise CheckpointError(
            f"{place}: expected a JSON object, found {problem}; fetch the model again"
        ) from problem
    expected: dict[str, tuple[object, ...]] = {
        "quant_type": (kind,),
        "blocksize": BLOCK_SIZES,
        "dtype": tuple(ROUND),
    }
    if not isinstance(state, dict):
        raise CheckpointError(f"{place}: expected a JSON object; fetch the model again")
    for key, values in expected.items():
        if state.get(key) not in values:
            raise CheckpointError(
                f"{place}: {key} is {state.get(key)!r}, expected {' or '.join(map(str, values))}; {_ORIGINAL}"
            )
    shape = state.get("shape")
    if (
        not isinstance(shape, list)
        or not shape
        or not all(type(n) is int and n >= 0 for n in shape)
    ):
        raise CheckpointError(
            f"{place}: shape is {shape!r}, expected a list of sizes; fetch the model again"
        )
    return state
