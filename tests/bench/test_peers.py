"""Peers: which run, what is said of those that do not, and that they compute the same model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedge.bench import Reference
from embedge.bench._errors import BenchError
from embedge.bench.peers import _catalogue as peers
from embedge.bench.peers._context import PeerContext
from embedge.bench.peers._hidden_state import graph_inputs

ABSENT = peers.Peer(variants={}, requires=("no_such_module.inside",), install="nothing")
TEXTS = ["a", "hello world", "the quick brown fox jumps over"]


def test_a_peer_that_is_not_installed_is_left_out_and_mentioned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "PEERS", {"absent": ABSENT})
    notes: list[str] = []

    assert peers.chosen_peers(None, notes.append) == []
    assert notes == ["absent is not compared with: not installed (pip install nothing)"]


def test_a_peer_asked_for_by_name_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", {"absent": ABSENT})

    with pytest.raises(BenchError, match="not installed; run: pip install nothing"):
        peers.chosen_peers(["absent"], print)


def test_none_is_no_peer_and_an_unknown_one_an_error() -> None:
    assert peers.chosen_peers(["none"], print) == []
    with pytest.raises(BenchError, match="known are onnxruntime, openvino, llama.cpp, torch, none"):
        peers.chosen_peers(["tensorrt"], print)


def test_variants_are_named_behind_a_colon(monkeypatch: pytest.MonkeyPatch) -> None:
    of = {"first": "m:f", "second": "m:g", "third": "m:h"}
    peer = peers.Peer(variants=of, usual=2, requires=("numpy",), install="numpy")
    monkeypatch.setattr(peers, "PEERS", {"peer": peer})

    assert peers.chosen_peers(None, print) == ["peer:first", "peer:second"]
    assert peers.chosen_peers(["peer"], print) == ["peer:first", "peer:second", "peer:third"]
    assert peers.chosen_peers(["peer"], print, most=1) == ["peer:first"]
    assert peers.chosen_peers(["peer:third"], print, most=1) == ["peer:third"]
    with pytest.raises(BenchError, match="peer:fourth: known are peer:first, peer:second"):
        peers.chosen_peers(["peer:fourth"], print)


def test_a_graph_that_asks_for_an_unknown_input_is_refused() -> None:
    ids = np.zeros((1, 2), np.int64)

    with pytest.raises(ValueError, match="asks for past_key"):
        graph_inputs(["input_ids", "past_key"], ids, ids)


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_a_peer_computes_the_merged_model(
    name: str, model: Path, adapter: Path, tmp_path: Path
) -> None:
    if not peers.PEERS[name].available():
        pytest.skip(f"{name} is not installed")
    if peers.PEERS[name].families is not None:
        pytest.skip(f"{name} is written for other families; test_llama_cpp.py has it")
    merged = Reference(model, adapter, merged=True)
    notes: list[str] = []

    built = list(
        peers.build_peers(
            peers.chosen_peers([name], notes.append),
            PeerContext(merged=merged, threads=1, workdir=tmp_path),
            notes.append,
        )
    )

    assert notes == []
    for system in built:
        cosines = (system.encode(TEXTS, role="query") * merged.encode(TEXTS, prompt="q ")).sum(1)
        assert (cosines > 0.95).all(), system.name  # 8 bits of random weights, two layers
        assert system.bytes_on_disk
