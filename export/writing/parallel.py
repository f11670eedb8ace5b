"""Computing tensors on several cores without holding many of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from embedge.runtime.host.cores import available_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

_COST_LIMIT = 50_000_000  # elements in the making at once: 200 MB of float32


def in_order(
    items: Sequence[Item],
    compute: Callable[[Item], Result],
    *,
    cost: Callable[[Item], int],
    limit: int = _COST_LIMIT,
) -> Iterator[Result]:
    """Yield ``compute(item)`` for each item in order, computed ahead in threads.

    numpy's loops run without the interpreter's lock.

    Args:
        items: what to compute.
        compute: runs in a thread; its exception is raised where its result would be yielded.
        cost: of an item, in the unit of ``limit``.
        limit: sum of the costs of the items that are computed at once; one item always goes.
    """
    waiting = deque(items)
    running: deque[tuple[Future[Result], int]] = deque()
    workers = available_cores()  # reads files, too slow to ask for every tensor
    with ThreadPoolExecutor(workers) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    price = cost(waiting[0])
                    if running and price + sum(c for _, c in running) > limit:
                        break
                    running.append((pool.submit(compute, waiting.popleft()), price))
                yield running.popleft()[0].result()
        finally:
            for future, _ in running:
                future.cancel()
