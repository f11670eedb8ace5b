"""Token ids for the reference and the peers, by transformers' tokenizer, padded on the right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from embedge.bench.errors import BenchError
from embedge.bench.systems.source import Source, is_jina_v4

__all__ = ["Ids", "TextTokens", "sorted_batches"]

Ids = NDArray[np.int64]
PADDED_TOKENS = 4096
_NO_LIMIT = 10**6  # tokenizers without a limit say 10**30
_OFFSET_FAMILIES = ("roberta", "xlm-roberta", "camembert", "mpnet")  # positions start after padding


class TextTokens:
    """The source's tokenizer, with the padding of its file and the length of a text overridden.

    Attributes:
        max_length: the most tokens of a text, special tokens included.
        pad_token_id: what shorter rows are filled with.
    """

    def __init__(self, source: Source) -> None:
        """Load the tokenizer.

        Args:
            source: the model; its ``max_length`` wins over the tokenizer's.

        Raises:
            BenchError: no file names a maximum length.
        """
        self._tokenizer: Any = _load(source)
        self._include_prompt = source.include_prompt
        self._tokenizer.padding_side = "right"
        self.pad_token_id = int(self._tokenizer.pad_token_id or 0)
        self.max_length = _max_length(source, int(self._tokenizer.model_max_length))

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, special tokens included, cut at ``max_length``."""
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            truncation=True,
            max_length=self.max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        rows: list[list[int]] = encoded["input_ids"]
        return rows

    def unpooled(self, prompt: str) -> int:
        """Return how many first tokens of a text behind ``prompt`` the pooling leaves out.

        As sentence-transformers counts: the prompt's own tokens, without a special one at their end.
        """
        if self._include_prompt or not prompt:
            return 0
        [ids] = self([prompt])
        return len(ids) - (bool(ids) and ids[-1] in self._tokenizer.all_special_ids)

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
        """Return ids and mask, int64 ``[batch, longest]``, padded on the right."""
        width = max(1, *(len(row) for row in rows))
        ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return ids, mask

    def embed(
        self,
        texts: Sequence[str],
        batch_size: int,
        forward: Callable[[Ids, Ids], NDArray[np.float32]],
    ) -> NDArray[np.float32]:
        """Return one vector a text, float32 ``[n, dim]``; batches hold texts of similar length.

        Args:
            texts: with their prompts.
            batch_size: most texts of a batch.
            forward: from ids and mask to float32 ``[batch, dim]``.
        """
        rows = self(texts)
        result: NDArray[np.float32] | None = None
        for batch in sorted_batches(rows, batch_size):
            vectors = forward(*self.pad([rows[i] for i in batch]))
            if result is None:
                result = np.empty((len(rows), vectors.shape[1]), dtype=np.float32)
            result[batch] = vectors
        return np.empty((0, 0), dtype=np.float32) if result is None else result

    def exact(self, texts: Sequence[str], batch: int, tokens: int) -> tuple[Ids, Ids]:
        """Return ``batch`` different rows of exactly ``tokens`` real tokens, nothing padded.

        The rows are consecutive slices of the texts' own tokens between the special tokens that
        the tokenizer puts around any text, so no row repeats another.

        Args:
            texts: where the tokens come from; read again from the start when they run out.
            batch: rows.
            tokens: tokens a row, special tokens included; at most ``max_length``.

        Raises:
            BenchError: more tokens than the model takes.
        """
        if tokens > self.max_length:
            raise BenchError(f"a row of {tokens} tokens: this model takes {self.max_length}")
        encoded = self._tokenizer(texts[0], return_special_tokens_mask=True)
        special = np.array(encoded["special_tokens_mask"], dtype=bool)
        content = np.flatnonzero(~special)
        head = encoded["input_ids"][: content[0]]
        tail = encoded["input_ids"][content[-1] + 1 :]
        plain = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        stream = np.array([i for row in plain for i in row], dtype=np.int64)
        size = tokens - len(head) - len(tail)
        # A step coprime with the stream's length keeps rows apart when the stream wraps around.
        starts = np.arange(batch) * size
        body = stream[
            (starts[:, None] + starts[:, None] // len(stream) + np.arange(size)) % len(stream)
        ]
        ends = np.ones((batch, 1), dtype=np.int64)
        ids = np.concatenate([ends * head, body, ends * tail], axis=1).astype(np.int64)
        return ids, np.ones_like(ids)


def sorted_batches(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Yield row numbers in batches of similar length, the longest first.

    A batch of more than one row has at most ``PADDED_TOKENS`` tokens: frameworks keep the memory of
    their largest batch, and several of them run side by side.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    start = 0
    while start < len(order):
        longest = max(1, len(rows[order[start]]))
        count = max(1, min(batch_size, PADDED_TOKENS // longest))
        yield order[start : start + count]
        start += count


def _load(source: Source) -> Any:
    if is_jina_v4(source.transformer):
        fast: Any = transformers.Qwen2TokenizerFast
        return fast.from_pretrained(source.transformer)
    known = _config(source).get("model_type") in CONFIG_MAPPING
    # a model of another type has its tokenizer in tokenizer.json, and so has one that says so, for which
    # transformers 5 would build its type's own; neither has annotations
    loader: Any = AutoTokenizer if known and not _generic(source) else PreTrainedTokenizerFast
    return loader.from_pretrained(source.transformer)


def _generic(source: Source) -> bool:
    file = source.transformer / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")


def _config(source: Source) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((source.transformer / "config.json").read_text("utf-8"))
    return found


def _max_length(source: Source, tokenizer_limit: int) -> int:
    config: Any = _config(source)
    if config.get("model_type") in CONFIG_MAPPING:  # which know more keys by other names
        config = AutoConfig.from_pretrained(source.transformer).to_dict()
    limits = [source.max_length or (tokenizer_limit if tokenizer_limit < _NO_LIMIT else None)]
    positions = config.get("max_position_embeddings")
    if positions and config.get("model_type") in _OFFSET_FAMILIES:
        positions -= config["pad_token_id"] + 1
    limits.append(positions)
    known = [limit for limit in limits if limit]
    if not known:
        raise BenchError(f"{source.transformer}: no file names a maximum length")
    return int(min(known))
