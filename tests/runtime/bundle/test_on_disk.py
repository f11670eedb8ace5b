"""Bundles as they lie on real disks: replaced while they are open, below links, in the hub's cache."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.runtime import (
    BundleError,
    Embedder,
    EmbedgeError,
    EmbedgeValueError,
    subset_bundle,
)
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.cli.main import main
from embedge.runtime.host.onnxruntime import open_session

TEXTS = ["w1 w2 w3", "w4"]
CHANGED = "changed since the bundle was opened: expected SHA-256 .*; open the bundle again"


def into_the_hub_cache(bundle: Path, cache: Path) -> Path:
    """A bundle as ``huggingface_hub.snapshot_download`` lays it out: the snapshot's folder."""
    repository = cache / "models--me--bundle"
    snapshot = repository / "snapshots" / "0a1b2c"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(f for f in bundle.rglob("*") if f.is_file())):
        blob, link = repository / "blobs" / f"{number:040x}", snapshot / file.relative_to(bundle)
        shutil.copy(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def double(file: Path) -> None:
    """Writes a graph's weights anew, twice as large, which changes their norm."""
    data = bytearray(file.read_bytes())
    weights = np.frombuffer(data, np.float32, offset=4096)
    file.write_bytes(data[:4096] + (weights[::-1] * 2).tobytes())


def other_folder(bundle: Any) -> None:
    """What a deploy does: another bundle takes the name."""
    new = bundle.path.with_name("new")
    shutil.copytree(bundle.path, new)
    double(new / "fp32/code.bin")
    bundle.path.rename(bundle.path.with_name("old"))
    new.rename(bundle.path)


def in_place(bundle: Any) -> None:
    double(bundle.path / "fp32/code.bin")


def renamed_over(bundle: Any) -> None:
    """What rsync does to a file that has changed, with the times of the old one."""
    file = bundle.path / "fp32/code.bin"
    beside = file.with_name("beside")
    shutil.copy2(file, beside)
    status = file.stat()
    double(beside)
    os.utime(beside, ns=(status.st_atime_ns, status.st_mtime_ns))
    beside.rename(file)


def graph_alone(bundle: Any) -> None:
    shutil.copy(bundle.path / "fp32/retrieval.onnx", bundle.path / "fp32/code.onnx")


@pytest.mark.parametrize("verify", ["none", "size", "full"])
@pytest.mark.parametrize("replace", [other_folder, in_place, renamed_over, graph_alone])
def test_a_graph_that_was_replaced_is_not_opened(
    two_tasks: Any, replace: Callable[[Any], None], verify: str
) -> None:
    model = Embedder(two_tasks.path, precision="fp32", verify=verify)
    kept = model.encode(TEXTS, task="retrieval")
    replace(two_tasks)
    with pytest.raises(BundleError, match=rf"fp32/code\.(bin|onnx): {CHANGED}"):
        model.encode(TEXTS, task="code")
    np.testing.assert_array_equal(model.encode(TEXTS, task="retrieval"), kept)  # is open


@pytest.mark.parametrize("replace", [other_folder, in_place])
def test_nor_after_it_was_closed(two_tasks: Any, replace: Callable[[Any], None]) -> None:
    model = Embedder(two_tasks.path, precision="fp32", max_sessions=1)
    for task in ("code", "retrieval"):
        model.encode(TEXTS, task=task)
    replace(two_tasks)
    with pytest.raises(BundleError, match=CHANGED):
        model.encode(TEXTS, task="code")


def test_nor_where_it_was_prepared(two_tasks: Any) -> None:
    options = ["--precision", "fp32", "--task", "code", "--pack-only"]
    assert main(["prepare", str(two_tasks.path), *options]) == 0
    model = Embedder(two_tasks.path, precision="fp32")
    other_folder(two_tasks)
    with pytest.raises(BundleError, match=CHANGED):
        model.encode(TEXTS, task="code")


def test_the_same_bundle_again_is_the_same_bundle(two_tasks: Any) -> None:
    model = Embedder(two_tasks.path, precision="fp32", max_sessions=1)
    expected = model.encode(TEXTS, task="code")
    model.encode(TEXTS, task="retrieval")
    shutil.copytree(two_tasks.path, two_tasks.path.with_name("new"))
    shutil.rmtree(two_tasks.path)
    two_tasks.path.with_name("new").rename(two_tasks.path)
    (two_tasks.path / "fp32/code.onnx").chmod(0o444)
    np.testing.assert_array_equal(model.encode(TEXTS, task="code"), expected)


def test_a_graph_that_changes_while_it_is_opened_is_not_used(
    two_tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_slowly(*arguments: Any) -> Any:
        in_place(two_tasks)
        return open_session(*arguments)

    monkeypatch.setattr("embedge.runtime.sessions.session.open_session", open_slowly)
    with pytest.raises(BundleError, match=CHANGED):
        Embedder(two_tasks.path, precision="fp32").encode(TEXTS, task="code")


def test_a_bundle_that_is_replaced_while_it_is_opened_is_refused(
    two_tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = Bundle.problems

    def look_slowly(self: Bundle, *, hashes: bool) -> list[str]:
        other_folder(two_tasks)
        return problems(self, hashes=hashes)

    monkeypatch.setattr(Bundle, "problems", look_slowly)
    with pytest.raises(BundleError, match="was replaced while it was opened; open it again"):
        Embedder(two_tasks.path, precision="fp32")


def test_a_release_behind_a_link_stays_open_when_the_link_moves_on(two_tasks: Any) -> None:
    current = two_tasks.path.with_name("current")
    current.symlink_to("two")
    model = Embedder(current, precision="fp32")
    expected = Embedder(two_tasks.path, precision="fp32").encode(TEXTS, task="code")
    shutil.copytree(two_tasks.path, two_tasks.path.with_name("new"))
    double(two_tasks.path.with_name("new") / "fp32/code.bin")
    current.unlink()
    current.symlink_to("new")
    np.testing.assert_array_equal(model.encode(TEXTS, task="code"), expected)


def test_a_relative_path_is_found_again_from_another_folder(
    two_tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Embedder(two_tasks.path, precision="fp32").encode(TEXTS, task="code")
    monkeypatch.chdir(two_tasks.path.parent)
    model = Embedder("two", precision="fp32")
    pickled = pickle.dumps(model)
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(model.encode(TEXTS, task="code"), expected)
    np.testing.assert_array_equal(pickle.loads(pickled).encode(TEXTS, task="code"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("verify", ["none", "size", "full"])
def test_the_hub_cache_is_opened(bundle: Any, tmp_path: Path, verify: str) -> None:
    expected = Embedder(bundle.path).encode(TEXTS)
    snapshot = into_the_hub_cache(bundle.path, tmp_path / "hub")
    np.testing.assert_array_equal(Embedder(snapshot, verify=verify).encode(TEXTS), expected)
    assert main(["prepare", str(snapshot), "--pack-only"]) == 0
    np.testing.assert_array_equal(Embedder(snapshot).encode(TEXTS), expected)
    (tmp_path / "link").symlink_to(snapshot)
    np.testing.assert_array_equal(Embedder(tmp_path / "link").encode(TEXTS), expected)


def test_a_bundle_in_a_folder_of_a_snapshot_is_opened(bundle: Any, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    shutil.copytree(bundle.path, folder / "bundle")
    snapshot = into_the_hub_cache(folder, tmp_path / "hub")
    assert Embedder(snapshot / "bundle", verify="full").encode("w1").shape == (8,)


@pytest.mark.parametrize("place", ["models--a--b/blobs/x/y", "models--c--d/blobs/y", "y"])
def test_links_to_other_places_of_the_cache_are_refused(
    bundle: Any, tmp_path: Path, place: str
) -> None:
    snapshot = into_the_hub_cache(bundle.path, tmp_path / "hub")
    outside = tmp_path / "hub" / place.replace("models--a--b", "models--me--bundle")
    outside.parent.mkdir(parents=True, exist_ok=True)
    link = snapshot / "fp32/shared.bin"
    shutil.copy(link, outside)
    link.unlink()
    link.symlink_to(outside)
    with pytest.raises(BundleError, match=r"shared\.bin: a link that leaves .*`cp -rL .* COPY`"):
        Embedder(snapshot)


def test_a_snapshot_whose_link_moves_on_has_changed(bundle: Any, tmp_path: Path) -> None:
    snapshot = into_the_hub_cache(bundle.path, tmp_path / "hub")
    model = Embedder(snapshot)
    link = snapshot / "fp32/retrieval.bin"
    other = link.resolve().with_name("f" * 40)
    shutil.copy(link, other)
    double(other)
    link.unlink()
    link.symlink_to(other)
    with pytest.raises(BundleError, match=CHANGED):
        model.encode("w1")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_folder_that_may_not_be_read_is_a_bundle_error(bundle: Any) -> None:
    bundle.path.chmod(0)
    try:
        with pytest.raises(BundleError, match="Permission denied"):
            Embedder(bundle.path)
    finally:
        bundle.path.chmod(0o755)


def test_a_circle_of_links_is_a_bundle_error(bundle: Any, tmp_path: Path) -> None:
    for path, name in ((tmp_path / "x", tmp_path / "x"), (bundle.path / "fp32/shared.bin", None)):
        path.unlink(missing_ok=True)
        path.symlink_to(path.name)
        with pytest.raises(BundleError):
            Embedder(name or bundle.path)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is gone."""
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x" * 300, "File name too long"),
        ("a\0b", "embedded null"),
        ("\udcff", "nothing there"),
        (
            "~/no such bundle",
            f"does not expand ~: give {re.escape(os.path.expanduser('~'))}/no such",
        ),
    ],
)
def test_paths_of_no_bundle_are_refused(path: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Embedder(path)


@pytest.mark.skipif(os.name == "nt", reason="a working folder stays there")
def test_a_deleted_working_folder_is_named(nowhere: None, two_tasks: Any) -> None:
    with pytest.raises(BundleError, match="the working folder was deleted or moved; `cd` to one"):
        Embedder(".")
    bundle = two_tasks.path
    with pytest.raises(EmbedgeError, match="part: .*the working folder was deleted or moved"):
        subset_bundle(bundle, "part")
    assert Embedder(bundle, precision="fp32").encode(TEXTS, task="code").shape[0] == 2


def test_the_working_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_tasks: Any
) -> None:
    bundle = two_tasks.path
    inner = tmp_path / "empty"
    inner.mkdir()
    monkeypatch.chdir(inner)
    for out in (".", inner):
        with pytest.raises(EmbedgeValueError, match="is the working folder, or holds it"):
            subset_bundle(bundle, out)
    assert not list(inner.iterdir())
    made = subset_bundle(bundle, "missing/../part")
    assert Bundle(made, verify="full").root == inner / "part"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["tokenizer.json", "fp32/code.onnx", "fp32/code.bin", "fp32"])
def test_what_may_not_be_read_is_named_with_the_command_that_lets_others(
    name: str, two_tasks: Any
) -> None:
    bundle = two_tasks.path
    (bundle / name).chmod(0)
    try:
        with pytest.raises(BundleError, match="Permission denied; its owner .* `chmod -R a"):
            Embedder(bundle, precision="fp32")
    finally:
        (bundle / name).chmod(0o755)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_path_that_is_no_utf8_is_refused_by_name(two_tasks: Any) -> None:
    bundle = two_tasks.path
    other = bundle.with_name("b\udcff")
    bundle.rename(other)
    with pytest.raises(EmbedgeError, match="opens paths in UTF-8 alone; rename the folder"):
        Embedder(other, precision="fp32").encode(TEXTS, task="code")
