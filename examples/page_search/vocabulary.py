"""Qwen2.5's tokenizer, cut to the words of pages, questions and code."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from qwen_vocabulary import merges_of

from page_search.pages import draw_pages
from page_search.questions import ASKED, IMAGE_PROMPT, ask, describe, draw_snippet, transcribe
from page_search.words import WORDS

PAGES = 1500


def texts() -> Iterator[str]:
    """Yield texts that have every word in every place where a tokenizer may split it otherwise."""
    yield IMAGE_PROMPT
    for word in WORDS:
        for form in {word, word.lower(), word.capitalize()}:
            yield from (form, f" {form}")
    draw = random.Random("vocabulary")
    for page in itertools.islice(draw_pages(0, held_out=False), PAGES):
        yield transcribe(page)
        yield f"Query: {describe(page, draw)}"
        yield from (f"Passage: {ask(page, draw, kind).text}" for kind in ASKED)
        snippet = draw_snippet(page, draw)
        yield from (snippet.question(draw), f"Passage: {snippet.code(draw)}")


def merges() -> frozenset[bytes]:
    """Return the tokens that the cut tokenizer keeps beside bytes."""
    return merges_of(texts())
