"""Exports tiny models with damaged files: what comes is vectors or an ``EmbedgeError``.

    python -m tests.fuzz.source --seed 1 --count 2000
    python -m tests.fuzz.source --seed 1 --only 137           # one of them again, with its outcome
    python -m tests.fuzz.source --seed 1 --count 500 --torch  # vectors are compared with torch's

Every mutation changes one or two files of a model's or its adapter's folder. It is exported and embeds in a
forked child, where a foreign exception, a crash, a hang, and a file outside of its folders are faults.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tokenizers
from numpy.typing import NDArray

from embedge.export import export_bundle
from embedge.runtime import Embedder
from embedge.runtime.kernels.library import own_kernels
from tests.fuzz.child import Outcome, Wrong, run
from tests.fuzz.mutate import copy_tree, mutate_file

__all__ = ["make_sources", "mutation"]

TEXTS = ["hello", "a longer text, with words", "0"]
LEAST_COSINE = {"fp32": 0.9999, "int8": 0.9, "int4": 0.6}
_ADAPTER = "adapter"  # beside the folder "model"
_LOADED = (onnx, onnxruntime, tokenizers)  # before the fork, for all children


def make_sources(root: Path) -> list[Path]:
    """Make the folders that are mutated: each holds a ``model`` and an ``adapter``."""
    own_kernels()  # are tried once, not in every child

    def make() -> None:
        from tests.helpers.models import linears, make_model, save, save_adapter, write_json

        kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "bert": (
                {"dense": [(24, "Tanh")]},
                {"use_dora": True, "modules_to_save": ["LayerNorm"]},
            ),
            "modernbert": ({"pooling": "cls"}, {"rank_pattern": {"Wo": 2}, "bias": "all"}),
            "qwen3": (
                {"pooling": "lasttoken"},
                {"use_rslora": True, "alpha_pattern": {"q_proj": 4}},
            ),
        }
        for name, (layout, options) in kinds.items():
            model = save(make_model(name), root / name / "model", **layout)
            write_json(
                model / "config_sentence_transformers.json",
                {"prompts": {"query": "find: "}, "default_prompt_name": None, "truncate_dim": None},
            )
            write_json(
                model / "1_Pooling" / "config.json",
                {"word_embedding_dimension": 32, "pooling_mode": layout.get("pooling", "mean")},
            )
            if name != "bert":
                settings = json.loads((model / "tokenizer_config.json").read_text())
                settings["model_input_names"] = ["input_ids", "attention_mask"]
                write_json(model / "tokenizer_config.json", settings)
            save_adapter(model, root / name / _ADAPTER, target=linears(name), **options)
            (model / "README.md").write_text("---\nlicense: mit\n---\n\n# tiny-model\n")

    outcome = run(make, seconds=300)
    if outcome.kind != "right":
        raise RuntimeError(f"the sources could not be made: {outcome.detail}")
    return sorted(root.iterdir())


def mutation(
    sources: Sequence[Path], seed: int, number: int, *, torch: bool = False
) -> tuple[str, Outcome]:
    """Make mutation ``number`` of ``seed``: what was done, and how the export ended."""
    rng = random.Random(f"{seed}:{number}")
    source = rng.choice(sources)
    precision = rng.choice(("fp32", "fp32", "int8", "int4"))
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        folder = copy_tree(source, root / "source")
        (root / "config.json").write_text('{"outside": true}')
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        adapters = [file for file in files if file.parent.name == _ADAPTER]
        done = [f"{source.name} {precision}"]
        for _ in range(rng.choice((1, 1, 1, 2))):
            file = rng.choice(adapters if rng.random() < 0.35 else files)
            if file.is_file() and not file.is_symlink():
                done.append(f"{file.relative_to(folder)}: {mutate_file(file, rng)}")

        def work() -> str:
            return _exported(folder, root / "out", precision, torch=torch)

        allowed = [folder, *(root / name for name in ("out", ".out.partial", ".out.lock"))]
        outcome = run(work, root=root, allowed=allowed)
        for left in [*folder.rglob("*")]:
            if left.is_file() and not left.is_symlink():
                left.chmod(0o600)
        shutil.rmtree(folder, ignore_errors=True)
    return " | ".join(done), outcome


def _exported(folder: Path, out: Path, precision: str, *, torch: bool) -> str:
    """Export and embed; the vectors have to be finite, and torch's where they are compared."""
    export_bundle(
        folder / "model",
        adapters={"task": folder / _ADAPTER},
        precisions=[precision],
        calibration="none",
        out=out,
    )
    model = Embedder(out, precision=precision, threads=1, verify="full")
    vectors = model.encode(TEXTS)
    if vectors.shape[0] != len(TEXTS) or not np.isfinite(vectors).all():
        raise Wrong(f"vectors of shape {vectors.shape} with NaN or infinity")
    compared = torch and _compare(folder, vectors, LEAST_COSINE[precision])
    return f"vectors of {vectors.shape[1]} dimensions{', as in torch' if compared else ''}"


def _compare(folder: Path, vectors: NDArray[np.float32], least: float) -> bool:
    """Compare with sentence-transformers and the unmerged adapter; whether those load the folder."""
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer

    try:
        reference = SentenceTransformer(
            str(folder / "model"), device="cpu", model_kwargs={"attn_implementation": "eager"}
        )
        reference[0].model = PeftModel.from_pretrained(
            reference[0].auto_model, str(folder / _ADAPTER)
        ).eval()
        expected = np.stack([reference.encode(text, show_progress_bar=False) for text in TEXTS])
    except Exception:  # torch's side refuses or fails: there is nothing to compare with
        return False
    if expected.shape != vectors.shape:
        raise Wrong(f"{vectors.shape[1]} dimensions, torch has {expected.shape[1]}")
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (vectors * expected).sum(axis=1) / np.maximum(lengths, 1e-30)
    if not (cosines >= least).all():
        raise Wrong(f"cosine {cosines.min():.5f} with torch's vectors")
    return True


def main() -> int:
    """Run the mutations that the command line asks for; 1 if any of them is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of one mutation")
    parser.add_argument("--torch", action="store_true", help="compare with torch's vectors")
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.count)
    if options.only is not None:
        numbers = range(options.only, options.only + 1)
    warnings.simplefilter("ignore")
    if options.torch:
        import peft  # noqa: F401
        import sentence_transformers  # noqa: F401
        from torch import set_num_threads

        set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        sources = make_sources(Path(folder))
        for number in numbers:
            what, outcome = mutation(sources, options.seed, number, torch=options.torch)
            compared = ", as in torch" if outcome.detail.endswith("as in torch") else ""
            counts[outcome.kind + compared] += 1
            if outcome.is_fault or options.only is not None:
                print(f"{number}: {outcome.kind}: {what}\n    {outcome.detail.strip()}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    return 1 if any(Outcome(kind, "").is_fault for kind in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
