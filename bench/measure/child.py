"""Runs as a child process: what a program that only embeds waits for and holds.

Only the standard library and embedge.runtime are imported (the reference, where that is the job),
so that the process is what such a program would be. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from embedge.runtime.host.memory import process_memory

_KINDS = {"VmHWM": "peak", "VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file_mapped"}


def memory() -> dict[str, int]:
    """Return bytes of this process's memory by kind; empty where /proc does not tell."""
    return {_KINDS[key]: count for key, count in process_memory().items() if key in _KINDS}


def milliseconds_since(start: float) -> float:
    """Return milliseconds since ``start`` of the monotonic clock, which processes share."""
    return (time.monotonic() - start) * 1000


def embedge_steps(job: dict[str, Any]) -> dict[str, Any]:
    """Open a bundle, embed a text, embed a batch with every task, switch between tasks; or pages, where there are."""
    from embedge.runtime import Embedder

    result: dict[str, Any] = {"imported_ms": milliseconds_since(job["started"])}
    options: dict[str, Any] = {k: job[k] for k in ("precision", "threads", "device")}
    model = Embedder(job["bundle"], **options)
    if "pages" in job:
        return result | page_steps(model, job)
    rows = {"multi_vector": job.get("multi_vector", False)}
    model.encode(job["text"], task=job["tasks"][0], **rows)
    result["first_vector_ms"] = milliseconds_since(job["started"])
    result["after_first_vector"] = memory()
    for task in job["tasks"]:
        model.encode(job["batch"], task=task, batch_size=32, on_truncate="ignore", **rows)
        result.setdefault("after_first_task", memory())
    result["after_batches"] = memory()
    if len(job["tasks"]) > 1:
        result |= switches(model, Embedder(job["bundle"], max_sessions=1, **options), job)
    return result


def page_steps(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Embed a page, then all of them with every task."""
    result: dict[str, Any] = {}
    model.encode_image(job["pages"][:1], task=job["tasks"][0])
    result["first_vector_ms"] = milliseconds_since(job["started"])
    result["after_first_vector"] = memory()
    for task in job["tasks"]:
        model.encode_image(job["pages"], task=task)
        result.setdefault("after_first_task", memory())
    return result | {"after_batches": memory()}


def switches(all_open: Any, one_open: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Time a text under the other task: graphs kept open, and only one open at a time."""
    first, second = job["tasks"][:2]
    times: dict[str, list[float]] = {"all": [], "one": []}
    for task in (first, second) * 3:
        for name, model in (("all", all_open), ("one", one_open)):
            start = time.monotonic()
            model.encode(job["text"], task=task, multi_vector=job.get("multi_vector", False))
            times[name].append(milliseconds_since(start))
    # Of the six turns, the first of each task opens its graph in either case.
    return {
        "switch_graph_open_ms": sorted(times["all"][2:])[1],
        "switch_graph_closed_ms": sorted(times["one"][2:])[1],
    }


def reference() -> Callable[[dict[str, Any]], Any]:
    """Import the reference; return what loads a job's."""
    from embedge.bench import Reference

    options = ("pooling", "threads", "device")
    return lambda job: Reference(
        job["source"], job["adapter"], task=job["tasks"][0], **{k: job[k] for k in options}
    )


def late_reference() -> Callable[[dict[str, Any]], Any]:
    """Import that of late-interaction models; return what loads a job's."""
    import torch

    from embedge.bench.systems.multi_vector import MultiVectorReference
    from embedge.bench.systems.source import read_multi_vector_source

    def load(job: dict[str, Any]) -> Any:
        torch.set_num_threads(job["threads"])
        source = read_multi_vector_source(job["source"])
        return MultiVectorReference(source, job["adapter"], device=job["device"])

    return load


def torch_steps(job: dict[str, Any]) -> dict[str, Any]:
    """Load the source with its adapter, embed a text, embed a batch: what the reference costs."""
    load = late_reference if job.get("multi_vector", False) else reference
    imported = load()
    result: dict[str, Any] = {"imported_ms": milliseconds_since(job["started"])}
    model = imported(job)
    model.encode([job["text"]])
    result["first_vector_ms"] = milliseconds_since(job["started"])
    result["after_first_vector"] = memory()
    model.encode(job["batch"])
    result["after_batches"] = memory()
    return result


if __name__ == "__main__":
    work = json.loads(sys.argv[1])
    print(json.dumps((torch_steps if work["system"] == "torch" else embedge_steps)(work)))
