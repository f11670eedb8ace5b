"""Memory of a process, as Linux counts it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["process_memory"]


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
