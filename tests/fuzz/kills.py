"""Kills exports, additions, overwrites and ``embedge prepare``, and looks at what is left.

    python -m tests.fuzz.kills --seed 1    # 40 exports, 20 of each of the others, at random moments
    python -m tests.fuzz.kills --every     # at every change of a file or folder, one after the other
    python -m tests.fuzz.kills --quick     # at a few of these

After each kill there has to be a complete bundle under the name, or none where there was none; the same run
succeeds when it is started again, and leaves nothing beside the bundle or inside it that no one listed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from tokenizers import Tokenizer

from embedge.export import export_bundle
from embedge.runtime import Embedder, EmbedgeError, EmbedgeWarning
from embedge.runtime.bundle import writing
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.cli.main import main as command
from embedge.runtime.kernels.library import own_kernels
from embedge.runtime.sessions.prepared_graphs import PreparedGraphs
from tests.fuzz.child import Outcome, Wrong, run

__all__ = ["JOBS", "Job", "die_after", "die_at_change", "kill"]

_LOADED = (onnx, onnxruntime, Tokenizer)  # before the fork, for all children
_CHANGES = (
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "os.chmod",
    "fcntl.flock",
    "ctypes.dlopen",  # before names are exchanged
)
_TEXTS = ["a b c", "d"]
_RUNS = {"export": 40, "prepare": 20, "overwrite": 20, "overwrite-in-two-steps": 20, "add": 20}
_QUICK = 3


@dataclass(frozen=True)
class Job:
    """Something that writes.

    Attributes:
        work: takes the source and the bundle's path.
        on: the tasks that the bundle has before, none: there is no bundle.
        tasks: those that it has afterwards.
        exchange: whether two names can be exchanged in one step.
        prepares: whether prepared graphs are left.
    """

    work: Callable[[Path, Path], None]
    on: tuple[str, ...]
    tasks: tuple[str, ...]
    exchange: bool = True
    prepares: bool = False


def _export(source: Path, out: Path, *tasks: str, **options: Any) -> None:
    precisions = ["int8", "int4"]
    adapters = dict.fromkeys(tasks)
    export_bundle(
        source, adapters=adapters, precisions=precisions, out=out, calibration="none", **options
    )


def _prepare(source: Path, out: Path) -> None:
    with redirect_stdout(StringIO()):
        if command(["prepare", str(out), "--pack-only"]) != 0:
            raise Wrong("prepare failed")


JOBS = {
    "export": Job(lambda s, o: _export(s, o, "a"), (), ("a",)),
    "overwrite": Job(lambda s, o: _export(s, o, "b", overwrite=True), ("a",), ("b",)),
    "overwrite-in-two-steps": Job(
        lambda s, o: _export(s, o, "b", overwrite=True), ("a",), ("b",), exchange=False
    ),
    "add": Job(lambda s, o: _export(s, o, "b"), ("a",), ("a", "b")),
    "prepare": Job(_prepare, ("a",), ("a",), prepares=True),
}


class Kills:
    """Kills the jobs in folders of their own.

    Args:
        root: an empty folder.
        source: a model, or ``None`` to make one, with torch.
    """

    def __init__(self, root: Path, source: Path | None = None) -> None:
        self._root, self._given = root, source
        self._source, self._start = source or root / "source", root / "start"
        own_kernels()  # tried once, and not by each child
        outcome = run(self._make, seconds=300)
        if outcome.kind != "right":
            raise RuntimeError(f"the bundle could not be made: {outcome.detail}")

    def changes(self, name: str) -> int:
        """How many changes of files and folders a job makes."""
        return int(self._in_a_copy(name, lambda out: run(lambda: self._counted(name, out))).detail)

    def seconds(self, name: str) -> float:
        """How long a job takes."""
        begin = time.monotonic()
        self._in_a_copy(name, lambda out: run(lambda: JOBS[name].work(self._source, out)))
        return time.monotonic() - begin

    def at_change(self, name: str, number: int) -> str | None:
        """Kill a job before its change ``number``; what was wrong afterwards."""
        return self._killed(name, lambda out: die_at_change(out.parent, number))

    def at_time(self, name: str, seconds: float) -> str | None:
        """Kill a job after some seconds; what was wrong afterwards."""
        return self._killed(name, lambda _: die_after(seconds))

    def _make(self) -> None:
        if self._given is None:
            from tests.helpers.exports import WIDE
            from tests.helpers.models import make_model, save

            save(make_model("bert", **WIDE), self._source)
        _export(self._source, self._start, "a")

    def _in_a_copy(self, name: str, use: Callable[[Path], Any]) -> Any:
        with tempfile.TemporaryDirectory(dir=self._root) as folder:
            out = Path(folder) / "out"
            if JOBS[name].on:
                shutil.copytree(self._start, out)
            return use(out)

    def _counted(self, name: str, out: Path) -> int:
        count = 0

        def note() -> None:
            nonlocal count
            count += 1

        _watch(out.parent, note)
        self._work(name, out)
        return count

    def _work(self, name: str, out: Path) -> None:
        job = JOBS[name]
        if not job.exchange:
            writing._exchange = lambda *_: False
        job.work(self._source, out)

    def _killed(self, name: str, arm: Callable[[Path], None]) -> str | None:
        def use(out: Path) -> str | None:
            def work() -> None:
                arm(out)
                self._work(name, out)

            ended = run(work)
            if ended.kind not in ("crash", "right"):
                return f"the run itself: {ended.kind}: {ended.detail}"
            for what, check in (
                ("after the kill", lambda: self._check(name, out, again=False)),
                ("the next run", lambda: self._again(name, out)),
                ("after the next run", lambda: self._check(name, out, again=True)),
            ):
                outcome: Outcome = run(check)
                if outcome.kind != "right":
                    left = sorted(str(path.relative_to(out.parent)) for path in _all(out.parent))
                    return f"{what}: {outcome.kind}: {outcome.detail}\n{left}"
            return None

        found: str | None = self._in_a_copy(name, use)
        return found

    def _again(self, name: str, out: Path) -> None:
        try:
            self._work(name, out)
        except EmbedgeError as error:  # it was done when it was killed
            if "nothing to add" not in str(error):
                raise

    def _check(self, name: str, out: Path, *, again: bool) -> None:
        job = JOBS[name]
        if not out.exists():
            if again or (job.on and (job.exchange or not writing.replaced_of(out).is_dir())):
                raise Wrong(f"no bundle: {sorted(os.listdir(out.parent))}")
            return
        tasks = tuple(_open(out))
        if tasks not in ((job.tasks,) if again else (job.on, job.tasks)):
            raise Wrong(f"tasks {tasks}")
        if again:
            _check_nothing_stray(out, prepared=job.prepares)


def _open(out: Path) -> list[str]:
    """The tasks of a bundle, after every byte was compared and every graph has run."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", EmbedgeWarning)
        manifest = Bundle(out, verify="full").manifest
        for precision, settings in manifest.precisions.items():
            model = Embedder(out, precision=precision, threads=1, verify="full")
            for task in settings.graphs:
                vectors = model.encode(_TEXTS, task=task)
                if not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4):
                    raise Wrong(f"{precision}/{task}: vectors of another length than 1")
    return list(manifest.tasks)


def _check_nothing_stray(out: Path, *, prepared: bool) -> None:
    bundle = Bundle(out, verify="none")
    beside = sorted(os.listdir(out.parent))
    if beside != [out.name]:
        raise Wrong(f"beside the bundle: {beside}")
    found = {path.relative_to(out).as_posix() for path in _all(out) if not path.is_dir()}
    inside = {name for name in found if name.startswith("prepared/")}
    listed = {*bundle.manifest.files, "manifest.json", "README.md"}
    if found - inside != listed:
        raise Wrong(f"in the bundle: {sorted((found - inside) ^ listed)}")
    if any(part.startswith(".") for name in inside for part in name.split("/")):
        raise Wrong(f"in prepared: {sorted(inside)}")
    if any(path.is_dir() and not any(path.iterdir()) for path in _all(out)):
        raise Wrong("an empty folder")
    if prepared:
        graphs = PreparedGraphs(bundle)
        wanted = sum(len(settings.graphs) for settings in bundle.manifest.precisions.values())
        if graphs.problems() or graphs.count != wanted:
            raise Wrong(f"prepared: {graphs.count} of {wanted} graphs, {graphs.problems()}")


def _all(folder: Path) -> Iterator[Path]:
    return folder.rglob("*")


def _watch(folder: Path, change: Callable[[], None]) -> None:
    """Call ``change`` before each change of files and folders below ``folder``."""
    inside = f"{os.path.realpath(folder)}/"

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in ("fcntl.flock", "ctypes.dlopen"):
            change()
            return
        elif event in _CHANGES:
            path = args[0]
        else:
            return
        with suppress(TypeError):
            # names in a folder that is being deleted are relative to it
            if not os.path.isabs(os.fsdecode(path)) or os.fsdecode(path).startswith(inside):
                change()

    sys.addaudithook(note)


def die_at_change(folder: Path, number: int) -> None:
    """Let this process die at a change of files below a folder, counted from 0."""
    left = number

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(folder, count)


def die_after(seconds: float) -> None:
    """Let this process die after a while."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process as SIGKILL does
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-4))


def kill(name: str, kills: Kills, options: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    """Kill a job as the command line asks: when, and what was wrong."""
    if options.every or options.quick:
        count = kills.changes(name)
        chosen: Sequence[int] = range(count + 1)
        if options.quick:
            chosen = [round(count * (i + 1) / _QUICK) for i in range(_QUICK)]
        for number in chosen:
            yield f"change {number} of {count}", kills.at_change(name, number)
        return
    rng = random.Random(f"{options.seed}:{name}")
    longest = kills.seconds(name)
    for number in range(options.count or _RUNS[name]):
        if number % 2:
            seconds = rng.uniform(0, longest)
            yield f"{seconds:.4f} of {longest:.2f} s", kills.at_time(name, seconds)
        else:
            place = rng.randrange(kills.changes(name) + 1)
            yield f"change {place}", kills.at_change(name, place)


def main() -> int:
    """Kill what the command line asks for; 1 if anything was wrong afterwards."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="kills of each job")
    parser.add_argument("--job", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--source", type=Path, help="a model's folder (default: one is made)")
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    done = faults = 0
    with tempfile.TemporaryDirectory() as folder:
        kills = Kills(Path(folder), options.source)
        for name in options.job:
            for when, problem in kill(name, kills, options):
                done += 1
                if problem is not None:
                    faults += 1
                    print(f"{name}, killed at {when}: {problem}", flush=True)
    print(f"{done} kills, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
