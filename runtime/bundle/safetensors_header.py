"""The header of a safetensors file.

The format, as https://github.com/huggingface/safetensors has it::

    8 bytes      length N of the header, little-endian
    N bytes      {"encoder.layer.0.query.weight": {"dtype": "F32", "shape": [384, 384],
                  "data_offsets": [0, 589824]}, "__metadata__": {…}, …} and spaces
    the rest     the tensors' bytes; offsets count from here

The rules that a damaged file breaks are checked before a tensor is read: a tensor's bytes are what its dtype and shape
need, and the tensors cover the rest of the file without holes, overlaps or bytes left over.
"""

from __future__ import annotations

import mmap
from math import prod
from typing import Any, NamedTuple

from embedge.runtime.bundle.json_object import parse_json

__all__ = ["ITEM_BYTES", "HeaderError", "StoredTensor", "read_header"]

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit that the format sets
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_MOST_BYTES = 1 << 60  # what indices reach; a tensor without values may name any shape
_MOST_AXES = 32  # of an array in numpy 1
_SHOWN = 80  # characters of a name in a message


class HeaderError(ValueError):
    """A rule of the format that a file breaks."""


class StoredTensor(NamedTuple):
    """Where a tensor lies.

    Attributes:
        dtype: as the file names it, e.g. ``"BF16"``.
        shape: its sizes.
        begin: its first byte, from the start of the file.
        end: the byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(data: mmap.mmap | bytes) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name.

    Args:
        data: the whole file, mapped; its header alone is read.

    Raises:
        HeaderError: the file breaks a rule of the format.
    """
    size = len(data)
    if size < _LENGTH_BYTES:
        raise HeaderError(f"it holds {size} bytes, fewer than the 8 of a header length")
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    if start > min(size, _LENGTH_BYTES + _MAX_HEADER_BYTES):
        raise HeaderError(
            f"the header should be {start - _LENGTH_BYTES} bytes, the file has {size}"
        )
    try:
        header = parse_json(data[_LENGTH_BYTES:start])
    except ValueError as problem:
        raise HeaderError(f"the header is not JSON ({problem})") from problem
    if not isinstance(header, dict):
        raise HeaderError("the header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(name[:_SHOWN], entry, start) for name, entry in header.items()}
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][-2:]):
        if tensor.begin != position:
            raise HeaderError(
                f"tensor {name[:_SHOWN]!r} begins at byte {tensor.begin} of the file, expected {position}"
            )
        position = tensor.end
    if position != size:
        raise HeaderError(f"its tensors end at byte {position}, the file has {size}")
    return tensors


def _tensor(name: str, entry: Any, start: int) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        numbers = (*shape, begin, end)
        sane = all(type(n) is int and 0 <= n <= _MOST_BYTES for n in numbers)
        sane = sane and isinstance(dtype, str) and len(shape) <= _MOST_AXES
        sane = sane and prod(max(n, 1) for n in shape) <= _MOST_BYTES
    except (TypeError, KeyError, ValueError):
        sane = False
    if not sane:
        raise HeaderError(f"the header entry of tensor {name!r} makes no sense")
    if dtype not in ITEM_BYTES:
        raise HeaderError(
            f"tensor {name!r} has the dtype {dtype[:_SHOWN]!r}, known are {', '.join(ITEM_BYTES)}"
        )
    needed = prod(shape) * ITEM_BYTES[dtype]
    if end - begin != needed:
        raise HeaderError(
            f"tensor {name!r} of shape {list(shape)} and dtype {dtype} needs {needed} bytes, "
            f"its offsets give it {end - begin}"
        )
    return StoredTensor(dtype, shape, start + begin, start + end)
