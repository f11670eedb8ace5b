"""Does what `embedge choose` answers keep its limits? Random limits, and each choice measured again by itself.

    python -m embedge.bench.studies.choices BUNDLE REPORT --eval retrieval=FILE --sets 10

Limits are drawn between the least and the most of each figure in the report, for one task or all. What is chosen is
written by ``embedge subset``, opened in processes of its own, and measured: files, peak memory, start, single texts,
batches, bytes of vectors, quality. The exit code is 1 if a limit is broken.

The texts that are timed and their rounds are those of the report. Times measured again are the usual ones (95th
percentile of all rounds, median start of three, median batch), which `choose` compared by the report's slow ones and a
margin. A margin is for an hour's differences, not for a machine that others load: each line has the load, and one
that is above the report's by more than a core says so.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from embedge.bench.measure.eval_files import read_eval
from embedge.bench.measure.labelled import column_quality, encode_columns, format_qualities
from embedge.bench.measure.latency import alternate, one_by_one, spread
from embedge.bench.measure.process import measure_process, process_texts
from embedge.bench.measure.quality import truncated
from embedge.bench.measure.texts import EvalSet, default_texts, limited, spaced
from embedge.bench.options import Shape
from embedge.bench.report.choose import LIMITS, Candidate, candidates, choose
from embedge.bench.report.configurations import index_bytes
from embedge.bench.report.recorded import read_reports
from embedge.bench.report.report import Report
from embedge.bench.systems.system import EmbedgeSystem
from embedge.runtime import Embedder
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.subset import subset_bundle

__all__ = ["main", "measure_again", "random_bounds"]

Bounds = dict[str, float]


def random_bounds(report: Report, generator: random.Random, tasks: Sequence[str] | None) -> Bounds:
    """Return limits on one to four figures, each between the least and the most that the report has of it."""
    found = candidates([report], tasks, "text")
    figures = {limit.figure for limit in LIMITS}
    values = {
        figure: sorted(getattr(c, figure) for c in found)
        for figure in sorted(figures)
        if all(getattr(c, figure) is not None for c in found)
    }
    some = generator.sample(sorted(values), generator.randint(1, min(4, len(values))))
    # The ends are where a margin decides, so they may lie a little outside.
    return {
        name: generator.uniform(values[name][0] * 0.95, min(values[name][-1] * 1.05, _most(name)))
        for name in some
    }


def _most(figure: str) -> float:
    return 1.0 if figure == "quality" else float("inf")


def measure_again(
    chosen: Candidate, bundle: Path, report: Report, sets: Mapping[str, EvalSet]
) -> dict[str, float]:
    """Return the figures of a choice, each measured anew; quality of the tasks that have a set.

    Args:
        chosen: what `choose` answered.
        bundle: the whole bundle.
        report: of it.
        sets: the main labelled set by task, as the report measured it.
    """
    threads = int(report.machine["threads"])
    texts = [text.text for text in default_texts()]
    with tempfile.TemporaryDirectory() as folder:
        part = subset_bundle(
            bundle, Path(folder) / "chosen", precisions=[chosen.precision], tasks=chosen.tasks
        )
        files = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        job: dict[str, Any] = {
            "system": "embedge",
            "bundle": str(part),
            "precision": chosen.precision,
        }
        job |= {"tasks": list(chosen.tasks), "threads": threads, "device": "cpu"}
        process = measure_process(job | process_texts(texts), repeats=3)
        system = EmbedgeSystem(part, chosen.tasks[0], chosen.precision, threads)
        found = {
            "disk": float(files),
            "start": process["first_vector_ms"],
            "latency": _single_p95(system, texts, report),
            "throughput": _throughput(system, _token_ids(part, texts), report),
            "index": float(index_bytes(chosen.dim, chosen.output_format)),
            "memory": float(process["after_batches"].get("peak", 0)),
        }
        shares = [
            _share(chosen, part, task, sets[task], report) for task in chosen.tasks if task in sets
        ]
    return found | ({"quality": min(shares)} if len(shares) == len(chosen.tasks) else {})


def _single_p95(system: EmbedgeSystem, texts: Sequence[str], report: Report) -> float:
    """Return the 95th percentile of texts one by one, those of the report and as often, in milliseconds."""
    effort = report.settings["effort"]
    role = next((row.single.get("role") for row in report.rows if row.single), None)
    encode = {"it": lambda text: system.encode([text], 1, role)}
    chosen = spaced(texts, effort["singles"])
    return spread(one_by_one(encode, chosen, effort["single_rounds"], skip=1)["it"])["p95_ms"]


def _load(report: Report) -> str:
    """Return the load now, and whether the machine is busier than when the report was made."""
    now, then = psutil.getloadavg()[0], report.machine.get("load_1_min", 0.0)
    busier = f", busier than the report's {then:.1f}" if now > then + 1 else ""
    return f"load {now:.1f}{busier}"


def _token_ids(bundle: Path, texts: Sequence[str]) -> Any:
    """Return the ids of some texts one after the other, int64."""
    tokens = Embedder(bundle, task=next(iter(Bundle(bundle).manifest.tasks))).tokenize(texts)
    return np.concatenate([each.ids for each in tokens])


def _throughput(system: EmbedgeSystem, ids: Any, report: Report) -> float:
    """Return texts a second of the report's largest shape."""
    names = {shape for row in report.rows for shape in row.shapes}
    if not names:
        return 0.0
    shape = max((Shape.parse(name) for name in names), key=lambda s: s.batch * s.tokens)
    batch = np.resize(ids, (shape.batch, shape.tokens))
    mask = np.ones_like(batch)
    times = alternate({"it": functools.partial(system.forward, batch, mask)}, 5)["it"]
    return shape.batch / float(np.median(times)) * 1000


def _share(
    chosen: Candidate, bundle: Path, task: str, evaluation: EvalSet, report: Report
) -> float:
    """Return the share of the reference's quality that a choice reaches."""
    row = report.row(task, f"embedge {chosen.precision}")
    assert row is not None
    dims = row.quality[evaluation.name]["dims"]
    reference = dims[max(dims, key=int)]["reference"]
    threads = int(report.machine["threads"])
    system = EmbedgeSystem(bundle, task, chosen.precision, threads)
    columns = encode_columns(system, evaluation)
    normalize = Bundle(bundle).manifest.model.normalize
    if chosen.output_format == "float32":
        value = column_quality(evaluation, columns, chosen.dim, normalize).value
        return float(value / reference)
    most = report.settings["effort"]["texts"]
    texts = [text.text for text in default_texts()][:most]
    calibration = truncated(system.encode(texts), chosen.dim, normalize).astype(np.float32)
    ranges = system.output_ranges(chosen.dim, calibration)
    cut = columns.cut(chosen.dim, normalize)
    value = format_qualities(evaluation, cut, ranges)[chosen.output_format].value
    return float(value / reference)


def _broken(bounds: Bounds, found: Mapping[str, float]) -> Iterator[str]:
    for limit in LIMITS:
        if limit.figure not in bounds or limit.figure not in found:
            continue
        bound, value = bounds[limit.figure], found[limit.figure]
        if value < bound if limit.least else value > bound:
            yield f"{limit.option} {limit.shown(bound)}: measured {limit.shown(value)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw limits, choose, measure again, print; return 1 if a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("report", type=Path, help="of this bundle")
    parser.add_argument("--eval", action="append", default=[], metavar="TASK=PATH")
    parser.add_argument("--sets", type=int, default=10, help="of limits that something meets")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    (report,) = read_reports(args.report)
    rows = report.settings["effort"]["rows"]
    named = dict(text.split("=", 1) for text in args.eval)
    sets = {task: limited(read_eval(Path(path)), rows) for task, path in named.items()}
    generator = random.Random(args.seed)
    answered, unanswered, failures = 0, 0, 0
    while answered < args.sets:
        tasks = generator.choice([None, *([task] for task in report.settings["tasks"])])
        bounds = random_bounds(report, generator, tasks)
        choice = choose([report], bounds, tasks=tasks, modality="text")
        if choice.candidate is None:
            unanswered += 1
            continue
        answered += 1
        found = measure_again(choice.candidate, args.bundle, report, sets)
        broken = list(_broken(bounds, found))
        failures += bool(broken)
        limits = ", ".join(
            f"{x.option} {x.shown(bounds[x.figure])} (again {x.shown(found[x.figure])})"
            if x.figure in found
            else f"{x.option} {x.shown(bounds[x.figure])} (not measured again)"
            for x in LIMITS
            if x.figure in bounds
        )
        verdict = "BROKEN" if broken else "kept"
        chosen = choice.candidate
        print(f"{verdict}  {chosen.name} for {', '.join(chosen.tasks)}: {limits}; {_load(report)}")
        sys.stdout.flush()
        for line in broken:
            print(f"    {line}")
    print(
        f"{answered - failures} of {answered} choices keep their limits; {unanswered} sets of limits had no answer; "
        f"{_load(report)}"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
