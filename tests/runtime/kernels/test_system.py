"""The part of the kernels that differs by operating system, compiled alone. tests/processors runs other systems'."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ("tests/processors/system_check.c", "runtime/kernels/native/system.c")
FLAGS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror")


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("cc") is None, reason="needs a C compiler for POSIX"
)
def test_memory_is_aligned_and_pages_of_files_are_dropped(tmp_path: Path) -> None:
    sources = [str(ROOT / source) for source in SOURCES]
    subprocess.run(["cc", *FLAGS, *sources, "-o", str(tmp_path / "check")], check=True)
    (tmp_path / "file").write_bytes(bytes(range(256)) * 8192)
    done = subprocess.run(
        [tmp_path / "check", tmp_path / "file"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("held ")
