"""What a failed, killed or concurrent export leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from embedge.export import CheckpointError, ExportError, export_bundle
from embedge.export.writing import precision as writer_module
from embedge.export.writing import weight_store as store_module
from embedge.runtime import Embedder, EmbedgeError
from embedge.runtime.errors import EmbedgeValueError
from tests.helpers.exports import (
    PRECISIONS,
    child,
    contents,
    leftovers,
    manifest,
    small,
)
from tests.helpers.models import (
    write_json,
)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the weight files refuse bytes after some have been written."""

    def fill(free: int) -> None:
        class File:
            def __init__(self, path: Path, mode: str) -> None:
                self._file = path.open(mode)

            def write(self, data: Any) -> None:
                if self._file.tell() + len(data) > free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._file.write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

        def open_(path: Path, mode: str) -> Any:
            return File(path, mode) if mode == "xb" else path.open(mode)

        monkeypatch.setattr(store_module, "open", open_, raising=False)

    return fill


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_full_disk_is_one_readable_error_and_leaves_nothing(
    precision: str, source: Path, tmp_path: Path, full_disk: Callable[[int], None]
) -> None:
    full_disk(20_000)
    with pytest.raises(ExportError, match="No space left on device.*nothing was left") as caught:
        small(source, tmp_path / "out", precisions=[precision])
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path / "out") == []


@pytest.mark.slow
def test_a_full_disk_leaves_an_older_bundle_as_it_was(
    source: Path, adapters: dict[str, Path], tmp_path: Path, full_disk: Callable[[int], None]
) -> None:
    out = small(source, tmp_path / "out", adapters={"first": adapters["first"]})
    before = contents(out)
    full_disk(2_000)
    with pytest.raises(ExportError, match="No space left"):
        small(source, out, adapters={"second": adapters["second"]}, precisions=["int8", "fp32"])
    assert contents(out) == before
    assert [p.name for p in sorted(out.iterdir()) if p.is_dir()] == ["int8"]


STOPPING_EXPORT = """
import os, signal, sys
from embedge.export.writing import weight_store
from embedge.export import export_bundle
put = weight_store.TensorStore.put
def put_and_stop(self, *arguments):
    put(self, *arguments)
    for file in self._open.values():
        file.flush()
    if self._open:
        weight_store.TensorStore.put = put
        os.kill(os.getpid(), signal.SIGSTOP)
weight_store.TensorStore.put = put_and_stop
source, task, out = sys.argv[1:]
export_bundle(source, adapters={task: None}, out=out, calibration="none", precisions=["fp32"])
"""


@contextmanager
def stopped_export(source: Path, task: str, out: Path) -> Iterator[subprocess.Popen[str]]:
    """An export of another process, stopped after its first weights are in a file."""
    with child(STOPPING_EXPORT, str(source), task, str(out)) as process:
        try:
            state = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert state is not None and state.si_code == os.CLD_STOPPED, process.communicate()[0]
            yield process
        finally:
            process.kill()


def killed_export(source: Path, task: str, out: Path, watched: Path) -> None:
    with stopped_export(source, task, out):
        assert any(p.stat().st_size for p in watched.glob("fp32/*.bin"))


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_under_the_name_and_a_second_run_succeeds(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed_export(source, "task", out, tmp_path / ".out.partial")
    assert not out.exists()
    small(source, out)
    assert leftovers(out) == ["out"]
    Embedder(out, precision="int8", verify="full")


@pytest.mark.slow
def test_a_killed_addition_leaves_the_bundle_usable_and_a_second_run_succeeds(
    source: Path, copy: Path
) -> None:
    without_fp32(copy)
    (copy / "int8/mine.bin").write_text("mine")
    killed_export(source, "third", copy, copy)
    Embedder(copy, precision="int8", verify="full").encode("ab", task="first")
    small(source, copy, adapters={"fourth": None}, precisions=["int8"])
    assert not (copy / "fp32").exists()
    assert set(contents(copy)) - {"manifest.json", "README.md"} == {
        *manifest(copy)["files"],
        "int8/mine.bin",
    }


@pytest.mark.slow
def test_a_killed_int4_addition_leaves_no_file_that_stops_the_next(
    source: Path, copy: Path
) -> None:
    document = manifest(copy)
    left = copy / "int4/third.unpack.json"
    write_json(copy / ".export.partial", sorted(document["files"]))
    left.write_text("{}")
    small(source, copy, adapters={"third": None}, precisions=["int4"])
    assert json.loads(left.read_text())
    Embedder(copy, precision="int4-unpacked", verify="full").encode("ab", task="third")


@contextmanager
def running_export(source: Path, task: str, out: Path) -> Iterator[int]:
    """An export of another process, stopped while it writes; yields its number."""
    with stopped_export(source, task, out) as process:
        yield process.pid
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output


def without_fp32(bundle: Path) -> None:
    shutil.rmtree(bundle / "fp32")
    document = manifest(bundle)
    del document["precisions"]["fp32"]
    document["files"] = {n: e for n, e in document["files"].items() if "fp32" not in n}
    write_json(bundle / "manifest.json", document)


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_export_to_the_same_new_folder_is_refused_and_harms_nothing(
    overwrite: bool, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with (
        running_export(source, "task", out) as number,
        pytest.raises(ExportError, match=rf"no other export .*found process {number} "),
    ):
        small(source, out, overwrite=overwrite)
    assert leftovers(out) == ["out"]
    Embedder(out, precision="fp32", verify="full").encode("ab")


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_addition_at_the_same_time_is_refused_and_both_can_follow_each_other(
    overwrite: bool, source: Path, copy: Path
) -> None:
    without_fp32(copy)
    with (
        running_export(source, "third", copy) as number,
        pytest.raises(ExportError, match=rf"no other export .*found process {number} "),
    ):
        small(source, copy, adapters={"fourth": None}, overwrite=overwrite)
    small(source, copy, adapters={"fourth": None})
    assert {"first", "second", "third", "fourth"} == manifest(copy)["tasks"].keys()
    assert set(contents(copy)) - {"manifest.json", "README.md"} == manifest(copy)["files"].keys()
    assert leftovers(copy) == ["copy"]
    Embedder(copy, precision="fp32", verify="full").encode("ab", task="third")
    Embedder(copy, precision="int8", verify="full").encode("ab", task="fourth")


@pytest.mark.parametrize("name", [".out.lock", ".out.partial", ".out.replaced"])
@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_what_somebody_put_beside_the_bundle_is_refused_and_left_alone(
    kind: str, name: str, source: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    if kind == "link":
        (tmp_path / name).symlink_to(victim)
    else:
        os.mkfifo(tmp_path / name)
    with pytest.raises(EmbedgeError, match=rf"{name}: expected .*, found a {kind}.*move it away"):
        small(source, tmp_path / "out")
    assert victim.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "victim"])


def test_an_export_that_is_refused_leaves_no_folder_that_it_made(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        small(tmp_path / "nowhere", tmp_path / "a/b/out")
    assert list(tmp_path.iterdir()) == []


# -- refusals of the operating system -------------------------------------------------------------------

REFUSALS = {
    errno.ENOSPC: r"No space left on device \(\d+ MB free there\); .*: free some space",
    errno.EROFS: "Read-only file system; .*: choose an --out that this user can write to",
    errno.EACCES: "Permission denied; .*: choose an --out that this user can write to",
    errno.ENOENT: "No such file or directory; .*: make sure that nothing else moves or deletes",
}


@pytest.mark.slow
@pytest.mark.parametrize("number", REFUSALS)
def test_what_the_system_refuses_comes_with_advice_that_helps(
    number: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number), "there")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ExportError, match=f"there: {REFUSALS[number]}") as caught:
        small(source, tmp_path / "out")
    assert ("space" in str(caught.value)) == (number == errno.ENOSPC)
    monkeypatch.undo()
    monkeypatch.setattr(writer_module, "write_graph", refuse)
    with pytest.raises(ExportError, match=f"there: {REFUSALS[number]}"):
        small(source, tmp_path / "out")
    assert leftovers(tmp_path / "out") == []


@pytest.mark.slow
def test_a_bundle_whose_parent_cannot_be_written_gains_a_task_all_the_same(
    source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.open

    def open_(path: Any, *arguments: Any) -> int:
        if Path(path).parent == copy.parent:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return really(path, *arguments)

    monkeypatch.setattr(os, "open", open_)
    small(source, copy, adapters={"third": None})
    assert "third" in manifest(copy)["tasks"]
    assert ".export.lock" not in contents(copy)


@pytest.mark.slow
def test_a_failed_addition_says_that_the_bundle_is_as_it_was(
    source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer_module, "write_graph", refuse)
    with pytest.raises(ExportError, match="the bundle that was there is as it was"):
        small(source, copy, adapters={"third": None})


@pytest.mark.slow
def test_the_working_folder_is_not_replaced(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    with pytest.raises(EmbedgeValueError, match="is the working folder, or holds it.*`cd` out"):
        export_bundle(source, adapters={"a": None}, precisions=["fp32"], out=".")
    assert not list(inner.iterdir())
    made = export_bundle(source, adapters={"a": None}, precisions=["fp32"], out="no/../made")
    assert (made / "manifest.json").is_file()
    monkeypatch.chdir(made)
    with pytest.raises(EmbedgeValueError, match="`cd` out"):
        export_bundle(source, adapters={"a": None}, precisions=["fp32"], out=made, overwrite=True)
    assert export_bundle(source, adapters={"b": None}, precisions=["fp32"], out=".") == Path(".")


@pytest.mark.skipif(sys.platform == "win32", reason="a working folder stays there")
def test_a_deleted_working_folder_is_named(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ExportError, match="the working folder was deleted or moved; `cd` to one"):
        export_bundle(source, adapters={"a": None}, precisions=["fp32"], out="made")
