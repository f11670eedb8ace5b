"""From a graph's output to the vectors of a call: checked, cut to ``truncate_dim``, normalized."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.manifest import Model
from embedge.runtime.encode.request import MappedRequest, Request
from embedge.runtime.encode.sequences import TokenSequence
from embedge.runtime.errors import BundleError
from embedge.runtime.host.progress import Progress
from embedge.runtime.scoring.similarity import normalized

__all__ = [
    "Codes",
    "Results",
    "Vectors",
    "collect",
    "finished_vectors",
    "no_results",
    "output_name",
]

Vectors = NDArray[np.float32]
Codes = NDArray[Any]  # float32, or what the call's format makes of it
Results = Codes | list[Any]


def output_name(request: Request) -> str:
    """The graph's output that a call reads."""
    if isinstance(request, MappedRequest):
        return "embeddings"
    return "token_embeddings" if request.options.multi_vector else "embedding"


def finished_vectors(
    output: Vectors,
    sequences: Sequence[TokenSequence],
    shape: tuple[int, ...],
    *,
    request: Request,
    model: Model,
    file: object,
) -> list[Any]:
    """What the sequences of a batch get: ``[dim]`` each, or ``[tokens, dim]``, in the call's format.

    Of a mapped request a sequence gets a list: ``[dim]`` for each task.

    A vector is cut to the call's length. It is normalized where the call asks for that, and again
    where it was cut and the source normalizes.

    Args:
        output: float32 ``[batch, dim]`` or ``[batch, tokens, dim]``, filling rows last.
        sequences: those of the batch that are no filling.
        shape: ``(batch, tokens)`` of the inputs.
        request: the call.
        model: what the graph should compute.
        file: the graph's, for messages.

    Raises:
        BundleError: the output has another shape.
    """
    multi = request.options.multi_vector
    expected = _expected_shape(request, model, shape)
    if output.shape != expected:
        raise BundleError(
            f"{file}: expected {output_name(request)} of the shape {list(expected)}, found "
            f"{list(output.shape)}; export the bundle again"
        )
    output = output[: len(sequences)]
    if isinstance(request, MappedRequest):
        of_rows = (
            of_one.output.codes(_cut(output[:, row], of_one, model))
            for row, of_one in request.by_row.items()
        )
        return [list(codes) for codes in zip(*of_rows, strict=True)]
    vectors = _cut(output, request, model)
    if multi:
        return [
            _of_tokens(of_one[: len(sequence)], sequence.scored, request)
            for of_one, sequence in zip(vectors, sequences, strict=True)
        ]
    return list(request.output.codes(vectors))


def _expected_shape(
    request: Request, model: Model, shape: tuple[int, ...]
) -> tuple[int | None, ...]:
    """The shape of the output that a call reads; ``shape`` as of :func:`finished_vectors`."""
    if isinstance(request, MappedRequest):
        return shape[0], request.rows, model.dim
    return (
        (*shape, model.multi_vector_dim) if request.options.multi_vector else (shape[0], model.dim)
    )


def _cut(vectors: Vectors, request: Request, model: Model) -> Vectors:
    """Vectors ``[…, dim]`` cut to a call's length, normalized where it asks for that, or the source does."""
    cut = request.dim < vectors.shape[-1]
    vectors = vectors[..., : request.dim]
    if request.options.normalize_embeddings or (cut and model.normalize):
        return normalized(vectors)
    return vectors


def _of_tokens(vectors: Vectors, scored: NDArray[np.bool_] | None, request: Request) -> Codes:
    """The multi-vectors of one sequence."""
    kept = vectors[... if scored is None else scored].copy()
    if request.options.pool_factor > 1:
        from embedge.runtime.scoring.token_pooling import pool_tokens  # few calls pool

        kept = pool_tokens(kept, request.options.pool_factor)
    return request.output.codes(kept)


def no_results(request: Request, count: int) -> Results:
    """Room for a call's results: zero vectors, or multi-vectors without tokens; of maps, a list of one a task."""
    if isinstance(request, MappedRequest):
        of_rows = (of_one.output.zeros(count, of_one.dim) for of_one in request.by_row.values())
        return [list(codes) for codes in zip(*of_rows, strict=True)]
    if request.options.multi_vector:
        return [request.output.zeros(0, request.dim)] * count
    return request.output.zeros(count, request.dim)


def collect(
    vectors: Generator[tuple[int, Codes], None, None],
    results: Results,
    *,
    shown: bool | None,
    unit: str = "text",
) -> None:
    """Stores vectors under their index as they come.

    Args:
        vectors: ``(index, vector)`` each; closed, whatever happens.
        results: where to.
        shown: draws a progress bar.
        unit: what it counts.
    """
    with (
        Progress(len(results), shown=bool(shown) and len(results) > 0, unit=unit) as progress,
        closing(vectors),
    ):
        for index, vector in vectors:
            results[index] = vector
            progress.advance(1)
