"""Reading a ``config.json`` and refusing what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedge.export.errors import CheckpointError

# Sizes of a tensor's axes: a number, a key of config.json (where it is missing, all such axes are as long
# as the first one), or None for any.
Shape = tuple[int | str | None, ...]
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

    def shapes(self) -> Mapping[str, Shape]:
        """Shapes of the modules' weights by the module's canonical name, or of tensors by their own.

        A bias is as long as the first axis.
        """
        return {}

    def check_shapes(self, found: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse tensors that do not have the shapes that config.json implies.

        Args:
            found: shapes of the tensors by canonical name.

        Raises:
            CheckpointError: naming the first one.
        """
        expected = self.shapes()
        sizes: dict[str, int] = {}
        for name, shape in sorted(found.items(), key=lambda item: -len(item[1])):
            module, _, what = name.rpartition(".")
            known = expected.get(name) or expected.get(module)
            if known is None or (name not in expected and what not in ("weight", "bias")):
                continue
            wanted = [self._axis(axis, sizes) for axis in known[: 1 if what == "bias" else None]]
            fits = len(wanted) == len(shape)
            for axis, size, there in zip(known, wanted, shape, strict=False):
                if size is None and isinstance(axis, str):
                    sizes[axis] = there
                fits = fits and size in (None, there)
            if not fits:
                shown = ", ".join("any" if size is None else str(size) for size in wanted)
                raise CheckpointError(
                    f"{name}: expected shape [{shown}] by config.json, found {list(shape)}; is "
                    "config.json of the same model as the weights?"
                )

    def _axis(self, axis: int | str | None, sizes: Mapping[str, int]) -> int | None:
        if not isinstance(axis, str):
            return axis
        return sizes.get(axis) if self.config.get(axis) is None else self.integer(axis)

    def divides(self, part: int, whole: int, what: str) -> None:
        """Refuse two settings of which the second is no multiple of the first."""
        if whole % part:
            raise CheckpointError(
                f"config.json: {what}: expected the second to be a multiple of the first, found "
                f"{part} and {whole}"
            )

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An integer setting; :class:`CheckpointError` where it is something else, or missing."""
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            kind = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
            raise CheckpointError(
                f"config.json: {key}: expected {kind}, found {value!r}; "
                "is this the folder of a transformers model?"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number setting, likewise."""
        return number(self.config, key, default)

    def positive(self, key: str, default: float | None = None) -> float:
        """A number setting above zero, likewise."""
        value = self.number(key, default)
        if value <= 0:
            raise self.unsupported(key, value, "a number above 0")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """A setting that is true or false, likewise."""
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key}: expected true or false, found {value!r}")
        return value

    def activation(self, key: str, default: str) -> str:
        """An activation that the graph has, by its transformers name."""
        value = self.config.get(key, default)
        if value not in ACTIVATIONS:
            raise self.unsupported(key, value, f"one of {', '.join(ACTIVATIONS)}")
        return str(value)

    def unsupported(self, key: str, found: object, expected: str) -> CheckpointError:
        """What to raise for a setting that the family does not implement."""
        return CheckpointError(
            f"config.json: {key} is {found!r}, which the {self.config.get('model_type')} family here "
            f"does not implement (expected {expected}); this model cannot be exported yet"
        )
