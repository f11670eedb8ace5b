"""The reference of adapters of QLoRA is the base as bitsandbytes restores it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from embedge import Embedder
from embedge.bench import Reference
from embedge.bench.errors import BenchError
from embedge.bench.systems import quantized_base
from embedge.bench.systems.source import read_source
from embedge.runtime.bundle.folder import Bundle
from tests.helpers.exports import small
from tests.helpers.models import make_model, random_texts, save

TEXTS = random_texts(8)
HOW = ("nf4,double_quant,dtype=bfloat16", "fp4", "int8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model("bert", hidden_size=64, intermediate_size=128)
    return save(model, tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
@pytest.mark.parametrize("how", HOW)
def test_vectors_are_those_of_the_bundle(how: str, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    out = small(source, tmp_path / "out", precisions=["fp32"], base_quantization=how)
    base = read_source(source)
    stated = Bundle(out).manifest.source.base_quantization
    with torch._dynamo.config.patch(disable=True):
        expected = Reference(replace(base, base_quantization=stated)).encode(TEXTS)
    found = Embedder(out, precision="fp32").encode(TEXTS)
    original = Reference(base).encode(TEXTS)
    # A few maxima of double quantization may lie a step of 8 bits away, and codes of fp4 before bitsandbytes 0.50.
    lost, by_base = 1 - (found * expected).sum(1), 1 - (found * original).sum(1)
    assert lost.max() < (1e-6 if how == "int8" else 1e-3)
    assert by_base.mean() > 1e-5 and lost.mean() < by_base.mean() / 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_a_base_that_is_stored_quantized_is_restored(
    settings: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    make: Any = transformers.BitsAndBytesConfig
    with torch._dynamo.config.patch(disable=True):
        quantized = transformers.AutoModel.from_pretrained(
            source, quantization_config=make(**settings), dtype=torch.float32, device_map="cpu"
        )
        stored = save(quantized, tmp_path / "stored")
        expected = Reference(stored).encode(TEXTS)
    out = small(stored, tmp_path / "out", precisions=["fp32"])
    found = Embedder(out, precision="fp32").encode(TEXTS)
    assert (1 - (found * expected).sum(1)).max() < 1e-6
    assert (1 - (found * Reference(source).encode(TEXTS)).sum(1)).mean() > 1e-5
    assert np.isfinite(found).all()


def test_without_bitsandbytes_the_command_to_install_it_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_base, "find_spec", lambda name: None)
    out = small(source, tmp_path / "out", precisions=["fp32"], base_quantization="nf4")
    stated = Bundle(out).manifest.source.base_quantization
    with pytest.raises(BenchError, match="accelerate and bitsandbytes is not installed; run: pip"):
        Reference(replace(read_source(source), base_quantization=stated))


def test_blocks_that_transformers_does_not_load_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_base, "find_spec", lambda name: name)
    how = "nf4,block_size=128"
    out = small(source, tmp_path / "out", precisions=["fp32"], base_quantization=how)
    stated = Bundle(out).manifest.source.base_quantization
    with pytest.raises(BenchError, match="in blocks of 128, which transformers does not load"):
        Reference(replace(read_source(source), base_quantization=stated))
