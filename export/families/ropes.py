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


def rope_of(reader: ConfigReader, head_size: int, theta: float | None) -> Rope:
    """The one set of rotary settings of a model, in ``rope_scaling`` or ``rope_parameters``.

    Args:
        reader: the model's config.json.
        head_size: channels of a head.
        theta: ``rope_theta`` where config.json has none, ``None`` where it has to have one.

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
    rope = _with_original_length(reader, checked_rope(rope, key))
    theta = number(rope if "rope_theta" in rope else config, "rope_theta", theta)
    return Rope(head_size=head_size, theta=theta, scaling=rope)


def ropes_by_layer_type(
    reader: ConfigReader, sizes: Mapping[str, int], thetas: Mapping[str, tuple[str, float]]
) -> dict[str, Rope]:
    """The rotary settings of each type of layers.

    transformers 5 writes them into ``rope_parameters`` by layer type. Before, bases were keys of their own, and
    ``rope_scaling`` was that of layers with full attention.

    Args:
        reader: the model's config.json.
        sizes: channels of a head, by the types of layers there are.
        thetas: by every type, the key of its base, "" where there never was one, and what it is without.

    Raises:
        CheckpointError: settings of other types, or two places contradict each other.
    """
    nested = reader.config.get("rope_parameters") or {}
    if not isinstance(nested, dict) or set(nested) - set(thetas):
        raise reader.unsupported("rope_parameters", nested, f"settings for {', '.join(thetas)}")
    ropes = {}
    for kind, size in sizes.items():
        key, default = thetas[kind]
        rope = nested.get(kind) or {}
        if not isinstance(rope, dict):
            raise reader.unsupported(f"rope_parameters.{kind}", rope, "an object of settings")
        name = f"rope_parameters.{kind}"
        if kind == "full_attention" and reader.config.get("rope_scaling"):
            rope, name = _scaling_of(reader, rope), "rope_scaling"
        rope = _with_original_length(reader, checked_rope(rope, name))
        own = reader.config.get(key)
        if own is not None and rope.get("rope_theta", own) != own:
            raise reader.unsupported(f"{name}.rope_theta", rope["rope_theta"], f"{key} {own}")
        theta = number(rope, "rope_theta") if "rope_theta" in rope else reader.number(key, default)
        ropes[kind] = Rope(name=f"rotary.{kind}", head_size=size, theta=theta, scaling=rope)
    return ropes


def _scaling_of(reader: ConfigReader, rope: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_scaling``, which says nothing else than ``rope_parameters`` where that is there too."""
    scaling = reader.config["rope_scaling"]
    if not isinstance(scaling, dict):
        raise reader.unsupported("rope_scaling", scaling, "an object of settings")
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if rope and rope != {**theta, **scaling}:
        raise reader.unsupported("rope_parameters.full_attention", rope, "rope_scaling's value")
    return {**theta, **scaling}


def _with_original_length(reader: ConfigReader, rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings with what YaRN is scaled from."""
    if "yarn" not in (rope.get("rope_type"), rope.get("type")):
        return rope
    original = rope.get("original_max_position_embeddings")
    original = original or reader.integer("max_position_embeddings")
    return {**rope, "original_max_position_embeddings": original}
