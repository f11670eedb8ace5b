"""llama.cpp as a peer: the file that is written, and that it computes the same model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _decoders import write_decoder

from embedge.bench import Reference
from embedge.bench.peers import _catalogue as peers
from embedge.bench.peers._context import PeerContext
from embedge.bench.peers._gguf import GgufError, read_table, write_gguf

TEXTS = ["the", "a lazy dog", "the quick brown fox jumps over w1 w2 w3 w4 w5 w6 w7"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
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
    model.config.rope_scaling = {"rope_type": "linear", "factor": 2.0}

    with pytest.raises(GgufError, match="rope_scaling=.*expected a plain llama"):
        write_gguf(model, tmp_path / "model.gguf")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_it_computes_the_merged_model(family: str, tmp_path: Path) -> None:
    if not peers.PEERS["llama.cpp"].available():
        pytest.skip("llama.cpp is not installed: pip install embedge[llama]")
    merged = Reference(write_decoder(tmp_path / "model", family), merged=True)
    (tmp_path / "work").mkdir()
    context = PeerContext(merged=merged, threads=1, workdir=tmp_path / "work")
    notes: list[str] = []

    chosen = peers.chosen_peers(["llama.cpp"], notes.append)
    systems = {s.name: s for s in peers.build_peers(chosen, context, notes.append)}

    assert notes == []
    expected = merged.encode(TEXTS)
    floors = {"F16": 0.9995, "Q8_0": 0.995, "Q4_K_M": 0.9, "Q4_0": 0.9}
    for kind, floor in floors.items():
        vectors = systems[f"llama.cpp {kind}"].encode(TEXTS)
        assert ((vectors * expected).sum(1) > floor).all(), kind
        one_by_one = np.concatenate([systems[f"llama.cpp {kind}"].encode([t]) for t in TEXTS])
        assert ((vectors * one_by_one).sum(1) > 0.999).all(), kind


def test_it_is_not_built_for_other_families(model: Path, tmp_path: Path) -> None:
    context = PeerContext(merged=Reference(model), threads=1, workdir=tmp_path)
    notes: list[str] = []

    assert list(peers.build_peers(["llama.cpp:f16"], context, notes.append)) == []
    assert notes == ["llama.cpp:f16 was not built: written for llama, qwen2, not for bert"]
