"""What each adapter is trained on, and how its quality is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backbone import Backbone, MiniLM, encode_all
from jsonl import read_jsonl
from metrics import Floats, Rows, max_sim, ndcg_at_10, spearman, truncate
from smollm2_backbone import SmolLM2

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
        drift_weight: Weight of staying near the bare backbone on mixed texts; 0 where the bare
            backbone is no embedder.
        dev: Files of ``eval/`` of other kinds that the adapter must not fall behind on; without
            any, ``lora_alpha`` stays as it was trained.
    """

    name: str
    mixture: dict[str, float]
    batch_size: int
    steps: int
    learning_rate: float
    drift_weight: float = 0.0
    dev: tuple[str, ...] = ()


_MINILM = (
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
_SMOLLM2 = (
    Task(
        name="retrieval",
        mixture={"retrieval": 0.6, "docstrings": 0.25, "glosses": 0.15},
        batch_size=32,
        steps=80,
        learning_rate=1e-3,
    ),
    Task(
        name="text-matching",
        mixture={"text-matching": 1.0},
        batch_size=48,
        steps=80,
        learning_rate=1e-3,
    ),
    Task(
        name="code",
        mixture={"code": 1.0},
        batch_size=32,
        steps=80,
        learning_rate=1e-3,
    ),
)
BACKBONES = (MiniLM.key, SmolLM2.key)


def backbone_of(key: str, model: Path | None) -> Backbone:
    """Return a backbone by its name on the command line.

    Args:
        key: One of ``BACKBONES``.
        model: Folder of its checkpoint, where no package brings one.
    """
    if key == MiniLM.key:
        return MiniLM()
    if model is None:
        raise SystemExit(
            f"--backbone {key}: expected --model FOLDER, found none; "
            "write the folder with examples/smollm2.py"
        )
    return SmolLM2(model)


def tasks_of(backbone: Backbone) -> tuple[Task, ...]:
    """Return what is trained for a backbone."""
    return _MINILM if backbone.key == MiniLM.key else _SMOLLM2


def columns(backbone: Backbone, rows: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Return the two texts of each row, each behind its prompt.

    Args:
        backbone: Has the prompts.
        rows: Rows with ``query`` and ``passage``, or with ``text1``, ``text2`` and ``score``.
    """
    if "score" in rows[0]:
        names, prompts = ("text1", "text2"), (backbone.query, backbone.query)
    else:
        names, prompts = ("query", "passage"), (backbone.query, backbone.passage)
    first, second = (
        [prompt + row[name] for row in rows] for name, prompt in zip(names, prompts, strict=True)
    )
    return first, second


@dataclass(frozen=True)
class Measured:
    """Vectors of one evaluation file.

    Attributes:
        first: float32 [rows, dim], queries or first texts.
        second: float32 [rows, dim], passages or second texts.
        scores: float64 [rows] of a graded file, else None.
        first_tokens: Where there is a multi-vector head, float32 [tokens, width] of each row.
        second_tokens: Likewise.
    """

    first: torch.Tensor
    second: torch.Tensor
    scores: Floats | None
    first_tokens: Rows = ()
    second_tokens: Rows = ()

    def values(self, dim: int | None = None) -> Floats:
        """Return nDCG@10 of each query, or the cosine of each graded pair, at ``dim`` columns."""
        dim = dim or self.first.shape[1]
        first, second = truncate(self.first, dim), truncate(self.second, dim)
        if self.scores is None:
            return ndcg_at_10(first @ second.T)
        return (first * second).sum(-1).double().numpy()

    def late_values(self) -> Floats:
        """Return nDCG@10 of each query by late interaction."""
        return ndcg_at_10(max_sim(self.first_tokens, self.second_tokens))

    def quality(self, dim: int | None = None) -> float:
        """Return the mean nDCG@10, or Spearman's correlation, at ``dim`` columns."""
        values = self.values(dim)
        return float(values.mean()) if self.scores is None else spearman(values, self.scores)


def measure(backbone: Backbone, model: Any, rows: list[dict[str, Any]]) -> Measured:
    """Return the vectors of the rows of an evaluation file.

    Args:
        backbone: Tokenizer and prompts.
        model: The backbone's model, bare or with an adapter.
        rows: Rows with ``query`` and ``passage``, or with ``text1``, ``text2`` and ``score``.
    """
    tokenizer = backbone.tokenizer()
    parts = [encode_all(model, tokenizer, texts) for texts in columns(backbone, rows)]
    (first, first_tokens), (second, second_tokens) = parts
    graded = "score" in rows[0]
    scores = np.array([row["score"] for row in rows], dtype=np.float64) if graded else None
    return Measured(first, second, scores, first_tokens, second_tokens)


def read_eval(name: str, folder: Path = HERE / "eval") -> list[dict[str, Any]]:
    """Return the rows of a file of ``eval/``.

    Args:
        name: File name without its ending.
        folder: The folder.
    """
    return read_jsonl(folder / f"{name}.jsonl")
