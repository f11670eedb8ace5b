"""Which tensor of a checkpoint a path in an adapter means."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from embedge.export.adapters.keys import PREFIX
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.tensor_parts import part_names

__all__ = ["BaseTensors"]

# transformers' families whose layers of these names are Conv1D, with weights [in, out]. PEFT goes
# by the layer's class and corrects fan_in_fan_out where it says otherwise; so the flag in the
# config decides nothing here.
_CONV1D_FAMILIES = frozenset({"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
_CONV1D_LAYERS = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})


class BaseTensors:
    """A checkpoint's tensors by the names that an adapter may have for them.

    Attributes:
        canonical: maps the keys of both to one form.
    """

    def __init__(self, checkpoint: Checkpoint, canonical: Callable[[str], str]) -> None:
        self.canonical = canonical
        self._checkpoint = checkpoint
        self._keys: dict[str, list[str]] = {}
        for key in checkpoint.keys():
            self._keys.setdefault(canonical(key), []).append(key)
        self._conv1d_family = checkpoint.config.get("model_type") in _CONV1D_FAMILIES

    def canonical_path(self, path: str) -> str:
        """The canonical name of a parameter path of the adapter."""
        return self.canonical(f"{PREFIX}{path}").removeprefix(PREFIX)

    def find(self, path: str) -> list[str]:
        """The checkpoint's keys for a parameter path."""
        return self._keys.get(self.canonical_path(path), [])

    def only(self, path: str) -> str | None:
        """The one key for a parameter path, ``None`` for none or several."""
        found = self.find(path)
        return found[0] if len(found) == 1 else None

    def has(self, path: str) -> bool:
        """Whether there is a tensor for a parameter path, or for its first block of rows."""
        return bool(self.find(part_names(path, self._checkpoint.fused)[0]))

    def blocks(self, path: str) -> list[tuple[str, tuple[int, int]]]:
        """The parameter paths that a tensor of the adapter is for, and which block of its rows is whose."""
        paths = part_names(path, self._checkpoint.fused)
        return [(part, (number, len(paths))) for number, part in enumerate(paths)]

    def of_module(self, module: str) -> Iterator[str]:
        """The tensors of a module, by any of its names: as stored, of rows alone, or canonical."""
        for stored in self._checkpoint.stored:
            for key in part_names(stored, self._checkpoint.fused):
                names = (stored, key, self.canonical(key))
                if any(f".{module}." in f".{name}" for name in names) and self._checkpoint.has(key):
                    yield key

    def is_conv1d(self, module: str) -> bool:
        """Whether transformers has a Conv1D of that name, with weights ``[in, out]``."""
        return self._conv1d_family and module.rpartition(".")[2] in _CONV1D_LAYERS
