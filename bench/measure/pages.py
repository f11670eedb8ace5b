"""Page images of a labelled set: depth 5, multi-vectors, alignment, and what fewer pixels cost and save.

Rules:
    * nDCG@5 is ViDoRe's, beside nDCG@10, by which all sets are compared.
    * A text that has no vector a token has no multi-vector figures. Scores are MaxSim of all tokens.
    * An image budget is ``max_pixels``. Its quality is compared with the reference's at the source's own budget.
    * A page is timed alone, from the bytes of its file to its vector, all systems and budgets in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.bench.documents import Document
from embedge.bench.measure.alignment import alignment
from embedge.bench.measure.labelled import (
    STORED,
    Columns,
    against,
    column_quality,
    encode_pages,
    firsts,
    stored_columns,
)
from embedge.bench.measure.latency import one_by_one, spread
from embedge.bench.measure.quality import Floats, Quality, gains_of, ndcg_of_scores
from embedge.bench.measure.texts import EvalSet, spaced
from embedge.bench.options import Profile
from embedge.bench.systems.system import PageSystem

__all__ = [
    "DEPTHS",
    "Budgets",
    "align_columns",
    "align_stored",
    "budget_figures",
    "different_pages",
    "page_times",
    "token_qualities",
]

DEPTHS = (5, 10)
Budgets = Sequence[int]
_TOGETHER = 32  # pages whose multi-vectors are held at once
Figures = dict[str, Any]
Vectors = NDArray[np.float32]


def different_pages(evaluation: EvalSet) -> list[Document]:
    """Return each different page once, in order of appearance."""
    return list(dict.fromkeys(evaluation.passages))


def token_qualities(system: PageSystem, evaluation: EvalSet) -> dict[int, Quality]:
    """Return nDCG of a system's multi-vectors by depth."""
    queries = system.token_vectors(list(dict.fromkeys(evaluation.first)), "query")
    pages = different_pages(evaluation)
    parts = [
        system.token_scores(queries, system.image_token_vectors(pages[start : start + _TOGETHER]))
        for start in range(0, len(pages), _TOGETHER)
    ]
    scores = np.concatenate(parts, axis=1).astype(np.float64)
    found = {depth: ndcg_of_scores(evaluation, scores, depth) for depth in DEPTHS}
    return {
        depth: Quality(value=float(items.mean()), items=items) for depth, items in found.items()
    }


def align_stored(
    evaluation: EvalSet, columns: Columns, ranges: Vectors
) -> dict[str, dict[str, float | None]]:
    """Return :func:`align_columns` of what each stored format keeps, by its name."""
    return {
        name: align_columns(evaluation, *stored_columns(evaluation, columns, name, ranges))
        for name in STORED
    }


def align_columns(
    evaluation: EvalSet, first: Floats | Vectors, second: Floats | Vectors
) -> dict[str, float | None]:
    """Return how the queries and pages of a set lie to each other, see :func:`alignment`.

    Args:
        evaluation: the set.
        first: its queries, ``[rows, dim]``.
        second: its pages, ``[rows and others, dim]``.
    """
    gains = gains_of(evaluation)
    pages = firsts(evaluation.passages)
    matches = np.zeros((len(gains), len(pages)), dtype=bool)
    for query, its in enumerate(gains):
        matches[query, [page for page, gain in its.items() if gain > 0]] = True
    queries = firsts(evaluation.first)
    return alignment(first[queries], second[pages], matches)


def budget_figures(
    system: PageSystem,
    evaluation: EvalSet,
    columns: Columns,
    reference: Mapping[int, Quality],
    budgets: Budgets,
    normalize: bool,
) -> dict[str, Figures]:
    """Return tokens and quality of each budget, by the budget as a string.

    Args:
        system: of the bundle.
        evaluation: a set of pages.
        columns: the system's at the source's own budget, which is the first.
        reference: the yardstick's quality at that budget, by depth.
        budgets: most pixels of a page, the source's own first.
        normalize: whether vectors have length 1.
    """
    pages = different_pages(evaluation)
    found = {}
    for number, budget in enumerate(budgets):
        at = columns
        if number:
            at = Columns(first=columns.first, second=encode_pages(system, evaluation, budget))
        dim = at.first.shape[1]
        found[str(budget)] = {
            "tokens": float(np.mean([system.page_tokens(page, budget) for page in pages])),
            "quality": {
                "set": evaluation.name,
                **{
                    f"ndcg@{depth}": against(
                        evaluation,
                        column_quality(evaluation, at, dim, normalize, depth),
                        reference[depth],
                    )
                    for depth in DEPTHS
                },
            },
        }
    return found


def page_times(
    systems: Sequence[PageSystem], evaluation: EvalSet, budgets: Budgets, profile: Profile
) -> dict[str, dict[str, Figures]]:
    """Return what :func:`spread` says and ``pages`` by system and budget; systems in torch at the first budget alone.

    Args:
        systems: all that are compared.
        evaluation: a set of pages.
        budgets: most pixels of a page, the source's own first.
        profile: how many pages, and how often.
    """
    chosen = spaced(different_pages(evaluation), profile.pages)
    runs = dict(_runs(systems, budgets))
    named = {str(key): run for key, run in runs.items()}
    times = one_by_one(named, chosen, profile.single_rounds, skip=1)
    found: dict[str, dict[str, Figures]] = {}
    for key in runs:
        system, budget = key
        figures = spread(times[str(key)]) | {"pages": len(chosen)}
        found.setdefault(system, {})[budget] = figures
    return found


def _runs(
    systems: Sequence[PageSystem], budgets: Budgets
) -> Iterator[tuple[tuple[str, str], Callable[[Document], object]]]:
    for system in systems:
        for budget in budgets if system.role == "embedge" else budgets[:1]:
            yield (system.name, str(budget)), functools.partial(_alone, system, budget)


def _alone(system: PageSystem, budget: int, page: Document) -> object:
    return system.encode_images([page], budget)
