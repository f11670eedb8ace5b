"""What a call's vectors are given as: floats, or codes by the ranges of its task.

Ranges are of whole vectors as the graph gives them. Those of a cut vector are its first ones, and where it is
normalized, they are wider by as much as the vectors of the calibration were longer on average.
"""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.manifest import Manifest, OutputRanges
from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.scoring.quantization import (
    RANGED,
    Ranges,
    as_ranges,
    code_dtype,
    code_width,
    quantize_embeddings,
)

__all__ = ["OutputFormat", "choose_ranges", "ranges_at"]


@dataclass(frozen=True)
class OutputFormat:
    """A format, and for 8 bits the ranges ``[2, dim]`` of its dimensions."""

    name: str = "float32"
    ranges: Ranges | None = field(default=None, compare=False)

    @property
    def dtype(self) -> Any:
        """The NumPy type of its codes."""
        return code_dtype(self.name)

    def width(self, dim: int) -> int:
        """How many codes a vector has."""
        return code_width(self.name, dim)

    def codes(self, vectors: NDArray[np.float32]) -> NDArray[Any]:
        """Vectors ``[…, dim]`` as codes."""
        if self.name == "float32":
            return vectors
        codes: NDArray[Any] = quantize_embeddings(vectors, self.name, self.ranges)
        return codes

    def zeros(self, count: int, dim: int) -> NDArray[Any]:
        """The codes of as many zero vectors."""
        zeros = np.zeros((count, self.width(dim)), self.dtype)
        if count and self.name != "float32":
            zeros[:] = self.codes(np.zeros((1, dim), np.float32))
        return zeros

    def parts(self) -> dict[str, Any]:
        """What a fingerprint says of it: nothing of floats of 32 bits, as before there were others."""
        if self.name == "float32":
            return {}
        ranges = None
        if self.ranges is not None:
            ranges = hashlib.sha256(np.ascontiguousarray(self.ranges, "<f4").tobytes()).hexdigest()
        return {"format": self.name, "ranges": ranges}


def choose_ranges(
    manifest: Manifest,
    task: str,
    name: str,
    given: Any,
    *,
    dim: int,
    normalize: bool,
    multi_vector: bool,
) -> Ranges | None:
    """The ranges of a call: those that it gives, or those of its task.

    Args:
        manifest: the bundle's.
        task: the call's.
        name: of the format.
        given: the call's ranges, or ``None``.
        dim: length of its vectors.
        normalize: whether they are normalized after the graph.
        multi_vector: whether there is one for each token.

    Raises:
        EmbedgeValueError: if the format needs none and some are given, or the reverse.
    """
    if name not in RANGED:
        if given is not None:
            raise EmbedgeValueError(
                f"ranges are for the formats {' and '.join(RANGED)}, and output_format is {name!r}; leave them out",
                arguments=["ranges", "output_format"],
            )
        return None
    if given is not None:
        return as_ranges(given, dim, name)
    of_task = manifest.tasks[task]
    stored = of_task.token_ranges if multi_vector else of_task.output_ranges
    if stored is None:
        raise EmbedgeValueError(
            f"output_format {name!r}: expected the range of each dimension, found none in the bundle for "
            f"{'multi-' * multi_vector}vectors of the task {task!r}; pass ranges, float [2, {dim}], or have the bundle "
            f"keep them: embedge ranges BUNDLE --task {shlex.quote(task)} --texts FILE",
            arguments=["output_format", "ranges"],
        )
    return ranges_at(stored, dim, normalize=normalize)


def ranges_at(stored: OutputRanges, dim: int, *, normalize: bool) -> Ranges:
    """Ranges of vectors that are cut to ``dim``, and perhaps normalized after that, float32 ``[2, dim]``."""
    ranges = np.array([stored.lowest[:dim], stored.highest[:dim]], np.float32)
    length = float(np.sqrt(sum(stored.mean_square[:dim])))
    return ranges / np.float32(length) if normalize and length > 0 else ranges
