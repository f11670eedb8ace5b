"""Tiny decoders with random weights in the layout of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
WORDS += [f"w{number}" for number in range(53)]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def write_decoder(folder: Path, family: str) -> Path:
    """Write a ``"llama"``, ``"qwen2"`` with biases, ``"qwen3"``, or the encoder ``"eurobert"``; return the folder."""
    torch.manual_seed(0)
    sizes = SIZES | ({"head_dim": 16} if family == "qwen3" else {})
    model = AutoModel.from_config(AutoConfig.for_model(family, **sizes))
    for name, values in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(values)
        if "norm" in name:
            torch.nn.init.uniform_(values, 0.5, 1.5)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=128
    ).save_pretrained(folder)
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path in kinds.values():
        (folder / path).mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True})
    )
    return folder
