"""From texts to vectors: tokenize, batch, run, truncate, back in order.

Texts go through in windows, so that the token ids held at once are bounded; lengths are sorted
within a window.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedge.runtime._batching import pad_batch, plan_batches
from embedge.runtime._errors import BundleError, EmbedgeWarning, TextTooLongError
from embedge.runtime._graphs import Graphs
from embedge.runtime._manifest import Model
from embedge.runtime._session import GraphSession
from embedge.runtime._similarity import normalized
from embedge.runtime._tokenize import TextTokenizer, TokenIds

__all__ = ["Request", "TextPipeline"]

_WINDOW_TEXTS = 8192
_OUTPUTS = {False: "embedding", True: "token_embeddings"}

Vectors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call's arguments, checked and looked up.

    Attributes:
        prefix: text to put before every text.
        max_batch_tokens: ``None``: what runs fastest here.
        dim: length of the vectors to give.
        normalize: L2-normalize even where the source does not.
        multi_vector: a vector per token.
    """

    task: str
    prefix: str
    batch_size: int
    max_batch_tokens: int | None
    dim: int
    normalize: bool
    on_truncate: str
    multi_vector: bool


class TextPipeline:
    """The steps from texts to vectors for one precision of a bundle.

    Args:
        tokenizer: texts to token ids.
        graphs: graphs by task.
        model: what the graphs compute.
        pad_token_id: the id that fills rows.
        row_multiple: batch × tokens is a multiple of this.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        graphs: Graphs,
        model: Model,
        *,
        pad_token_id: int,
        row_multiple: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._graphs = graphs
        self._model = model
        self._pad_token_id = pad_token_id
        self._row_multiple = row_multiple
        self._warned_of_truncation = False

    def embed(
        self,
        texts: Sequence[str],
        request: Request,
        store: Callable[[int, Vectors], None],
        advance: Callable[[int], object],
    ) -> None:
        """Stores each text's result under its index; texts without tokens are left out.

        Args:
            texts: without their prefix.
            request: the call.
            store: takes an index and float32 ``[dim]``, or ``[tokens, dim]`` for multi-vectors.
            advance: takes the number of texts that were done.
        """
        without_tokens: list[int] = []
        for start in range(0, len(texts), _WINDOW_TEXTS):
            window = [request.prefix + text for text in texts[start : start + _WINDOW_TEXTS]]
            tokens = self._tokenizer(window)
            self._report_truncation(tokens, start, request.on_truncate)
            filled = [index for index, text in enumerate(tokens) if len(text)]
            without_tokens += (start + i for i, text in enumerate(tokens) if not len(text))
            advance(len(tokens) - len(filled))
            places = [start + index for index in filled]
            self.embed_tokens([tokens[i] for i in filled], places, request, store, advance)
        if without_tokens:
            warnings.warn(
                f"{len(without_tokens)} of {len(texts)} texts have no tokens and become zero "
                f"vectors; the first is sentences[{without_tokens[0]}]",
                EmbedgeWarning,
                stacklevel=3,
            )

    def embed_tokens(
        self,
        texts: Sequence[TokenIds],
        places: Sequence[int],
        request: Request,
        store: Callable[[int, Vectors], None],
        advance: Callable[[int], object],
    ) -> None:
        """Stores each text's result under its place.

        Args:
            texts: token ids, at least one each.
            places: the index to store each under.
            request: the call.
            store: as for :meth:`embed`.
            advance: as for :meth:`embed`.
        """
        if not texts:
            return
        batches = plan_batches(
            [len(text) for text in texts],
            batch_size=request.batch_size,
            max_batch_tokens=request.max_batch_tokens or self._graphs.batch_tokens(request.task),
            lanes=self._graphs.lanes(request.task),
        )

        def work(session: GraphSession, batch: NDArray[np.intp]) -> list[Vectors]:
            return self._run(session, [texts[i] for i in batch], request)

        def done(batch: NDArray[np.intp], rows: list[Vectors]) -> None:
            for index, row in zip(batch, rows, strict=True):
                store(places[index], row)
            advance(len(batch))

        longest = len(texts[batches[0][0]])
        with self._graphs.use(request.task) as lanes:
            lanes.run(batches, work, done, tokens=longest * len(batches[0]))

    def _run(
        self, session: GraphSession, texts: Sequence[TokenIds], request: Request
    ) -> list[Vectors]:
        """The result of each text of one batch."""
        model = self._model
        padded = pad_batch(
            texts,
            input_names=model.inputs,
            pad_token_id=self._pad_token_id,
            row_multiple=self._row_multiple,
            max_length=model.max_length,
        )
        result = session.run(_OUTPUTS[request.multi_vector], padded.inputs)[: padded.texts]
        full_dim = model.multi_vector_dim if request.multi_vector else model.dim
        if result.shape[-1] != full_dim:
            raise BundleError(
                f"{session.file}: expected vectors of {full_dim} dimensions, found "
                f"{result.shape[-1]}; export the bundle again"
            )
        cut = request.dim < result.shape[-1]
        result = result[..., : request.dim]
        if request.normalize or (cut and model.normalize):
            result = normalized(result)
        if request.multi_vector:
            return [row[: len(text)].copy() for row, text in zip(result, texts, strict=True)]
        return list(result)

    def _report_truncation(self, tokens: Sequence[TokenIds], start: int, on_truncate: str) -> None:
        """Warns of the first cut text once, or refuses it."""
        if on_truncate == "ignore" or (on_truncate == "warn" and self._warned_of_truncation):
            return
        first = next((start + i for i, text in enumerate(tokens) if text.truncated), None)
        if first is None:
            return
        if on_truncate == "error":
            raise TextTooLongError(first, self._model.max_length)
        self._warned_of_truncation = True
        warnings.warn(
            f"sentences[{first}] is longer than {self._model.max_length} tokens and was cut; "
            'on_truncate="ignore" or "error" changes this warning, which is given once',
            EmbedgeWarning,
            stacklevel=4,
        )
