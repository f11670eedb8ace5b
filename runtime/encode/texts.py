"""From texts to rows of tokens to vectors.

Texts go through in windows, so that the token ids held at once are bounded; lengths are sorted
within a window. While the graph runs one window, a thread reads the tokens of the next. The first
windows are small, so that the graph need not wait for tokens. Texts of a call that have the same
tokens run once.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

from embedge.runtime.encode.batch_runner import RowRunner
from embedge.runtime.encode.prefetch import ahead
from embedge.runtime.encode.request import Request
from embedge.runtime.encode.tokenizer import TextTokenizer, TokenIds
from embedge.runtime.errors import EmbedgeWarning, TextTooLongError

__all__ = ["TextPipeline"]

# Of a text of 16 tokens the graph of a small model takes some 20 times as long as its tokens: windows
# may grow by 4 and the next one is yet ready in time. Two are held at once.
_FIRST_TEXTS = 512
_GROWTH = 4
_WINDOW_TEXTS = 8192
_WINDOW_CHARACTERS = 8_000_000  # some 32 MB of ids


class TextPipeline:
    """The steps from texts to vectors for one precision of a bundle.

    Args:
        tokenizer: texts to token ids.
        runner: rows to vectors.
        max_length: most tokens of a text, for messages.
    """

    def __init__(self, tokenizer: TextTokenizer, runner: RowRunner, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._runner = runner
        self._max_length = max_length
        self._warned_of_truncation = False

    def embed(
        self,
        texts: Sequence[str],
        places: Sequence[int],
        request: Request,
        results: Any,
        advance: Callable[[int], object],
    ) -> None:
        """Sets each text's result; those of texts without tokens stay as they are.

        Args:
            texts: without their prefix.
            places: the index of each in ``results``.
            request: the call.
            results: takes float32 ``[dim]`` at an index, or ``[tokens, dim]`` for multi-vectors.
            advance: takes the number of texts that were done.
        """
        without_tokens: list[int] = []
        first_places: dict[bytes, int] = {}
        with closing(self._windows(texts, request.prefix)) as windows:
            start = 0
            for tokens in windows:
                here = places[start : start + len(tokens)]
                start += len(tokens)
                self._report_truncation(tokens, here, request.on_truncate)
                without_tokens += (p for p, text in zip(here, tokens, strict=True) if not len(text))
                self._run_once_each(tokens, here, first_places, request, results, advance)
        if without_tokens:
            warnings.warn(
                f"{len(without_tokens)} of {len(texts)} texts have no tokens and become zero "
                f"vectors; the first is inputs[{without_tokens[0]}]",
                EmbedgeWarning,
                stacklevel=3,
            )

    def _windows(self, texts: Sequence[str], prefix: str) -> Generator[list[TokenIds], None, None]:
        """The tokens of the texts, window by window, each read while the one before it is in use."""
        windows = (self._tokenizer([prefix + text for text in part]) for part in _parts(texts))
        # No thread for a call that has a single window.
        return windows if len(texts) <= _FIRST_TEXTS else ahead(windows)

    def _run_once_each(
        self,
        tokens: Sequence[TokenIds],
        places: Sequence[int],
        first_places: dict[bytes, int],
        request: Request,
        results: Any,
        advance: Callable[[int], object],
    ) -> None:
        """Runs texts with the same tokens once; each gets a result of its own.

        Args:
            tokens: of the texts of a window.
            places: of the same texts.
            first_places: the place of the first text of the call with some tokens, by their digest
                (the ids themselves could be more than the vectors); extended.
            request: the call.
            results: as for :meth:`embed`.
            advance: as for :meth:`embed`.
        """
        rows: list[TokenIds] = []
        places_of_rows: list[int] = []
        copies: list[tuple[int, int]] = []
        for text, place in zip(tokens, places, strict=True):
            if not len(text):
                continue
            digest = hashlib.blake2b(text.ids.tobytes(), digest_size=16).digest()
            first = first_places.setdefault(digest, place)
            if first == place:
                rows.append(text)
                places_of_rows.append(place)
            else:
                copies.append((place, first))
        self._runner.run(rows, places_of_rows, request, results.__setitem__, advance)
        for place, first in copies:
            results[place] = results[first].copy()
        advance(len(tokens) - len(rows))

    def _report_truncation(
        self, tokens: Sequence[TokenIds], places: Sequence[int], on_truncate: str
    ) -> None:
        """Warns of the first cut text once, or refuses it."""
        if on_truncate == "ignore" or (on_truncate == "warn" and self._warned_of_truncation):
            return
        first = next((p for p, text in zip(places, tokens, strict=True) if text.truncated), None)
        if first is None:
            return
        if on_truncate == "error":
            raise TextTooLongError(first, self._max_length)
        self._warned_of_truncation = True
        warnings.warn(
            f"inputs[{first}] is longer than {self._max_length} tokens and was cut; "
            'on_truncate="ignore" cuts in silence, on_truncate="error" refuses; this is said once',
            EmbedgeWarning,
            stacklevel=4,
        )


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts of each window."""
    start, most = 0, _FIRST_TEXTS
    while start < len(texts):
        stop, characters = start, 0
        while stop < min(start + most, len(texts)) and characters < _WINDOW_CHARACTERS:
            characters += len(texts[stop])
            stop += 1
        yield texts[start:stop]
        start, most = stop, min(most * _GROWTH, _WINDOW_TEXTS)
