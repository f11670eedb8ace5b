"""How many cores this process really has.

The smallest of what each layer allows:
    * The scheduler's affinity mask. Two hardware threads of a core count once: the matmuls that take the
      time gain nothing from the second.
    * The CPU quota of the process's cgroup and of every group above it, versions 1 and 2, rounded down.
      Threads beyond the quota are stopped together with the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

__all__ = ["available_cores", "cgroup_cpu_quota"]

_ROOT = Path("/")


def available_cores(root: Path = _ROOT) -> int:
    """Cores that this process may keep busy, at least 1.

    Args:
        root: where ``proc`` and ``sys`` are looked up.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = _physical_cores(os.sched_getaffinity(0), root)
    else:
        cores = os.cpu_count() or 1
    quota = cgroup_cpu_quota(root)
    return max(1, cores if quota is None else min(cores, int(quota)))


def cgroup_cpu_quota(root: Path = _ROOT) -> float | None:
    """CPUs' worth of time the process's cgroups allow it, ``None`` where they set no limit.

    Args:
        root: where ``proc`` and ``sys`` are looked up.
    """
    groups = _own_groups(root)
    quotas = []
    for version, mount, mounted_group in _mounts(root):
        group = groups.get(version)
        if group is None:
            continue
        for folder in _levels(root / mount.lstrip("/"), mounted_group, group):
            quota = _quota_v2(folder) if version == 2 else _quota_v1(folder)
            if quota is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _physical_cores(cpus: Iterable[int], root: Path) -> int:
    """Distinct cores behind some CPU numbers; all of them where the system does not tell."""
    siblings = set()
    for cpu in cpus:
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings.add(_read(folder / "thread_siblings_list") or str(cpu))
    return len(siblings)


def _own_groups(root: Path) -> dict[int, str]:
    """The process's group by cgroup version, e.g. ``{2: "/user.slice"}``."""
    groups = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            groups[2] = group
        elif "cpu" in controllers.split(","):
            groups[1] = group
    return groups


def _mounts(root: Path) -> Iterator[tuple[int, str, str]]:
    """``(version, mount point, group that is mounted there)`` of the CPU controllers."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        # 36 35 98:0 /group /mount/point rw,noatime shared:1 - cgroup cgroup rw,cpu,cpuacct
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) < 5 or len(right) < 3:
            continue
        if right[0] == "cgroup2":
            yield 2, left[4], left[3]
        elif right[0] == "cgroup" and "cpu" in right[2].split(","):
            yield 1, left[4], left[3]


def _levels(mount: Path, mounted_group: str, group: str) -> Iterator[Path]:
    """Folders of the process's group and the ones above it, as far as they are mounted here.

    Inside a container the mount often shows the container's own group as its root, under a path
    that only exists outside; then the root is all there is to see.
    """
    try:
        below = PurePosixPath(group).relative_to(mounted_group)
    except ValueError:
        below = PurePosixPath()
    if ".." in below.parts:  # a process outside its cgroup namespace
        below = PurePosixPath()
    for level in (below, *below.parents):
        yield mount / level


def _quota_v2(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _quota_v1(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    """Microseconds of CPU time per period as a number of CPUs; "max" and -1 mean no limit."""
    try:
        time_us, period_us = int(quota), int(period)
    except ValueError:
        return None
    return time_us / period_us if time_us > 0 and period_us > 0 else None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
