"""Overwriting a bundle, and files in it that embedge did not write."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import pytest

from embedge.runtime import Embedder, EmbedgeError
from embedge.runtime.cli.main import main
from embedge.runtime.errors import EmbedgeValueError
from tests.helpers.exports import (
    contents,
    leftovers,
    manifest,
    small,
)
from tests.helpers.models import (
    linears,
    save_adapter,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared.2.bin", "third.onnx", "third.bin"])
def test_additions_do_not_write_through_links(name: str, source: Path, copy: Path) -> None:
    victim = copy.parent / "victim"
    (copy / "int8" / name).symlink_to(victim)
    with suppress(EmbedgeError):
        small(source, copy, adapters={"third": None})
    assert not victim.exists()


@pytest.mark.slow
def test_a_precisions_folder_behind_a_link_is_not_added_to(source: Path, copy: Path) -> None:
    (copy / "int8").rename(copy.parent / "elsewhere")
    (copy / "int8").symlink_to(copy.parent / "elsewhere")
    before = contents(copy.parent / "elsewhere")
    with pytest.raises(EmbedgeError, match="link"):
        small(source, copy, adapters={"third": None})
    assert contents(copy.parent / "elsewhere") == before


@pytest.mark.slow
def test_everything_listed_is_on_the_disk_before_the_manifest_is(
    source: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[tuple[int, int]] = set()
    fsync = os.fsync

    def record(descriptor: int) -> None:
        status = os.fstat(descriptor)
        flushed.add((status.st_dev, status.st_ino))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    before = contents(copy)
    small(source, copy, adapters={"third": None}, precisions=["int8", "int4"])
    out = small(source, tmp_path / "new")
    added = [copy / name for name in set(contents(copy)) - set(before)]
    for path in [*added, *out.rglob("*"), copy / "manifest.json", copy / "int8", copy, out]:
        assert (path.stat().st_dev, path.stat().st_ino) in flushed, path


def test_overwriting_replaces_the_whole_bundle(source: Path, copy: Path) -> None:
    small(source, copy, overwrite=True)
    assert list(manifest(copy)["tasks"]) == ["task"]
    assert not (copy / "int4").exists()
    assert leftovers(copy) == ["copy"]


def test_a_failed_overwrite_leaves_the_old_bundle(source: Path, copy: Path) -> None:
    before = contents(copy)
    with pytest.raises(EmbedgeValueError):
        small(source, copy, overwrite=True, keep={"nothing": "fp32"})
    assert contents(copy) == before


@pytest.mark.slow
def test_overwriting_deletes_what_embedge_itself_put_beside_the_bundles_files(
    source: Path, copy: Path
) -> None:
    assert main(["prepare", str(copy), "--precision", "int8", "--pack-only"]) == 0
    (copy / ".manifest.json.k3j2.tmp").write_text("of a killed bench --record")
    small(source, copy, overwrite=True)
    assert set(contents(copy)) - {"manifest.json", "README.md"} == manifest(copy)["files"].keys()
    Embedder(copy, precision="int8", verify="full").encode("ab")


def test_overwriting_deletes_the_report_of_the_bundle(source: Path, copy: Path) -> None:
    (copy / "report.json").write_text('{"report_version": 1, "rows": []}')
    small(source, copy, overwrite=True)
    assert not (copy / "report.json").exists()


@pytest.mark.parametrize(
    "name", ["notes.txt", "int8/mine.bin", "int8/other.onnx", "deep/x/y", "report.json"]
)
def test_overwriting_refuses_to_delete_a_foreign_file(name: str, source: Path, copy: Path) -> None:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_text("mine")
    with pytest.raises(EmbedgeValueError, match=re.escape(name)):
        small(source, copy, overwrite=True)
    assert (copy / name).read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["notes.txt", "int8/mine.bin", "int8/third.bin", "int8/a.onnx"])
def test_adding_leaves_a_foreign_file_and_does_not_list_it(
    name: str, source: Path, copy: Path
) -> None:
    (copy / name).write_text("mine")
    adapter = save_adapter(source, copy.parent / "lora", target=linears("bert"))
    small(source, copy, adapters={"third": adapter})
    assert (copy / name).read_text() == "mine"
    assert name not in manifest(copy)["files"]
    Embedder(copy, precision="int8", verify="full").encode("ab", task="third")


def test_a_failed_addition_leaves_a_foreign_file(source: Path, copy: Path) -> None:
    (copy / "int8/mine.bin").write_text("mine")
    before = contents(copy)
    with pytest.raises(EmbedgeValueError):
        small(source, copy, adapters={"third": None}, keep={"nothing": "fp32"})
    assert contents(copy) == before


def test_a_foreign_graph_of_the_new_tasks_name_is_refused(source: Path, copy: Path) -> None:
    (copy / "int8/third.onnx").write_text("mine")
    with pytest.raises(EmbedgeValueError, match=r"third\.onnx"):
        small(source, copy, adapters={"third": None})
    assert (copy / "int8/third.onnx").read_text() == "mine"
