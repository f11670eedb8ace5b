"""Where a pass's time goes: ``python -m embedge.bench.studies.operators BUNDLE --precision int8 --shapes 8x64``.

ONNX Runtime's profiler times every node of a graph that the runtime opens. Printed is, by kind of operator, the
median time of a pass and its share. The share of all products says how near a pass comes to products alone.

One session runs a batch with all threads. ``EMBEDGE_KERNELS=avx2`` shows an older instruction set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from embedge.bench.options import Shape
from embedge.runtime import Embedder, EmbedgeError
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.host.cores import available_cores
from embedge.runtime.sessions import session as sessions
from embedge.runtime.sessions.task_inputs import task_inputs

__all__ = ["main", "times_by_operator"]

_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm")  # what these begin
_REST = "between nodes"
_TOKENS = 50  # different ones, which every vocabulary has


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="embedge.bench.studies.operators", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", nargs="+", default=["int8"])
    parser.add_argument("--task", help="default: the bundle's first")
    parser.add_argument(
        "--shapes", nargs="+", type=Shape.parse, default=[Shape(batch=8, tokens=64)]
    )
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args(arguments)
    try:
        _show_all(options)
    except EmbedgeError as error:
        print(f"embedge.bench.studies.operators: {error}", file=sys.stderr)
        return 1
    return 0


def _show_all(options: argparse.Namespace) -> None:
    bundle = Bundle(options.bundle, verify="size")
    task = options.task or next(iter(bundle.manifest.tasks))
    for precision in options.precision:
        Embedder(
            bundle.root, precision=precision, task=task
        ).close()  # refuses what the bundle lacks
        for shape in options.shapes:
            times = times_by_operator(
                bundle, precision, task, shape, threads=options.threads, runs=options.runs
            )
            whole = sum(times.values())
            products = sum(time for name, time in times.items() if name.startswith(_PRODUCTS))
            print(
                f"{precision}, {task}, {shape.name}: {whole:.2f} ms, products {products / whole:.1%}"
            )
            width = max(map(len, times))
            for name, time in sorted(times.items(), key=lambda item: -item[1]):
                print(f"  {name:{width}}  {time:9.2f} ms  {time / whole:6.1%}")


def times_by_operator(
    bundle: Bundle, precision: str, task: str, shape: Shape, *, threads: int, runs: int
) -> Mapping[str, float]:
    """Median milliseconds of a pass's nodes, by operator, and as "between nodes" those of the pass that no node has.

    Args:
        bundle: whose graph.
        precision: one of its precisions.
        task: one of its tasks.
        shape: of the batch, of random tokens without padding.
        threads: of the session.
        runs: timed ones, after three that are not.
    """
    generator = np.random.default_rng(0)
    ids = generator.integers(1, _TOKENS, (shape.batch, shape.tokens), dtype=np.int64)
    rows = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    rows["token_type_ids"] = np.zeros_like(ids)
    inputs = {name: rows[name] for name in bundle.graph_inputs(precision, task) if name in rows}
    with tempfile.TemporaryDirectory() as folder:
        with _profiled(str(Path(folder) / "profile")):
            config = sessions.SessionConfig(threads=threads)
            session = sessions.open_graph(bundle, precision, task, config)
        tensors = bundle.task_tensors(precision, task)
        if tensors is not None:
            session = session.of_task(task_inputs(tensors))
        for _ in range(runs + 3):
            session.run(session.outputs[0], inputs)
        del session
        (file,) = Path(folder).iterdir()
        events = json.loads(file.read_text(encoding="utf-8"))
    return _medians(events, runs)


def _medians(events: Sequence[Mapping[str, Any]], runs: int) -> Mapping[str, float]:
    """By operator, of the last runs of a profile."""
    ends = [event for event in events if event["name"] == "model_run"][-runs:]
    times: dict[str, list[float]] = defaultdict(lambda: [0.0] * runs)
    for event in events:
        if event["cat"] != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        for run, end in enumerate(ends):
            if end["ts"] <= event["ts"] < end["ts"] + end["dur"]:
                times[event["args"]["op_name"]][run] += event["dur"] / 1000
    for run, end in enumerate(ends):
        nodes = sum(of_operator[run] for name, of_operator in times.items() if name != _REST)
        times[_REST][run] = end["dur"] / 1000 - nodes
    return {name: statistics.median(of_operator) for name, of_operator in times.items()}


@contextmanager
def _profiled(prefix: str) -> Iterator[None]:
    """Sessions that the runtime opens until the block ends have a profiler, which writes its file when they close."""
    options_of = sessions.new_options

    def with_profiler(**arguments: Any) -> Any:
        options = options_of(**arguments)
        options.enable_profiling, options.profile_file_prefix = True, prefix
        return options

    sessions.new_options = with_profiler
    try:
        yield
    finally:
        sessions.new_options = options_of


if __name__ == "__main__":
    raise SystemExit(main())
