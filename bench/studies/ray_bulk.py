"""What Ray costs beside one process, and whether killed workers lose rows.

    python -m embedge.bench.studies.ray_bulk BUNDLE --precision int8 --task retrieval --rows 1000000

The same short texts are embedded twice on the same cores: by ``embedge embed`` from one Parquet file, in one process
with a thread a core, and by ``embed_parquet`` of :mod:`embedge.integrations.ray` from many files, with an actor a core.
Some of Ray's workers are killed (SIGKILL) meanwhile. Then the rows are compared: each has to be there once, with the
vector that the one process gave.

* *seconds*: from the start of the program to its end; of Ray's with its start and its end.
* *CPU seconds*: of all processes of the program, looked at twice a second. They say less about the overhead than
  seconds on a quiet machine, and more on a busy one.

Needs ``pip install "ray[data]" pyarrow psutil``. The last line is the same as one JSON document; exit status 1: rows
were lost, doubled, or have other vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from embedge.bench.studies.bulk import WORDS, short_texts
from embedge.runtime.host.cores import available_cores
from embedge.runtime.tables.arrow import load_pyarrow

__all__ = ["Difference", "Run", "compare", "main"]

_POLL_SECONDS = 0.5
_DIFFERENT_TEXTS = 20_000
_NEAR = 1e-4
_TARGET = 0.15
_JOB = """
import json, sys, ray
from embedge.integrations.ray import embed_parquet
source, target, bundle, options, cores, actors, threads = sys.argv[1:]
ray.init(num_cpus=int(cores), include_dashboard=False, log_to_driver=False, logging_level="error")
embed_parquet(
    source, target, bundle, actors=int(actors), threads_per_actor=int(threads), show_progress_bar=False,
    **json.loads(options),
)
"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One program.

    Attributes:
        seconds: from its start to its end.
        cpu_seconds: of all its processes.
        killed: workers that were killed.
    """

    seconds: float
    cpu_seconds: float
    killed: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Rows of Ray's files beside those of the one process.

    Attributes:
        lost: rows that are nowhere.
        doubled: rows that are there once more than they should be, all together.
        largest: largest absolute difference of a vector's value.
    """

    lost: int
    doubled: int
    largest: float

    @property
    def is_fault(self) -> bool:
        return self.lost > 0 or self.doubled > 0 or not self.largest <= _NEAR


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="embedge.bench.studies.ray_bulk",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", help="may be left out where the bundle has exactly one")
    parser.add_argument("--task", help="may be left out where the bundle has exactly one")
    parser.add_argument("--rows", type=int, default=20_000, metavar="N")
    parser.add_argument(
        "--words",
        type=int,
        nargs=2,
        default=WORDS,
        metavar=("FEWEST", "MOST"),
        help="of a text (4 20), before its number",
    )
    parser.add_argument(
        "--files", type=int, metavar="N", help="default: one per 10,000 rows, and 16 at least"
    )
    parser.add_argument("--actors", type=int, metavar="N", help="default: the cores there are")
    parser.add_argument("--kills", type=int, default=2, metavar="N", help="workers to kill (2)")
    parser.add_argument(
        "--folder", type=Path, help="for the files, 4 KB a row (default: a temporary one)"
    )
    options = parser.parse_args(arguments)
    for name in ("rows", "files", "actors"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, found {value}")
    if not 1 <= options.words[0] <= options.words[1]:
        parser.error(
            f"--words: expected FEWEST from 1 on and MOST from that on, found {options.words}"
        )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        return _study(options, Path(folder))


def _study(options: argparse.Namespace, folder: Path) -> int:
    cores = available_cores()
    actors = options.actors or cores
    files = options.files or max(options.rows // 10_000, 16)
    _write_inputs(folder, options.rows, files, tuple(options.words))
    choice = {n: getattr(options, n) for n in ("task", "precision") if getattr(options, n)}
    command = [sys.executable, "-m", "embedge.runtime", "embed", str(options.bundle), "--quiet"]
    command += [word for name, value in choice.items() for word in (f"--{name}", value)]
    command += ["--input", str(folder / "whole.parquet"), "--threads", str(cores)]
    command += ["--on-truncate", "ignore", "--output", str(folder / "one.parquet")]
    one = _run(command, lambda job: None)
    print(f"one process, {cores} threads:  {_told(one, options.rows)}", flush=True)
    target = folder / "many"
    job = [sys.executable, "-c", _JOB, str(folder / "in"), str(target), str(options.bundle)]
    job += [json.dumps(choice | {"on_truncate": "ignore"}), str(cores), str(actors)]
    job += [str(max(cores // actors, 1))]
    many = _run(job, _Killer(target, files, options.kills))
    print(f"Ray, {actors} actors, {files} files: {_told(many, options.rows)}", flush=True)
    difference = compare(folder / "one.parquet", target)
    overhead = many.seconds / one.seconds - 1
    of_cpu = many.cpu_seconds / one.cpu_seconds - 1
    print(
        f"workers killed {many.killed}; rows lost {difference.lost}, doubled {difference.doubled}"
    )
    print(f"largest difference of a value {difference.largest:.2g} (at most {_NEAR:g})")
    print(
        f"overhead: {overhead:+.1%} of seconds (target {_TARGET:.0%}), {of_cpu:+.1%} of CPU seconds"
    )
    print(
        json.dumps(
            {
                "rows": options.rows,
                "one": asdict(one),
                "ray": asdict(many),
                "difference": asdict(difference),
                "overhead": overhead,
                "overhead_cpu": of_cpu,
            }
        )
    )
    return 1 if difference.is_fault or many.killed < options.kills else 0


def compare(whole: Path, parts: Path) -> Difference:
    """Compares the rows of one file, whose ``id`` counts from 0, with those of a folder's files.

    Args:
        whole: with the columns ``id`` and ``embedding``.
        parts: a folder of such files.
    """
    ids, expected = _rows(whole)
    if not np.array_equal(ids, np.arange(len(ids))):
        raise SystemExit(f"{whole}: expected ids that count from 0, found others")
    counts = np.zeros(len(ids), np.int64)
    largest = 0.0
    for path in sorted(parts.rglob("*.parquet")):
        ids, vectors = _rows(path)
        np.add.at(counts, ids, 1)
        if len(ids):
            largest = float(np.maximum(largest, np.abs(vectors - expected[ids]).max()))  # keeps NaN
    return Difference(
        lost=int((counts == 0).sum()), doubled=int((counts - 1).clip(0).sum()), largest=largest
    )


def _rows(path: Path) -> tuple[Any, Any]:
    """The ids, int64 ``[rows]``, and vectors, float32 ``[rows, dim]``, of a file."""
    arrow = load_pyarrow()
    table = arrow.parquet.read_table(path)
    column = table.column("embedding").combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False)
    return table.column("id").to_numpy(), values.reshape(-1, column.type.list_size)


def _write_inputs(folder: Path, rows: int, files: int, words: tuple[int, int] = WORDS) -> None:
    """``whole.parquet``, and the same rows in ``in/``, in so many files."""
    arrow = load_pyarrow()
    texts = short_texts(min(rows, _DIFFERENT_TEXTS), words=words)
    ids = np.arange(rows)
    # A number behind the text makes each its own: equal texts would be embedded once a call.
    table = arrow.table({"id": ids, "text": [f"{texts[i % len(texts)]} {i}" for i in ids]})
    arrow.parquet.write_table(table, folder / "whole.parquet", row_group_size=65_536)
    (folder / "in").mkdir()
    for number in range(files):
        start, stop = rows * number // files, rows * (number + 1) // files
        arrow.parquet.write_table(
            table.slice(start, stop - start), folder / "in" / f"{number:06d}.parquet"
        )


def _run(command: Sequence[str], look: Callable[[psutil.Process], int | None]) -> Run:
    """Runs a program, and calls ``look`` twice a second, which says how many workers it killed."""
    begin = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, env=environment) as process:
        job = psutil.Process(process.pid)
        cpu: dict[int, float] = {}
        killed = 0
        while process.poll() is None:
            for member in _family(job):
                with suppress(psutil.Error):
                    times = member.cpu_times()
                    cpu[member.pid] = times.user + times.system
            killed += look(job) or 0
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
    seconds = time.perf_counter() - begin
    if process.returncode != 0:
        raise SystemExit(
            f"embedge.bench.studies.ray_bulk: {command[2]} ended with {process.returncode}"
        )
    return Run(seconds=seconds, cpu_seconds=sum(cpu.values()), killed=killed)


class _Killer:
    """Kills a worker whenever another share of the files is there."""

    def __init__(self, target: Path, files: int, kills: int) -> None:
        self._target, self._files, self._kills = target, files, kills
        self._done: list[int] = []

    def __call__(self, job: psutil.Process) -> int:
        there = len(list(self._target.rglob("*.parquet"))) if self._target.exists() else 0
        if len(self._done) >= self._kills:
            return 0
        if there < self._files * (len(self._done) + 1) / (self._kills + 1):
            return 0
        for member in _family(job):
            with suppress(psutil.Error):
                if member.pid not in self._done and "_Files" in " ".join(member.cmdline()):
                    member.kill()
                    self._done.append(member.pid)
                    return 1
        return 0


def _family(job: psutil.Process) -> Iterator[psutil.Process]:
    """The process and all that descend from it."""
    with suppress(psutil.Error):
        yield job
        yield from job.children(recursive=True)


def _told(run: Run, rows: int) -> str:
    return f"{run.seconds:8.1f} s {rows / run.seconds:8.0f} texts/s {run.cpu_seconds:8.1f} CPU s"


if __name__ == "__main__":
    sys.exit(main())
