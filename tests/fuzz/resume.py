"""Kills runs of ``embedge embed --resume`` one after the other until one gets through, and compares what it wrote.

    python -m tests.fuzz.resume BUNDLE --seed 1 --count 40

Each run is killed at some change of a file or folder, or at some moment. In the end the output has to be, to the
bit, what a run without ``--resume`` writes, and nothing may be left beside it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import warnings
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embedge.runtime.cli import embed, parts
from embedge.runtime.cli.main import main as command
from tests.fuzz.child import Outcome, Wrong, run
from tests.fuzz.kills import die_after, die_at_change

ROWS, CHUNK = 61, 5
INPUTS = ("lines", "in.jsonl", "in.csv", "in.parquet")
FORMATS = ("jsonl", "npy", "csv", "parquet")
_MOST_RUNS = 200


def write_inputs(folder: Path) -> None:
    """The same rows in each format; in CSV and JSONL some with line breaks."""
    texts = [f"w{i} w{i * 7 % 60}" for i in range(ROWS)]
    (folder / "lines").write_text("\n".join(texts))
    objects = [f'{{"id": {i}, "text": "{text}\\n"}}\n' for i, text in enumerate(texts)]
    (folder / "in.jsonl").write_text("".join(objects))
    rows = [f'{i},"{text}\n"\n' for i, text in enumerate(texts)]
    (folder / "in.csv").write_text("id,text\n" + "".join(rows))
    table = pa.table({"id": range(ROWS), "text": texts})
    pq.write_table(table, folder / "in.parquet", row_group_size=17)


def job(bundle: Path, folder: Path, source: str, file_format: str, shard: str | None) -> list[str]:
    """The command that a run executes, but for its output."""
    call = ["embed", str(bundle), "--input", str(folder / source), "--format", file_format]
    call += ["--batch-size", "4", "--threads", "1", "--quiet"]
    if source.endswith("jsonl"):
        call += ["--field", "text"]
    return call + ([] if shard is None else ["--shard", shard])


def until_through(call: list[str], out: Path, rng: random.Random, kills: int) -> int:
    """Runs the command until it gets through, killed so many times at most; how often it was killed."""

    def once(die: bool) -> Outcome:
        def work() -> None:
            if die and rng.random() < 0.75:
                die_at_change(out.parent, rng.randrange(25))
            elif die:
                die_after(rng.uniform(0.001, 0.1))
            said = StringIO()
            with redirect_stderr(said):
                code = command([*call, "--output", str(out), "--resume"])
            if code != 0:
                raise Wrong(said.getvalue())

        return run(work)

    for killed in range(_MOST_RUNS):
        rng.random()  # the child has a copy of the generator
        outcome = once(killed < kills)
        if outcome.kind == "right":
            return killed
        if outcome.kind == "wrong" and "is there already, and no" in outcome.detail:
            return killed  # killed after its last change
        if outcome.detail not in ("SIGKILL", "SIGALRM"):
            raise Wrong(f"{outcome.kind}: {outcome.detail}")
    raise Wrong(f"not through in {_MOST_RUNS} runs")


def one(bundle: Path, folder: Path, rng: random.Random) -> str:
    """One job with its kills; says what it was.

    Raises:
        Wrong: the output is not what it has to be, or something is left beside it.
    """
    source, file_format = rng.choice(INPUTS), rng.choice(FORMATS)
    shard = rng.choice((None, None, "2/3"))
    call = job(bundle, folder, source, file_format, shard)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        whole, out = Path(place, "whole"), Path(place, "outputs", "out")
        out.parent.mkdir()
        made = run(lambda: command([*call, "--output", str(whole)]))
        if made.detail != "0":
            raise Wrong(f"without --resume: {made}")
        kills = until_through(call, out, rng, rng.randrange(1, 40))
        left = os.listdir(out.parent)
        if set(left) - {"out"} and not _is_swept(left):
            raise Wrong(f"{call}: left {left}")
        if file_format == "parquet":
            expected, found = pq.read_table(whole), pq.read_table(out)
            same = found.equals(expected, check_metadata=True)
        else:
            same = out.read_bytes() == whole.read_bytes()
        if not same:
            raise Wrong(f"{call}: another output after {kills} kills")
    return f"{source} to {file_format}, shard {shard}: {kills} kills"


def _is_swept(left: list[str]) -> bool:
    """A folder on its way out: the next run that comes by deletes it."""
    return set(left) == {"out", ".out.parts.partial"}


def main() -> int:
    """Runs what the command line asks for; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    embed._CHUNK_TEXTS = CHUNK
    parts._PART_SECONDS = 0.0
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name))
        for number in range(options.count):
            try:
                print(one(options.bundle, Path(name), random.Random(f"{options.seed}:{number}")))
            except Wrong as wrong:
                faults += 1
                print(f"{number}: {wrong}")
    print(f"{options.count} jobs, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
