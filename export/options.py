"""What an export is asked to do, checked as far as it can be before anything is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedge.export.schemes.registry import BRANCHED, KEPT, PORTABLE, PRECISIONS
from embedge.export.source.base_quantization import BaseQuantization
from embedge.export.source.sentence_transformers import POOLINGS, pooling_problem
from embedge.runtime.bundle.names import A_NAME, is_name
from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.host.memory import parse_bytes

__all__ = ["POOLINGS", "ExportOptions", "check_dims", "check_tasks"]

_MODALITIES = ("all", "text")
_LAYOUTS = ("merged", "shared")
_METHODS = ("gptq", "rtn")
_BLOCK_SIZES = (16, 32, 64, 128, 256)
RANK_MULTIPLE = 16  # columns of a panel
_MOST_RANKS = 512
_RESERVED = ("base", "maps", "shared", "shared.constants", "vision")
_RESERVED_END = ".unpacked"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The arguments of :func:`embedge.export.export_bundle`, which says what each means.

    Each may be given as a caller has it: paths as strings, lists, ``None`` for an empty mapping, sizes
    with units. It is checked and converted when the object is built.

    Raises:
        EmbedgeValueError: naming the argument and what would have been right.
    """

    source: str
    out: Path
    adapters: Mapping[str, Path | None] = field(default_factory=dict)
    precisions: tuple[str, ...] = ("int8",)
    modality: str = "all"
    matryoshka_dims: tuple[int, ...] | None = None
    pooling: str | None = None
    calibration: Path | str = "default"
    keep: Mapping[str, str] = field(default_factory=dict)
    int4_block_size: int | None = None
    int4_method: str = "gptq"
    int8_method: str | None = None
    portable: bool = False
    layout: str = "merged"
    branch_rank: int | None = None
    budget: int | None = None
    base_quantization: BaseQuantization | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        adapters = _mapping(
            "adapters", self.adapters, "{'task': 'adapter folder'} or {'task': None}"
        )
        check_tasks(adapters)
        keep = _mapping("keep", self.keep, "{'pattern of layers': 'fp32'} or 'int8'")
        dims: Any = self.matryoshka_dims
        if dims is not None and (isinstance(dims, str) or not isinstance(dims, Iterable)):
            raise _refused("matryoshka_dims", f": expected a list of integers, found {dims!r}")
        _choice("modality", self.modality, _MODALITIES)
        _path("source", self.source)  # or a hub id, which is kept as it is written
        precisions = _precisions(self.precisions)
        _check_keep(keep, precisions)
        if self.pooling is not None and (problem := pooling_problem(self.pooling)):
            raise _refused("pooling", f" {self.pooling!r}: {problem}")
        if self.int4_block_size not in (None, *_BLOCK_SIZES):
            sizes = ", ".join(map(str, _BLOCK_SIZES[:-1]))
            expected = f"expected {sizes} or {_BLOCK_SIZES[-1]}"
            raise _refused("int4_block_size", f" {self.int4_block_size!r}: {expected}")
        _choice("int4_method", self.int4_method, _METHODS)
        _choice("int8_method", self.int8_method, (None, *_METHODS))
        _check_portable(self.portable, precisions)
        _choice("layout", self.layout, _LAYOUTS)
        self._check_branches(precisions)
        if self.budget is not None and ("int4" not in precisions or self.calibration == "none"):
            raise _refused(
                "budget",
                f" {self.budget!r}: it chooses between 4 and 8 bits by calibration; add int4 to the "
                "precisions and leave the calibration texts on",
            )
        if self.layout == "shared" and (keep or self.budget is not None):
            raise _refused(
                "keep" if keep else "budget",
                ": tasks that share a backbone share its layers' precisions too, and have a branch in each; leave "
                "it out, or choose the layout merged",
            )
        converted: dict[str, Any] = {
            "source": str(self.source),
            "adapters": {
                name: None if folder is None else _path(f"adapters[{name!r}]", folder)
                for name, folder in adapters.items()
            },
            "precisions": precisions,
            "out": _path("out", self.out),
            "matryoshka_dims": None if dims is None else tuple(dims),
            "keep": dict(keep),
            "budget": None if self.budget is None else parse_bytes("budget", self.budget),
            "base_quantization": None
            if self.base_quantization is None
            else BaseQuantization.parse(self.base_quantization),
        }
        if self.calibration not in ("default", "none"):
            converted["calibration"] = _path("calibration", self.calibration)
        for name, value in converted.items():
            object.__setattr__(self, name, value)

    def _check_branches(self, precisions: Sequence[str]) -> None:
        rank = self.branch_rank
        if rank is not None and (
            isinstance(rank, bool)
            or not isinstance(rank, int)
            or rank % RANK_MULTIPLE
            or not 0 < rank <= _MOST_RANKS
        ):
            raise _refused(
                "branch_rank",
                f" {rank!r}: expected a multiple of {RANK_MULTIPLE} up to {_MOST_RANKS}",
            )
        argument = "layout" if self.layout == "shared" else "branch_rank"
        plain = [precision for precision in precisions if precision not in BRANCHED]
        if plain and (self.layout == "shared" or rank is not None):
            raise _refused(
                argument,
                f": branches are of {' and '.join(BRANCHED)}, and {', '.join(plain)} has none; export that in a "
                "call of its own",
            )


def check_tasks(adapters: Iterable[str]) -> None:
    """Refuse names of tasks that cannot be file names.

    Raises:
        EmbedgeValueError: naming the bad task.
    """
    for name in adapters:
        if not is_name(name) or name in _RESERVED or name.endswith(_RESERVED_END):
            raise EmbedgeValueError(
                f"task {name!r}: expected a name of {A_NAME}, none of {', '.join(_RESERVED)} and not ending "
                f"in {_RESERVED_END}; choose another name"
            )


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


def _refused(argument: str, message: str) -> EmbedgeValueError:
    return EmbedgeValueError(argument + message, arguments=[argument])


def _choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    if value not in choices:
        expected = ", ".join(choice for choice in choices if choice is not None)
        raise _refused(name, f" {value!r}: expected one of {expected}")


def _mapping(name: str, value: object, expected: str) -> Mapping[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _refused(name, f": expected {expected}, found {value!r}")
    return value


def _path(name: str, value: object) -> Path:
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise _refused(name, f": expected a path, found {value!r}")
    return Path(path)


def _precisions(precisions: object) -> tuple[str, ...]:
    """The precisions without repeats; one may stand alone."""
    if isinstance(precisions, str):
        precisions = [precisions]
    expected = f": expected {{}} of {', '.join(PRECISIONS)}, found "
    if not isinstance(precisions, Iterable):
        raise _refused("precisions", f"{expected.format('a list of some')}{precisions!r}")
    given = list(precisions)
    unknown = [p for p in given if p not in PRECISIONS]
    if unknown or not given:
        raise _refused(
            "precisions",
            expected.format("some")
            + (", ".join(map(repr, unknown)) or "none")
            + "".join(
                f"; an {name} export has it too"
                for name, precision in PRECISIONS.items()
                if len(unknown) == 1 and unknown[0] in precision.beside
            ),
        )
    return tuple(dict.fromkeys(given))


def _check_portable(portable: object, precisions: Sequence[str]) -> None:
    if not isinstance(portable, bool):
        raise _refused("portable", f": expected True or False, found {portable!r}")
    if portable and not set(precisions) & set(PORTABLE):
        raise _refused(
            "portable",
            f": it is about 8-bit weights, and {', '.join(precisions)} has none; leave it out, or add int8 "
            "to the precisions",
        )


def _check_keep(keep: Mapping[Any, Any], precisions: Sequence[str]) -> None:
    """Refuse precisions that a kept layer cannot have, in any of the graphs."""
    for pattern, precision in keep.items():
        if not isinstance(pattern, str):
            raise _refused("keep", f": expected patterns of layer names, found {pattern!r}")
        if precision not in KEPT:
            raise _refused("keep", f" {pattern!r}={precision!r}: expected 'fp32' or 'int8'")
        if precision == "int8" and "int4-fp16" in precisions:
            raise _refused(
                "keep",
                f" {pattern!r}='int8': int8 matmuls run on the CPU, int4-fp16 graphs on CUDA; keep the "
                "layers at 'fp32', or export int4-fp16 in a call of its own",
            )
