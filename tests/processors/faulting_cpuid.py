"""Copies embedge and packages so that their CPUID instructions fault, for ``cpuid_mask.c`` to answer.

    python tests/processors/faulting_cpuid.py build/faulting/lib/python3.11/site-packages onnxruntime
    CPUID_MASK=avx2 CPUID_FAULTS=1 LD_PRELOAD=build/cpuid_mask.so build/faulting/bin/python -m pytest

Works on every x86-64 Linux, also where the system cannot let CPUID fault. ``objdump`` finds the instructions, so that
other bytes of the same value stay. What is not copied, such as torch, sees the processor as it is.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

_CPUID, _FAULTS = b"\x0f\xa2", b"\xce\xa2"
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+cpuid", re.MULTILINE)
_SEGMENT = re.compile(r"LOAD\s+0x([0-9a-f]+) 0x([0-9a-f]+) 0x[0-9a-f]+ 0x([0-9a-f]+)")


def let_cpuid_fault(library: Path) -> int:
    """Replace each CPUID of a library by two bytes that are no instruction.

    Args:
        library: an x86-64 ELF file; changed in place.

    Returns:
        How many there were.
    """
    code = _output("objdump", "-d", "--no-show-raw-insn", library)
    parts = _SEGMENT.findall(_output("readelf", "-lW", library))
    content = bytearray(library.read_bytes())
    places = [
        address - start + offset
        for address in (int(match, 16) for match in _INSTRUCTION.findall(code))
        for offset, start, size in ([int(number, 16) for number in part] for part in parts)
        if start <= address < start + size
    ]
    for place in places:
        assert content[place : place + 2] == _CPUID, (library, place)
        content[place : place + 2] = _FAULTS
    library.write_bytes(content)
    return len(places)


def copy_package(name: str, folder: Path) -> None:
    """Copy a package, links followed, and let CPUID fault in its libraries.

    Args:
        name: what it is imported as.
        folder: a folder of packages; the copy lies in it under this name. One of before is replaced.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name}: expected an installed package, found none; run `make install`")
    shutil.rmtree(folder / name, ignore_errors=True)
    of_others = shutil.ignore_patterns("node_modules", "__pycache__")
    shutil.copytree(Path(spec.origin).parent, folder / name, ignore=of_others)
    for library in sorted((folder / name).rglob("*.so*")):
        print(f"{library.name}: {let_cpuid_fault(library)} CPUID instructions fault")


def _output(*command: object) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(f"expected a folder of packages, and names of packages\n\n{__doc__}")
    if shutil.which("objdump") is None:
        raise SystemExit("objdump: not found; install binutils, e.g. `apt-get install binutils`")
    for package in ("embedge", *sys.argv[2:]):
        copy_package(package, Path(sys.argv[1]))
