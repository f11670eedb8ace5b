"""From options to what is really measured: names looked up, files read, subsets drawn.

Everything a call can get wrong is found here, before the first model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch

from embedge.bench.errors import BenchArgumentError
from embedge.bench.measure.eval_files import read_eval
from embedge.bench.measure.texts import (
    EvalSet,
    Text,
    default_texts,
    limited,
    read_texts,
    spaced,
    subset,
)
from embedge.bench.options import SHAPES, BenchOptions
from embedge.bench.peers.registry import chosen_peers
from embedge.bench.systems.backbone import adapter_folder, find_adapter
from embedge.bench.systems.multi_vector import native_class
from embedge.bench.systems.source import (
    Source,
    model_folder,
    read_multi_vector_source,
    read_source,
)
from embedge.bench.systems.torch_types import choose_torch_types
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.errors import DeviceError
from embedge.runtime.host.cores import available_cores
from embedge.runtime.sessions.device import cuda_problem

__all__ = ["Plan", "make_plan"]

_PAGES_NOTE = "peers were left out: they run text alone, and this bundle takes images too"
_LATE_NOTE = (
    "late interaction: cosines are of the vectors of all tokens, each text embedded as a query and as a document; "
    "top-10 and quality go by the model's score of a query for a document; 1 text: a query; times of batches are "
    "not measured, and no other runtime gives these vectors"
)


@dataclass(kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        options: what was asked for.
        bundle: the opened bundle.
        source: the reference's files.
        threads: threads of every system.
        tasks: tasks, in the bundle's order.
        precisions: precisions that run on the device.
        adapters: adapter folder by task; a bare task has none.
        peers: ``peer:variant`` of each that is compared with.
        torch_types: in which merged torch is measured.
        texts: for fidelity.
        singles: that are timed one by one.
        evaluations: labelled sets by task, the main one first.
        notes: sentences for the report; grows while measuring.
    """

    options: BenchOptions
    bundle: Bundle
    source: Source
    threads: int
    tasks: list[str]
    precisions: list[str]
    adapters: dict[str, Path]
    peers: list[str]
    torch_types: tuple[str, ...]
    texts: list[Text]
    singles: list[str]
    evaluations: dict[str, list[EvalSet]]
    notes: list[str] = field(default_factory=list)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def late_interaction(self) -> bool:
        """Whether vectors are of tokens."""
        return self.manifest.model.late_interaction is not None

    @property
    def takes_images(self) -> bool:
        """Whether the bundle embeds images."""
        return self.manifest.model.image is not None

    @property
    def budgets(self) -> list[int]:
        """Most pixels of a page to measure at, the bundle's own first."""
        image = self.manifest.model.image
        own = [] if image is None else [image.max_pixels]
        return list(dict.fromkeys([*own, *self.options.max_pixels]))

    @property
    def page_tasks(self) -> list[str]:
        """The tasks whose pages are timed."""
        having = [t for t in self.tasks if any(e.modality == "image" for e in self.evaluations[t])]
        return having[: self.options.profile.latency_tasks]

    @property
    def timed_tasks(self) -> list[str]:
        """The tasks whose latency is measured."""
        return self.tasks[: self.options.profile.latency_tasks]

    @property
    def peered_tasks(self) -> list[str]:
        """The tasks that are compared with peers."""
        return self.tasks[: self.options.profile.peer_tasks] if self.peers else []

    @property
    def dims(self) -> list[int]:
        """Dimensions to measure at, the full one first."""
        model = self.manifest.model
        return sorted({*(model.matryoshka_dims or ()), model.dim}, reverse=True)

    def mapped(self, task: str) -> list[str]:
        """The precisions whose maps give a task's vectors; none where images have vectors too, which maps lack."""
        if self.late_interaction or self.manifest.model.image is not None:
            return []
        maps = {
            precision: self.manifest.precisions[precision].maps for precision in self.precisions
        }
        return [p for p, found in maps.items() if found is not None and task in found.tasks]

    @property
    def steps(self) -> int:
        """How many steps a progress bar has."""
        systems = 1 + len(self.torch_types) + len(self.precisions)
        processes = (len(self.precisions) + 1) * bool(self.options.profile.process_repeats)
        shapes = 0 if self.late_interaction else len(self.options.shapes)
        timed = shapes + bool(self.options.profile.singles)
        peers = (len(self.peers) + 1) * len(self.peered_tasks)
        pages = len(self.page_tasks) + (
            len(self.precisions) if self.page_tasks and processes else 0
        )
        mapped = sum(len(self.mapped(task)) for task in self.tasks)
        embedded = len(self.tasks) * systems + mapped + peers
        return embedded + timed * len(self.timed_tasks) + processes + pages


def make_plan(options: BenchOptions) -> Plan:
    """Return what ``options`` asks for.

    Raises:
        DeviceError: the device does not work here.
        EmbedgeError: the bundle, the reference, an adapter or a data file does not hold it.
    """
    _check_device(options.device)
    bundle = Bundle(options.bundle)
    threads = options.threads or available_cores()
    notes = _busy(threads)
    texts = default_texts() if options.texts is None else read_texts(options.texts)
    late = bundle.manifest.model.late_interaction is not None
    quantization = bundle.manifest.source.base_quantization
    if late:
        _check_late(options)
        if quantization is not None:
            raise BenchArgumentError(
                f"{options.bundle}: adapters of a late-interaction model on a base quantized as {quantization}, which "
                "sentence-transformers' reference does not load; expected a bundle without --base-quantization"
            )
    takes_images = bundle.manifest.model.image is not None
    if takes_images:
        _check_with_images(options, notes)
    declared = bundle.manifest.tasks
    tasks = _chosen("task", options.tasks, list(declared))
    device = options.device
    runnable = [name for name, p in bundle.manifest.precisions.items() if device in p.devices]
    plan = Plan(
        options=options,
        bundle=bundle,
        source=replace(
            read_multi_vector_source(options.reference)
            if late
            else read_source(options.reference, options.pooling),
            base_quantization=quantization,
        ),
        threads=threads,
        tasks=tasks,
        precisions=_precisions(options, runnable),
        adapters=_adapters(_with_own_adapters(options, bundle), bundle, tasks),
        peers=[] if late or takes_images else _peers(options, notes),
        torch_types=_torch_types(options, notes, late),
        texts=_for_fidelity(texts, options, notes),
        singles=spaced([text.text for text in texts], options.profile.singles),
        evaluations=_evaluations(options, list(declared), tasks, notes),
        notes=notes,
    )
    _check_pages(plan)
    if late:
        notes.append(_LATE_NOTE)
    untimed = [task for task in tasks if task not in plan.timed_tasks]
    if plan.timed_tasks and untimed:
        notes.append(
            f"latency was measured on {', '.join(plan.timed_tasks)} alone; the graphs of "
            f"{', '.join(untimed)} differ from it only in the numbers they hold"
        )
    if plan.peers and len(plan.peered_tasks) < len(tasks):
        notes.append(f"peers were measured on {', '.join(plan.peered_tasks)} alone")
    if "float32" in plan.torch_types and not options.profile.torch_quality:
        notes.append(
            "fidelity and quality of torch fp32 are the yardstick's own, not measured again merged"
        )
    return plan


def _check_late(options: BenchOptions) -> None:
    """Refuse what is not measured of a late-interaction bundle.

    Raises:
        BenchArgumentError: naming the option.
        BenchError: sentence-transformers is too old to be the reference.
    """
    other_peers, other_types = set(options.peers or ()) - {"none"}, set(options.torch_types or ())
    refused = {
        f"--peers {' '.join(sorted(other_peers))}": bool(other_peers),
        f"--torch-types {' '.join(sorted(other_types))}": bool(other_types - {"float32", "none"}),
        f"--shapes {' '.join(shape.name for shape in options.shapes)}": tuple(options.shapes)
        != SHAPES,
        f"--pooling {options.pooling}": options.pooling is not None,
    }
    for option, given in refused.items():
        if given:
            raise BenchArgumentError(
                f"{option}: {options.bundle} is a late-interaction model, which is compared by the vectors of its "
                "tokens with sentence-transformers in float32; leave the option out"
            )
    native_class()


def _check_with_images(options: BenchOptions, notes: list[str]) -> None:
    """Refuse peers by name for a bundle that takes images too.

    Raises:
        BenchArgumentError: peers were named.
    """
    if named := set(options.peers or ()) - {"none"}:
        raise BenchArgumentError(
            f"--peers {' '.join(sorted(named))}: {options.bundle} takes images too, which is compared with torch "
            "alone; leave the option out"
        )
    if options.peers is None and options.profile.others:
        notes.append(_PAGES_NOTE)


def _check_pages(plan: Plan) -> None:
    """Refuse sets of pages and image budgets that the bundle cannot be measured by.

    Raises:
        BenchArgumentError: naming the option.
    """
    options, sets = plan.options, plan.evaluations.items()
    paged = [(task, one.name) for task, its in sets for one in its if one.modality == "image"]
    if paged and not plan.takes_images:
        task, name = paged[0]
        raise BenchArgumentError(
            f"--eval {task}={name}: is a set of page images; {options.bundle} takes "
            f"{', '.join(plan.manifest.model.modalities)} alone; name a bundle with a vision tower"
        )
    if options.max_pixels and not paged:
        raise BenchArgumentError(
            f"--max-pixels {' '.join(map(str, options.max_pixels))}: is measured on page images; add --eval TASK=PATH "
            "of queries and pages"
        )
    if plan.takes_images and not paged:
        plan.notes.append(
            "images were not measured; --eval TASK=PATH of queries and page images measures them"
        )
    if not options.profile.latency_tasks:
        return
    untimed = {task for task, _ in paged} - set(plan.page_tasks)
    if untimed:
        plan.notes.append(
            f"pages were timed on {', '.join(plan.page_tasks)} alone; the graphs of {', '.join(sorted(untimed))} "
            "differ from it only in the numbers they hold"
        )


def _torch_types(options: BenchOptions, notes: list[str], late: bool) -> tuple[str, ...]:
    named = _named(options, options.torch_types)
    if late and named is None:
        return ("float32",)
    return choose_torch_types(named, options.device, notes)


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    problem = cuda_problem()
    if problem is None and not torch.cuda.is_available():
        problem = "this torch sees no GPU; install a CUDA build of it, which the reference needs"
    if problem is not None:
        raise DeviceError(f"--device {device}: {problem}")


def _precisions(options: BenchOptions, runnable: Sequence[str]) -> list[str]:
    if not runnable:
        raise BenchArgumentError(
            f"{options.bundle}: the bundle has no precision that runs on {options.device}; export "
            f"{'fp16 or int4-fp16' if options.device == 'cuda' else 'int8'} as well"
        )
    return _chosen("precision", options.precisions, runnable)


def _peers(options: BenchOptions, notes: list[str]) -> list[str]:
    if options.device != "cpu":
        return []
    names = _named(options, options.peers)
    return chosen_peers(names, notes.append, options.profile.peer_variants)


def _named(options: BenchOptions, names: Sequence[str] | None) -> Sequence[str] | None:
    """What to compare with; where the call names nothing and nothing else is wanted, nothing."""
    return ("none",) if names is None and not options.profile.others else names


def _chosen(what: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        raise BenchArgumentError(
            f"--{what} {' '.join(unknown)}: not measurable in this bundle; it has: "
            f"{', '.join(known) or 'none'}"
        )
    return list(known) if wanted is None else [name for name in known if name in wanted]


def _with_own_adapters(options: BenchOptions, bundle: Bundle) -> BenchOptions:
    """Return options with the adapters that the reference's folder holds itself.

    They are in one file for all tasks, as jina-embeddings-v4's, or in a folder a task, as jina-embeddings-v5's.
    """
    own = model_folder(options.reference) / "adapters"
    found = {
        name: folder
        for name, task in bundle.manifest.tasks.items()
        if task.adapter is not None and (folder := find_adapter(name, own)) is not None
    }
    return replace(options, adapters=found | dict(options.adapters))


def _adapters(options: BenchOptions, bundle: Bundle, tasks: Sequence[str]) -> dict[str, Path]:
    declared = bundle.manifest.tasks
    unknown = [name for name in options.adapters if name not in declared]
    if unknown:
        raise BenchArgumentError(
            f"--adapter {', '.join(unknown)}: the bundle's tasks are {', '.join(declared)}"
        )
    adapted = [task for task in tasks if declared[task].adapter is not None]
    lacking = [task for task in adapted if task not in options.adapters]
    if lacking:
        raise BenchArgumentError(
            f"{bundle.root}: the tasks {', '.join(lacking)} were merged from adapters; the "
            "reference needs them too: add "
            + " ".join(f"--adapter {task}=FOLDER" for task in lacking)
        )
    bare = [task for task in tasks if task in options.adapters and task not in adapted]
    if bare:
        raise BenchArgumentError(
            f"--adapter {', '.join(bare)}: the bundle has the bare backbone there; leave it out"
        )
    return {task: adapter_folder(task, options.adapters[task]) for task in adapted}


def _for_fidelity(texts: Sequence[Text], options: BenchOptions, notes: list[str]) -> list[Text]:
    rows = subset(len(texts), options.profile.texts)
    if len(rows) < len(texts):
        notes.append(f"fidelity on {len(rows)} of {len(texts)} texts, drawn by a seed")
    return [texts[i] for i in rows]


def _evaluations(
    options: BenchOptions, declared: Sequence[str], tasks: Sequence[str], notes: list[str]
) -> dict[str, list[EvalSet]]:
    profile = options.profile
    result: dict[str, list[EvalSet]] = {task: [] for task in tasks}
    for task, file in options.evaluations:
        if task not in declared:
            raise BenchArgumentError(
                f"--eval {task}={file}: the bundle's tasks are {', '.join(declared)}"
            )
        if task not in result:
            continue
        most = profile.eval_sets
        if most is not None and len(result[task]) >= most:
            if most:
                notes.append(f"{file.name} was left out: one labelled set a task")
            continue
        whole = read_eval(file)
        if any(whole.name == other.name for other in result[task]):
            raise BenchArgumentError(
                f"--eval {task}={file}: another set of this task is called {whole.name}; rename one"
            )
        result[task].append(limited(whole, profile.rows))
        if profile.rows is not None and max(len(whole.first), len(whole.others)) > profile.rows:
            note = f"{whole.name}: {profile.rows} of {len(whole.first)} rows, drawn by a seed"
            if whole.others:
                note += (
                    f", and {len(result[task][-1].others)} of {len(whole.others)} other passages"
                )
            if whole.scores is None:
                note += "; fewer passages to choose from make retrieval look easier"
            notes.append(note)
    return result


def _busy(threads: int) -> list[str]:
    """Return a note if others keep the processor busy before the bench does."""
    load = psutil.getloadavg()[0]
    cores = psutil.cpu_count() or 1
    if load + threads <= cores + 1:
        return []
    return [
        f"the machine was busy when this began (load {load:.1f} on {cores} cores): times are not "
        "its own, and may flatter ratios to torch, whose threads wait for each other"
    ]
