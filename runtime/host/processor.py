"""The processor: its name and its instruction sets, as Linux lists them in ``/proc/cpuinfo``."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

__all__ = ["has_amx", "instruction_sets", "processor_identity", "processor_name"]

_IDENTITY = ("model name", "flags", "Features", "CPU part", "CPU implementer")


def processor_name() -> str:
    """What its maker calls the processor; "unknown" where the system does not say."""
    names = [value for key, value in _cpu_info() if key == "model name"]
    return next(iter(names), platform.processor()) or "unknown"


def instruction_sets() -> frozenset[str]:
    """Names of the instruction sets, such as "avx512_vnni"; empty where the system is not Linux."""
    lists = (value for key, value in _cpu_info() if key in ("flags", "Features"))
    return frozenset(name for value in lists for name in value.split())


def has_amx() -> bool:
    """Whether the processor multiplies tiles of 8-bit integers."""
    return "amx_int8" in instruction_sets()


def processor_identity() -> str:
    """A text that is the same on processors of one model and one set of instructions."""
    lines = _lines()
    if lines is None:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.partition(":")[0].strip() in _IDENTITY})
    )


def _cpu_info() -> list[tuple[str, str]]:
    pairs = (line.partition(":") for line in _lines() or ())
    return [(key.strip(), value.strip()) for key, _, value in pairs]


@functools.cache
def _lines() -> tuple[str, ...] | None:
    """Lines of ``/proc/cpuinfo``, read once; ``None`` where there is none."""
    try:
        return tuple(Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines())
    except OSError:
        return None
