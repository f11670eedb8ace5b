"""Decoders of transformers run without a causal mask, whichever version: the mask is given whole."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from peft import PeftModel
from tokenizers import Tokenizer

from embedge.export import export_bundle
from embedge.runtime import Embedder
from tests.helpers.models import cosines, load_base, make_model, random_texts, write_json

BOUND = 0.999999
LONG = 1000
Pool = Callable[[torch.Tensor], torch.Tensor]
POOLS: dict[str, Pool] = {"mean": lambda x: x.mean(0), "lasttoken": lambda x: x[-1]}
NATIVE = (
    int(transformers.__version__.split(".")[0]) >= 5
)  # whose decoders read is_causal, and which has EuroBERT
LENGTHS = (1, 2, 63, 64, 65, 511, 512, 513, 998)


def texts_of_all_lengths(count: int = 20) -> list[str]:
    """Texts of characters, which tiny tokenizers make a token of each."""
    characters = "".join(random_texts(60, longest=60))
    more = np.random.default_rng(1).integers(3, 400, count - len(LENGTHS))
    return [characters[start : start + n] for start, n in enumerate((*LENGTHS, *more))]


TEXTS = texts_of_all_lengths()


def states(model: Any, ids: Sequence[int], window: int | None = None) -> torch.Tensor:
    """The last states ``[tokens, hidden]`` where a token sees all others, or those at most ``window`` away."""
    places = torch.arange(len(ids))
    hidden = torch.zeros(len(ids), len(ids))
    full = hidden[None, None]
    if window is not None:
        apart = (places[:, None] - places).abs() > window
        hidden = hidden.masked_fill(apart, torch.finfo(torch.float32).min)
    mask: Any = hidden[None, None]
    if model.config.model_type.startswith("qwen"):
        mask = {"full_attention": full, "sliding_attention": mask}
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=torch.tensor([list(ids)]), attention_mask=mask)[0][0]
    return output


def vectors(
    model: Any,
    source: Path,
    texts: Sequence[str],
    *,
    pooling: str = "lasttoken",
    window: int | None = None,
    normalize: bool = True,
) -> NDArray[np.float32]:
    """float32 ``[texts, hidden]``, each text alone, by the tokenizer in ``source``."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    rows = [
        POOLS[pooling](states(model, tokenizer.encode(text).ids, window)).numpy() for text in texts
    ]
    found = np.stack(rows)
    return found / np.linalg.norm(found, axis=1, keepdims=True) if normalize else found


def change(source: Path, **changes: Any) -> Path:
    """Change a model's config.json; ``...`` takes a key away."""
    file = source / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    write_json(file, {key: value for key, value in config.items() if value is not ...})
    return source


def long_model(name: str, **changes: Any) -> Any:
    rope: dict[str, Any] = {"rope_scaling": None} if name == "llama" else {}
    return make_model(name, max_position_embeddings=1024, **rope, **changes)


def exported(source: Path, out: Path, **options: Any) -> Embedder:
    settings: dict[str, Any] = {
        "adapters": {"task": None},
        "precisions": ["fp32"],
        "calibration": "none",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_bundle(source, out=out, **{**settings, **options})
    return Embedder(out, precision="fp32", threads=1)


def assert_parity(model: Embedder, expected: Any, texts: list[str] = TEXTS) -> None:
    """In padded batches, and alone."""
    found = model.encode(texts, batch_size=8, on_truncate="error")
    assert cosines(found, expected).min() >= BOUND
    alone = np.stack([model.encode(text) for text in texts[:10]])
    assert cosines(alone, expected[:10]).min() >= BOUND


def adapted(source: Path, adapter: Path, base: Any = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base or load_base(source), adapter).eval()
