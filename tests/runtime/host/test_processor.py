"""What ``/proc`` says of the processor and of a process's memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.runtime.host import processor
from embedge.runtime.host.memory import process_memory

X86 = """processor\t: 0
model name\t: A Processor @ 2.50GHz
cpu MHz\t\t: 2500.000
flags\t\t: fpu avx2 avx512_vnni

processor\t: 1
model name\t: A Processor @ 2.50GHz
cpu MHz\t\t: 3100.000
flags\t\t: fpu avx2 avx512_vnni
"""
ARM = """processor\t: 0
Features\t: fp asimd i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd0c
"""


@pytest.fixture
def cpu_info(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets ``/proc/cpuinfo`` hold a text, or be missing."""

    def set_text(text: str | None) -> None:
        def read(self: Path, *_: Any) -> str:
            assert str(self) == "/proc/cpuinfo"
            if text is None:
                raise FileNotFoundError
            return text

        processor._lines.cache_clear()
        monkeypatch.setattr(Path, "read_text", read)

    yield set_text
    processor._lines.cache_clear()


def test_of_an_x86_processor(cpu_info: Any) -> None:
    cpu_info(X86)
    assert processor.processor_name() == "A Processor @ 2.50GHz"
    assert processor.instruction_sets() == {"fpu", "avx2", "avx512_vnni"}
    assert not processor.has_amx()
    identity = processor.processor_identity()
    assert identity == "flags\t\t: fpu avx2 avx512_vnni\nmodel name\t: A Processor @ 2.50GHz"
    cpu_info(X86.replace("avx2", "avx2 amx_int8"))
    assert processor.has_amx()
    assert processor.processor_identity() != identity


def test_of_an_arm_processor(cpu_info: Any) -> None:
    cpu_info(ARM)
    assert processor.instruction_sets() == {"fp", "asimd", "i8mm"}
    assert "CPU part\t: 0xd0c" in processor.processor_identity()


def test_where_the_system_does_not_tell(cpu_info: Any) -> None:
    cpu_info(None)
    assert processor.instruction_sets() == frozenset()
    assert processor.processor_name()
    assert not processor.has_amx()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_this_process_and_of_one_that_ended() -> None:
    gc.collect()
    before = process_memory()
    assert 0 < before["RssAnon"] <= before["VmRSS"] <= before["VmHWM"]
    block = np.ones(1 << 25)  # 256 MiB, written; what other tests left may be freed meanwhile
    assert process_memory(os.getpid())["RssAnon"] > before["RssAnon"] + 0.5 * block.nbytes
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert process_memory(ended.pid) == {}
