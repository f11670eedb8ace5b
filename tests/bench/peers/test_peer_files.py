"""Files that peers are made of: written whole or not at all, kept for the same model alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from embedge.bench import Reference
from embedge.bench.errors import BenchArgumentError
from embedge.bench.peers import context as contexts
from embedge.bench.peers import registry as peers
from embedge.bench.peers.context import PeerContext, kept_folder
from tests.helpers.decoders import write_decoder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(write_decoder(tmp_path_factory.mktemp("model"), "llama"), merged=True)


def test_what_is_written_in_part_is_written_again(merged: Reference, tmp_path: Path) -> None:
    context = PeerContext(merged=merged, threads=1, workdir=tmp_path)
    calls = []

    def write(folder: Path) -> None:
        assert not list(folder.iterdir())
        (folder / "first").touch()
        calls.append(folder)
        if len(calls) == 1:
            raise KeyboardInterrupt
        (folder / "second").touch()

    with pytest.raises(KeyboardInterrupt):
        context.made("thing", write)
    assert not (tmp_path / "thing").exists()
    for _ in range(2):
        folder = context.made("thing", write)
        assert sorted(file.name for file in folder.iterdir()) == ["first", "second"]
    assert len(calls) == 2


def test_a_kept_folder_is_used_again_without_an_export(
    merged: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not peers.PEERS["onnxruntime"].available():
        pytest.skip("no exporter is installed: pip install onnxscript")
    names = ["onnxruntime:int8-exact", "onnxruntime:fp32", "onnxruntime:q4"]
    notes: list[str] = []

    def vectors() -> list[torch.Tensor]:
        folder = kept_folder(tmp_path / "kept", merged)
        context = PeerContext(merged=merged, threads=1, workdir=folder)
        systems = peers.build_peers(names, context, notes.append)
        return [torch.from_numpy(system.encode(["the quick", "dog"])) for system in systems]

    first = vectors()
    for export in ("_by_optimum", "_by_torch"):
        monkeypatch.setattr(contexts, export, None)
    again = vectors()

    assert notes == []
    assert len(first) == len(names)
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one, other)


def test_files_of_another_model_are_refused(merged: Reference, tmp_path: Path) -> None:
    kept = kept_folder(tmp_path / "kept", merged)
    values = next(iter(merged.backbone.parameters())).data
    values[0, 0] += 1
    try:
        with pytest.raises(BenchArgumentError, match="made of other weights; remove it, or name"):
            kept_folder(kept, merged)
    finally:
        values[0, 0] -= 1


def test_files_by_other_versions_are_refused(merged: Reference, tmp_path: Path) -> None:
    kept = kept_folder(tmp_path / "kept", merged)
    stamp = kept / "made-of.json"
    found = json.loads(stamp.read_text())
    found["versions"]["torch"] = "1.0"
    stamp.write_text(json.dumps(found))

    with pytest.raises(BenchArgumentError, match="made of other versions"):
        kept_folder(kept, merged)


@pytest.mark.parametrize("content", [None, "", "{}", "[1]"])
def test_a_folder_of_other_things_is_refused(
    content: str | None, merged: Reference, tmp_path: Path
) -> None:
    file = tmp_path / ("notes.txt" if content is None else "made-of.json")
    file.write_text(content or "")

    with pytest.raises(BenchArgumentError, match="expected an empty folder, or one with made-of"):
        kept_folder(tmp_path, merged)
