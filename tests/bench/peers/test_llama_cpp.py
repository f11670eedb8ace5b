"""llama.cpp as a peer: the file that is written, and that it computes the same model."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from transformers import CONFIG_MAPPING

from embedge.bench import Reference
from embedge.bench.peers import registry as peers
from embedge.bench.peers.context import PeerContext
from embedge.bench.peers.gguf import GgufError, read_table, write_gguf
from embedge.bench.peers.llama_probe import runs
from tests.helpers.decoders import write_decoder

TEXTS = ["the", "a lazy dog", "the quick brown fox jumps over w1 w2 w3 w4 w5 w6 w7"]
NEWER = "eurobert" in CONFIG_MAPPING
FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    pytest.param("eurobert", marks=pytest.mark.skipif(not NEWER, reason="needs transformers 5.24")),
]
needs_llama_cpp = pytest.mark.skipif(
    not peers.PEERS["llama.cpp"].available(), reason="llama-cpp-python is not installed"
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_has_the_table_and_every_tensor(family: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    model = Reference(write_decoder(tmp_path, family)).backbone

    write_gguf(model, tmp_path / "model.gguf")

    tensors = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    assert len(tensors) == len(model.state_dict())
    table = model.embed_tokens.weight.detach().numpy()
    np.testing.assert_allclose(read_table(tmp_path / "model.gguf"), table, rtol=1e-3, atol=1e-6)


def test_a_stretched_rope_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    model = Reference(write_decoder(tmp_path, "llama")).backbone
    key = "rope_parameters" if hasattr(model.config, "rope_parameters") else "rope_scaling"
    setattr(model.config, key, {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0})

    with pytest.raises(GgufError, match=f"{key}=.*expected a plain llama"):
        write_gguf(model, tmp_path / "model.gguf")


@needs_llama_cpp
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_the_same_in_any_batch(family: str, tmp_path: Path) -> None:
    merged = Reference(write_decoder(tmp_path / "model", family), merged=True)
    (tmp_path / "work").mkdir()
    context = PeerContext(merged=merged, threads=1, workdir=tmp_path / "work")

    system = next(peers.build_peers(["llama.cpp:f16"], context, print))

    together = system.encode(TEXTS)
    alone = np.concatenate([system.encode([text]) for text in TEXTS])
    assert ((together * alone).sum(1) > 0.9999).all()
    assert ((together * merged.encode(TEXTS)).sum(1) > 0.9999).all()


@needs_llama_cpp
def test_an_encoder_takes_more_texts_than_one_call_holds(model: Path, tmp_path: Path) -> None:
    merged = Reference(model)
    context = PeerContext(merged=merged, threads=1, workdir=tmp_path)
    system = next(peers.build_peers(["llama.cpp:f16"], context, print))
    texts = [f"{a}{b}" * 8 for a in "abcdefg" for b in "hijklmn"]  # 49 of 18 tokens

    cosines = (system.encode(texts, 49) * merged.encode(texts)).sum(1)

    assert (cosines > 0.999).all()


def test_other_families_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    model = Reference(write_decoder(tmp_path, "llama")).backbone
    model.config.model_type = "mistral"

    with pytest.raises(
        GgufError, match="model_type mistral: written are llama, qwen2, qwen3, bert, eurobert"
    ):
        write_gguf(model, tmp_path / "model.gguf")


@pytest.mark.parametrize(("status", "works"), [(0, True), (-11, False)])
def test_a_crash_of_the_child_is_a_no(
    status: int, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], status, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: done)

    assert runs(Path("model.gguf"), 64, causal=True) is works


def test_an_error_of_the_child_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nValueError: no such\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: done)

    with pytest.raises(ValueError, match="no such"):
        runs(Path("model.gguf"), 64, causal=True)
