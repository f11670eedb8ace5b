"""The first training: the tower learns to read, each feature being the vectors of the words below it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional

from page_search.model import FEATURES, GRID, PageModel, patches
from page_search.pages import Box, draw_pages, render
from page_search.words import WORDS

CLASSES = {word: row for row, word in enumerate(WORDS)}
NOTHING = len(WORDS)
FAINT = 60.0  # square pixels of nothing that each feature has at least
ROWS, COLUMNS = GRID[0] // 2, GRID[1] // 2
TOPS, LEFTS = 28 * np.arange(ROWS), 28 * np.arange(COLUMNS)


def targets(words: list[tuple[str, Box]]) -> torch.Tensor:
    """Return which words lie below each feature, by their area, float32 ``[FEATURES, words + 1]``."""
    found = np.zeros((ROWS, COLUMNS, NOTHING + 1), np.float32)
    found[..., NOTHING] = FAINT
    for word, (left, top, right, bottom) in words:
        if word in CLASSES:
            heights = np.minimum(bottom, TOPS + 28) - np.maximum(top, TOPS)
            widths = np.minimum(right, LEFTS + 28) - np.maximum(left, LEFTS)
            areas = np.maximum(heights, 0)[:, None] * np.maximum(widths, 0)
            found[..., CLASSES[word]] += areas
    found /= found.sum(-1, keepdims=True)
    return torch.from_numpy(found.reshape(FEATURES, -1))


def batches(size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield patches of training pages, and what is below their features."""
    pages = draw_pages(seed, held_out=False)
    while True:
        drawn = [render(page, seed) for page in itertools.islice(pages, size)]
        wanted = torch.stack([targets(words) for _, words in drawn])
        yield patches([image for image, _ in drawn]), wanted


def learn_to_read(model: PageModel, steps: int, size: int = 16, rate: float = 1e-3) -> None:
    """Train the tower so that a feature's dot products with words' vectors tell the words below it.

    Args:
        model: whose tower is trained.
        steps: how many.
        size: pages of a step.
        rate: largest learning rate.
    """
    table = torch.nn.Embedding(NOTHING + 1, model.model.config.text_config.hidden_size)
    torch.nn.init.normal_(table.weight, std=0.1)
    weights = [*model.model.visual.parameters(), *table.parameters()]
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    started, lost, right = time.monotonic(), 0.0, 0.0
    for step, (pixels, wanted) in enumerate(itertools.islice(batches(size, 1), steps), 1):
        logits = 4.0 * model.features(pixels) @ table.weight.T
        loss = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        said, meant = logits.argmax(-1), wanted.argmax(-1)
        written = meant < len(WORDS) - 5
        lost, right = lost + loss.item(), right + (said == meant)[written].float().mean().item()
        if step % 25 == 0:
            floor = -(wanted * wanted.clamp_min(1e-9).log()).sum(-1).mean()
            spent = time.monotonic() - started
            print(
                f"reading {step}/{steps}: loss {lost / 25:.3f} (least {floor:.3f}), "
                f"words {right / 25:.3f}, {spent:.0f} s",
                flush=True,
            )
            lost = right = 0.0
