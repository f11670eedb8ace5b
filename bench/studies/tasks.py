"""Tasks of a matmul on many cores, by simulation: ``python -m embedge.bench.studies.tasks``.

The kernels give ONNX Runtime's threads tasks, each some rows by some slabs of 48 columns
(``run_work`` in ``runtime/kernels/native/library.c``). Few tasks leave threads without work at the end; small ones
cost their claims, and read weights again. This plays ONNX Runtime's loop: threads claim one task after the other,
first of their own shard of eight, then of the others' (``LoopCounter`` in its ``threadpool.cc``). Shown is which part
of all threads' time is work of the matmul, by shape, threads and rule. Machines differ: the rates are options.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["IN_USE", "RULES", "SHAPES", "Machine", "Matmul", "Rule", "efficiency", "main", "split"]

_SLAB, _STRIP, _SHARDS = 48, 8, 8  # columns, rows, shards of ONNX Runtime's loop


class Matmul(NamedTuple):
    """Sizes of a product."""

    rows: int
    depth: int
    columns: int


class Rule(NamedTuple):
    """How a matmul is split.

    Attributes:
        tasks: as many are wanted.
        rows: the fewest of a task, where it has not all.
        products: the fewest multiplications of a task, where it has not all rows.
    """

    tasks: int
    rows: int
    products: int = 1


class Machine(NamedTuple):
    """What things take.

    Attributes:
        products: multiplications a second of one core.
        read: bytes a second at which one core reads weights that another read before.
        claim: seconds to claim a task.
        wake: seconds until a thread has its first task, and as much a sixteenth for each before it.
        jitter: the most by which a task takes longer than it should, as a part of it.
    """

    products: float = 200e9
    read: float = 20e9
    claim: float = 0.2e-6
    wake: float = 3e-6
    jitter: float = 0.2


# The first one was the kernels' once; IN_USE is theirs.
IN_USE = Rule(512, 32, 1 << 20)
RULES = (Rule(64, 64), Rule(256, 64), Rule(512, 16, 1 << 20), IN_USE, Rule(1024, 32, 1 << 20))
SHAPES = {
    "MiniLM 8×64, q": Matmul(512, 384, 384),
    "MiniLM 8×64, up": Matmul(512, 384, 1536),
    "MiniLM 32×128, q": Matmul(4096, 384, 384),
    "768 wide 1×64, q": Matmul(64, 768, 768),
    "768 wide 8×64, down": Matmul(512, 3072, 768),
    "2048 wide 1×64, q": Matmul(64, 2048, 2048),
    "2048 wide 1×512, kv": Matmul(512, 2048, 256),
    "2048 wide 1×512, down": Matmul(512, 11008, 2048),
    "2048 wide 8×512, up": Matmul(4096, 2048, 11008),
}


def split(matmul: Matmul, rule: Rule) -> tuple[list[tuple[int, int]], int]:
    """``(rows, slabs)`` of each task, and in how many blocks the rows of a slab are, as ``run_work`` does it."""
    slabs = -(-matmul.columns // _SLAB)
    per_task = -(-slabs // rule.tasks)
    groups = -(-slabs // per_task)
    products = matmul.rows * matmul.depth * per_task * _SLAB
    most = min(matmul.rows // rule.rows, products // rule.products)
    blocks = max(1, min(-(-rule.tasks // groups), most))
    edges = [matmul.rows * block // blocks for block in range(blocks + 1)]
    return [
        (end - start, min(per_task, slabs - group * per_task))
        for group in range(groups)
        for start, end in itertools.pairwise(edges)
    ], blocks


def efficiency(matmul: Matmul, rule: Rule, threads: int, machine: Machine) -> float:
    """The part of all threads' time, from the call to its end, that one thread without tasks would take."""
    tasks, blocks = split(matmul, rule)
    draw = random.Random(5)
    shards = min(_SHARDS, threads, len(tasks))
    left = [
        list(range(len(tasks) * shard // shards, len(tasks) * (shard + 1) // shards))[::-1]
        for shard in range(shards)
    ]
    workers = min(threads, len(tasks))
    ready = [(machine.wake * (worker > 0) * (1 + worker / 16), worker) for worker in range(workers)]
    heapq.heapify(ready)
    held: list[int | None] = [None] * workers  # the slabs whose weights a thread's cache holds
    end = 0.0
    while ready:
        now, worker = heapq.heappop(ready)
        home = worker % shards
        shard = next((s for i in range(shards) if left[s := (home + i) % shards]), None)
        if shard is None:
            end = max(end, now)
            continue
        index = left[shard].pop()
        rows, slabs = tasks[index]
        work = rows * matmul.depth * slabs * _SLAB / machine.products
        # A strip that is not full takes the time of its weights' loads: half of a full one's.
        work *= max(1.0, 0.5 * _STRIP * -(-rows // _STRIP) / rows)
        group = index // blocks
        fetch = 0.0 if held[worker] == group else matmul.depth * slabs * _SLAB / machine.read
        held[worker] = group
        took = max(work, fetch) * (1 + draw.random() * machine.jitter)
        heapq.heappush(ready, (now + machine.claim + took, worker))
    alone = matmul.rows * matmul.depth * -(-matmul.columns // _SLAB) * _SLAB / machine.products
    return alone / (threads * end)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each shape and number of threads."""
    parser = argparse.ArgumentParser(prog="embedge.bench.studies.tasks", description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 16, 64])
    for name, value in Machine()._asdict().items():
        parser.add_argument(f"--{name}", type=float, default=value)
    options = vars(parser.parse_args(arguments))
    threads = options.pop("threads")
    machine = Machine(**options)
    print("shape | threads | " + " | ".join(str(tuple(rule)) for rule in RULES))
    for name, matmul in SHAPES.items():
        for count in threads:
            parts = (
                f"{efficiency(matmul, rule, count, machine):.2f} of {len(split(matmul, rule)[0])}"
                for rule in RULES
            )
            print(f"{name} | {count} | " + " | ".join(parts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
