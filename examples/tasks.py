"""What each adapter is trained on, and how its quality is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backbone import encode
from jsonl import read_jsonl
from metrics import Floats, ndcg_at_10, spearman, truncate
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Task:
    """One adapter's training.

    Attributes:
        name: Folder of the adapter.
        mixture: Training files and the share of the batches that each gets; a batch comes from
            one file, so that its negatives are of the same kind.
        batch_size: Pairs in a batch.
        steps: Optimizer steps.
        learning_rate: Peak learning rate.
        drift_weight: Weight of staying near the bare backbone on mixed texts.
        dev: Files of ``eval/`` of other kinds that the adapter must not fall behind on.
    """

    name: str
    mixture: dict[str, float]
    batch_size: int
    steps: int
    learning_rate: float
    drift_weight: float
    dev: tuple[str, ...]


TASKS = (
    Task(
        name="retrieval",
        mixture={"retrieval": 0.6, "docstrings": 0.25, "glosses": 0.15},
        batch_size=64,
        steps=110,
        learning_rate=4e-4,
        drift_weight=3.0,
        dev=("other-docs-dev-pod",),
    ),
    Task(
        name="text-matching",
        mixture={"text-matching": 1.0},
        batch_size=96,
        steps=160,
        learning_rate=4e-4,
        drift_weight=20.0,
        dev=("other-graded-dev-pod", "other-docs-dev-pod"),
    ),
    Task(
        name="code",
        mixture={"code": 1.0},
        batch_size=64,
        steps=120,
        learning_rate=4e-4,
        drift_weight=3.0,
        dev=("other-code-dev-go", "other-code-dev-perl"),
    ),
)


@dataclass(frozen=True)
class Measured:
    """Vectors of one evaluation file.

    Attributes:
        first: float32 [rows, 384], queries or first texts.
        second: float32 [rows, 384], passages or second texts.
        scores: float64 [rows] of a graded file, else None.
    """

    first: torch.Tensor
    second: torch.Tensor
    scores: Floats | None

    def values(self, dim: int = 384) -> Floats:
        """Return nDCG@10 of each query, or the cosine of each graded pair, at ``dim`` columns."""
        first, second = truncate(self.first, dim), truncate(self.second, dim)
        if self.scores is None:
            return ndcg_at_10(first, second)
        return (first * second).sum(-1).double().numpy()

    def quality(self, dim: int = 384) -> float:
        """Return the mean nDCG@10, or Spearman's correlation, at ``dim`` columns."""
        values = self.values(dim)
        return float(values.mean()) if self.scores is None else spearman(values, self.scores)


def measure(model: Any, tokenizer: Tokenizer, rows: list[dict[str, Any]]) -> Measured:
    """Return the vectors of the rows of an evaluation file.

    Args:
        model: The backbone, bare or with an adapter.
        tokenizer: From ``load_tokenizer``.
        rows: Rows with ``query`` and ``passage``, or with ``text1``, ``text2`` and ``score``.
    """
    graded = "score" in rows[0]
    names = ("text1", "text2") if graded else ("query", "passage")
    first, second = (encode(model, tokenizer, [row[name] for row in rows]) for name in names)
    scores = np.array([row["score"] for row in rows], dtype=np.float64) if graded else None
    return Measured(first, second, scores)


def read_eval(name: str, folder: Path = HERE / "eval") -> list[dict[str, Any]]:
    """Return the rows of a file of ``eval/``.

    Args:
        name: File name without its ending.
        folder: The folder.
    """
    return read_jsonl(folder / f"{name}.jsonl")
