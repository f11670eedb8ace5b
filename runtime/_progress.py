"""A progress bar where tqdm is installed, nothing where it is not."""

from __future__ import annotations

from types import TracebackType
from typing import Any

__all__ = ["Progress"]


class Progress:
    """Counts what was embedded on standard error; closes with its block.

    Args:
        total: texts or images to come, ``None`` where that is not known.
        shown: ``False`` counts in silence.
        unit: what is counted.
    """

    def __init__(self, total: int | None, *, shown: bool, unit: str = "text") -> None:
        self._bar: Any = None
        if not shown:
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=total, unit=unit, desc="embed", dynamic_ncols=True)

    def advance(self, count: int) -> None:
        """Counts some more."""
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
