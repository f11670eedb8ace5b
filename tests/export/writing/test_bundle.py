"""Bundles: what lies where, and what is shared."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx
import pytest

from embedge.export import pipeline
from embedge.export.options import ExportOptions
from embedge.export.progress import Progress
from embedge.runtime import Embedder
from embedge.runtime.bundle.manifest import Manifest
from tests.helpers.exports import (
    PRECISIONS,
    child,
    contents,
    endings,
    external,
    manifest,
    small,
)
from tests.helpers.sessions import open_graph


@pytest.mark.slow
def test_a_bundle_holds_these_files_and_no_others(bundle: Path) -> None:
    expected = {"manifest.json", "README.md", "tokenizer.json"}
    for precision in PRECISIONS:
        names = ["shared.bin"]
        for task in ("first", "second"):
            names += [f"{task}.{end}" for end in endings(precision)]
        expected |= {f"{precision}/{name}" for name in names}
    assert contents(bundle).keys() == expected


def test_the_manifest_is_valid_and_names_every_file_with_its_hash(bundle: Path) -> None:
    parsed = Manifest.from_dict(manifest(bundle))
    stated = {name: entry.sha256 for name, entry in parsed.files.items()}
    found = contents(bundle)
    assert stated == {n: h for n, h in found.items() if n not in ("manifest.json", "README.md")}
    assert all((bundle / n).stat().st_size == e.size for n, e in parsed.files.items())


@pytest.mark.slow
def test_the_full_check_passes(bundle: Path) -> None:
    Embedder(bundle, precision="int8", verify="full")


def test_matryoshka_dimensions_include_the_whole(bundle: Path) -> None:
    assert manifest(bundle)["model"]["matryoshka_dims"] == [16, 32, 96]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_offsets_are_aligned_and_tensors_do_not_overlap(bundle: Path, precision: str) -> None:
    pieces: dict[str, set[tuple[int, int]]] = {}
    for task in ("first", "second"):
        for file, offset, length in external(bundle, f"{precision}/{task}.onnx").values():
            assert offset % 4096 == 0
            pieces.setdefault(file, set()).add((offset, length))
    for file, spans in pieces.items():
        ends = 0
        for offset, length in sorted(spans):
            assert offset >= ends
            ends = offset + length
        assert ends == (bundle / precision / file).stat().st_size


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_tasks_share_lies_once_in_the_shared_file(bundle: Path, precision: str) -> None:
    first, second = (external(bundle, f"{precision}/{t}.onnx") for t in ("first", "second"))
    adapted = re.compile(r".*self\.(query|value)\.(weight|scales)$")
    for name, place in first.items():
        assert (place == second[name]) == (place[0] == "shared.bin")
        if adapted.match(name):
            assert place[0] == "first.bin"
        else:
            assert place[0] == "shared.bin", name
    assert any("intermediate.dense.weight" in name for name in first)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_bytes_are_stored_twice(bundle: Path, precision: str) -> None:
    seen = set()
    places = {
        place
        for task in ("first", "second")
        for place in external(bundle, f"{precision}/{task}.onnx").values()
    }
    for file, offset, length in places:
        data = (bundle / precision / file).read_bytes()[offset : offset + length]
        assert data not in seen
        seen.add(data)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_onnxruntime_loads_every_graph(bundle: Path, precision: str) -> None:
    for task in ("first", "second"):
        session = open_graph(bundle / precision / f"{task}.onnx")
        assert [o.name for o in session.get_outputs()] == ["embedding"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_onnx_checks_the_graphs_with_their_external_data(bundle: Path, precision: str) -> None:
    onnx.checker.check_model(str(bundle / precision / "first.onnx"))


EXPORT_AGAIN = """
import json, sys
from embedge.export import export_bundle
source, adapters, precisions, texts, out = json.loads(sys.argv[1])
export_bundle(
    source,
    adapters=adapters,
    precisions=precisions,
    calibration=texts,
    out=out,
    matryoshka_dims=[16, 32],
)
"""


@pytest.mark.slow
def test_another_process_with_another_hash_seed_writes_the_same_bytes(
    source: Path, adapters: dict[str, Path], few_texts: Path, bundle: Path, tmp_path: Path
) -> None:
    job = [str(source), {n: str(a) for n, a in adapters.items()}, PRECISIONS, str(few_texts)]
    process = child(
        EXPORT_AGAIN, json.dumps([*job, str(tmp_path / "again")]), PYTHONHASHSEED="12345"
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert contents(tmp_path / "again") == contents(bundle)


def test_an_export_keeps_the_ranges_of_its_vectors(
    source: Path, tmp_path: Path, few_texts: Path
) -> None:
    out = small(source, tmp_path / "b", precisions=["fp32"], calibration=few_texts)
    [task] = Manifest.from_dict(manifest(out)).tasks.values()
    assert task.output_ranges is not None
    model = Embedder(out)
    texts = [line for line in few_texts.read_text("utf-8").split("\n") if line.strip()]
    vectors = model.encode(texts, prompt="", on_truncate="ignore")
    low, high = model.get_output_ranges()
    assert ((low <= vectors) & (vectors <= high)).all()
    assert task.output_ranges.vectors == len(texts)
    small(
        source,
        out,
        adapters={"task": None, "later": None},
        precisions=["fp32"],
        calibration=few_texts,
    )
    after = Manifest.from_dict(manifest(out)).tasks
    assert after["task"] == task
    assert after["later"].output_ranges is not None


def test_without_texts_or_with_a_large_graph_ranges_are_left_to_the_command(
    source: Path, tmp_path: Path, few_texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small(source, tmp_path / "none", precisions=["fp32"])
    assert Manifest.from_dict(manifest(out)).tasks["task"].output_ranges is None
    monkeypatch.setattr(pipeline, "_RANGE_BYTES", 1000)
    told: list[str] = []
    options = ExportOptions(
        source=str(source), adapters={"task": None}, precisions=("fp32",),
        calibration=few_texts, out=tmp_path / "large",
    )  # fmt: skip
    out = pipeline.export(options, Progress(told=told.append))
    assert Manifest.from_dict(manifest(out)).tasks["task"].output_ranges is None
    assert f"embedge ranges {out} --task task --texts FILE" in told[-1]
