"""Resident memory of an embedding process under a real limit: ``python -m embedge.bench.studies.resident``.

A child process, in a memory control group of its own where the machine lets one be made, opens a bundle
and embeds a text of ``--tokens`` tokens and, with ``--image``, a page image of 768 features. Shown are
its anonymous memory and the mapped pages it has touched.
A group's limit counts both and the page cache; ``ulimit -v`` would count what is mapped and never read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from embedge.bench.errors import BenchError
from embedge.bench.measure.child import memory

__all__ = ["main"]

_GROUPS = Path("/sys/fs/cgroup")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="embedge.bench.studies.resident", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--task", default=None)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--image", action="store_true", help="embed a page image too")
    parser.add_argument("--limit-gb", type=float, help="10⁹ bytes the process may take")
    parser.add_argument(
        "--memory-limit-gb", type=float, help="memory_limit of the Embedder, in 10⁹ bytes"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return _embed(options)
    command = [
        sys.executable,
        "-m",
        "embedge.bench.studies.resident",
        str(options.bundle),
        "--child",
    ]
    command += ["--precision", options.precision, "--tokens", str(options.tokens)]
    command += ["--task", options.task] if options.task else []
    command += ["--image"] if options.image else []
    if options.memory_limit_gb is not None:
        command += ["--memory-limit-gb", str(options.memory_limit_gb)]
    with _group(options.limit_gb) as group:

        def join() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(command, preexec_fn=join, check=False)
    if done.returncode < 0:
        raise BenchError(f"the process was killed by signal {-done.returncode}: above the limit")
    return done.returncode


@contextmanager
def _group(limit_gb: float | None) -> Iterator[Path | None]:
    """A control group with the limit, removed at the end; ``None`` without a limit."""
    if limit_gb is None:
        yield None
        return
    old = _GROUPS / "memory"  # version 1
    group = (old if old.is_dir() else _GROUPS) / f"embedge-{os.getpid()}"
    name = "memory.limit_in_bytes" if old.is_dir() else "memory.max"
    try:
        group.mkdir()
        (group / name).write_text(str(int(limit_gb * 1e9)))
    except OSError as error:
        raise BenchError(
            f"{group}: a memory control group could not be made ({error.strerror}); run as root, or leave "
            "--limit-gb out"
        ) from error
    try:
        yield group
    finally:
        group.rmdir()


def _embed(options: argparse.Namespace) -> int:
    from embedge.runtime import Embedder

    begin = time.perf_counter()
    limit = options.memory_limit_gb
    model = Embedder(
        options.bundle,
        precision=options.precision,
        memory_limit=None if limit is None else int(limit * 1e9),
    )
    task = options.task or model.tasks[0]
    model.encode("one", task=task)
    print(f"first vector after {time.perf_counter() - begin:.1f} s: {json.dumps(_memory())}")
    text = "a " * (options.tokens - 2)  # a token each behind the prompt's two
    begin = time.perf_counter()
    model.encode(text, task=task, on_truncate="ignore")
    print(
        f"{options.tokens} tokens in {time.perf_counter() - begin:.2f} s: {json.dumps(_memory())}"
    )
    if options.image:
        page = np.random.default_rng(0).integers(0, 256, (896, 672, 3), np.uint8)
        begin = time.perf_counter()
        model.encode_image(page, task=task)
        print(f"a page in {time.perf_counter() - begin:.2f} s: {json.dumps(_memory())}")
    return 0


def _memory() -> dict[str, float]:
    """Gigabytes (10⁹) of this process by kind, as Linux counts them."""
    return {kind: round(count / 1e9, 2) for kind, count in memory().items()}


if __name__ == "__main__":
    sys.exit(main())
