"""Rotary position tables, by transformers' ``rope_scaling`` types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.export.errors import CheckpointError
from embedge.export.graph.builder import Graph
from embedge.export.graph.ops import CONTRIB
from embedge.export.graph.scheme import Target
from embedge.export.graph.values import Value
from embedge.export.source.config import number, words

Table = NDArray[np.float32]


def rotary_tables(
    head_size: int, theta: float, length: int, scaling: Mapping[str, Any] | None
) -> tuple[Table, Table]:
    """Cosines and sines of every position and frequency.

    Args:
        head_size: channels of a head.
        theta: base of the frequencies.
        length: positions.
        scaling: ``rope_scaling`` of the configuration, or ``None``.

    Returns:
        Two float32 ``[length, head_size / 2]``.

    Raises:
        CheckpointError: a scaling type that depends on the text's length, or an unknown one.
    """
    exponents = np.arange(0, head_size, 2, dtype=np.float64) / head_size
    # transformers holds frequencies and angles in float32
    frequencies: Table = (1.0 / theta**exponents).astype(np.float32)
    factor = np.float32(1.0)
    if scaling and _kind(scaling) == "yarn":
        frequencies, factor = _yarn(frequencies, theta, scaling)
    elif scaling:
        frequencies = _scaled(frequencies, scaling)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies[None, :]
    return np.cos(angles, dtype=np.float32) * factor, np.sin(angles, dtype=np.float32) * factor


_ROPE_KEYS = words(
    """attention_factor beta_fast beta_slow factor finetuned high_freq_factor low_freq_factor
    mrope_section mscale mscale_all_dim original_max_position_embeddings rope_theta rope_type truncate
    type"""
)


def checked_rope(rope: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One set of rotary settings without what changes nothing.

    Args:
        rope: ``rope_scaling``, ``rope_parameters`` or a layer type's part of it.
        name: what config.json calls it.

    Raises:
        CheckpointError: a setting that is not known, or two that contradict each other.
    """
    rope = {key: value for key, value in rope.items() if value is not None}
    partial = rope.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise CheckpointError(
            f"config.json: {name}.partial_rotary_factor is {partial!r}, which is not implemented; "
            "expected 1.0: this model cannot be exported yet"
        )
    if unknown := sorted(set(rope) - _ROPE_KEYS):
        raise CheckpointError(
            f"config.json: {name} has {', '.join(unknown)}, which no rotary type here reads; delete it "
            "if no code does, otherwise the model cannot be exported yet"
        )
    kinds = {
        "default" if rope[k] == "mrope" else rope[k] for k in ("rope_type", "type") if k in rope
    }
    if len(kinds) > 1:
        raise CheckpointError(
            f"config.json: {name} has rope_type {rope['rope_type']!r} and type {rope['type']!r}; expected "
            "one of them: delete the wrong one"
        )
    return rope


def _kind(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _yarn(frequencies: Table, theta: float, scaling: Mapping[str, Any]) -> tuple[Table, np.float32]:
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


def _scaled(frequencies: Table, scaling: Mapping[str, Any]) -> Table:
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
        stretched: Table = np.where(middle, blended, result).astype(np.float32)
        return stretched
    raise CheckpointError(
        f"config.json: rope_scaling type {kind!r} is not supported; expected 'default', 'linear', "
        "'llama3' or 'yarn' ('dynamic' and 'longrope' change with the length of the text)"
    )


def rotary_inputs(
    g: Graph, name: str, tables: tuple[Table, Table], detail: str
) -> tuple[Value, Value]:
    """The two tables as initializers."""
    cos, sin = tables
    return (
        g.computed(f"{name}.cos", cos.shape, lambda: cos, detail=detail),
        g.computed(f"{name}.sin", sin.shape, lambda: sin, detail=detail),
    )


def position_ids(g: Graph, tokens: str) -> Value:
    """int64 ``[batch, tokens]``: 0, 1, 2, … in every row."""
    steps = g.op("Range", g.const(0, "int64"), tokens, g.const(1, "int64"))
    return g.op("Expand", steps, g.op("Shape", "attention_mask"))


def rotate(g: Graph, x: str, cos: str, sin: str, positions: str | None, heads: int) -> Value:
    """Rotary embedding of ``x`` float32 ``[batch, tokens, heads · head_size]``, halves rotated.

    Args:
        g: the graph.
        x: queries or keys.
        cos: float32 ``[positions, head_size / 2]``, or without ``positions`` a row for every token,
            ``[batch, tokens, head_size / 2]``.
        sin: as ``cos``.
        positions: int64 ``[batch, tokens]``, or ``None``.
        heads: heads of ``x``.
    """
    if g.scheme.target is not Target.CUDA:
        angles = [cos, sin] if positions is None else [cos, sin, positions]
        return g.op("RotaryEmbedding", x, *angles, num_heads=heads, interleaved=0)
    if positions is None:
        tables = cos, sin
        cos, sin, positions = g.once(f"rows.{cos}", lambda: _table_rows(g, *tables))
    arguments = [x, positions, cos, sin]
    return g.op("RotaryEmbedding", *arguments, domain=CONTRIB, num_heads=heads, interleaved=0)


def _table_rows(g: Graph, cos: str, sin: str) -> tuple[Value, Value, Value]:
    """A row for every token as tables, whose rows ONNX Runtime's own operator wants, and positions."""
    axes = g.op("Shape", cos)
    row = g.op("Gather", axes, g.const([2], "int64"), axis=0)
    table = g.op("Concat", g.const([-1], "int64"), row, axis=0)
    zero, one = g.const(0, "int64"), g.const(1, "int64")
    tokens = g.op("Shape", cos, start=0, end=2)
    count = g.op("Mul", *(g.op("Gather", axes, axis_number, axis=0) for axis_number in (zero, one)))
    steps = g.op("Range", zero, count, one)
    return g.op("Reshape", cos, table), g.op("Reshape", sin, table), g.op("Reshape", steps, tokens)
