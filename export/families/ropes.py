"""Rotary settings of a ``config.json``, as transformers 4 and 5 write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.export.graph.rotary import Rope
from embedge.export.source.config import ConfigReader, number, words

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


def rope_of(reader: ConfigReader, head_size: int, theta: float) -> Rope:
    """The one set of rotary settings of a model, in ``rope_scaling`` or ``rope_parameters``.

    Args:
        reader: the model's config.json.
        head_size: channels of a head.
        theta: ``rope_theta`` where config.json has none.

    Raises:
        CheckpointError: layers have settings of their own, or two places contradict each other.
    """
    config = reader.config
    found = {k: config[k] for k in ("rope_scaling", "rope_parameters") if config.get(k)}
    key, rope = next(iter(found.items()), ("rope_scaling", {}))
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        raise reader.unsupported(key, rope, "one set of numbers for all layers")
    if any(other != rope for other in found.values()):
        raise reader.unsupported(
            "rope_parameters", found["rope_parameters"], "rope_scaling's value"
        )
    own = config.get("rope_theta")
    if own is not None and rope.get("rope_theta", own) != own:
        raise reader.unsupported(f"{key}.rope_theta", rope["rope_theta"], f"rope_theta {own}")
    rope = checked_rope(rope, key)
    if "yarn" in (rope.get("rope_type"), rope.get("type")):
        original = rope.get("original_max_position_embeddings")
        original = original or reader.integer("max_position_embeddings")
        rope = {**rope, "original_max_position_embeddings": original}
    theta = number(rope if "rope_theta" in rope else config, "rope_theta", theta)
    return Rope(head_size=head_size, theta=theta, scaling=rope)
