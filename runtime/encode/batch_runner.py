"""From token sequences to vectors: plan batches, pad each, run the task's graph on it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.manifest import Model
from embedge.runtime.encode.batch_size import MAX_PADDING_TOKENS
from embedge.runtime.encode.batches import pad_batch, plan_batches
from embedge.runtime.encode.request import Request
from embedge.runtime.encode.sequences import ImageTokens, TokenSequence
from embedge.runtime.encode.vectors import Vectors, finished_vectors, output_name
from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.sessions.graphs import Graphs
from embedge.runtime.sessions.session import GraphSession

__all__ = ["BatchRunner"]


class BatchRunner:
    """Runs the tasks' graphs of one precision.

    Args:
        graphs: of the precision.
        model: what they compute.
        pad_token_id: the id that fills sequences.
        row_multiple: batch × tokens is a multiple of this.
        token_name: an id's token, for messages.
    """

    def __init__(
        self,
        graphs: Graphs,
        model: Model,
        *,
        pad_token_id: int,
        row_multiple: int,
        token_name: Callable[[int], str],
    ) -> None:
        self._graphs = graphs
        self._model = model
        self._pad_token_id = pad_token_id
        self._row_multiple = row_multiple
        self._token_name = token_name

    def run(
        self, items: Sequence[tuple[int, TokenSequence]], request: Request
    ) -> Generator[tuple[int, Vectors], None, None]:
        """``(index, vector)`` of each item, as batches finish.

        A vector is float32 ``[dim]``, or ``[tokens, dim]`` for multi-vectors.

        Args:
            items: ``(index in the call, sequence of at least one token)``.
            request: the call.

        Raises:
            EmbedgeValueError: for a token that the model's table lacks.
        """
        if not items:
            return
        graphs, task = self._graphs, request.task
        table_rows = graphs.token_rows(task)
        self.check_ids(items, task)
        batches = plan_batches(
            [len(sequence) for _, sequence in items],
            batch_size=request.options.batch_size,
            max_batch_tokens=request.options.max_batch_tokens or graphs.settings(task).batch_tokens,
            concurrency=1 if request.options.one_thread else graphs.concurrency(task),
            max_padding=MAX_PADDING_TOKENS[graphs.device],
        )
        largest = len(items[batches[0][0]][1]) * len(batches[0])

        def work(session: GraphSession, batch: NDArray[np.intp]) -> list[Vectors]:
            return self._run(session, [items[i][1] for i in batch], request, table_rows)

        with (
            graphs.use(task) as workers,
            closing(
                workers.run(batches, work, tokens=largest, one_thread=request.options.one_thread)
            ) as results,
        ):
            for batch, vectors in results:
                for i, vector in zip(batch, vectors, strict=True):
                    yield items[i][0], vector

    def check_ids(self, items: Sequence[tuple[int, TokenSequence]], task: str) -> None:
        """Refuses tokens that the model's table lacks: operators give another row for them, or none.

        Args:
            items: as for :meth:`run`.
            task: whose graph is to run.

        Raises:
            EmbedgeValueError: for the first of them.
        """
        table_rows = self._graphs.token_rows(task)
        if table_rows is None:
            return
        for index, sequence in items:
            largest = int(sequence.ids.max())
            if largest >= table_rows:
                what = "images" if isinstance(sequence, ImageTokens) else "inputs"
                raise EmbedgeValueError(
                    f"{what}[{index}] has {self._token_name(largest)}, a token that the tokenizer knows "
                    f"and the model does not, whose table has {table_rows} rows; leave it out of the "
                    "text, or export a model whose table was resized"
                )

    def _run(
        self,
        session: GraphSession,
        sequences: Sequence[TokenSequence],
        request: Request,
        table_rows: int | None,
    ) -> list[Vectors]:
        """The vectors of one batch."""
        model, padding = self._model, self._pad_token_id
        inputs = pad_batch(
            sequences,
            input_names=model.inputs,
            # Masked, so that any id does.
            pad_token_id=padding if table_rows is None or padding < table_rows else 0,
            row_multiple=self._row_multiple,
            max_length=model.max_length,
            hidden_size=model.image.hidden_size if model.image else 0,
        )
        return finished_vectors(
            session.run(output_name(request), inputs),
            sequences,
            inputs["input_ids"].shape,
            request=request,
            model=model,
            file=session.file,
        )
