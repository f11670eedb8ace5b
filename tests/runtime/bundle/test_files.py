from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedge.runtime import BundleError, Embedder
from embedge.runtime.bundle.contract import PREPARED
from embedge.runtime.bundle.files import open_regular_file, read_regular_file
from embedge.runtime.sessions.prepared_graphs import machine_name


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_a_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(path.parent)  # the name of a socket may have 107 bytes
        listener.bind(path.name)


STRANGE = [
    (fifo, "a FIFO"),
    (link_to_a_fifo, "a FIFO"),
    (device, "a device"),
    (folder, "a folder"),
    (unix_socket, "a socket"),
]
strange_files = pytest.mark.parametrize(("make", "kind"), STRANGE, ids=lambda v: str(v)[:16])


@strange_files
def test_what_is_no_regular_file_is_refused(
    make: Callable[[Path], None], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "x")
    with pytest.raises(OSError, match=f"expected a regular file, found {kind}") as caught:
        read_regular_file(tmp_path / "x", 100)
    assert caught.value.filename == str(tmp_path / "x")


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_regular_file(tmp_path / "x", 5) == b"12345"
    with pytest.raises(OSError, match="expected at most 4 bytes, found 5"):
        read_regular_file(tmp_path / "x", 4)
    with open_regular_file(tmp_path / "x") as file:
        assert file.read() == b"12345"


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)  # takes no space
    with pytest.raises(OSError, match=r"at most 100 bytes, found 1,099,511,627,776"):
        read_regular_file(tmp_path / "x", 100)


def test_a_missing_file_stays_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_regular_file(tmp_path / "x", 100)


@strange_files
@pytest.mark.parametrize(
    "name", ["manifest.json", "tokenizer.json", "fp32/retrieval.onnx", "fp32/shared.bin"]
)
def test_a_bundle_refuses_them_by_name(
    make: Callable[[Path], None],
    kind: str,
    name: str,
    bundle: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(bundle.path)
    (bundle.path / name).unlink()
    make(bundle.path / name)
    for verify in ("none", "full"):
        with pytest.raises(BundleError, match=rf"{name}: .*found {kind}"):
            Embedder(bundle.path, precision="fp32", verify=verify).encode("w1")


@strange_files
@pytest.mark.parametrize("name", ["tuning.json", "fp32/retrieval/prepared.json"])
def test_of_what_was_prepared_they_are_left_out(
    make: Callable[[Path], None],
    kind: str,
    name: str,
    bundle: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = bundle.path / PREPARED / machine_name() / name
    file.parent.mkdir(parents=True)
    monkeypatch.chdir(file.parent)
    make(file)
    with pytest.warns(UserWarning, match=f"not used: .*expected a regular file, found {kind}"):
        assert Embedder(bundle.path, precision="fp32").encode("w1").shape == (8,)


def test_a_large_manifest_is_refused_before_it_is_read(bundle: Any) -> None:
    with (bundle.path / "manifest.json").open("r+b") as file:
        file.truncate(10 << 30)
    with pytest.raises(BundleError, match=r"manifest\.json: .*at most 67,108,864 bytes, found 10"):
        Embedder(bundle.path)
