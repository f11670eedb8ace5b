"""Weights of a model, as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

TENSORS = {
    "b.weight": np.arange(12, dtype=np.float32).reshape(3, 4) - 5.5,
    "a.bias": np.array([1e-3, -2, 3e4], np.float32),
    "a.empty": np.zeros((0, 4), np.float32),
    "c.scalar": np.array(2.5, np.float32),
}


def write_model(
    folder: Path, tensors: dict[str, NDArray[Any]] | None = None, **config: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"} | config))
    save_file(TENSORS if tensors is None else tensors, folder / "model.safetensors")
    return folder
