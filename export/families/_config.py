"""Reading a ``config.json`` and refusing what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedge.export._errors import CheckpointError
from embedge.export._graph import Graph

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "silu", "swish", "relu")


def number(settings: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number of ``config.json``, or of one of its objects.

    Raises:
        CheckpointError: it is something else, or missing without a default.
    """
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(
            f"config.json: {key}: expected a number, found {value!r}; "
            "is this the folder of a transformers model?"
        )
    return float(value)


def words(text: str) -> frozenset[str]:
    """The words of a text, as a table of keys is written."""
    return frozenset(text.split())


class ConfigReader:
    """Typed access to a configuration, and what to say where it does not fit.

    Attributes:
        config: the settings, with a ``model_type`` for messages.
    """

    config: Mapping[str, Any]

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

    def _int(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            kind = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
            raise CheckpointError(
                f"config.json: {key}: expected {kind}, found {value!r}; "
                "is this the folder of a transformers model?"
            )
        return value

    def _float(self, key: str, default: float | None = None) -> float:
        return number(self.config, key, default)

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
