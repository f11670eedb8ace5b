"""Measures a bundle: task by task, the reference first, then every system against it."""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from embedge.bench import _data as data_files
from embedge.bench._backbone import adapter_folder
from embedge.bench._errors import BenchError
from embedge.bench._machine import machine, versions
from embedge.bench._measure import (
    TORCH_FP32,
    TaskData,
    latency,
    reference_vectors,
    vectors_against,
)
from embedge.bench._options import BenchOptions
from embedge.bench._peer_context import PeerContext
from embedge.bench._peers import PEERS, build_peers, chosen_peers
from embedge.bench._process import measure_process
from embedge.bench._reference import Reference
from embedge.bench._report import Report, Row
from embedge.bench._source import Source, read_source
from embedge.bench._systems import EmbedgeSystem, System, TorchSystem
from embedge.runtime._bundle import Bundle
from embedge.runtime._cores import available_cores

__all__ = ["run_bench"]


def run_bench(options: BenchOptions, show_progress_bar: bool = False) -> Report:
    """Measure what ``options`` says and return the figures.

    Args:
        options: what to measure.
        show_progress_bar: on standard error.

    Raises:
        EmbedgeError: the bundle, the reference, an adapter or a data file does not hold what was
            asked for.
    """
    return _Run(options, show_progress_bar).report()


class _Run:
    def __init__(self, options: BenchOptions, show_progress_bar: bool) -> None:
        self._options = options
        self._bundle = Bundle(options.bundle)
        self._threads = options.threads or available_cores()
        torch.set_num_threads(self._threads)
        self._notes = _busy(self._threads)
        self._tasks = _chosen("task", options.tasks, list(self._bundle.manifest.tasks))
        self._precisions = self._chosen_precisions()
        self._adapters = self._chosen_adapters()
        self._source = read_source(options.reference, options.pooling)
        self._peers = chosen_peers(options.peers, self._notes.append)
        self._texts = self._chosen_texts()
        self._evaluations = self._chosen_evaluations()
        self._timed_tasks = self._tasks[: options.effort.latency_tasks] if options.latency else []
        self._bar = tqdm(
            total=self._step_count(), disable=not show_progress_bar, file=sys.stderr, unit="step"
        )

    def report(self) -> Report:
        started = time.monotonic()
        with self._bar:
            rows = [row for task in self._tasks for row in self._task_rows(task)]
            process = self._processes() if self._options.process else {}
        effort = self._options.effort
        untimed = [task for task in self._tasks if task not in self._timed_tasks]
        if self._timed_tasks and untimed:
            self._notes.append(
                f"latency was measured on {', '.join(self._timed_tasks)} alone; the graphs of "
                f"{', '.join(untimed)} differ from it only in the numbers they hold"
            )
        settings = {
            "tasks": self._tasks,
            "precisions": self._precisions,
            "threads": self._threads,
            "texts": len(self._texts),
            "evaluations": {t: [e.name for e in s] for t, s in self._evaluations.items()},
            "latency_tasks": self._timed_tasks,
            "effort": asdict(effort),
            "seconds": round(time.monotonic() - started, 1),
        }
        return Report(
            bundle=self._bundle.root.resolve().name,
            source=self._bundle.manifest.source.to_dict(),
            machine=machine(self._threads),
            versions=versions(),
            settings=settings,
            notes=tuple(dict.fromkeys(self._notes)),
            sizes=self._sizes(),
            process=process,
            rows=tuple(rows),
        )

    # -- one task -------------------------------------------------------------------------------

    def _task_rows(self, task: str) -> Iterator[Row]:
        data = TaskData(
            texts=self._texts,
            evaluations=self._evaluations.get(task, []),
            dims=self._dims(),
            normalize=self._bundle.manifest.model.normalize,
        )
        adapter = self._adapters.get(task)
        self._step(f"{task}: reference")
        reference = reference_vectors(Reference(self._source, adapter), data)
        with self._systems(task, adapter) as systems:
            figures = {}
            for system in systems:
                self._step(f"{task}: {system.name}")
                figures[system.name] = vectors_against(
                    system, data, reference, self._options.effort
                )
            if task in self._timed_tasks:
                texts = [text.text for text in self._texts]
                tokens = Reference(self._source).tokens
                times = latency(
                    systems,
                    tokens,
                    texts,
                    self._options.effort,
                    lambda name: self._step(f"{task}: {name}"),
                )
                figures = {name: values | times[name] for name, values in figures.items()}
            for system in systems:
                yield Row(
                    task=task,
                    system=system.name,
                    role=system.role,
                    precision=system.precision,
                    bytes_on_disk=system.bytes_on_disk,
                    **figures[system.name],
                )
        gc.collect()  # models with reference cycles, before the next task's

    @contextmanager
    def _systems(self, task: str, adapter: Path | None) -> Iterator[list[System]]:
        weights = _weights_bytes(self._source)
        merged = Reference(self._source, adapter, merged=True)
        halved = Reference(self._source, adapter, "bfloat16", merged=True)
        systems: list[System] = [
            TorchSystem(TORCH_FP32, merged, weights),
            TorchSystem("torch bf16", halved, weights // 2),
        ]
        workdir = Path(tempfile.mkdtemp(prefix="embedge-bench-"))
        try:
            if self._peers:
                self._step(f"{task}: building peers")
                context = PeerContext(merged=merged, threads=self._threads, workdir=workdir)
                systems += build_peers(
                    self._peers,
                    context,
                    self._notes.append,
                    self._options.effort.peer_variants,
                )
            systems += [
                EmbedgeSystem(self._bundle.root, task, precision, self._threads)
                for precision in self._precisions
                if task in self._bundle.manifest.precisions[precision].graphs
            ]
            yield systems
        finally:
            shutil.rmtree(workdir, ignore_errors=True)

    # -- the rest -------------------------------------------------------------------------------

    def _processes(self) -> dict[str, Any]:
        texts = [text.text for text in self._texts if 300 < len(text.text) < 900]
        batch = (texts or [text.text for text in self._texts])[:32]
        common = {"text": "how do I sort a dict", "batch": batch, "threads": self._threads}
        repeats = self._options.effort.process_repeats
        result = {}
        for precision in self._precisions:
            self._step(f"cold start, {precision}")
            graphs = self._bundle.manifest.precisions[precision].graphs
            tasks = [task for task in self._tasks if task in graphs]
            own = {"bundle": str(self._bundle.root.resolve()), "precision": precision}
            job = {"system": "embedge", "tasks": tasks, **own, **common}
            result[f"embedge {precision}"] = measure_process(job, repeats)
        self._step("cold start, torch")
        adapter = self._adapters.get(self._tasks[0])
        job = {
            "system": "torch",
            "source": str(self._source.path),
            "adapter": None if adapter is None else str(adapter.resolve()),
            "pooling": self._source.pooling,
            **common,
        }
        result[TORCH_FP32] = measure_process(job, repeats)
        return result

    def _sizes(self) -> dict[str, int]:
        files = self._bundle.manifest.files
        sizes = {
            precision: sum(f.size for name, f in files.items() if name.startswith(f"{precision}/"))
            for precision in self._precisions
        }
        return {"fp32_weights": _weights_bytes(self._source), **sizes}

    def _dims(self) -> list[int]:
        model = self._bundle.manifest.model
        return sorted({*(model.matryoshka_dims or ()), model.dim}, reverse=True)

    def _step(self, name: str) -> None:
        self._bar.set_description(name, refresh=False)
        self._bar.update()

    def _step_count(self) -> int:
        variants = self._options.effort.peer_variants
        peers = sum(len(PEERS[name].builders[:variants]) for name in self._peers)
        systems = 3 + len(self._precisions) + peers + bool(self._peers)
        timed = 5 * len(self._timed_tasks)
        processes = (len(self._precisions) + 1) * self._options.process
        return len(self._tasks) * systems + timed + processes

    # -- what was asked for ---------------------------------------------------------------------

    def _chosen_precisions(self) -> list[str]:
        found = self._bundle.manifest.precisions
        known = [name for name, precision in found.items() if "cpu" in precision.devices]
        return _chosen("precision", self._options.precisions, known)

    def _chosen_adapters(self) -> dict[str, Path]:
        declared = self._bundle.manifest.tasks
        unknown = [name for name in self._options.adapters if name not in declared]
        if unknown:
            raise BenchError(
                f"--adapter {', '.join(unknown)}: the bundle's tasks are {', '.join(declared)}"
            )
        lacking = [
            task
            for task in self._tasks
            if declared[task].adapter is not None and task not in self._options.adapters
        ]
        if lacking:
            raise BenchError(
                f"{self._bundle.root}: the tasks {', '.join(lacking)} were merged from adapters; "
                "the reference needs them too: add "
                + " ".join(f"--adapter {task}=FOLDER" for task in lacking)
            )
        return {
            task: adapter_folder(task, self._options.adapters[task])
            for task in self._tasks
            if declared[task].adapter is not None
        }

    def _chosen_texts(self) -> list[data_files.Text]:
        file = self._options.texts
        texts = data_files.default_texts() if file is None else data_files.read_texts(file)
        rows = data_files.subset(len(texts), self._options.effort.texts)
        if len(rows) < len(texts):
            self._notes.append(f"fidelity on {len(rows)} of {len(texts)} texts, drawn by a seed")
        return [texts[i] for i in rows]

    def _chosen_evaluations(self) -> dict[str, list[data_files.EvalSet]]:
        effort = self._options.effort
        result: dict[str, list[data_files.EvalSet]] = {task: [] for task in self._tasks}
        for task, file in self._options.evaluations:
            if task not in self._bundle.manifest.tasks:
                known = ", ".join(self._bundle.manifest.tasks)
                raise BenchError(f"--eval {task}={file}: the bundle's tasks are {known}")
            if task not in result:
                continue
            if effort.eval_sets is not None and len(result[task]) >= effort.eval_sets:
                self._notes.append(f"{file.stem} was left out: one labelled set a task")
                continue
            whole = data_files.read_eval(file)
            result[task].append(data_files.limited(whole, effort.rows))
            if effort.rows is not None and len(whole.first) > effort.rows:
                note = f"{whole.name}: {effort.rows} of {len(whole.first)} rows, drawn by a seed"
                if whole.scores is None:
                    note += "; fewer passages to choose from make retrieval look easier"
                self._notes.append(note)
        return result


def _chosen(what: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        raise BenchError(
            f"--{what} {' '.join(unknown)}: not measurable in this bundle; it has: "
            f"{', '.join(known) or 'none'}"
        )
    return list(known) if wanted is None else [name for name in known if name in wanted]


def _busy(threads: int) -> list[str]:
    """Return a note if others keep the processor busy before the bench does."""
    load = psutil.getloadavg()[0]
    cores = psutil.cpu_count() or 1
    if load + threads <= cores + 1:
        return []
    return [
        f"the machine was busy when this began (load {load:.1f} on {cores} cores): times are not "
        "its own, and ratios to torch, whose threads wait for each other, are flattering"
    ]


def _weights_bytes(source: Source) -> int:
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        sizes = [file.stat().st_size for file in source.transformer.glob(pattern)]
        if sizes:
            return sum(sizes)
    return 0
