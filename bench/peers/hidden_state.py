"""What peers share: a model that ends at the hidden states, the bench's tokenizer around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from embedge.bench.peers.context import PeerContext
from embedge.bench.systems.pooling import pool
from embedge.bench.systems.tokens import Ids

__all__ = ["HiddenStateSystem", "Run", "graph_inputs"]

Run = Callable[[Ids, Ids], NDArray[np.float32]]


class HiddenStateSystem:
    """A peer that is timed up to the hidden states: pooling is not charged to it.

    Args:
        name: what the report calls it.
        run: from ids and mask, int64 ``[batch, tokens]``, to float32 ``[batch, tokens, width]``.
        context: what it was made from.
        bytes_on_disk: of its graph and weights.
        caveat: what a reader of its figures has to know, ``None`` for nothing.
    """

    role = "peer"
    precision: str | None = None

    def __init__(
        self,
        name: str,
        run: Run,
        context: PeerContext,
        bytes_on_disk: int | None,
        caveat: str | None = None,
    ) -> None:
        self.name = name
        self.forward = run
        self.bytes_on_disk = bytes_on_disk
        self.caveat = caveat
        self._source = context.source
        self._tokens = context.tokens

    def encode(
        self, texts: Sequence[str], batch_size: int = 32, role: str | None = None
    ) -> NDArray[np.float32]:
        """Return float32 ``[n, dim]``, pooled as the source pools."""
        prompt = self._source.prompt(role)
        run = partial(self._vectors, unpooled=self._tokens.unpooled(prompt))
        return self._tokens.embed([prompt + text for text in texts], batch_size, run)

    def _vectors(self, ids: Ids, mask: Ids, *, unpooled: int) -> NDArray[np.float32]:
        hidden = torch.from_numpy(np.array(self.forward(ids, mask)))
        vectors: NDArray[np.float32] = pool(
            hidden, torch.from_numpy(mask), self._source, unpooled
        ).numpy()
        return vectors


def graph_inputs(names: Sequence[str], ids: Ids, mask: Ids) -> dict[str, Ids]:
    """Return the inputs that an exported graph asks for.

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
