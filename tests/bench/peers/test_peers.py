"""Peers: which run, what is said of those that do not, and that they compute the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

from embedge.bench import Reference
from embedge.bench.errors import BenchError
from embedge.bench.peers import context as contexts
from embedge.bench.peers import registry as peers
from embedge.bench.peers.context import PeerContext
from embedge.bench.peers.hidden_state import HiddenStateSystem, graph_inputs
from embedge.bench.peers.rounding import rounded_blocks, rounded_rows
from tests.helpers.decoders import write_decoder

pytestmark = pytest.mark.slow

ABSENT = peers.Peer(variants={}, requires=("no_such_module.inside",), install="nothing")
CAVEATS = ("not repacked", "downloads from the hub")
TEXTS = ["a", "hello world", "the quick brown fox jumps over"]


def test_a_peer_that_is_not_installed_is_left_out_and_mentioned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "PEERS", {"absent": ABSENT})
    notes: list[str] = []

    assert peers.chosen_peers(None, notes.append) == []
    assert notes == ["absent is not compared with: not installed (pip install nothing)"]


def test_a_peer_that_runs_only_when_named_is_not_mentioned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "PEERS", {"absent": replace(ABSENT, usual=0)})
    notes: list[str] = []

    assert peers.chosen_peers(None, notes.append) == []
    assert notes == []


def test_a_peer_asked_for_by_name_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", {"absent": ABSENT})

    with pytest.raises(BenchError, match="not installed; run: pip install nothing"):
        peers.chosen_peers(["absent"], print)


@pytest.mark.parametrize(
    ("found", "usable"), [("4.57.6", True), ("4.58.0.dev0", False), ("5.24.0", False)]
)
def test_optimum_counts_only_with_the_transformers_it_takes(
    found: str, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "version", lambda name: found)
    monkeypatch.setattr(contexts, "find_spec", lambda name: name)

    assert contexts.installed("optimum.exporters.onnx") is usable
    assert contexts.installed("onnxscript")


def test_none_is_no_peer_and_an_unknown_one_an_error() -> None:
    assert peers.chosen_peers(["none"], print) == []
    with pytest.raises(BenchError, match=f"known are {', '.join(peers.PEERS)}, none"):
        peers.chosen_peers(["tensorrt"], print)


def test_variants_are_named_behind_a_colon(monkeypatch: pytest.MonkeyPatch) -> None:
    of = {"first": "m:f", "second": "m:g", "third": "m:h"}
    peer = peers.Peer(variants=of, usual=2, requires=("numpy",), install="numpy")
    monkeypatch.setattr(peers, "PEERS", {"peer": peer})

    assert peers.chosen_peers(None, print) == ["peer:first", "peer:second"]
    assert peers.chosen_peers(["peer"], print) == ["peer:first", "peer:second", "peer:third"]
    assert peers.chosen_peers(["peer"], print, most=1) == ["peer:first"]
    assert peers.chosen_peers(["peer:third"], print, most=1) == ["peer:third"]
    assert peers.chosen_peers(["peer:Third"], print) == ["peer:third"]  # Q8_0 is written so
    with pytest.raises(BenchError, match="peer:fourth: known are peer:first, peer:second"):
        peers.chosen_peers(["peer:fourth"], print)


def test_a_graph_that_asks_for_an_unknown_input_is_refused() -> None:
    ids = np.zeros((1, 2), np.int64)

    with pytest.raises(ValueError, match="asks for past_key"):
        graph_inputs(["input_ids", "past_key"], ids, ids)


@pytest.mark.parametrize("family", ["bert", "llama", "qwen2"])
@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_a_peer_computes_the_merged_model(
    name: str,
    family: str,
    make_model: Callable[..., Path],
    model: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)  # the same, minutes sooner
    peer = peers.PEERS[name]
    if not peer.available():
        pytest.skip(f"{name} is not installed: pip install {peer.install}")
    # llama.cpp's AMX kernels compute widths of 32 wrongly, bitsandbytes' nf4 needs blocks of 64
    if family == "bert" and name in ("llama.cpp", "bitsandbytes"):
        merged = Reference(make_model(width=64), merged=True)
    elif family == "bert":
        merged = Reference(model, adapter, merged=True)
    else:
        merged = Reference(write_decoder(tmp_path / "model", family), merged=True)
    (tmp_path / "work").mkdir()
    context = PeerContext(merged=merged, threads=1, workdir=tmp_path / "work")
    notes: list[str] = []

    built = list(peers.build_peers(peers.chosen_peers([name], notes.append), context, notes.append))

    unfused = "onnxruntime:int8-optimized was not built: ONNX Runtime's optimizer has no fusions"
    unexpected = [
        n for n in notes if not n.startswith(unfused) and not any(c in n for c in CAVEATS)
    ]
    assert unexpected == []
    assert len(built) == len(peer.variants) - any(n.startswith(unfused) for n in notes)
    texts = TEXTS if family == "bert" else ["the", "a lazy dog", "the quick fox w1 w2 w3 w4 w5 w6"]
    expected = merged.encode(texts, prompt=merged.source.prompt("query"))
    for system in built:
        cosines = (system.encode(texts, role="query") * expected).sum(1)
        assert (cosines > least_cosine(system.name)).all(), (system.name, cosines)
        assert system.bytes_on_disk


def least_cosine(system: str) -> float:
    """Return what random weights, two layers of them, leave of the cosine."""
    if "F16" in system or "fp32" in system:
        return 0.999
    if "bf16" in system:
        return 0.998
    return 0.85 if any(kind in system.lower() for kind in ("int4", "q4", "nf4")) else 0.95


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_padding_changes_no_text_of_a_decoder(tmp_path: Path) -> None:
    if not peers.PEERS["onnxruntime"].available():
        pytest.skip("no exporter is installed: pip install onnxscript")
    merged = Reference(write_decoder(tmp_path / "model", "llama"), merged=True)
    context = PeerContext(merged=merged, threads=1, workdir=tmp_path)
    session = onnxruntime.InferenceSession(context.onnx(), providers=["CPUExecutionProvider"])
    names = [graph_input.name for graph_input in session.get_inputs()]
    ids, mask = merged.tokens.pad(merged.tokens(["the quick brown fox", "dog"]))

    [together] = session.run(None, graph_inputs(names, ids, mask))
    [alone] = session.run(None, graph_inputs(names, ids[1:, :1], mask[1:, :1]))

    np.testing.assert_allclose(together[1, :1], alone[0], atol=1e-5)


def test_a_caveat_of_a_peer_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careful(HiddenStateSystem):
        def __init__(self, context: PeerContext) -> None:
            self.caveat = "slower than it could be"

    module = SimpleNamespace(build=Careful)
    monkeypatch.setattr(peers, "import_module", lambda name: module)
    peer = peers.Peer(variants={"v": "m:build"}, requires=(), install="")
    monkeypatch.setattr(peers, "PEERS", {"peer": peer})
    context = SimpleNamespace(config=SimpleNamespace(model_type="bert"))
    notes: list[str] = []

    assert len(list(peers.build_peers(["peer:v"], context, notes.append))) == 1  # type: ignore[arg-type]
    assert notes == ["peer:v: slower than it could be"]


def test_the_yardsticks_round_rows_and_blocks_to_nearest() -> None:
    weight = torch.randn(6, 80, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    rows, blocks = rounded_rows(weight), rounded_blocks(weight)

    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((rows - weight).abs() <= step * 0.501).all()
    assert ((rows / step.clamp_min(1e-9)).round() - rows / step.clamp_min(1e-9)).abs().max() < 1e-3
    for start in (0, 32, 64):
        part, rounded = weight[:, start : start + 32], blocks[:, start : start + 32]
        low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
        assert ((rounded - part).abs().amax(1) <= (high - low) / 15 * 1.01).all()
        assert max(len(row.unique()) for row in rounded) <= 16
    assert not blocks[1].any()
