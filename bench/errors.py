"""What goes wrong in a bench.

EmbedgeError
└── BenchError                  a source, a data file or a bundle does not hold what was asked for
    └── BenchArgumentError      the call itself is wrong (also an EmbedgeValueError)
"""

from __future__ import annotations

from embedge.runtime import EmbedgeError, EmbedgeValueError

__all__ = ["BenchArgumentError", "BenchError"]


class BenchError(EmbedgeError):
    """A source, a data file or a bundle does not hold what the bench was asked to measure."""


class BenchArgumentError(BenchError, EmbedgeValueError):
    """An argument names something that does not exist or cannot be measured."""
