"""The manifest says what each graph computes, wherever its weights lie, and whatever it is called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from embedge.runtime import Embedder, FingerprintError
from embedge.runtime.bundle.folder import Bundle
from tests.helpers.exports import WIDE, manifest, small
from tests.helpers.models import make_model, save, save_adapter


def recorded(bundle: Path) -> dict[str, dict[str, str]]:
    return {name: p["content_sha256"] for name, p in manifest(bundle)["precisions"].items()}


def test_it_is_what_the_files_say(copy: Path) -> None:
    stated = recorded(copy)
    document = manifest(copy)
    for precision in document["precisions"].values():
        del precision["content_sha256"]
    (copy / "manifest.json").write_text(json.dumps(document))
    older = Bundle(copy)
    assert {name: set(by) for name, by in stated.items()} == {
        name: {"first", "second"} for name in ("fp32", "fp16", "int8", "int4", "int4-unpacked")
    }
    for name, by_task in stated.items():
        assert {task: older.content_sha256(name, task) for task in by_task} == by_task
        assert len(set(by_task.values())) == 2


@pytest.mark.slow
def test_it_depends_on_no_other_task_and_no_name(
    source: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    options = {"precisions": ["fp32", "int8", "int4"]}
    both = recorded(small(source, tmp_path / "both", adapters=adapters, **options))
    added = small(source, tmp_path / "added", adapters={"second": adapters["second"]}, **options)
    small(source, added, adapters={"first": adapters["first"]}, **options)
    shutil.copytree(adapters["first"], tmp_path / "adapters" / "renamed")
    renamed = {"renamed": tmp_path / "adapters" / "renamed"}
    alone = recorded(small(source, tmp_path / "alone", adapters=renamed, **options))
    assert recorded(added) == both
    assert {n: by["renamed"] for n, by in alone.items()} == {
        n: by["first"] for n, by in both.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("change", ["weights", "adapter", "pooling"])
def test_it_changes_with_the_source(
    change: str, source: Path, adapters: dict[str, Path], bundle: Path, tmp_path: Path
) -> None:
    model, adapter = source, adapters["first"]
    if change == "adapter":
        adapter = save_adapter(source, tmp_path / "other", target=["query", "value"], seed=9)
    else:
        seed, pooling = (1, "mean") if change == "weights" else (0, "cls")
        model = save(make_model("bert", seed=seed, **WIDE), tmp_path / "tiny", pooling=pooling)
    other = small(model, tmp_path / "out", adapters={"first": adapter}, precisions=["fp32"])
    before = Embedder(bundle, precision="fp32", task="first")
    after = Embedder(other, precision="fp32", task="first")
    with pytest.raises(FingerprintError) as caught:
        after.check_fingerprint(before.fingerprint_parts())
    assert set(caught.value.differing) == {"graph", *({"pooling"} if change == "pooling" else {})}
