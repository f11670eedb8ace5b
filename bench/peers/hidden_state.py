"""What peers share: a graph that ends at the hidden states, the bench's tokenizer around it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from embedge.bench.systems.pooling import pool
from embedge.bench.systems.source import Source
from embedge.bench.systems.tokens import Ids, TextTokens, sorted_batches

__all__ = ["HiddenStateSystem", "graph_inputs"]


class HiddenStateSystem:
    """A peer; subclasses give :meth:`forward`, from ids to hidden states.

    ``forward`` stops there: a peer is not charged for pooling when shapes are timed.

    Attributes:
        caveat: what a reader of its figures has to know, ``None`` for nothing.
    """

    role = "peer"
    precision: str | None = None
    caveat: str | None = None

    def __init__(
        self, name: str, source: Source, tokens: TextTokens, bytes_on_disk: int | None
    ) -> None:
        self.name = name
        self.bytes_on_disk = bytes_on_disk
        self._source = source
        self._tokens = tokens

    def forward(self, ids: Ids, mask: Ids) -> NDArray[np.float32]:
        """Return the hidden states, float32 ``[batch, tokens, width]``."""
        raise NotImplementedError

    def encode(
        self, texts: Sequence[str], batch_size: int = 32, role: str | None = None
    ) -> NDArray[np.float32]:
        """Return float32 ``[n, dim]``, pooled as the source pools."""
        prompt = self._source.prompt(role)
        rows = self._tokens([prompt + text for text in texts])
        parts: dict[int, NDArray[np.float32]] = {}
        for batch in sorted_batches(rows, batch_size):
            ids, mask = self._tokens.pad([rows[i] for i in batch])
            hidden = torch.from_numpy(np.array(self.forward(ids, mask)))
            vectors = pool(hidden, torch.from_numpy(mask), self._source).numpy()
            parts.update(zip(batch, vectors, strict=True))
        return np.stack([parts[i] for i in range(len(rows))])


def graph_inputs(names: Sequence[str], ids: Ids, mask: Ids) -> dict[str, Ids]:
    """Return the inputs that an optimum graph asks for.

    Raises:
        ValueError: it asks for one that is not known, such as a key-value cache.
    """
    made: dict[str, Ids] = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy(),
    }
    unknown = [name for name in names if name not in made]
    if unknown:
        raise ValueError(f"the exported graph asks for {', '.join(unknown)}")
    return {name: made[name] for name in names}
