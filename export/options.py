"""What an export is asked to do, checked as far as it can be before anything is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from embedge.runtime.bundle.contract import UNPACKED_PRECISION
from embedge.runtime.bundle.names import A_NAME, is_name
from embedge.runtime.errors import EmbedgeValueError

PRECISIONS = ("fp32", "fp16", "int8", "int4", "int4-fp16")
INT4 = ("int4", "int4-fp16")  # on the CPU, on GPUs
MODALITIES = ("all", "text")
WIDE_MODEL = 1536  # hidden size
METHODS = ("gptq", "rtn")
POOLINGS = ("mean", "cls", "lasttoken")
RESERVED = ("base", "shared", "vision")
RESERVED_END = ".unpacked"


@dataclass(frozen=True, kw_only=True)
class Request:
    """See :func:`embedge.export.export_bundle` for the meaning of each."""

    source: str
    adapters: Mapping[str, Path | None]
    precisions: tuple[str, ...]
    out: Path
    matryoshka_dims: tuple[int, ...] | None
    pooling: str | None
    calibration: Path | str
    keep: Mapping[str, str]
    int4_block_size: int | None
    int4_method: str
    int8_method: str | None
    budget: int | None
    overwrite: bool
    modality: str = "all"


def check_mapping(name: str, value: object, expected: str) -> None:
    """Refuse what is not a mapping.

    Raises:
        EmbedgeValueError: naming the argument.
    """
    if not isinstance(value, Mapping):
        raise EmbedgeValueError(f"{name}: expected {expected}, found {value!r}")


def check_path(name: str, value: object) -> Path:
    """A path from a string or a path object.

    Raises:
        EmbedgeValueError: naming the argument.
    """
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise EmbedgeValueError(f"{name}: expected a path, found {value!r}")
    return Path(path)


def check_tasks(adapters: Mapping[str, object]) -> None:
    """Refuse names that cannot be file names.

    Raises:
        EmbedgeValueError: naming the bad task.
    """
    for name in adapters:
        if not is_name(name) or name in RESERVED or name.endswith(RESERVED_END):
            raise EmbedgeValueError(
                f"task {name!r}: expected a name of {A_NAME}, none of {', '.join(RESERVED)} and not ending "
                f"in {RESERVED_END}; choose another name"
            )


def check_precisions(precisions: Sequence[str]) -> tuple[str, ...]:
    """The precisions without repeats.

    Raises:
        EmbedgeValueError: an unknown one, or none at all.
    """
    if isinstance(precisions, str):
        precisions = [precisions]
    if not isinstance(precisions, Iterable):
        raise EmbedgeValueError(
            f"precisions: expected a list of some of {', '.join(PRECISIONS)}, found {precisions!r}"
        )
    precisions = list(precisions)
    unknown = [p for p in precisions if p not in PRECISIONS]
    if unknown or not precisions:
        raise EmbedgeValueError(
            f"precisions: expected some of {', '.join(PRECISIONS)}, "
            f"found {', '.join(map(repr, unknown)) or 'none'}"
            + ("; an int4 export has it too" if unknown == [UNPACKED_PRECISION] else "")
        )
    return tuple(dict.fromkeys(precisions))


def check_dims(dims: Sequence[int] | None, dim: int) -> tuple[int, ...] | None:
    """Matryoshka dimensions in increasing order, the full one included.

    Raises:
        EmbedgeValueError: one is not an integer in ``1…dim``.
    """
    if dims is None:
        return None
    for value in dims:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= dim:
            raise EmbedgeValueError(
                f"matryoshka dimension {value!r}: expected an integer from 1 to {dim}, the model's "
                "own dimension"
            )
    return tuple(sorted({*dims, dim}))


def check_keep(keep: Mapping[str, str], precisions: Sequence[str]) -> None:
    """Refuse precisions that a kept layer cannot have, in any of the graphs.

    Raises:
        EmbedgeValueError: naming the pattern.
    """
    for pattern, precision in keep.items():
        if not isinstance(pattern, str):
            raise EmbedgeValueError(f"keep: expected patterns of layer names, found {pattern!r}")
        if precision not in ("fp32", "int8"):
            raise EmbedgeValueError(f"keep {pattern!r}={precision!r}: expected 'fp32' or 'int8'")
        if precision == "int8" and "int4-fp16" in precisions:
            raise EmbedgeValueError(
                f"keep {pattern!r}='int8': int8 products run on the CPU, int4-fp16 graphs on CUDA; keep "
                "the layers at 'fp32', or export int4-fp16 in a call of its own"
            )
