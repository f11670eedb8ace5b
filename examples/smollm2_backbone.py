"""SmolLM2-135M as ``smollm2.py`` writes it: a causal model with a multi-vector head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from backbone import Backbone
from safetensors import safe_open
from torch.nn.functional import normalize
from transformers import LlamaModel
from transformers.utils import logging


class WithHead(torch.nn.Module):
    """A decoder and, beside it, the Linear that makes a vector of each token."""

    def __init__(self, model: Any, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.config = model.config
        self.model = model
        self.multi_vector_projector = torch.nn.Linear(weight.shape[1], weight.shape[0])
        self.multi_vector_projector.weight.data = weight
        self.multi_vector_projector.bias.data = bias

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        rows = self.multi_vector_projector(output.last_hidden_state).float()
        output.token_embeddings = normalize(rows, dim=-1)
        return output


class SmolLM2(Backbone):
    """SmolLM2-135M-Instruct in the folder that ``smollm2.py`` wrote."""

    key = "smollm2"
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    widths = (64, 128, 256, 576)
    max_tokens = 512
    train_tokens = 64
    attention = "eager"
    targets = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "multi_vector_projector",
    )
    rank = 4
    alpha = 8
    half = True
    query = "Query: "
    passage = "Passage: "
    home = "smollm2-adapters"
    results = "eval/smollm2-results.json"

    def __init__(self, folder: Path) -> None:
        """Take the checkpoint's folder."""
        self._folder = folder

    @property
    def folder(self) -> Path:
        if not (self._folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{self._folder}: expected a checkpoint, found no config.json; "
                "run examples/smollm2.py FOLDER and give --model FOLDER"
            )
        return self._folder

    def load(self, attention: str = "sdpa") -> WithHead:
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # the head is no part of transformers' model
        model = LlamaModel.from_pretrained(
            self.folder, attn_implementation=attention, dtype=torch.float32
        )
        logging.set_verbosity(level)
        with safe_open(self.folder / "model.safetensors", "pt") as file:
            head = [file.get_tensor(f"multi_vector_projector.{n}") for n in ("weight", "bias")]
        whole = WithHead(model, *head)
        whole.name_or_path = model.config._name_or_path = self.name
        return whole.eval()
