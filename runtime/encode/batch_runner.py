"""From rows of tokens to vectors: batch, pad, run, truncate. A row is a text or an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.manifest import Model
from embedge.runtime.encode.batches import ImageTokens, Row, pad_batch, plan_batches
from embedge.runtime.encode.request import Request
from embedge.runtime.errors import BundleError, EmbedgeValueError
from embedge.runtime.scoring.similarity import normalized
from embedge.runtime.sessions.graphs import Graphs
from embedge.runtime.sessions.session import GraphSession

__all__ = ["RowRunner"]

_OUTPUTS = {False: "embedding", True: "token_embeddings"}

Vectors = NDArray[np.float32]


class RowRunner:
    """Runs a task's graph on rows.

    Args:
        graphs: of one precision.
        model: what they compute.
        pad_token_id: the id that fills rows.
        row_multiple: batch × tokens is a multiple of this.
    """

    def __init__(
        self, graphs: Graphs, model: Model, *, pad_token_id: int, row_multiple: int
    ) -> None:
        self._graphs = graphs
        self._model = model
        self._pad_token_id = pad_token_id
        self._row_multiple = row_multiple

    def run(
        self,
        rows: Sequence[Row],
        places: Sequence[int],
        request: Request,
        store: Callable[[int, Vectors], None],
        advance: Callable[[int], object],
    ) -> None:
        """Stores each row's result under its place.

        Args:
            rows: of at least one token each.
            places: the index to store each under.
            request: the call.
            store: takes a place and float32 ``[dim]``, or ``[tokens, dim]`` for multi-vectors.
            advance: takes the number of rows that were done.
        """
        if not rows:
            return
        token_rows = self._graphs.token_rows(request.task)
        if token_rows is not None:
            _check_ids(rows, places, token_rows)
        batches = plan_batches(
            [len(row) for row in rows],
            batch_size=request.batch_size,
            max_batch_tokens=request.max_batch_tokens or self._graphs.batch_tokens(request.task),
            lanes=self._graphs.lanes(request.task),
            max_padding=self._graphs.max_padding(),
        )

        def work(session: GraphSession, batch: NDArray[np.intp]) -> list[Vectors]:
            return self._run(session, [rows[i] for i in batch], request)

        def done(batch: NDArray[np.intp], results: list[Vectors]) -> None:
            for index, result in zip(batch, results, strict=True):
                store(places[index], result)
            advance(len(batch))

        longest = len(rows[batches[0][0]])
        tokens = longest * len(batches[0])
        self._graphs.use(request.task, lambda lanes: lanes.run(batches, work, done, tokens=tokens))

    def _run(self, session: GraphSession, rows: Sequence[Row], request: Request) -> list[Vectors]:
        """The result of each row of one batch."""
        model = self._model
        token_rows, padding = self._graphs.token_rows(request.task), self._pad_token_id
        padded = pad_batch(
            rows,
            input_names=model.inputs,
            # Masked, so that any id does.
            pad_token_id=padding if token_rows is None or padding < token_rows else 0,
            row_multiple=self._row_multiple,
            max_length=model.max_length,
            hidden_size=model.image.hidden_size if model.image else 0,
        )
        output = _OUTPUTS[request.multi_vector]
        result = session.run(output, padded.inputs)
        shape = padded.inputs["input_ids"].shape
        expected = (
            (*shape, model.multi_vector_dim) if request.multi_vector else (shape[0], model.dim)
        )
        if result.shape != expected:
            raise BundleError(
                f"{session.file}: expected {output} of the shape {list(expected)}, found "
                f"{list(result.shape)}; export the bundle again"
            )
        result = result[: padded.rows]
        cut = request.dim < result.shape[-1]
        result = result[..., : request.dim]
        if request.normalize or (cut and model.normalize):
            result = normalized(result)
        if request.multi_vector:
            return [vectors[: len(row)].copy() for vectors, row in zip(result, rows, strict=True)]
        return list(result)


def _check_ids(rows: Sequence[Row], places: Sequence[int], token_rows: int) -> None:
    """Refuses tokens that the model's table lacks, for which operators give other rows or none.

    Raises:
        EmbedgeValueError: with the text's place in the call.
    """
    for row, place in zip(rows, places, strict=True):
        ids = row.row.ids if isinstance(row, ImageTokens) else row.ids
        largest = int(ids.max())
        if largest >= token_rows:
            what = "images" if isinstance(row, ImageTokens) else "sentences"
            raise EmbedgeValueError(
                f"{what}[{place}] has the token {largest}, and the model's table ends at {token_rows - 1}: "
                "its tokenizer has tokens that it was not trained on; take that token out of the text, or "
                "export a model whose table was resized"
            )
