"""Trains the small page model: the tower reads, then questions find pages, then each task adapts."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jina_v4_layout import TASKS, adapter_config
from losses import cosent, cosent_of
from metrics import truncate
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from qwen_vocabulary import BYTES, ORDINARY, SPECIAL, write_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional

from page_search.checkpoint import write_adapters, write_base
from page_search.model import FEATURES, Encoded, PageModel, patches, small_size, train_faster
from page_search.pages import Page, draw_pages, render
from page_search.questions import (
    IMAGE_PROMPT,
    alike,
    ask,
    describe,
    draw_snippet,
    relative,
    transcribe,
)
from page_search.reading import CLASSES, NOTHING, learn_to_read, targets
from page_search.vocabulary import merges

SEED = 21
SCALE = 20.0


@dataclass
class Plan:
    """How much the language model trains.

    Attributes:
        backbone: steps of the language model and the head.
        adapter: steps of each task's adapter.
        pages: whose features are kept; a quarter of them has relatives.
        batch: pages of a step.
    """

    backbone: int = 600
    adapter: int = 120
    pages: int = 6000
    batch: int = 32


@dataclass
class Shelf:
    """Training pages and their features.

    Attributes:
        pages: what they say.
        features: float32 ``[pages, FEATURES, hidden]``.
        relatives: pages that share something with the first ones, in their order.
        relative_features: theirs.
    """

    pages: list[Page]
    features: torch.Tensor
    relatives: list[Page]
    relative_features: torch.Tensor


def read(tower: Path, steps: int) -> None:
    """Train the tower alone and write it, with the vectors of words, to a safetensors file.

    Args:
        tower: takes the tensors.
        steps: of 16 pages.
    """
    size = small_size(1200, 900)  # the tower knows no tokens: any vocabulary does
    tokens = size.tokens()
    marks = (tokens["vision_start_token_id"], tokens["vision_end_token_id"])
    torch.manual_seed(0)
    features = [tokens["image_token_id"]] * FEATURES
    model = PageModel(size, [1, 2, marks[0], *features, marks[1], 5, 6])
    train_faster()
    learn_to_read(model, steps)
    save_file(model.model.visual.state_dict(), tower)


class Trainer:
    """The model, its tokenizer, and the pages that it trains on.

    Args:
        out: takes the checkpoint.
        tower: what ``read`` wrote.
        plan: how long to train.
    """

    def __init__(self, out: Path, tower: Path, plan: Plan) -> None:
        self.out, self.plan = out, plan
        out.mkdir(parents=True, exist_ok=True)
        kept = merges()
        write_tokenizer(out, kept)
        self.size = small_size(BYTES + len(kept) + len(SPECIAL) + len(ORDINARY), len(kept))
        self.tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
        prompt = IMAGE_PROMPT.replace("<|image_pad|>", "<|image_pad|>" * FEATURES)
        torch.manual_seed(SEED)
        self.model = PageModel(self.size, self.ids(prompt))
        self.model.model.visual.load_state_dict(load_file(tower))
        train_faster()

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def texts(self, texts: Sequence[str]) -> Encoded:
        """Return the vectors of texts, prompts included."""
        return self.model.texts([self.ids(text) for text in texts])

    def run(self) -> None:
        """Train everything and write the checkpoint."""
        self.model.model.visual.requires_grad_(requires_grad=False)
        shelf = self.shelf()
        self.name_words(shelf)
        self.train_backbone(shelf)
        write_base(self.out, self.model, self.size)
        self.model.requires_grad_(requires_grad=False)
        found = {task: self.train_adapter(task, shelf) for task in TASKS}
        write_adapters(self.out, found, self.size)

    @torch.no_grad()
    def shelf(self) -> Shelf:
        """Draw training pages, with the features that the tower gives."""
        pages = list(itertools.islice(draw_pages(2, held_out=False), self.plan.pages))
        draw = random.Random("relatives")
        relatives = [relative(page, draw) for page in pages[: self.plan.pages // 4]]
        return Shelf(pages, self.features(pages), relatives, self.features(relatives))

    def features(self, pages: Sequence[Page]) -> torch.Tensor:
        """Return the tower's features of pages, ``[pages, FEATURES, hidden]``."""
        found = []
        for start in range(0, len(pages), 32):
            images = [render(page, seed=3)[0] for page in pages[start : start + 32]]
            found.append(self.model.features(patches(images)))
        return torch.cat(found)

    @torch.no_grad()
    def name_words(self, shelf: Shelf) -> None:
        """Let the embedding of each word be the mean feature of where it stands on pages."""
        wanted = torch.stack([targets(render(page, seed=3)[1]) for page in shelf.pages])
        weights = wanted.flatten(0, 1).square()
        sums = weights.T @ shelf.features.flatten(0, 1)
        means = sums / weights.sum(0)[:, None].clamp_min(1e-6)
        spread = float(means[:NOTHING].std())
        embeddings = self.model.model.language_model.embed_tokens.weight
        torch.nn.init.normal_(embeddings, std=spread)
        for word, row in CLASSES.items():
            for form in (
                word.lower(),
                word.capitalize(),
                f" {word.lower()}",
                f" {word.capitalize()}",
            ):
                for token in self.ids(form):
                    if token >= BYTES:
                        embeddings[token] = means[row]
        torch.nn.init.orthogonal_(self.model.multi_vector_projector.weight)

    def train_backbone(self, shelf: Shelf) -> None:
        """Train the language model and the head: questions find pages and their texts."""
        draw = random.Random("backbone")
        weights = [p for p in self.model.parameters() if p.requires_grad]

        def loss() -> torch.Tensor:
            return self.finding_loss(shelf, draw, transcripts=draw.random() < 0.5)

        self.optimize("backbone", weights, loss, self.plan.backbone, 1e-3)

    def finding_loss(self, shelf: Shelf, draw: random.Random, *, transcripts: bool) -> torch.Tensor:
        """Contrast questions with pages, on vectors of all widths and on multi-vectors."""
        rows = draw.sample(range(len(shelf.pages)), self.plan.batch)
        pages = [shelf.pages[row] for row in rows]
        asked = [ask(page, draw) for page in pages]
        also = torch.tensor([[q.answered_by(page) for page in pages] for q in asked])
        queries = self.texts([f"Query: {question.text}" for question in asked])
        loss = self.contrast(queries, self.model.pages(shelf.features[rows]), also)
        if transcripts:
            texts = self.texts([f"Passage: {transcribe(page)}" for page in pages])
            loss = loss + 0.5 * self.contrast(queries, texts, also)
        return loss

    def contrast(self, queries: Encoded, found: Encoded, also: torch.Tensor) -> torch.Tensor:
        """In-batch contrastive loss; ``also`` marks what answers a query besides its own row."""
        hidden = also & ~torch.eye(len(also), dtype=torch.bool)
        target = torch.arange(len(also))
        scores = [
            truncate(queries.single, width) @ truncate(found.single, width).T
            for width in self.size.matryoshka_dims
        ]
        losses = []
        for score in (*scores, late(queries, found)):
            logits = (SCALE * score).masked_fill(hidden, float("-inf"))
            forth = functional.cross_entropy(logits, target)
            losses.append(0.75 * forth + 0.25 * functional.cross_entropy(logits.T, target))
        return torch.stack(losses[:-1]).mean() + losses[-1]

    def matching_loss(self, shelf: Shelf, draw: random.Random) -> torch.Tensor:
        """Order pairs of pages, of their descriptions, and of one and the other, by what they share."""
        rows = draw.sample(range(len(shelf.relatives)), self.plan.batch)
        scores = torch.tensor([alike(shelf.pages[r], shelf.relatives[r]) for r in rows])
        firsts = self.texts([f"Query: {describe(shelf.pages[r], draw)}" for r in rows])
        seconds = self.texts([f"Query: {describe(shelf.relatives[r], draw)}" for r in rows])
        drawn = self.model.pages(shelf.features[rows])
        others = self.model.pages(shelf.relative_features[rows])
        total = torch.zeros(())
        for one, other in ((firsts, seconds), (drawn, others), (firsts, others)):
            for width in self.size.matryoshka_dims:
                left, right = truncate(one.single, width), truncate(other.single, width)
                total = total + cosent(left, right, scores) / len(self.size.matryoshka_dims)
            forth, back = late(one, other).diagonal(), late(other, one).diagonal()
            total = total + cosent_of(0.5 * (forth + back), scores)
        return total / 3

    def code_loss(self, shelf: Shelf, draw: random.Random) -> torch.Tensor:
        """Contrast questions with code; some code of a batch is of the same title."""
        pages = draw.sample(shelf.pages, self.plan.batch // 3)
        snippets = [draw_snippet(page, draw) for page in pages for _ in range(3)]
        also = torch.tensor([[one == other for other in snippets] for one in snippets])
        queries = self.texts([f"Query: {snippet.question(draw)}" for snippet in snippets])
        found = self.texts([f"Passage: {snippet.code(draw)}" for snippet in snippets])
        return self.contrast(queries, found, also)

    def train_adapter(self, task: str, shelf: Shelf) -> dict[str, torch.Tensor]:
        """Train one task's LoRA on the frozen model; return its tensors by PEFT's names."""
        draw = random.Random(f"adapter:{task}")
        losses: dict[str, Callable[[], torch.Tensor]] = {
            "retrieval": partial(self.finding_loss, shelf, draw, transcripts=False),
            "text-matching": partial(self.matching_loss, shelf, draw),
            "code": partial(self.code_loss, shelf, draw),
        }
        settings = adapter_config(rank=self.size.rank, alpha=self.size.rank, multi_task=True)
        names = ("r", "lora_alpha", "target_modules", "exclude_modules")
        torch.manual_seed(SEED)
        adapted = get_peft_model(self.model, LoraConfig(**{name: settings[name] for name in names}))
        weights = [p for p in adapted.parameters() if p.requires_grad]
        self.optimize(task, weights, losses[task], self.plan.adapter, 3e-3)
        found = {name: t.clone() for name, t in get_peft_model_state_dict(adapted).items()}
        adapted.unload()
        return found

    def optimize(
        self,
        name: str,
        weights: list[torch.nn.Parameter],
        loss: Callable[[], torch.Tensor],
        steps: int,
        rate: float,
    ) -> None:
        """Run so many steps of AdamW, and say how it goes."""
        optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.01, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
        started, total = time.monotonic(), 0.0
        for step in range(1, steps + 1):
            value = loss()
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            total += value.item()
            if step % 20 == 0:
                spent = time.monotonic() - started
                print(f"{name} {step}/{steps}: loss {total / 20:.3f}, {spent:.0f} s", flush=True)
                total = 0.0


def late(queries: Encoded, found: Encoded) -> torch.Tensor:
    """MaxSim as a mean over a query's tokens, float32 ``[queries, found]``."""
    pairs = torch.einsum("qtd,psd->qpts", queries.multi, found.multi)
    pairs = pairs.masked_fill(found.mask[None, :, None] == 0, -1.0)
    best = pairs.amax(-1) * queries.mask[:, None]
    return best.sum(-1) / queries.mask.sum(-1)[:, None]
