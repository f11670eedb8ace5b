"""From a graph's output to the vectors of a call: checked, cut to ``truncate_dim``, normalized."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.manifest import Model
from embedge.runtime.encode.request import Request
from embedge.runtime.encode.sequences import TokenSequence
from embedge.runtime.errors import BundleError
from embedge.runtime.host.progress import Progress
from embedge.runtime.scoring.similarity import normalized

__all__ = ["Results", "Vectors", "collect", "finished_vectors", "no_results", "output_name"]

Vectors = NDArray[np.float32]
Results = Vectors | list[Vectors]


def output_name(request: Request) -> str:
    """The graph's output that a call reads."""
    return "token_embeddings" if request.options.multi_vector else "embedding"


def finished_vectors(
    output: Vectors,
    sequences: Sequence[TokenSequence],
    shape: tuple[int, ...],
    *,
    request: Request,
    model: Model,
    file: object,
) -> list[Vectors]:
    """What the sequences of a batch get: float32 ``[dim]`` each, or ``[tokens, dim]``.

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
    expected = (*shape, model.multi_vector_dim) if multi else (shape[0], model.dim)
    if output.shape != expected:
        raise BundleError(
            f"{file}: expected {output_name(request)} of the shape {list(expected)}, found "
            f"{list(output.shape)}; export the bundle again"
        )
    cut = request.dim < output.shape[-1]
    vectors = output[: len(sequences), ..., : request.dim]
    if request.options.normalize_embeddings or (cut and model.normalize):
        vectors = normalized(vectors)
    if multi:
        return [
            of_one[: len(sequence)][... if sequence.scored is None else sequence.scored].copy()
            for of_one, sequence in zip(vectors, sequences, strict=True)
        ]
    return list(vectors)


def no_results(request: Request, count: int) -> Results:
    """Room for a call's results: zero vectors, or multi-vectors without tokens."""
    if request.options.multi_vector:
        return [np.zeros((0, request.dim), np.float32)] * count
    return np.zeros((count, request.dim), np.float32)


def collect(
    vectors: Generator[tuple[int, Vectors], None, None],
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
