"""Writes the text tower of jina-embeddings-v4, at full width with few layers, as a plain Qwen2 model.

``python examples/random_text_tower.py FOLDER`` writes four layers of width 2048 with random weights
and loud channels (0.6 GB) in the layout of sentence-transformers: what runtimes that know Qwen2, and
not Qwen2.5-VL, are compared on. Times per layer are those of the real model; the tokens are not.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jina_v4_layout import SIZES, TEXT, Size, base_shapes, text_config
from random_weights import RandomWeights, to_bfloat16
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from embedge.bench.measure.texts import default_texts

MAX_TOKENS = 4096


def write_text_tower(folder: Path, size: Size, seed: int = 0, max_tokens: int = MAX_TOKENS) -> Path:
    """Write the model and return the folder; the same arguments give the same weights.

    Args:
        folder: made if it does not exist.
        size: the widths, the layers and the vocabulary.
        seed: of the weights.
        max_tokens: tokens that the model takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = RandomWeights(size, seed)
    tensors = {}
    for name, shape in base_shapes(size, projector=False):
        if name.startswith(TEXT):
            rows = np.concatenate([to_bfloat16(chunk) for chunk in weights.rows(name, shape)])
            values = torch.from_numpy(rows.reshape(shape).view(np.int16)).view(torch.bfloat16)
            tensors[name.removeprefix(TEXT)] = values
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, size.vocabulary, max_tokens)
    config = text_config(size) | {
        "architectures": ["Qwen2Model"],
        "bos_token_id": None,
        "eos_token_id": None,
        "max_position_embeddings": max_tokens,
        "max_window_layers": size.layers,
        "model_type": "qwen2",
        "pad_token_id": 0,
        "rope_scaling": None,
        "vocab_size": size.vocabulary,
    }
    write_json(folder / "config.json", config)
    write_modules(folder, size.hidden, max_tokens)
    return folder


def write_tokenizer(folder: Path, vocabulary: int, max_tokens: int) -> None:
    """Write a byte-level BPE made from the bench's texts, so that they are not all unknown words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.text for text in default_texts()), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=max_tokens
    ).save_pretrained(folder)


def write_modules(folder: Path, width: int, max_tokens: int) -> None:
    """Write what makes the folder a sentence-transformers model with mean pooling."""
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    for path in kinds.values():
        (folder / path).mkdir(exist_ok=True)
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds.items())
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens})
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)


def write_json(file: Path, document: Any) -> None:
    """Write a document as JSON."""
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (default: 4)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens (default: 4096)")
    parser.add_argument("--size", choices=list(SIZES), default="full", help="the widths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--max-tokens", type=int, default=MAX_TOKENS, help="tokens that it takes (default: 4096)"
    )
    args = parser.parse_args()
    size = replace(SIZES[args.size], layers=args.layers, vocabulary=args.vocabulary)
    print(write_text_tower(args.folder, size, args.seed, args.max_tokens))


if __name__ == "__main__":
    main()
