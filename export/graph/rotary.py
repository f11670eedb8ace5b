"""Rotary position embeddings (Su et al., arXiv 2104.09864), by transformers' ``rope_scaling`` types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from embedge.export.errors import CheckpointError
from embedge.export.graph.builder import Graph
from embedge.export.graph.ops import CONTRIB
from embedge.export.graph.scheme import Target
from embedge.export.graph.values import FloatArray, Value
from embedge.export.source.config import number

_MOST_ROWS = 1 << 17


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions of some layers.

    Attributes:
        name: of its tables in the graph.
        head_size: channels of a head.
        theta: base of the frequencies.
        scaling: as ``rope_scaling`` of the configuration.
        sections: frequencies by position axis (time, row, column), ``None`` for texts alone: with them angles
            are computed as the graph runs, as for texts of more than 131,072 tokens, whose tables would be large.
    """

    name: str = "rotary"
    head_size: int
    theta: float
    scaling: Mapping[str, Any]
    sections: tuple[int, ...] | None = None

    @property
    def frequencies(self) -> FloatArray:
        """float32 ``[head_size / 2]``, before any scaling; transformers holds them and the angles so."""
        exponents = np.arange(0, self.head_size, 2, dtype=np.float64) / self.head_size
        frequencies: FloatArray = (1.0 / self.theta**exponents).astype(np.float32)
        return frequencies


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Values in a graph: cosines and sines ``[rows, head_size / 2]``, and which row is whose.

    Attributes:
        cos: float32 ``[rows, head_size / 2]``, or without ``positions`` a row for every token,
            ``[batch, tokens, head_size / 2]``.
        sin: as ``cos``.
        positions: int64 ``[batch, tokens]``, or ``None``.
    """

    cos: str
    sin: str
    positions: str | None = None


def rotary(g: Graph, rope: Rope, tokens: str, max_length: int, *, images: bool = False) -> Rotary:
    """Write what :func:`rotate` needs.

    Args:
        g: the graph.
        rope: the settings.
        tokens: int64 scalar, padded tokens of the batch.
        max_length: most tokens of a text.
        images: whether positions have axes and are the input ``position_ids``, ``[3, batch, tokens]``.
    """
    short = max_length <= _MOST_ROWS or _kind(rope.scaling) != "default"
    if rope.sections is None and short:

        def stored(name: str, table: FloatArray) -> Value:
            detail = f"{rope}|{max_length}"
            return g.computed(f"{rope.name}.{name}", table.shape, lambda: table, detail=detail)

        cosines, sines = rotary_tables(rope, max_length)
        cos, sin = stored("cos", cosines), stored("sin", sines)
        return Rotary(cos=cos, sin=sin, positions=position_ids(g, tokens))
    if rope.sections is None or not images:
        column = g.op("Unsqueeze", counted(g, tokens), g.const([1], "int64"))
        angles = g.op("Mul", g.op("Cast", column, to=TensorProto.FLOAT), g.const(rope.frequencies))
        cos, sin = g.op("Cos", angles), g.op("Sin", angles)
        return Rotary(cos=cos, sin=sin, positions=position_ids(g, tokens))
    # one axis per frequency: [3, batch, tokens] → [batch, tokens, 3] → [batch, tokens, head / 2]
    positions = g.op("Cast", "position_ids", to=TensorProto.FLOAT)
    axes = np.repeat(np.arange(len(rope.sections)), rope.sections)
    last = g.op("Transpose", positions, perm=[1, 2, 0])
    chosen = g.op("Gather", last, g.const(axes, "int64"), axis=2)
    angles = g.op("Mul", chosen, g.const(rope.frequencies))
    return Rotary(cos=g.op("Cos", angles), sin=g.op("Sin", angles))


def rotate(g: Graph, x: str, rotary: Rotary, heads: int) -> Value:
    """Queries or keys ``x`` float32 ``[batch, tokens, heads · head_size]`` turned, halves against halves."""
    cos, sin, positions = rotary.cos, rotary.sin, rotary.positions
    if g.scheme.target is not Target.CUDA:
        angles = [cos, sin] if positions is None else [cos, sin, positions]
        return g.op("RotaryEmbedding", x, *angles, num_heads=heads, interleaved=0)
    if positions is None:
        cos, sin, positions = g.once(f"rows.{cos}", lambda: _table_rows(g, rotary))
    arguments = [x, positions, cos, sin]
    return g.op("RotaryEmbedding", *arguments, domain=CONTRIB, num_heads=heads, interleaved=0)


def _table_rows(g: Graph, rotary: Rotary) -> tuple[Value, Value, Value]:
    """A row for every token as tables, whose rows ONNX Runtime's own operator wants, and positions."""
    cos, sin = rotary.cos, rotary.sin
    axes = g.op("Shape", cos)
    row = g.op("Gather", axes, g.const([2], "int64"), axis=0)
    table = g.op("Concat", g.const([-1], "int64"), row, axis=0)
    zero, one = g.const(0, "int64"), g.const(1, "int64")
    tokens = g.op("Shape", cos, start=0, end=2)
    count = g.op("Mul", *(g.op("Gather", axes, axis_number, axis=0) for axis_number in (zero, one)))
    steps = g.op("Range", zero, count, one)
    return g.op("Reshape", cos, table), g.op("Reshape", sin, table), g.op("Reshape", steps, tokens)


def counted(g: Graph, tokens: str) -> Value:
    """The numbers 0, 1, 2, … as int64 ``[tokens]``."""
    return g.op("Range", g.const(0, "int64"), tokens, g.const(1, "int64"))


def position_ids(g: Graph, tokens: str) -> Value:
    """int64 ``[batch, tokens]``: 0, 1, 2, … in every row, once in a graph."""

    def write() -> Value:
        return g.op("Expand", counted(g, tokens), g.op("Shape", "attention_mask"))

    return g.once("positions", write)


def rotary_tables(rope: Rope, length: int) -> tuple[FloatArray, FloatArray]:
    """Cosines and sines of every position and frequency, two float32 ``[length, head_size / 2]``.

    Raises:
        CheckpointError: a scaling type that depends on the text's length, or an unknown one.
    """
    frequencies, factor = rope.frequencies, np.float32(1.0)
    if _kind(rope.scaling) == "yarn":
        frequencies, factor = _yarn(frequencies, rope.theta, rope.scaling)
    else:
        frequencies = _scaled(frequencies, rope.scaling)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies[None, :]
    return np.cos(angles, dtype=np.float32) * factor, np.sin(angles, dtype=np.float32) * factor


def _kind(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _yarn(
    frequencies: FloatArray, theta: float, scaling: Mapping[str, Any]
) -> tuple[FloatArray, np.float32]:
    """YaRN (Peng et al., arXiv 2309.00071): the frequencies, and the factor of cosines and sines."""
    factor = number(scaling, "factor")
    original = number(scaling, "original_max_position_embeddings")
    size = 2 * len(frequencies)

    def channel(rotations: float) -> float:
        """The channel that turns so often over the original length."""
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = channel(scaling.get("beta_fast") or 32)
    high = channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    span = high - low or 0.001
    stretched = np.clip((np.arange(size // 2, dtype=np.float32) - low) / span, 0, 1)
    blended = frequencies / factor * stretched + frequencies * (1 - stretched)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        scale, scale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if not (scale and scale_all):
            scale, scale_all = 1.0, 0.0  # the magnitude of 0 is 1
        attention = magnitude(float(scale)) / magnitude(float(scale_all))
    return blended.astype(np.float32), np.float32(attention)


def _scaled(frequencies: FloatArray, scaling: Mapping[str, Any]) -> FloatArray:
    kind = _kind(scaling)
    if kind == "default":
        return frequencies
    factor = number(scaling, "factor", 1.0)
    if kind == "linear":
        return frequencies / np.float32(factor)
    if kind == "llama3":  # Llama 3.1: long wavelengths are stretched, short ones kept
        low = number(scaling, "low_freq_factor")
        high = number(scaling, "high_freq_factor")
        original = number(scaling, "original_max_position_embeddings")
        wavelength = 2 * math.pi / frequencies
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * frequencies / factor + smooth * frequencies
        result = np.where(wavelength > original / low, frequencies / factor, frequencies)
        middle = (wavelength <= original / low) & (wavelength >= original / high)
        stretched: FloatArray = np.where(middle, blended, result).astype(np.float32)
        return stretched
    raise CheckpointError(
        f"config.json: rope_scaling type {kind!r} is not supported; expected 'default', 'linear', "
        "'llama3' or 'yarn' ('dynamic' and 'longrope' change with the length of the text)"
    )
