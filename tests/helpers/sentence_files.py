"""sentence-transformers' files of a model without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CONFIG = {"model_type": "bert", "max_position_embeddings": 64, "pad_token_id": 0}


PREFIX = "sentence_transformers.models."


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_model(folder: Path, *modules: str, **files: dict[str, Any]) -> Path:
    """Write modules.json and, by keyword, other JSON files."""
    kinds = modules or ("Transformer", "Pooling")
    full = [kind if "." in kind else PREFIX + kind for kind in kinds]
    paths = ["" if kind == "Transformer" else f"{i}_{kind}" for i, kind in enumerate(kinds)]
    write_json(
        folder / "modules.json", [{"path": p, "type": k} for p, k in zip(paths, full, strict=True)]
    )
    names = {
        "pooling": "1_Pooling/config.json",
        "settings": "config_sentence_transformers.json",
        "transformer": "sentence_bert_config.json",
        "tokenizer": "tokenizer_config.json",
        "tokenizer_file": "tokenizer.json",
        "normalize": "2_Normalize/config.json",
        "dense": "2_Dense/config.json",
    }
    for name, content in ({"pooling": {"pooling_mode_mean_tokens": True}} | files).items():
        write_json(folder / names[name], content)
    return folder


def write_dense(folder: Path, **config: Any) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    tensors = {
        "linear.weight": generator.normal(size=(3, 4)).astype(np.float32),
        "linear.bias": generator.normal(size=3).astype(np.float32),
    }
    full = {
        "in_features": 4,
        "out_features": 3,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    write_json(folder / "config.json", full | config)
    save_file(tensors, folder / "model.safetensors")
    return tensors
