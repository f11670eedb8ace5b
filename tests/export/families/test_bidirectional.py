"""Decoders without a causal mask, and EuroBERT, against transformers' classes with PEFT's adapter unmerged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from embedge.export import CheckpointError, export_bundle
from embedge.runtime import Embedder
from tests.helpers.bidirectional import NATIVE, TEXTS, vectors
from tests.helpers.models import (
    LINEARS,
    WINDOW,
    Reference,
    cosines,
    load_base,
    make_model,
    save,
    save_adapter,
    write_json,
)

BOUND = 0.999999
LONG = 1000
DECODERS = ("llama", "llama-with-biases", "mistral", "qwen2", "qwen2-sliding", "qwen3")
SLIDING = ("mistral", "qwen2-sliding")


def change(source: Path, **changes: Any) -> Path:
    file = source / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    write_json(file, {key: value for key, value in config.items() if value is not ...})
    return source


def long_model(name: str, **changes: Any) -> Any:
    rope = {"rope_scaling": None} if name == "llama" else {}
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


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {
        name: save(long_model(name), root / name, pooling="lasttoken", max_length=LONG)
        for name in DECODERS
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_that_is_not_causal_sees_all_tokens(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources[name]
    adapter = save_adapter(source, tmp_path / "adapter", target=rf".*({LINEARS['decoder']})")
    reference = adapted(source, adapter)  # causal by itself, so that the mask decides
    expected = vectors(reference, source, TEXTS, window=WINDOW if name in SLIDING else None)
    config = (source / "config.json").read_text()
    try:
        change(source, is_causal=False)
        model = exported(source, tmp_path / "out", adapters={"task": adapter})
        assert_parity(model, expected)
        if NATIVE:
            assert cosines(Reference(source, adapter).encode(TEXTS), expected).min() >= BOUND
    finally:
        (source / "config.json").write_text(config)
    causal = exported(source, tmp_path / "causal", adapters={"task": adapter})
    assert cosines(causal.encode(TEXTS[3:]), expected[3:]).max() < BOUND
