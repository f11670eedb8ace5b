"""The base as bitsandbytes quantizes it when it is loaded: what an adapter of QLoRA was trained on.

transformers replaces every Linear but those of ``llm_int8_skip_modules`` and the output head. Its weights are
rounded to the dtype that the model is loaded in, and quantized; what is multiplied are the restored ones. Here
the same is done to the original weights, a tensor at a time as they are read. Embeddings, norms and biases stay as
they are stored.

Sources: Dettmers et al., "QLoRA", arXiv 2305.14314; "Bitsandbytes" in transformers' documentation of quantization.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.export.errors import CheckpointError
from embedge.export.source.bitsandbytes import BLOCK_SIZES
from embedge.export.source.safetensors_file import StoredTensors, check_finite, row_range
from embedge.quant.bitsandbytes import (
    CODES,
    ROUND,
    dequantize,
    dequantize_int8,
    double_quantized,
    int8_rows,
    quantize,
)
from embedge.runtime.errors import EmbedgeValueError

__all__ = ["BaseQuantization", "loaded_dtype"]

_KINDS = (*CODES, "int8")
_FORM = (
    "nf4, fp4 or int8, and after commas any of double_quant, block_size=64, dtype=bfloat16 and "
    "skip=MODULE+MODULE"
)
_STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}


@dataclass(frozen=True, kw_only=True)
class BaseQuantization:
    """How a base was quantized when an adapter was trained on it.

    Attributes:
        kind: "nf4", "fp4" or "int8" (LLM.int8).
        block_size: weights that share a maximum; not of int8.
        double_quant: whether the maxima are quantized as well; not of int8.
        dtype: that of the model when it was loaded, ``None``: the one of its config.json or its weights.
        skip: names of modules that are left as they are, as ``llm_int8_skip_modules`` has them.
    """

    kind: str
    block_size: int = 64
    double_quant: bool = False
    dtype: str | None = None
    skip: tuple[str, ...] = field(default=())

    @classmethod
    def parse(cls, text: object) -> BaseQuantization:
        """Read ``"nf4,double_quant,dtype=float16"``.

        Raises:
            EmbedgeValueError: saying what was expected.
        """
        kind, *settings = text.split(",") if isinstance(text, str) else [""]
        if kind not in _KINDS:
            raise _refused(text, f"expected {_FORM}")
        found: dict[str, Any] = {"kind": kind}
        for setting in settings:
            name, equals, value = setting.partition("=")
            read = _SETTINGS.get(name)
            if name in found or read is None or (kind == "int8" and name in _OF_BLOCKS):
                known = ", ".join(n for n in _SETTINGS if kind != "int8" or n not in _OF_BLOCKS)
                raise _refused(text, f"{name!r}: expected each of {known} once at most")
            found[name] = read(value if equals else None)
            if found[name] is None:
                raise _refused(text, f"{setting!r}: expected {_FORM}")
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """What a manifest says of it; the settings of blocks where there are some."""
        blocks = {"block_size": self.block_size, "double_quant": self.double_quant}
        return {
            "kind": self.kind,
            **({} if self.kind == "int8" else blocks),
            "dtype": self.dtype,
            "skip": list(self.skip),
        }

    def restored(
        self, files: Mapping[str, StoredTensors], linears: Iterable[str], dtype: str
    ) -> tuple[BaseQuantization, dict[str, StoredTensors]]:
        """Return this with the dtype it stands for, and what reads each tensor of the base.

        Args:
            files: what reads the original ones.
            linears: the weights of Linears among them, by their names there.
            dtype: what ``None`` stands for.

        Raises:
            EmbedgeValueError: ``skip`` names a module that is none of the Linears, or one that depends on the
                version of transformers; or no Linear is left.
        """
        how = replace(self, dtype=self.dtype or dtype)
        weights = sorted(linears)
        for name in self.skip:
            _check_versions_agree(name, weights)
            if not any(_skips_in_4(name, weight) for weight in weights):
                raise EmbedgeValueError(
                    f"base_quantization skip={name}: expected a module among the model's Linears, of which none is "
                    f"called so; they are {', '.join(w.removesuffix('.weight') for w in weights[:6])}, …; leave it "
                    "out where it is an output head, which no vector depends on",
                    arguments=["base_quantization"],
                )
        chosen = [w for w in weights if not any(_skips_in_4(name, w) for name in self.skip)]
        if not chosen:
            left = " that skip leaves" if self.skip else ""
            raise EmbedgeValueError(
                f"base_quantization {self.kind!r}: expected a Linear to quantize, found none{left}; leave it out",
                arguments=["base_quantization"],
            )
        return how, {**files, **{w: _Quantized(files[w], w, how) for w in chosen}}


def loaded_dtype(config: Mapping[str, Any], stored: Iterable[str]) -> str:
    """Return the dtype that transformers 5 loads a model in where it is told none, by its name in torch.

    Args:
        config: the content of config.json.
        stored: dtypes of the Linears' weights, as safetensors names them.

    Raises:
        CheckpointError: config.json names one that bitsandbytes does not take.
    """
    text = config.get("text_config")
    for settings in (config, text if isinstance(text, dict) else {}):
        named = settings.get("dtype", settings.get("torch_dtype"))
        if named is not None:
            if named not in ROUND:
                raise CheckpointError(
                    f"config.json: dtype is {named!r}, expected {', '.join(ROUND)}; say which the base was loaded "
                    "in: --base-quantization nf4,dtype=bfloat16"
                )
            return str(named)
    return next((_STORED[dtype] for dtype in stored if dtype in _STORED), "float32")


@dataclass(frozen=True)
class _Quantized:
    """A Linear's weight as it is restored, read as its file reads it."""

    file: StoredTensors
    key: str
    how: BaseQuantization

    @property
    def path(self) -> Path:
        return self.file.path

    def shape(self, key: str) -> tuple[int, ...]:
        return self.file.shape(self.key)

    def is_float(self, key: str) -> bool:
        return self.file.is_float(self.key)

    def read(self, key: str, rows: slice | None = None) -> NDArray[np.float32]:
        """The tensor, or some rows: those of whole blocks around them are quantized, the scales of all if need be."""
        shape = self.shape(key)
        first, last = row_range(rows, shape)
        values = self._int8(first, last) if self.how.kind == "int8" else self._blocks(first, last)
        values = values.reshape(last - first, *shape[1:])
        return check_finite(values, f"{self.path}: tensor {self.key!r}", first, CheckpointError)

    def _loaded(self, first: int, last: int) -> NDArray[np.float32]:
        assert self.how.dtype is not None
        name = f"{self.path}: tensor {self.key!r} in {self.how.dtype}"
        values = ROUND[self.how.dtype](self.file.read(self.key, slice(first, last)))
        return check_finite(values, name, first, CheckpointError)

    def _int8(self, first: int, last: int) -> NDArray[np.float32]:
        return dequantize_int8(*int8_rows(self._loaded(first, last)))

    def _blocks(self, first: int, last: int) -> NDArray[np.float32]:
        how, table, shape = self.how, CODES[self.how.kind], self.shape(self.key)
        width = prod(shape[1:])
        begin, end = first, last
        if how.double_quant:  # the scales' mean is one of all
            begin, end = 0, shape[0]
        else:  # rows that begin and end with blocks
            step = how.block_size // np.gcd(how.block_size, width)
            begin, end = begin - begin % step, min(shape[0], end + -end % step)
        codes, absmax = quantize(self._loaded(begin, end).reshape(-1), table, how.block_size)
        if how.double_quant:
            absmax = double_quantized(absmax)
        values = dequantize(codes, absmax, table, how.block_size)
        assert how.dtype is not None
        return ROUND[how.dtype](values[(first - begin) * width : (last - begin) * width])


def _check_versions_agree(name: str, weights: Iterable[str]) -> None:
    """Refuse a name in ``llm_int8_skip_modules`` which the versions of transformers read as other modules."""
    for weight in weights:
        in_4, in_5 = _skips_in_4(name, weight), _skips_in_5(name, weight)
        if in_4 != in_5:
            module = weight.removesuffix(".weight")
            skips, quantizes = (4, 5) if in_4 else (5, 4)
            raise EmbedgeValueError(
                f"base_quantization skip={name}: transformers {skips} skips {module} by this name, transformers "
                f"{quantizes} quantizes it; give the last parts or the whole paths of the modules that yours skipped, "
                f"such as skip={module.rpartition('.')[2]} or skip={module}",
                arguments=["base_quantization"],
            )


def _skips_in_4(name: str, weight: str) -> bool:
    """Whether transformers 4 leaves a Linear out: by its path, its last part, or an end of a part before a dot."""
    module = weight.removesuffix(".weight")
    return name in (module, module.rpartition(".")[2]) or f"{name}." in module


def _skips_in_5(name: str, weight: str) -> bool:
    """Whether transformers 5 does: by a regular expression that fits the path up to a dot, or by the path's end."""
    module = weight.removesuffix(".weight")
    try:
        fits = re.match(rf"(?:{name})(?:(?<=\.)|(?=\.|$))", module) is not None
    except re.error:
        fits = False
    return fits or module.endswith(name)


def _block_size(text: str | None) -> int | None:
    size = int(text) if text and text.isascii() and text.isdecimal() else 0
    return size if size in BLOCK_SIZES else None


def _skip(text: str | None) -> tuple[str, ...] | None:
    names = tuple((text or "").split("+"))
    return names if all(names) else None


_SETTINGS: Mapping[str, Callable[[str | None], Any]] = {
    "double_quant": lambda text: True if text is None else None,
    "block_size": _block_size,
    "dtype": lambda text: text if text in ROUND else None,
    "skip": _skip,
}
_OF_BLOCKS = ("double_quant", "block_size")


def _refused(text: object, problem: str) -> EmbedgeValueError:
    return EmbedgeValueError(
        f"base_quantization {text!r}: {problem}", arguments=["base_quantization"]
    )
