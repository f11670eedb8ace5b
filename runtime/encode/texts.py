"""From texts to tokens to vectors.

Texts go through in windows, so that the token ids held at once are bounded; lengths are sorted
within a window. While the graph runs one window, a thread reads the tokens of the next. The first
windows are small, so that the graph need not wait for tokens. Texts of a call that have the same
tokens run once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing

from embedge.runtime.bundle.manifest import POOL_MASK, Model
from embedge.runtime.encode.batch_runner import BatchRunner
from embedge.runtime.encode.late_interaction import in_role
from embedge.runtime.encode.prefetch import prefetched
from embedge.runtime.encode.request import CallOptions, Request
from embedge.runtime.encode.sequences import TokenIds
from embedge.runtime.encode.tokenizer import TextTokenizer
from embedge.runtime.encode.vectors import Results, Vectors, no_results
from embedge.runtime.errors import TextTooLongError, warn

__all__ = ["TextPipeline"]

# Of a text of 16 tokens the graph of a small model takes some 20 times as long as its tokens: windows
# may grow by 4 and the next one is yet ready in time. Two are held at once.
_FIRST_TEXTS = 512
_GROWTH = 4
_WINDOW_TEXTS = 8192
_WINDOW_CHARACTERS = 8_000_000  # some 32 MB of ids

Window = list[tuple[int, TokenIds]]  # index in the call, tokens


class TextPipeline:
    """The steps from texts to vectors for one precision of a bundle.

    Args:
        tokenizer: texts to token ids.
        runner: tokens to vectors.
        model: what its graphs compute.
    """

    def __init__(self, tokenizer: TextTokenizer, runner: BatchRunner, model: Model) -> None:
        self._tokenizer = tokenizer
        self._runner = runner
        self._model = model
        self._warned_of_truncation = False

    def encode(
        self, texts: Sequence[str], indices: Sequence[int], request: Request, results: Results
    ) -> Generator[tuple[int, Vectors], None, None]:
        """``(index, vector)`` of each text, as batches finish.

        A vector is float32 ``[dim]``, or ``[tokens, dim]`` for multi-vectors. Without a token it is
        zero, or empty.

        Args:
            texts: without their prefix.
            indices: of the texts in the call.
            request: the call.
            results: holds at each index what came for it, before the next is asked for.

        Raises:
            TextTooLongError: for a text that would be cut, under "error".
        """
        without_tokens: list[int] = []
        first_with: dict[bytes, int] = {}
        with closing(self._windows(texts, request)) as windows:
            start = 0
            for tokens in windows:
                window = list(zip(indices[start : start + len(tokens)], tokens, strict=True))
                start += len(tokens)
                self._report_truncation(window, request.options)
                for index, text in window:
                    if not len(text):
                        without_tokens.append(index)
                        yield index, no_results(request, 1)[0]
                yield from self._run_once_each(window, first_with, request, results)
        if without_tokens:
            warn(
                f"{len(without_tokens)} of {len(texts)} texts have no tokens and become zero "
                f"vectors; the first is inputs[{without_tokens[0]}]"
            )

    def tokenize(self, texts: Sequence[str], request: Request) -> list[TokenIds]:
        """The tokens of each text, all of them at once.

        Args:
            texts: without their prefix.
            request: the call.

        Raises:
            EmbedgeValueError: for a token that the model's table lacks.
        """
        tokens = self._reader(request)([request.prefix + text for text in texts])
        with_any = [(index, text) for index, text in enumerate(tokens) if len(text)]
        self._runner.check_ids(with_any, request.task)
        return tokens

    def _windows(
        self, texts: Sequence[str], request: Request
    ) -> Generator[list[TokenIds], None, None]:
        """The tokens of the texts, window by window, each read while the one before it is in use."""
        prefix, read = request.prefix, self._reader(request)
        windows = (read([prefix + text for text in part]) for part in _parts(texts))
        # No thread for a call that has a single window.
        return windows if len(texts) <= _FIRST_TEXTS else prefetched(windows)

    def _reader(self, request: Request) -> Callable[[list[str]], list[TokenIds]]:
        """What makes tokens of a call's texts."""
        model, tokenizer, role = self._model, self._tokenizer, request.options.role
        rules = model.late_interaction
        if rules is not None:
            limited = tokenizer.cut_at(rules.length(role))
            return lambda texts: [in_role(text, rules, role) for text in limited(texts)]
        skips = POOL_MASK in model.inputs and not model.include_prompt
        unpooled = tokenizer.prompt_tokens(request.prefix) if skips else 0
        return lambda texts: tokenizer(texts, unpooled)

    def _run_once_each(
        self, window: Window, first_with: dict[bytes, int], request: Request, results: Results
    ) -> Generator[tuple[int, Vectors], None, None]:
        """Vectors of a window's texts that have tokens; texts with the same tokens run once.

        Args:
            window: its texts.
            first_with: the index of the call's first text with some tokens, by their digest (the ids
                themselves could be more than the vectors); extended.
            request: the call.
            results: as for :meth:`encode`.
        """
        unique: Window = []
        copies: list[tuple[int, int]] = []
        for index, text in window:
            if not len(text):
                continue
            key = text.ids.tobytes() + str(text.attended).encode()
            digest = hashlib.blake2b(key, digest_size=16).digest()
            first = first_with.setdefault(digest, index)
            if first == index:
                unique.append((index, text))
            else:
                copies.append((index, first))
        yield from self._runner.run(unique, request)
        for index, first in copies:
            yield index, results[first].copy()

    def _report_truncation(self, window: Window, options: CallOptions) -> None:
        """Warns of the first cut text once, or refuses it."""
        on_truncate, rules = options.on_truncate, self._model.late_interaction
        if on_truncate == "ignore" or (on_truncate == "warn" and self._warned_of_truncation):
            return
        first = next((index for index, text in window if text.truncated), None)
        if first is None:
            return
        most = self._model.max_length if rules is None else rules.length(options.role)
        if on_truncate == "error":
            raise TextTooLongError(first, most)
        self._warned_of_truncation = True
        silence, refusal = 'on_truncate="ignore"', 'on_truncate="error"'
        warn(
            f"inputs[{first}] is longer than {most} tokens and was cut; {silence} cuts in "
            f"silence, {refusal} refuses; this is said once",
            arguments=[silence, refusal],
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
