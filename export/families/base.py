"""What a model family tells the exporter. A new family is one small file beside this one.

A family reads ``config.json``, refuses what it does not implement, names the checkpoint's tensors canonically, and
declares its :class:`~embedge.export.graph.architecture.Architecture`, from which the graph is written. It
declares its keys of config.json in ``known_keys.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from embedge.export.adapters.adapter import Adapter
from embedge.export.errors import CheckpointError
from embedge.export.families.key_defaults import DEFAULTS
from embedge.export.graph.architecture import Architecture
from embedge.export.graph.builder import Graph
from embedge.export.graph.scheme import Scheme
from embedge.export.graph.values import LinearRef
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.config import ConfigReader, Shape
from embedge.export.source.sentence_transformers import SentenceSettings
from embedge.export.weights.rotated import ResidualStream
from embedge.export.weights.tensors import Weights

# What transformers' task classes and trl put on a backbone, by first parts of its names; no vector needs it.
HEADS = ("classifier.", "cls.", "lm_head.", "pooler.", "qa_outputs.", "score.", "v_head.")
HEAD_ROOTS = tuple(head.rstrip(".") for head in HEADS)


class Tower(ConfigReader, ABC):
    """A model of its own whose features take the places of tokens in a family's states.

    Attributes:
        prefix: with which the canonical names of its tensors begin.
    """

    prefix: ClassVar[str]

    @abstractmethod
    def __init__(self, config: Mapping[str, Any], text_width: int) -> None:
        """Read the model's config.json; ``text_width`` is the width of the states."""

    @abstractmethod
    def image_settings(self) -> dict[str, Any]:
        """Its part of the manifest's ``model.image``."""

    @abstractmethod
    def graph(self, weights: Weights, scheme: Scheme) -> Graph:
        """Write its graph."""

    @abstractmethod
    def streams(self) -> tuple[ResidualStream, ...]:
        """Its own residual streams that may be rotated."""

    @abstractmethod
    def check_tensors(self, names: Iterable[str]) -> None:
        """As :meth:`Family.check_tensors`."""


class Family(ConfigReader, ABC):
    """One architecture, for one ``config.json``.

    Attributes:
        model_types: values of ``model_type`` the family serves.
        examples: a published model of each, by ``model_type``: its id on the hub.
        roots: first components of the backbone's own tensor names.
        ignored: canonical prefixes of tensors that do not reach an embedding (poolers, heads).
        renamed: ends of canonical names that older checkpoints write differently, and what they are now.
        fused: ends of modules whose rows are those of several, and the ends of their names, in order.
        aside: ends of names of tensors that are adapters, as a regular expression; "" for none.
        aliases: other names that config.json may give a setting, and the one it is read by.
        pooling_hint: what to say where the model's files name no pooling, "" for nothing.
        tower: what makes states of other things than texts, or ``None``.
        fits_half: whether its values fit float16, which graphs for GPUs multiply in.
        architecture: what the graph is written from.

    Args:
        config: a config.json.
        max_length: most tokens of a text.

    Raises:
        CheckpointError: the configuration asks for what is not supported.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[Mapping[str, str]] = {}
    roots: ClassVar[tuple[str, ...]]
    ignored: ClassVar[tuple[str, ...]] = HEADS
    renamed: ClassVar[Mapping[str, str]] = {}
    fused: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    aside: ClassVar[str] = ""
    aliases: ClassVar[Mapping[str, str]] = {}
    pooling_hint: ClassVar[str] = ""
    tower: ClassVar[type[Tower] | None] = None
    fits_half: ClassVar[bool] = True

    def __init__(self, config: Mapping[str, Any], max_length: int) -> None:
        first = {"model_type": self.model_types[0]}
        self.config = {**first, **DEFAULTS.get(self.kind(config), {}), **self.settings(config)}
        self.max_length = max_length
        self.hidden_size = self.integer("hidden_size")
        self.num_layers = self.integer("num_hidden_layers")
        self.architecture = self.declare()

    @abstractmethod
    def declare(self) -> Architecture:
        """Read the configuration; raise :class:`CheckpointError` for what is not supported."""

    # -- what a published model brings ----------------------------------------------------------------

    @classmethod
    def own_settings(cls, config: Mapping[str, Any], folder: Path) -> SentenceSettings | None:
        """How texts become vectors, where the family knows it better than the model's files."""
        return None

    @classmethod
    def completed(cls, settings: SentenceSettings, config: Mapping[str, Any]) -> SentenceSettings:
        """The settings with what the family knows beyond the model's files."""
        return settings

    @classmethod
    def guessed_pooling(cls, config: Mapping[str, Any]) -> str | None:
        """What is taken, with a warning, where neither the model's files nor the caller name a pooling."""
        return None

    @classmethod
    def own_tasks(cls, config: Mapping[str, Any], name: str) -> dict[str, str | None]:
        """Tasks a model is published with: folder of their adapter below the model's, or ``None``."""
        return {}

    @classmethod
    def tasks_beside(cls, folder: Path) -> dict[str, str | None]:
        """Tasks whose adapters lie in known folders below the model's, where config.json names none."""
        return {}

    @classmethod
    def own_adapters(cls, checkpoint: Checkpoint) -> dict[str, Adapter]:
        """Adapters that the checkpoint itself holds, by task."""
        return {}

    @classmethod
    def settings(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json's settings by the names that are read: flat, without aliases.

        Raises:
            CheckpointError: it gives a setting two values.
        """
        flat = flat_config(config)
        for alias, name in cls.aliases.items():
            if flat.get(alias) is None:
                continue
            if flat.get(name, flat[alias]) != flat[alias]:
                raise CheckpointError(
                    f"config.json: {alias} is {flat[alias]!r} and {name} {flat[name]!r}, two names of one "
                    "setting; expected one value: delete the wrong one"
                )
            flat[name] = flat[alias]
        return flat

    @classmethod
    def kind(cls, config: Mapping[str, Any]) -> str:
        """The model's entry in the table of keys."""
        kind = config.get("model_type")
        return str(kind) if kind in cls.model_types else cls.model_types[0]

    @classmethod
    def serves(cls, config: Mapping[str, Any], name: str) -> bool:
        """Whether this is the family of a model with this config.json and short name."""
        return config.get("model_type") in cls.model_types

    @classmethod
    def canonical(cls, key: str) -> str:
        """A checkpoint key or adapter path without what wraps the backbone.

        ``bert.encoder.layer.0…`` and ``base_model.model.encoder.layer.0…`` become ``encoder.layer.0…``.
        A key that holds no backbone component is returned as it is.
        """
        parts = key.split(".")
        for start, part in enumerate(parts):
            if part in cls.roots:
                key = ".".join(parts[start:])
                break
        for old, new in cls.renamed.items():
            if key.endswith(old):
                key = key[: -len(old)] + new
        return key

    def left_out(self) -> str:
        """What the model embeds besides texts and no export does, for a warning; "" for nothing."""
        return ""

    # -- checks -------------------------------------------------------------------------------------

    def shapes(self) -> Mapping[str, Shape]:
        return self.architecture.shapes()

    def check_tensors(self, names: Iterable[str]) -> None:
        """Refuse biases that config.json does not declare, and the lack of those that it does.

        Args:
            names: canonical names of the checkpoint's own tensors.

        Raises:
            CheckpointError: transformers would leave a bias out, or put zeros in the place of one.
        """
        check_biases(self.architecture.linears, names, self.config)

    def check_length(self, positions: int) -> None:
        """Refuse texts that are longer than the model's positions."""
        if self.max_length > positions:
            raise CheckpointError(
                f"max length {self.max_length} exceeds the {positions} positions the model has: correct "
                "max_seq_length, query_length or document_length, whichever is above them"
            )

    def slides(self) -> list[bool] | None:
        """By layer, whether ``layer_types`` has it attend to a window; ``None`` where it is not there."""
        types, known = self.config.get("layer_types"), ("full_attention", "sliding_attention")
        if types is None:
            return None
        listed = types if isinstance(types, list) else []
        if len(listed) != self.num_layers or any(kind not in known for kind in listed):
            expected = f"{self.num_layers} of {', '.join(known)}"
            raise self.unsupported("layer_types", types, expected)
        return [kind == known[1] for kind in listed]

    def layer_types(self, every: int) -> list[str]:
        """By layer, ``full_attention`` or ``sliding_attention``, as Gemma's models say it.

        Args:
            every: without ``layer_types`` and ``sliding_window_pattern``, a layer of so many attends to all tokens.
        """
        pattern = self.integer("sliding_window_pattern", every)
        slides = self.slides() or [bool((i + 1) % pattern) for i in range(self.num_layers)]
        return ["sliding_attention" if slide else "full_attention" for slide in slides]


def check_biases(
    linears: Iterable[LinearRef], names: Iterable[str], config: Mapping[str, Any]
) -> None:
    """Refuse a bias that the architecture does not have, and the lack of one that it has.

    Args:
        linears: the architecture's.
        names: canonical names of the checkpoint's own tensors.
        config: the model's settings, for the message.

    Raises:
        CheckpointError: naming the bias.
    """
    there = set(names)
    for linear in linears:
        if (linear.bias in there) == linear.has_bias or linear.weight not in there:
            continue  # a weight that is missing is named where it is read
        flags = (f"{key} {config[key]!r}" for key in sorted(config) if key.endswith("_bias"))
        said = ", ".join((str(config["model_type"]), *flags))
        if linear.has_bias:
            raise CheckpointError(
                f"{linear.bias}: expected this tensor by config.json ({said}), found none, and zeros in its place "
                "would give other vectors; is config.json of the same model as the weights? Correct config.json "
                "where the model has no such bias, or fetch the weights again"
            )
        raise CheckpointError(
            f"{linear.bias}: expected no such tensor by config.json ({said}), so that transformers leaves it "
            "out; correct config.json, or delete the tensor"
        )


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the settings of its ``text_config``, if it has one, at the top.

    A null there stands for itself, but where the top has a value.
    """
    text = config.get("text_config")
    own = text if isinstance(text, dict) else {}
    own = {k: v for k, v in own.items() if k != "model_type" and (v is not None or k not in config)}
    return {**config, **own}
