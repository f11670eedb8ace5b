"""From texts to rows of tokens to vectors.

Texts go through in windows, so that the token ids held at once are bounded; lengths are sorted
within a window, and texts with the same tokens run once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from embedge.runtime._errors import EmbedgeWarning, TextTooLongError
from embedge.runtime._request import Request
from embedge.runtime._rows import RowRunner
from embedge.runtime._tokenize import TextTokenizer, TokenIds

__all__ = ["TextPipeline"]

_WINDOW_TEXTS = 8192

Vectors = NDArray[np.float32]


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
        store: Callable[[int, Vectors], None],
        advance: Callable[[int], object],
    ) -> None:
        """Stores each text's result under its place; texts without tokens are left out.

        Args:
            texts: without their prefix.
            places: where each stands in the call.
            request: the call.
            store: takes a place and float32 ``[dim]``, or ``[tokens, dim]`` for multi-vectors.
            advance: takes the number of texts that were done.
        """
        without_tokens: list[int] = []
        for start in range(0, len(texts), _WINDOW_TEXTS):
            window = [request.prefix + text for text in texts[start : start + _WINDOW_TEXTS]]
            tokens = self._tokenizer(window)
            here = places[start : start + _WINDOW_TEXTS]
            self._report_truncation(tokens, here, request.on_truncate)
            filled = [index for index, text in enumerate(tokens) if len(text)]
            without_tokens += (here[i] for i, text in enumerate(tokens) if not len(text))
            advance(len(tokens) - len(filled))
            self._run_once_each(
                [tokens[i] for i in filled], [here[i] for i in filled], request, store, advance
            )
        if without_tokens:
            warnings.warn(
                f"{len(without_tokens)} of {len(texts)} texts have no tokens and become zero "
                f"vectors; the first is sentences[{without_tokens[0]}]",
                EmbedgeWarning,
                stacklevel=3,
            )

    def _run_once_each(
        self,
        tokens: Sequence[TokenIds],
        places: Sequence[int],
        request: Request,
        store: Callable[[int, Vectors], None],
        advance: Callable[[int], object],
    ) -> None:
        """Runs texts with the same tokens once; each gets a result of its own."""
        same: dict[bytes, list[int]] = {}
        for index, text in enumerate(tokens):
            same.setdefault(text.ids.tobytes(), []).append(index)
        groups = list(same.values())

        def store_all(group: int, result: Vectors) -> None:
            first, *others = groups[group]
            for index in others:
                store(places[index], result.copy())
            store(places[first], result)
            if others:
                advance(len(others))

        rows = [tokens[group[0]] for group in groups]
        self._runner.run(rows, range(len(groups)), request, store_all, advance)

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
            f"sentences[{first}] is longer than {self._max_length} tokens and was cut; "
            'on_truncate="ignore" or "error" changes this warning, which is given once',
            EmbedgeWarning,
            stacklevel=4,
        )
