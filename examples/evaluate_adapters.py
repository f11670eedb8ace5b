"""Measures the bare backbone and every adapter on the held-out sets, prints and stores it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from allocator import keep_freed_memory
from backbone import MATRYOSHKA_DIMS, load_adapter, load_backbone, load_tokenizer
from metrics import bootstrap_mean_difference, bootstrap_spearman_difference
from tasks import HERE, TASKS, Measured, measure, read_eval

OTHER_KINDS = {
    "retrieval": ("other-docs-dev-pod", "other-docs-test-man", "other-docs-test-cmake"),
    "text-matching": (
        "other-graded-dev-pod",
        "other-graded-test-man",
        "other-docs-dev-pod",
        "other-docs-test-man",
    ),
    "code": (
        "other-code-dev-go",
        "other-code-dev-perl",
        "other-code-test-javascript",
        "other-code-test-ruby",
    ),
}

Result = dict[str, Any]


def compare(ours: Measured, theirs: Measured) -> Result:
    """Return the difference of two models on one file and its 95 % interval.

    Args:
        ours: Vectors of one model.
        theirs: Vectors of the other, of the same rows.
    """
    if ours.scores is None:
        interval = bootstrap_mean_difference(ours.values(), theirs.values())
    else:
        interval = bootstrap_spearman_difference(ours.values(), theirs.values(), ours.scores)
    return {
        "difference": round(ours.quality() - theirs.quality(), 4),
        "low": round(interval[0], 4),
        "high": round(interval[1], 4),
    }


def _widths(measured: Measured) -> dict[str, float]:
    return {str(dim): round(measured.quality(dim), 4) for dim in MATRYOSHKA_DIMS}


def evaluate(adapters: Path, eval_folder: Path) -> Result:
    """Return every number, by task.

    Args:
        adapters: Folder with a folder per adapter.
        eval_folder: Folder of the held-out sets.
    """
    names = [task.name for task in TASKS]
    wanted = {"bare": {*names, *(other for others in OTHER_KINDS.values() for other in others)}}
    wanted |= {name: {*names, *OTHER_KINDS[name]} for name in names}
    tokenizer = load_tokenizer()
    vectors: dict[tuple[str, str], Measured] = {}
    for model_name, files in wanted.items():
        bare = model_name == "bare"
        model = load_backbone() if bare else load_adapter(adapters / model_name)
        for file in sorted(files):
            vectors[model_name, file] = measure(model, tokenizer, read_eval(file, eval_folder))
            quality = vectors[model_name, file].quality()
            print(f"{model_name:14} {file:28} {quality:.4f}", flush=True)
    results: Result = {}
    for name in names:
        own = vectors[name, name]
        rivals = ["bare", *(other for other in names if other != name)]
        results[name] = {
            "metric": "ndcg@10" if own.scores is None else "spearman",
            "rows": len(own.first),
            "own": round(own.quality(), 4),
            "against": {
                rival: {"quality": round(vectors[rival, name].quality(), 4)}
                | compare(own, vectors[rival, name])
                for rival in rivals
            },
            "widths": {"own": _widths(own), "bare": _widths(vectors["bare", name])},
            "other_kinds": {
                file: {
                    "bare": round(vectors["bare", file].quality(), 4),
                    "own": round(vectors[name, file].quality(), 4),
                }
                | compare(vectors[name, file], vectors["bare", file])
                for file in OTHER_KINDS[name]
            },
        }
    return results


def table(results: Result) -> str:
    """Return the results as Markdown tables.

    Args:
        results: From ``evaluate``.
    """
    lines = ["| task | against | own | other | difference | 95 % interval |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, result in results.items():
        for rival, row in result["against"].items():
            lines.append(
                f"| {name} ({result['metric']}) | {rival} | {result['own']:.4f} "
                f"| {row['quality']:.4f} | {row['difference']:+.4f} "
                f"| {row['low']:+.4f} to {row['high']:+.4f} |"
            )
    lines += ["", "| adapter | other kind | bare | own | difference | 95 % interval |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, result in results.items():
        for file, row in result["other_kinds"].items():
            lines.append(
                f"| {name} | {file} | {row['bare']:.4f} | {row['own']:.4f} "
                f"| {row['difference']:+.4f} | {row['low']:+.4f} to {row['high']:+.4f} |"
            )
    widths = [str(dim) for dim in MATRYOSHKA_DIMS]
    lines += ["", f"| task | model | {' | '.join(widths)} | kept at 64 |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, result in results.items():
        for model, row in result["widths"].items():
            cells = " | ".join(f"{row[width]:.4f}" for width in widths)
            lines.append(f"| {name} | {model} | {cells} | {row['64'] / row['384']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=Path, default=HERE / "adapters")
    parser.add_argument("--eval", type=Path, default=HERE / "eval")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    results = evaluate(options.adapters, options.eval)
    text = json.dumps(results, indent=2) + "\n"
    (options.eval / "results.json").write_text(text, encoding="utf-8")
    print("\n" + table(results))


if __name__ == "__main__":
    main()
