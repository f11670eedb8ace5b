"""How well an exported page model finds held-out pages, texts and code."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from embedge import Embedder
from page_search.pages import Page, draw_pages, render
from page_search.questions import (
    ASKED,
    Question,
    Snippet,
    alike,
    ask,
    describe,
    draw_snippet,
    relative,
)

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class HeldOut:
    """Pages whose titles no page of training has, and questions to them.

    Attributes:
        pages: what they say.
        questions: one of each kind for a page, where it has one.
        relevant: bool ``[questions, pages]``: which pages answer which questions.
    """

    pages: list[Page]
    questions: list[Question]
    relevant: Bools


def held_out(pages: int = 300, seed: int = 9) -> HeldOut:
    """Return held-out pages and a question to each, of the kinds by turns."""
    found = list(itertools.islice(draw_pages(seed, held_out=True), pages))
    draw = random.Random(f"questions:{seed}")
    asked = [ask(page, draw, kind) for page, kind in zip(found, itertools.cycle(ASKED))]
    relevant = np.array([[question.answered_by(page) for page in found] for question in asked])
    return HeldOut(found, asked, relevant)


def ndcg(scores: Floats, relevant: Bools, k: int = 5) -> NDArray[np.float64]:
    """Return nDCG@k of each query, every relevant document gaining 1; the first of equals is first.

    Args:
        scores: float32 ``[queries, documents]``.
        relevant: bool ``[queries, documents]``, at least one in each row.
        k: How many documents count.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    gains = np.take_along_axis(relevant, order, axis=1)
    discounts = 1 / np.log2(np.arange(gains.shape[1]) + 2)
    best = np.cumsum(discounts)[np.minimum(relevant.sum(1), gains.shape[1]) - 1]
    found: NDArray[np.float64] = gains @ discounts / best
    return found


def page_search(model: Embedder, data: HeldOut, task: str = "retrieval") -> dict[str, Any]:
    """Return mean nDCG@5 of questions against pages.

    Returns:
        ``single`` by dimension, ``multi``, and both by kind of question under ``by_kind``.
    """
    images = [render(page, seed=5)[0] for page in data.pages]
    texts = [question.text for question in data.questions]
    queries = model.encode(texts, task=task, prompt_name="query")
    pages = model.encode_image(images, task=task)
    single = {
        width: ndcg(cut(queries, width) @ cut(pages, width).T, data.relevant) for width in DIMS
    }
    tokens = model.encode(texts, task=task, prompt_name="query", multi_vector=True)
    rows = model.encode_image(images, task=task, multi_vector=True)
    multi = ndcg(model.similarity(tokens, rows), data.relevant)
    kinds = np.array([question.kind for question in data.questions])
    return {
        "single": {width: round(float(values.mean()), 4) for width, values in single.items()},
        "multi": round(float(multi.mean()), 4),
        "by_kind": {
            str(kind): {
                "single": round(float(single[max(DIMS)][kinds == kind].mean()), 4),
                "multi": round(float(multi[kinds == kind].mean()), 4),
                "questions": int((kinds == kind).sum()),
            }
            for kind in sorted(set(kinds))
        },
    }


DIMS = (32, 64, 128, 192)


def cut(vectors: Floats, width: int) -> Floats:
    """Return the first columns, at length 1."""
    kept = vectors[:, :width]
    scaled: Floats = kept / np.linalg.norm(kept, axis=1, keepdims=True)
    return scaled


def matching(model: Embedder, task: str = "text-matching", pairs: int = 150) -> dict[str, float]:
    """Return Spearman's correlation of cosines with what two descriptions, or two pages, share."""
    draw = random.Random("matching")
    firsts = list(itertools.islice(draw_pages(11, held_out=True), pairs))
    seconds = [relative(page, draw) for page in firsts]
    shared = [alike(one, other) for one, other in zip(firsts, seconds, strict=True)]
    found = {}
    texts = [[describe(page, draw) for page in pages] for pages in (firsts, seconds)]
    images = [[render(page, seed=6)[0] for page in pages] for pages in (firsts, seconds)]
    encode: dict[str, tuple[Callable[..., Any], Sequence[Sequence[Any]]]] = {
        "texts": (model.encode, texts),
        "pages": (model.encode_image, images),
    }
    for name, (of, both) in encode.items():
        one, other = (of(side, task=task) for side in both)
        found[name] = round(float(spearmanr((one * other).sum(1), shared).statistic), 4)
    return found


def code_search(model: Embedder, task: str = "code", titles: int = 40) -> dict[str, float]:
    """Return nDCG@5 of questions against code on held-out titles, several snippets a title."""
    draw = random.Random("code")
    pages = itertools.islice(draw_pages(12, held_out=True), titles)
    drawn = [draw_snippet(page, draw) for page in pages for _ in range(5)]
    snippets: list[Snippet] = list(dict.fromkeys(drawn))
    queries = [snippet.question(draw) for snippet in snippets]
    codes = [snippet.code(draw) for snippet in snippets]
    relevant = np.eye(len(snippets), dtype=np.bool_)
    one = model.encode(queries, task=task, prompt_name="query")
    other = model.encode(codes, task=task, prompt_name="passage")
    tokens = model.encode(queries, task=task, prompt_name="query", multi_vector=True)
    rows = model.encode(codes, task=task, prompt_name="passage", multi_vector=True)
    return {
        "single": round(float(ndcg(one @ other.T, relevant).mean()), 4),
        "multi": round(float(ndcg(model.similarity(tokens, rows), relevant).mean()), 4),
    }
