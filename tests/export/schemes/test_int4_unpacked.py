"""int4 bundles whose weights are unpacked to 8 bits when a graph opens."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.export import export_bundle
from embedge.runtime import Embedder, EmbedgeError, subset_bundle
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.cli.main import main
from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.sessions.prepared_graphs import PreparedGraphs
from embedge.runtime.tuning.prepack_graphs import prepack_graph
from tests.helpers.models import linears, make_model, random_texts, save, save_adapter

pytestmark = pytest.mark.slow

TEXTS = random_texts(16)
UNPACKED = "int4-unpacked"

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model wide enough that its weights lie in files, and a LoRA for it."""
    root = tmp_path_factory.mktemp("unpacked")
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 272, "gain": 0.6}
    save(make_model("qwen2", **shape), root / "model", pooling="mean")
    return root / "model", save_adapter(
        root / "model", root / "lora", target=linears("qwen2"), size=0.4
    )


@pytest.fixture(scope="module")
def export(parts: tuple[Path, Path], few_texts: Path) -> Export:
    """Exports tasks of the model at int4, to a folder."""
    source, adapter = parts

    def run(out: Path, *tasks: str) -> Path:
        adapters = {task: {"one": adapter, "bare": None}[task] for task in tasks}
        return export_bundle(
            source, adapters=adapters, precisions=["int4"], calibration=few_texts, out=out
        )

    return run


@pytest.fixture(scope="module")
def original(export: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("unpacked") / "bundle", "one", "bare")


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def encode(bundle: Path, precision: str | None = UNPACKED, task: str = "one") -> Any:
    return Embedder(bundle, precision=precision, threads=2).encode(TEXTS, task=task)


def test_without_a_name_the_stored_precision_is_taken(bundle: Path) -> None:
    assert Embedder(bundle).precision == "int4"
    assert Embedder(bundle, precision=UNPACKED).tasks == ("one", "bare")


def test_a_prepared_graph_gives_the_same_vectors_and_unpacks_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = encode(bundle)
    assert (
        main(["prepare", str(bundle), "--precision", UNPACKED, "--task", "one", "--pack-only"]) == 0
    )
    assert capsys.readouterr().out.startswith(f"{UNPACKED}/one: ")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("unpacked again")

    monkeypatch.setattr("embedge.runtime.sessions.unpack.unpack", refuse)
    np.testing.assert_array_equal(encode(bundle), expected)


def test_a_prepared_graph_of_other_weights_is_not_used(bundle: Path) -> None:
    prepack_graph(PreparedGraphs(Bundle(bundle)), UNPACKED, "one")
    record = next(bundle.glob(f"prepared/*/{UNPACKED}/one/prepared.json"))
    listed = next(name for name in Bundle(bundle).manifest.files if name.endswith("shared.bin"))
    assert listed in record.read_text()
    record.write_text(record.read_text().replace(Bundle(bundle).manifest.files[listed].sha256, ""))
    with pytest.warns(UserWarning, match="made from other files"):
        encode(bundle)


def test_the_memory_limit_counts_what_is_unpacked(bundle: Path) -> None:
    opened = Bundle(bundle)
    linear = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 272)  # two layers' q, o, k, v and MLP
    packed, unpacked = (opened.graph_bytes(p, "one") for p in ("int4", UNPACKED))
    assert linear < unpacked < linear + packed
    assert packed == opened.disk_bytes("int4", "one")
    assert packed < opened.disk_bytes(UNPACKED, "one") < 1.5 * packed  # constants, and the list
    with pytest.raises(EmbedgeError, match="above memory_limit"):
        Embedder(bundle, precision=UNPACKED, memory_limit=linear).encode(TEXTS, task="one")


def test_cut_weights_are_an_error_that_names_the_file(bundle: Path) -> None:
    file = next((bundle / "int4").glob("one*.bin"))
    file.write_bytes(file.read_bytes()[:-5000])
    model = Embedder(bundle, precision=UNPACKED, verify="none")
    with pytest.raises(EmbedgeError, match=rf"{file.name}: truncated"):
        model.encode(TEXTS, task="one")


def test_a_task_that_is_added_shares_the_weights(export: Export, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export(out, "bare")
    before = encode(out, task="bare")
    export(out, "one")
    np.testing.assert_array_equal(encode(out, task="bare"), before)
    assert np.isfinite(encode(out)).all()
    assert Embedder(out, precision=UNPACKED).tasks == ("bare", "one")


def test_two_exports_are_byte_identical(export: Export, original: Path, tmp_path: Path) -> None:
    again = export(tmp_path / "b", "one", "bare")
    for file in sorted(original.rglob("*.*")):
        assert (again / file.relative_to(original)).read_bytes() == file.read_bytes(), file


def test_it_is_no_precision_to_export(parts: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EmbedgeValueError, match="an int4 export has it too"):
        export_bundle(
            parts[0], adapters={"a": None}, precisions=[UNPACKED], out=tmp_path / "nothing"
        )


def test_an_earlier_bundle_without_it_gains_it_for_new_tasks(
    export: Export, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    export(out, "bare")
    manifest = (out / "manifest.json").read_text()
    document = json.loads(manifest)
    del document["precisions"][UNPACKED]
    for name in ("bare.unpacked.onnx", "bare.unpack.json"):
        (out / "int4" / name).unlink()
        del document["files"][f"int4/{name}"]
    (out / "manifest.json").write_text(json.dumps(document))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(out, "one")
    assert Embedder(out, precision=UNPACKED).tasks == ("one",)
    assert Embedder(out, precision="int4").tasks == ("bare", "one")


@pytest.mark.parametrize("precision", ["int4", UNPACKED])
def test_from_the_hub_cache_with_links_to_its_blobs(
    bundle: Path, tmp_path: Path, precision: str
) -> None:
    expected = encode(bundle, precision)
    repository = tmp_path / "models--me--bundle"
    snapshot = repository / "snapshots" / "0a1b2c"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(f for f in bundle.rglob("*") if f.is_file())):
        blob, link = repository / "blobs" / f"{number:040x}", snapshot / file.relative_to(bundle)
        shutil.move(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    np.testing.assert_array_equal(encode(snapshot, precision), expected)
    assert main(["prepare", str(snapshot), "--precision", precision, "--pack-only"]) == 0
    np.testing.assert_array_equal(encode(snapshot, precision), expected)


def test_a_subset_takes_along_the_blocks_that_are_unpacked(bundle: Path, tmp_path: Path) -> None:
    expected = encode(bundle)
    out = subset_bundle(bundle, tmp_path / "part", precisions=[UNPACKED], tasks=["one"])
    listed = Bundle(out, verify="full").manifest.files
    assert {"int4/one.unpacked.onnx", "int4/one.unpack.json", "int4/shared.bin"} <= set(listed)
    assert not {"int4/bare.unpacked.onnx", "int4/bare.onnx"} & set(listed)
    np.testing.assert_array_equal(encode(out), expected)
