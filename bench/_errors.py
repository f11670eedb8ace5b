"""What goes wrong in a bench.

EmbedgeError
└── BenchError      a source, a data file or a bundle does not hold what was asked for
"""

from __future__ import annotations

from embedge.runtime import EmbedgeError

__all__ = ["BenchError"]


class BenchError(EmbedgeError, ValueError):
    """A source, a data file or a bundle does not hold what the bench was asked to measure."""
