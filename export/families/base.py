"""What a model family tells the exporter. A new family is one small file beside this one.

A family reads ``config.json``, refuses what it does not implement, names the checkpoint's tensors
canonically, and writes its graph in four pieces: :meth:`Family.context` (what all layers share),
:meth:`Family.embed`, :meth:`Family.layer`, :meth:`Family.final`. Layers are separate because
calibration runs them one at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from onnx import TensorProto

from embedge.export.families.config_keys import DEFAULTS
from embedge.export.graph.builder import Graph
from embedge.export.graph.values import Value
from embedge.export.source.config import ConfigReader
from embedge.export.weights.rotated import ResidualStream

if TYPE_CHECKING:
    from embedge.export.families.qwen2_5_vision import Qwen25Vision
    from embedge.export.source.sentence_transformers import SentenceSettings

# What transformers' task classes and trl put on a backbone, by first parts of its names; no vector needs it.
HEADS = ("classifier.", "cls.", "lm_head.", "pooler.", "qa_outputs.", "score.", "v_head.")


class Family(ConfigReader, ABC):
    """One architecture, for one ``config.json``.

    Attributes:
        model_types: values of ``model_type`` the family serves.
        roots: first components of the backbone's own tensor names.
        ignored: canonical prefixes of tensors that do not reach an embedding (poolers, heads).
        inputs: graph inputs in order.
        default_pooling: where neither the model nor the caller says.
        guess: what to say where the default is taken, "" for nothing.
        tower: the vision tower, or ``None``.
        multi_vector_dim: width of :meth:`token_embeddings`, or ``None``.
        pool_mask: the input that says which tokens a mean is taken over.
        token_table: the tensor with a row per token.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    roots: ClassVar[tuple[str, ...]]
    ignored: ClassVar[tuple[str, ...]] = ()
    renamed: ClassVar[Mapping[str, str]] = {}
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    default_pooling: ClassVar[str | None] = None
    guess: ClassVar[str] = ""
    tower: ClassVar[type[Qwen25Vision] | None] = None
    multi_vector_dim: int | None = None
    pool_mask: str = "attention_mask"
    token_table: ClassVar[str] = "embed_tokens.weight"

    def __init__(self, config: Mapping[str, Any], max_length: int) -> None:
        first = {"model_type": self.model_types[0]}
        self.config = {**first, **DEFAULTS.get(self.kind(config), {}), **flat_config(config)}
        self.max_length = max_length
        self.hidden_size = self._int("hidden_size")
        self.num_layers = self._int("num_hidden_layers")
        self.check()

    # -- to be written by a family ------------------------------------------------------------------

    @abstractmethod
    def check(self) -> None:
        """Read the configuration; raise :class:`CheckpointError` for what is not supported."""

    @abstractmethod
    def context(self, g: Graph) -> dict[str, str]:
        """Values shared by all layers, from the graph inputs that are already declared."""

    @abstractmethod
    def embed(self, g: Graph, context: dict[str, str]) -> Value:
        """Token states before the first layer, float32 ``[batch, tokens, hidden]``."""

    @abstractmethod
    def layer(self, g: Graph, context: dict[str, str], index: int, hidden: Value) -> Value:
        """Token states after layer ``index``."""

    def final(self, g: Graph, context: dict[str, str], hidden: Value) -> Value:
        """Token states as the model returns them."""
        return hidden

    def token_embeddings(self, g: Graph, hidden: str) -> Value:
        """Vectors of the tokens, float32 ``[batch, tokens, multi_vector_dim]``, where there is a head."""
        raise NotImplementedError

    def with_images(self) -> Family:
        """The same model with the inputs for images, where there is a vision tower."""
        raise NotImplementedError

    def text_only(self) -> Family:
        """The same model with token ids as its only inputs."""
        return self

    def streams(self) -> tuple[ResidualStream, ...]:
        """The residual streams that may be rotated; none where norms follow a block, or have biases."""
        return ()

    # -- what a published model brings ----------------------------------------------------------------

    @classmethod
    def own_settings(cls, config: Mapping[str, Any], folder: Path) -> SentenceSettings | None:
        """How texts become vectors, where the family knows it better than the model's files."""
        return None

    @classmethod
    def own_tasks(cls, config: Mapping[str, Any], name: str) -> dict[str, str | None]:
        """Tasks a model is published with: folder of their adapter below the model's, or ``None``."""
        return {}

    @classmethod
    def kind(cls, config: Mapping[str, Any]) -> str:
        """The model's entry in the table of keys."""
        kind = config.get("model_type")
        return str(kind) if kind in cls.model_types else cls.model_types[0]

    def check_tensors(self, names: Iterable[str]) -> None:
        """Refuse tensors that transformers would leave out though this family would use them.

        Args:
            names: canonical names of the checkpoint's own tensors.
        """

    @classmethod
    def serves(cls, config: Mapping[str, Any], name: str) -> bool:
        """Whether this is the family of a model with this config.json and short name."""
        return config.get("model_type") in cls.model_types

    # -- shared -------------------------------------------------------------------------------------

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

    def declare_inputs(self, g: Graph) -> None:
        """Declare the graph inputs, int64 ``[batch, tokens]`` each."""
        for name in self.inputs:
            g.input(name, TensorProto.INT64, ["batch", "tokens"])

    def lengths(self, g: Graph) -> str:
        """int64 ``[batch]``: attended tokens of each row (rows are padded on the right)."""
        return g.op("ReduceSum", "attention_mask", g.const([1], "int64"), keepdims=0)

    def tokens(self, g: Graph) -> str:
        """int64 scalar: padded tokens of the batch."""
        shape = g.op("Shape", "attention_mask")
        return g.op("Gather", shape, g.const(1, "int64"), axis=0)


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the settings of its ``text_config``, if it has one, at the top."""
    text = config.get("text_config")
    own = text if isinstance(text, dict) else {}
    own = {key: value for key, value in own.items() if value is not None and key != "model_type"}
    return {**config, **own}
