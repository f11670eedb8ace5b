"""A processor without AVX-512 for programs that tests start, at full speed where this one can be masked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from embedge.runtime.host.saturation import saturates_u8s8

__all__ = ["environment_as_avx2"]

_SOURCE = Path(__file__).resolve().parents[1] / "processors" / "cpuid_mask.c"


def environment_as_avx2(folder: Path) -> dict[str, str]:
    """Environment variables of a process whose 8-bit products saturate: as they are, where they do so here.

    Args:
        folder: takes what is compiled.

    Skips the test where the processor is another one and cannot be masked.
    """
    variables = dict(os.environ)
    if saturates_u8s8():
        return variables
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None or not _faults():
        pytest.skip(
            "needs a processor without VNNI, or Linux with cc and cpuid_fault (make test-as-avx2)"
        )
    library = folder / "cpuid_mask.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    loaded = [str(library), *filter(None, [variables.get("LD_PRELOAD")])]
    return {**variables, "CPUID_MASK": "avx2", "LD_PRELOAD": os.pathsep.join(loaded)}


def _faults() -> bool:
    """Whether the system can answer CPUID in the processor's place."""
    return " cpuid_fault" in Path("/proc/cpuinfo").read_text("utf-8")
