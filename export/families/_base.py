"""What a model family tells the exporter. A new family is one small file beside this one.

A family reads ``config.json``, refuses what it does not implement, names the checkpoint's tensors
canonically, and writes its graph in four pieces: :meth:`Family.context` (what all layers share),
:meth:`Family.embed`, :meth:`Family.layer`, :meth:`Family.final`. Layers are separate because
calibration runs them one at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from onnx import TensorProto

from embedge.export._errors import CheckpointError
from embedge.export._graph import Graph

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "silu", "swish", "relu")
GELU_LOWER_BOUND = -0.17004  # the minimum of x·Φ(x) is -0.169971; margin for float rounding


class Family(ABC):
    """One architecture, for one ``config.json``.

    Attributes:
        model_types: values of ``model_type`` the family serves.
        prefixes: wrapper prefixes that transformers or PEFT put before the backbone's tensor names.
        roots: first components of the backbone's own tensor names.
        ignored: canonical prefixes of tensors that do not reach an embedding (poolers, heads).
        inputs: graph inputs in order.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    roots: ClassVar[tuple[str, ...]]
    ignored: ClassVar[tuple[str, ...]] = ()
    renamed: ClassVar[Mapping[str, str]] = {}
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    default_pooling: ClassVar[str | None] = None

    def __init__(self, config: Mapping[str, Any], max_length: int) -> None:
        self.config = config
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
    def embed(self, g: Graph, context: dict[str, str]) -> str:
        """Token states before the first layer, float32 ``[batch, tokens, hidden]``."""

    @abstractmethod
    def layer(self, g: Graph, context: dict[str, str], index: int, hidden: str) -> str:
        """Token states after layer ``index``."""

    def final(self, g: Graph, context: dict[str, str], hidden: str) -> str:
        """Token states as the model returns them."""
        return hidden

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

    def expect_shape(self, g: Graph, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that does not have the shape config.json implies."""
        found = g.weights.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{name}: expected shape {list(shape)} by config.json, found {list(found)}; is "
                "config.json of the same model as the weights?"
            )

    def _divides(self, part: int, whole: int, what: str) -> None:
        if whole % part:
            raise CheckpointError(
                f"config.json: {what}: expected the second to be a multiple of the first, found "
                f"{part} and {whole}"
            )

    def _int(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise CheckpointError(
                f"config.json: {key}: expected a positive integer, found {value!r}; "
                "is this the folder of a transformers model?"
            )
        return value

    def _float(self, key: str, default: float | None = None) -> float:
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"config.json: {key}: expected a number, found {value!r}")
        return float(value)

    def _activation(self, key: str, default: str) -> str:
        value = self.config.get(key, default)
        if value not in ACTIVATIONS:
            raise self._unsupported(key, value, f"one of {', '.join(ACTIVATIONS)}")
        return str(value)

    def _unsupported(self, key: str, found: object, expected: str) -> CheckpointError:
        return CheckpointError(
            f"config.json: {key} is {found!r}, which the {self.config.get('model_type')} family here "
            f"does not implement (expected {expected}); this model cannot be exported yet"
        )


def lower_bound(activation: str) -> float | None:
    """A value that the activation never falls below, ``None`` where none is useful."""
    if activation.startswith("gelu"):
        return GELU_LOWER_BOUND
    return 0.0 if activation == "relu" else None
