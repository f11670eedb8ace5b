"""Everything of an adapter that does not fit a model, said at once, with what to do about it."""

from __future__ import annotations

from embedge.export.adapters.config import LoraSettings
from embedge.export.adapters.merge_advice import merge_advice
from embedge.export.errors import AdapterError
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.names import base_name
from embedge.export.source.safetensors_file import TensorSource

__all__ = ["OTHER_CONFIG", "OTHER_TARGETS", "Problems"]

_OTHER_MODEL = "use it with the model that it was trained on, as PEFT saved it"
OTHER_CONFIG = (
    "set r and rank_pattern in adapter_config.json as they were in training, or copy both files of "
    "the adapter again"
)
OTHER_TARGETS = (
    "set target_modules in adapter_config.json as it was in training (null: every module in the file), or "
    "delete the tensors that no training made"
)
_MOST_SHOWN = 4  # problems in a message


class Problems:
    """What does not fit.

    Attributes:
        found: whether any key of the adapter finds a tensor of the model.
        resized: rows of the adapter's token table, where it has another number than the model's.
    """

    def __init__(self) -> None:
        self.found = False
        self.resized: int | None = None
        self._advice: dict[str, str] = {}  # by problem
        self._lost: dict[str, str] = {}  # problem to the path that was looked for

    def __len__(self) -> int:
        return len(self._advice)

    def add(self, text: str, advice: str = _OTHER_MODEL) -> None:
        """Note a problem, and what to do where all problems are of its kind."""
        self._advice[text] = advice

    def add_lost(self, key: str, path: str) -> None:
        """Note a key whose ``path`` is no tensor's."""
        text = f"{key}: finds no tensor of the model"
        self.add(text)
        self._lost[text] = path

    def error(
        self, name: str, file: TensorSource, settings: LoraSettings, checkpoint: Checkpoint
    ) -> AdapterError:
        """Return the error that counts all problems and lists the first.

        Args:
            name: the adapter's.
            file: its tensors.
            settings: its config.
            checkpoint: the model.
        """
        problems = list(self._advice)
        if self._lost and not self.found:
            stranger = self._stranger(settings.base_model, checkpoint)
            problems = [stranger, *(p for p in problems if p not in self._lost)]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        rest = len(problems) - _MOST_SHOWN
        shown = "; ".join(problems[:_MOST_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")
        kinds = set(self._advice.values())
        advice = kinds.pop() if len(kinds) == 1 else _OTHER_MODEL
        if self.resized is not None:
            advice = "a bundle has one tokenizer and one vocabulary for all tasks: " + merge_advice(
                checkpoint.path,
                checkpoint.transformer_path,
                file.path.parent,
                settings.model_class,
                self.resized,
            )
        return AdapterError(
            f"adapter {name!r} ({file.path.parent}) does not fit the model {checkpoint.name!r}, {count}: "
            f"{shown}; {advice}"
        )

    def _stranger(self, base: str | None, checkpoint: Checkpoint) -> str:
        """Say in one text that the adapter is that of another model altogether."""
        origin = "it" if base is None else f"it was trained on {base_name(base)!r} and"
        theirs = next(iter(self._lost.values()))
        matrices = (key for key in checkpoint.keys() if len(checkpoint.shape(key)) == 2)
        ours = next((key for key in matrices if ".0." in key), "no numbered layers")
        return (
            f"none of its {len(self._lost)} modules is in this "
            f"{checkpoint.config.get('model_type', 'model')}: {origin} has {theirs}, the model has {ours}"
        )
