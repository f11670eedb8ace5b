"""Measures the bare backbone and every adapter on the held-out sets, prints and stores it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from allocator import keep_freed_memory
from backbone import Backbone
from metrics import Floats, bootstrap_mean_difference, bootstrap_spearman_difference
from tasks import BACKBONES, HERE, Measured, backbone_of, measure, read_eval, tasks_of

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
        return _mean_difference(ours.values(), theirs.values())
    interval = bootstrap_spearman_difference(ours.values(), theirs.values(), ours.scores)
    return _difference(ours.quality() - theirs.quality(), interval)


def _mean_difference(ours: Floats, theirs: Floats) -> Result:
    interval = bootstrap_mean_difference(ours, theirs)
    return _difference(float(ours.mean() - theirs.mean()), interval)


def _difference(value: float, interval: tuple[float, float]) -> Result:
    low, high = interval
    return {"difference": round(value, 4), "low": round(low, 4), "high": round(high, 4)}


def _widths(backbone: Backbone, measured: Measured) -> dict[str, float]:
    return {str(dim): round(measured.quality(dim), 4) for dim in backbone.widths}


def _late(own: Measured, rivals: dict[str, Measured]) -> Result:
    """Late interaction of the own adapter against that of the others, and against its vectors."""
    late = {name: rival.late_values() for name, rival in rivals.items()}
    values = own.late_values()
    against = {f"{name}, late": other for name, other in late.items()}
    against["own, one vector"] = own.values()
    return {
        "own": round(float(values.mean()), 4),
        "against": {
            name: {"quality": round(float(other.mean()), 4)} | _mean_difference(values, other)
            for name, other in against.items()
        },
    }


def _spread(rows: list[Any], limit: int | None) -> list[Any]:
    return rows[:: -(-len(rows) // limit)] if limit else rows


def evaluate(
    backbone: Backbone, adapters: Path, eval_folder: Path, limit: int | None = None
) -> Result:
    """Return every number, by task.

    Args:
        backbone: What the adapters are for.
        adapters: Folder with a folder per adapter.
        eval_folder: Folder of the held-out sets.
        limit: At most so many rows of a set, evenly spaced; all by default.
    """
    tasks = tasks_of(backbone)
    names = [task.name for task in tasks]
    # other kinds tell whether a backbone that was an embedder before has lost anything
    others = {task.name: OTHER_KINDS[task.name] if task.dev else () for task in tasks}
    wanted = {"bare": {*names, *(file for files in others.values() for file in files)}}
    wanted |= {name: {*names, *others[name]} for name in names}
    vectors: dict[tuple[str, str], Measured] = {}
    for model_name, files in wanted.items():
        bare = model_name == "bare"
        model = backbone.load() if bare else backbone.load_adapter(adapters / model_name)
        for file in sorted(files):
            rows = _spread(read_eval(file, eval_folder), limit)
            vectors[model_name, file] = measure(backbone, model, rows)
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
            "widths": {
                "own": _widths(backbone, own),
                "bare": _widths(backbone, vectors["bare", name]),
            },
            "other_kinds": {
                file: {
                    "bare": round(vectors["bare", file].quality(), 4),
                    "own": round(vectors[name, file].quality(), 4),
                }
                | compare(vectors[name, file], vectors["bare", file])
                for file in others[name]
            },
        }
        if own.first_tokens and own.scores is None:
            results[name]["late"] = _late(own, {rival: vectors[rival, name] for rival in rivals})
    return results


def table(results: Result) -> str:
    """Return the results as Markdown tables.

    Args:
        results: From ``evaluate``.
    """
    lines = _rivals("task", [(f"{n} ({r['metric']})", r) for n, r in results.items()])
    late = [(f"{n} (ndcg@10)", r["late"]) for n, r in results.items() if "late" in r]
    if late:
        lines += ["", *_rivals("late interaction", late)]
    if any(result["other_kinds"] for result in results.values()):
        lines += ["", "| adapter | other kind | bare | own | difference | 95 % interval |"]
        lines += ["|---|---|---|---|---|---|"]
    for name, result in results.items():
        for file, row in result["other_kinds"].items():
            lines.append(
                f"| {name} | {file} | {row['bare']:.4f} | {row['own']:.4f} "
                f"| {row['difference']:+.4f} | {row['low']:+.4f} to {row['high']:+.4f} |"
            )
    widths = list(next(iter(results.values()))["widths"]["own"])
    lines += ["", f"| task | model | {' | '.join(widths)} | kept at {widths[0]} |"]
    lines += ["|" + "---|" * (len(widths) + 3)]
    for name, result in results.items():
        for model, row in result["widths"].items():
            cells = " | ".join(f"{row[width]:.4f}" for width in widths)
            lines.append(f"| {name} | {model} | {cells} | {row[widths[0]] / row[widths[-1]]:.1%} |")
    return "\n".join(lines)


def _rivals(kind: str, results: Sequence[tuple[str, Result]]) -> list[str]:
    """A table of each result's quality beside that of every rival."""
    lines = [f"| {kind} | against | own | other | difference | 95 % interval |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, result in results:
        for rival, row in result["against"].items():
            lines.append(
                f"| {name} | {rival} | {result['own']:.4f} | {row['quality']:.4f} "
                f"| {row['difference']:+.4f} | {row['low']:+.4f} to {row['high']:+.4f} |"
            )
    return lines


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", choices=BACKBONES, default=BACKBONES[0])
    parser.add_argument("--model", type=Path, help="folder of the checkpoint, for smollm2")
    parser.add_argument("--adapters", type=Path, help="adapters/ of the backbone by default")
    parser.add_argument("--eval", type=Path, default=HERE / "eval", help="the held-out sets")
    parser.add_argument("--rows", type=int, help="at most so many of a set; all by default")
    parser.add_argument(
        "--tokens", type=int, help="where texts are cut; as the backbone by default"
    )
    parser.add_argument("--out", type=Path, help="the results' file in eval/ by default")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    backbone = backbone_of(options.backbone, options.model)
    backbone.max_tokens = options.tokens or backbone.max_tokens
    adapters = options.adapters or HERE / backbone.home
    results = evaluate(backbone, adapters, options.eval, options.rows)
    text = json.dumps(results, indent=2) + "\n"
    (options.out or HERE / backbone.results).write_text(text, encoding="utf-8")
    print("\n" + table(results))


if __name__ == "__main__":
    main()
