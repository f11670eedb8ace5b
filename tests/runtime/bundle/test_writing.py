"""Files and folders take their name when they are whole, whatever lies beside them."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embedge.runtime import Embedder, EmbedgeError
from embedge.runtime.bundle import writing
from embedge.runtime.bundle.lock import sole_holder
from embedge.runtime.bundle.writing import (
    NewFile,
    make_folder,
    partial_of,
    put_in_place,
    recover,
    replace_file,
    replaced_of,
    sweep,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def folder_of(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def busy(holder: str) -> EmbedgeError:
    return EmbedgeError(f"{holder} holds it")


# -- files --------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    file.chmod(0o640)
    replace_file(file, "new")
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("new", 0o640)
    assert names(tmp_path) == ["file"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "file").symlink_to(tmp_path / "victim")
    replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "file").is_symlink()


def test_a_file_that_is_discarded_leaves_nothing(tmp_path: Path) -> None:
    new = NewFile(tmp_path / "file")
    new.file.write(b"half")
    new.discard()
    assert names(tmp_path) == []


def test_a_rename_that_is_refused_leaves_nothing_new(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_file(tmp_path / "file", "new")
    assert names(tmp_path) == ["file"]


KILLED = """
import os, sys
from pathlib import Path
from embedge.runtime.bundle.writing import NewFile
new = NewFile(Path(sys.argv[1]))
new.file.write(b"half")
new.file.flush()
os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_what_a_killed_process_wrote_goes_with_the_next_and_what_a_live_one_writes_stays(
    tmp_path: Path,
) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "file")], check=False)
    (killed,) = names(tmp_path)
    live = NewFile(tmp_path / "file")
    assert killed not in names(tmp_path)
    replace_file(tmp_path / "file", "other")
    live.file.write(b"live")
    live.commit()
    assert (tmp_path / "file").read_text() == "live"
    assert names(tmp_path) == ["file"]


def test_only_files_of_that_kind_are_swept(tmp_path: Path) -> None:
    ours, digits = ".file.0123456789abcdef.partial", "0123456789abcdef"
    (tmp_path / ours).write_text("")
    (tmp_path / f".other.{digits}.partial").write_text("")
    (tmp_path / ".file.mine.partial").write_text("")
    (tmp_path / "victim").write_text("precious")
    (tmp_path / f".file.{digits[::-1]}.partial").symlink_to(tmp_path / "victim")
    sweep(tmp_path, "file")
    assert names(tmp_path) == sorted(
        [
            f".other.{digits}.partial",
            ".file.mine.partial",
            "victim",
            f".file.{digits[::-1]}.partial",
        ]
    )


# -- what somebody put at a predictable name ----------------------------------------------------------------


def link(path: Path) -> None:
    path.symlink_to(path.parent / "victim")


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "made-by-nobody")


def second_name(path: Path) -> None:
    os.link(path.parent / "victim", path)


def full(path: Path) -> None:
    path.write_text("a user's own")


def in_use(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        here = os.getcwd()
        os.chdir(path.parent)  # names of sockets are short
        try:
            other.bind(path.name)
        finally:
            os.chdir(here)


def loop(path: Path) -> None:
    path.symlink_to(path)


PLANTED: list[Callable[[Path], None]] = [
    link,
    dangling,
    second_name,
    full,
    in_use,
    loop,
    Path.mkdir,
    os.mkfifo,
]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_what_is_no_lock_is_refused_and_left_alone(
    plant: Callable[[Path], None], tmp_path: Path
) -> None:
    (tmp_path / "victim").write_text("precious")
    lock = tmp_path / ".out.lock"
    plant(lock)
    before = (names(tmp_path), lock.lstat().st_mode)
    with (
        pytest.raises(EmbedgeError, match=r"\.out\.lock: expected .*, found .*move it away"),
        sole_holder(lock, busy),
    ):
        pass
    assert (names(tmp_path), lock.lstat().st_mode) == before
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("plant", [link, dangling, full, loop, os.mkfifo])
@pytest.mark.parametrize("name", [partial_of, replaced_of])
def test_what_is_no_folder_is_refused_and_left_alone(
    name: Callable[[Path], Path], plant: Callable[[Path], None], tmp_path: Path
) -> None:
    folder_of(tmp_path / "victim", "precious")
    plant(name(tmp_path / "out"))
    before = names(tmp_path)
    with pytest.raises(EmbedgeError, match=r"expected a folder .*, found .*move it away"):
        recover(tmp_path / "out")
    if name is partial_of:
        with pytest.raises(EmbedgeError, match=r"expected a folder .*, found .*move it away"):
            make_folder(partial_of(tmp_path / "out"))
    assert names(tmp_path) == before
    assert (tmp_path / "victim/file").read_text() == "precious"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="gives files away")
def test_what_another_user_made_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / ".out.lock"
    lock.write_text("1\n")
    os.chown(lock, 12345, 12345)
    with (
        pytest.raises(EmbedgeError, match="of this user that embedge made, .* of user 12345"),
        sole_holder(lock, busy),
    ):
        pass
    assert lock.read_text() == "1\n"


def test_a_lock_of_a_dead_process_is_taken_over_and_one_that_is_held_is_not(tmp_path: Path) -> None:
    lock = tmp_path / ".out.lock"
    lock.write_text("123\n")
    with sole_holder(lock, busy):
        assert lock.read_text() == f"{os.getpid()}\n"
        with (
            pytest.raises(EmbedgeError, match=f"process {os.getpid()} holds it"),
            sole_holder(lock, busy),
        ):
            pass
    assert names(tmp_path) == []


# -- folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_the_place_of_another(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(writing, "_exchange", lambda *_: False)
    out = folder_of(tmp_path / "out", "old")
    put_in_place(folder_of(partial_of(out), "new"), out, replace=True)
    assert (out / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_folder_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = folder_of(tmp_path / "out", "mine")
    with pytest.raises(OSError, match="not empty"):
        put_in_place(folder_of(partial_of(out), "new"), out, replace=False)
    assert (out / "file").read_text() == "mine"


def test_a_refused_second_step_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_exchange", lambda *_: False)
    out = folder_of(tmp_path / "out", "old")
    work = folder_of(partial_of(out), "new")
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if (source, target) == (work, out):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"):
        put_in_place(work, out, replace=True)
    assert (out / "file").read_text() == "old"


@pytest.mark.parametrize("under_the_name", ["nothing", "an empty folder", "a folder"])
def test_the_next_writer_restores_or_removes_what_was_replaced(
    under_the_name: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    folder_of(replaced_of(out), "old")
    folder_of(partial_of(out), "half")
    if under_the_name == "an empty folder":
        out.mkdir()
    elif under_the_name == "a folder":
        folder_of(out, "new")
    recover(out)
    assert (out / "file").read_text() == ("new" if under_the_name == "a folder" else "old")
    assert names(tmp_path) == ["out"]


def test_a_bundle_that_an_interrupted_overwrite_moved_is_named(tmp_path: Path) -> None:
    folder_of(replaced_of(tmp_path / "out"), "old")
    with pytest.raises(EmbedgeError, match=r"left the bundle as .*\.out\.replaced; rename it"):
        Embedder(tmp_path / "out")


def test_an_export_that_has_not_ended_is_named(tmp_path: Path) -> None:
    folder_of(partial_of(tmp_path / "out"), "half")
    with pytest.raises(EmbedgeError, match="an export that has not ended; wait .* or run it again"):
        Embedder(tmp_path / "out")
