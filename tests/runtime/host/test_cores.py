from __future__ import annotations

import os
from pathlib import Path

import pytest

from embedge.runtime.host.cores import available_cores, cgroup_cpu_quota


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "33 31 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"

TREES = {
    "v2: its own limit": (
        {
            "proc/self/cgroup": "0::/a/b",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/a/b/cpu.max": "250000 100000",
        },
        2.5,
    ),
    "v2: a group above limits more": (
        {
            "proc/self/cgroup": "0::/a/b",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/a/cpu.max": "50000 100000",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000",
        },
        0.5,
    ),
    "v2: in a container's namespace": (
        {
            "proc/self/cgroup": "0::/",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cpu.max": "400000 200000",
        },
        2.0,
    ),
    "v2: outside its namespace": (
        {
            "proc/self/cgroup": "0::/../other",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cpu.max": "300000 100000",
        },
        3.0,
    ),
    "v2: no limit": (
        {
            "proc/self/cgroup": "0::/a",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/a/cpu.max": "max 100000",
        },
        None,
    ),
    "v1: its own limit": (
        {
            "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/x\n0::/",
            "proc/self/mountinfo": V1_MOUNT.format(root="/"),
            "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000",
        },
        1.5,
    ),
    "v1: mounted from the container's group": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/77",
            "proc/self/mountinfo": V1_MOUNT.format(root="/docker/77"),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        2.0,
    ),
    "v1: no limit": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/",
            "proc/self/mountinfo": V1_MOUNT.format(root="/"),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        None,
    ),
    "no cgroups": ({}, None),
    "nonsense": (
        {"proc/self/cgroup": "x", "proc/self/mountinfo": "y - z\n1 2 - cgroup2 cgroup2 rw"},
        None,
    ),
}


@pytest.mark.parametrize(("files", "quota"), TREES.values(), ids=TREES.keys())
def test_the_smallest_quota_on_the_way_up_counts(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    assert cgroup_cpu_quota(write_tree(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [("max 100000", 3), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 3)],
)
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_cores_are_the_fewest_of_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_max: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    root = write_tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cpu.max": cpu_max,
        },
    )
    assert available_cores(root) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_two_hardware_threads_are_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    siblings = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    root = write_tree(
        tmp_path,
        {
            f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text
            for cpu, text in siblings.items()
        },
    )
    assert available_cores(root) == 2


def test_this_machine_has_a_core() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
