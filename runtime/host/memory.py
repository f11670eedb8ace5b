"""Memory: what a process holds, as Linux counts it, and amounts as people write them."""

from __future__ import annotations

import re
from pathlib import Path

from embedge.runtime.errors import EmbedgeValueError

__all__ = ["parse_bytes", "process_memory"]


def process_memory(process: int | str = "self") -> dict[str, int]:
    """Bytes by Linux's names in ``/proc/PROCESS/status``.

    Some of them: ``VmRSS`` resident, ``VmHWM`` the most that ever was resident, ``RssAnon`` what no
    file holds, ``RssFile`` mapped from files.

    Args:
        process: its number; "self" for this one.

    Returns:
        Nothing on other systems, and once the process has ended.
    """
    found = {}
    try:
        for line in Path(f"/proc/{process}/status").read_text("ascii", "replace").splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                found[name] = int(value.split()[0]) * 1024
    except OSError:
        return {}
    return found


def parse_bytes(name: str, value: int | str) -> int:
    """A number of bytes, or one with a unit: ``"2.0GB"``, ``"900 MB"``, ``"1.5 GiB"``.

    Args:
        name: of the argument, for messages.
        value: what was given.
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", str(value).strip())
    if isinstance(value, bool) or found is None or found[2].upper() not in units:
        raise EmbedgeValueError(
            f"{name} {value!r}: expected a number of bytes, or one with KB, MB, GB, KiB, MiB or GiB",
            arguments=[name],
        )
    from fractions import Fraction  # seldom needed, and slow to load

    return int(Fraction(found[1]) * units[found[2].upper()])
