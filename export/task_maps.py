"""Fitting maps: from one pass with a base task's adapter to the vectors of a bundle's other tasks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from embedge.export.graph.maps_graph import (
    Pool,
    maps_graph,
    pools_graph,
    stated,
    to_maps_model,
)
from embedge.export.writing.lock import sole_exporter
from embedge.export.writing.maps import NewMaps, write_maps
from embedge.quant.fidelity import cosine_rows, top_k_overlap
from embedge.quant.task_maps import fit_task_maps
from embedge.runtime.bundle.contract import MAPS
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.errors import EmbedgeValueError, warn
from embedge.runtime.task_passes import TaskPasses

__all__ = ["FitOptions", "fit_maps"]

_LEAST_TEXTS, _FEW_TEXTS = 40, 2000
_SHARE = 10  # one text of so many is measured, and one chooses among maps
_NEIGHBOURS = 10


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """The arguments of :func:`fit_maps`, which states what each means.

    Raises:
        EmbedgeValueError: for one that cannot be used whatever the bundle is.
    """

    bundle: Path
    texts: Sequence[str] = field(repr=False)
    base: str
    tasks: Sequence[str] | None = None
    precisions: Sequence[str] | None = None
    layers: int = 0
    hidden: int = 0
    steps: int = 1000
    threads: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.texts, str) or len(self.texts) < _LEAST_TEXTS:
            raise EmbedgeValueError(
                f"texts: expected at least {_LEAST_TEXTS}, better some thousands such as you embed, found "
                f"{1 if isinstance(self.texts, str) else len(self.texts)}",
                arguments=["texts"],
            )
        for name, least in (("layers", 0), ("hidden", 0), ("steps", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise EmbedgeValueError(
                    f"{name}: expected a whole number of at least {least}, found {value!r}",
                    arguments=[name],
                )
        if len(self.texts) < _FEW_TEXTS:
            warn(
                f"maps of {len(self.texts)} texts; some thousands such as you embed bring them closer"
            )


def fit_maps(
    bundle: str | os.PathLike[str],
    texts: Sequence[str],
    *,
    base: str,
    tasks: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    layers: int = 0,
    hidden: int = 0,
    steps: int = 1000,
    threads: int | None = None,
    overwrite: bool = False,
    told: Callable[[str, int], None] = lambda _, __: None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Add maps to a bundle, by which ``Embedder.encode_tasks`` gives several tasks' vectors from one pass.

    The pass has the adapter of one task, the base. Of its vector and of pools of its inner states, maps make those of
    the other tasks. Nothing but the texts is needed: what the maps should give are the vectors of the tasks' own
    graphs. One text of ten chooses among maps, and how near those come on another is kept in the manifest.

    Args:
        bundle: the bundle's folder.
        texts: such as you embed, for all of the tasks; some thousands. They need no labels.
        base: the task whose adapter the pass has: the sum of the others' adapters is a good one.
        tasks: those to map to; ``None``: all others that a precision has.
        precisions: whose graphs get maps; ``None``: all that run on a CPU.
        layers: of how many layers before the last one the mean of the states is taken too.
        hidden: width of a network beside the linear map; 0: none.
        steps: for which that is trained.
        threads: of the passes; ``None``: the cores that this process really has.
        overwrite: fit maps again where a precision has some.
        told: is called with what is being done, and how many texts or steps of it are.

    Returns:
        by precision and task: ``cosine_mean`` and ``cosine_min`` to the vectors of the task's own graph over the
        held-out texts, and ``top10_overlap``, the share of the ten nearest that are the same.

    Raises:
        EmbedgeValueError: for an argument that cannot be used, or a bundle that maps cannot be added to.
        EmbedgeError: if the bundle cannot be run or written.
    """
    arguments = dict(locals())
    told = arguments.pop("told")
    options = FitOptions(**{**arguments, "bundle": Path(bundle)})
    opened = Bundle(bundle, verify="none")
    chosen = dict(_chosen(opened.manifest, options))
    with sole_exporter(options.bundle):
        found = {
            precision: _fit(opened, precision, mapped, options, told)
            for precision, mapped in chosen.items()
        }
        write_maps(opened.root, found)
    return {precision: maps.entry["fidelity"] for precision, maps in found.items()}


def _chosen(manifest: Manifest, options: FitOptions) -> Iterator[tuple[str, list[str]]]:
    """The precisions that get maps, and the tasks to map to in each."""
    if manifest.model.late_interaction is not None:
        raise EmbedgeValueError(
            f"{options.bundle}: {manifest.source.name} is a late-interaction model, of a vector a token; maps are of "
            "vectors a text"
        )
    if MAPS in manifest.tasks:
        raise EmbedgeValueError(
            f"{options.bundle}: a task has the name {MAPS!r}, which the graph of maps has; export it under another"
        )
    for name in (options.base, *(options.tasks or ())):
        if name not in manifest.tasks:
            raise EmbedgeValueError(
                f"the bundle has no task {name!r}; it has {', '.join(manifest.tasks)}",
                arguments=["base", "tasks"],
            )
    for name in options.precisions or ():
        if name not in manifest.precisions:
            raise EmbedgeValueError(
                f"the bundle has no precision {name!r}; it has {', '.join(manifest.precisions)}",
                arguments=["precisions"],
            )
    names = options.precisions or [
        name for name in manifest.precisions if _refusal(manifest, name) is None
    ]
    if not names:
        raise EmbedgeValueError(
            f"{options.bundle}: none of its precisions runs on a CPU: {', '.join(manifest.precisions)}"
        )
    for name in names:
        yield name, _mapped(manifest, name, options)


def _refusal(manifest: Manifest, precision: str) -> str | None:
    """Why a precision gets no maps; ``None``: it may."""
    settings = manifest.precisions[precision]
    if "cpu" not in settings.devices:
        return "does not run on a CPU, on which maps are fitted"
    if settings.unpack:
        return "unpacks its weights when it opens, which a graph of maps cannot yet"
    return None


def _mapped(manifest: Manifest, precision: str, options: FitOptions) -> list[str]:
    settings = manifest.precisions[precision]
    problem = _refusal(manifest, precision)
    if problem is not None:
        raise EmbedgeValueError(f"precision {precision!r} {problem}", arguments=["precisions"])
    if settings.maps is not None and not options.overwrite:
        raise EmbedgeValueError(
            f"precision {precision!r} has maps already, of {', '.join(settings.maps.tasks)}; pass overwrite=True to "
            "fit them again",
            arguments=["overwrite=True"],
        )
    tasks = [t for t in options.tasks or settings.graphs if t != options.base]
    lacking = [task for task in (options.base, *tasks) if task not in settings.graphs]
    if lacking or not tasks:
        raise EmbedgeValueError(
            f"precision {precision!r} has the tasks {', '.join(settings.graphs)}; expected the base and others to "
            f"map to, {'lacks ' + ', '.join(lacking) if lacking else 'found none but the base'}",
            arguments=["base", "tasks"],
        )
    return list(dict.fromkeys(tasks))


def _fit(
    bundle: Bundle,
    precision: str,
    tasks: Sequence[str],
    options: FitOptions,
    told: Callable[[str, int], None],
) -> NewMaps:
    """The maps of one precision."""
    model = onnx.load(str(bundle.graph(precision, options.base)), load_external_data=False)
    pools = _pools(bundle, model, options)
    at = f"{precision}: {options.base}"
    with TaskPasses(
        bundle.root,
        precision,
        options.base,
        options.texts,
        threads=options.threads,
        told=lambda count: told(at, count),
    ) as passes:
        plain = to_maps_model(model, pools_graph(model, pools), [], {})
        x = passes.outputs(plain.SerializeToString(), "pools")
        vectors = {}
        for task in tasks:
            at = f"{precision}: {task}"
            vectors[task] = passes.vectors(task)
    if len(x) < _LEAST_TEXTS:
        raise EmbedgeValueError(
            f"texts: expected at least {_LEAST_TEXTS} that are not empty, found {len(x)}"
        )
    numbers = np.arange(len(x))
    measured = numbers % _SHARE == 0
    chooses = (numbers % _SHARE == _SHARE // 2)[~measured]
    maps = fit_task_maps(
        x[~measured],
        {task: own[~measured] for task, own in vectors.items()},
        chooses,
        hidden=options.hidden,
        steps=options.steps,
        normalize=bundle.manifest.model.normalize,
        told=lambda _: told(f"{precision}: maps", 1),
    )
    given = maps(x[measured])
    own = x[measured][:, : bundle.manifest.model.dim]
    fidelity = {options.base: _figures(own, own)} | {
        task: _figures(given[:, row], vectors[task][measured]) for row, task in enumerate(tasks)
    }
    entry = {
        "base": options.base,
        "tasks": [options.base, *tasks],
        "texts": int((~chooses).sum()),
        "fidelity": fidelity,
    }
    return NewMaps(model, maps_graph(model, pools, maps), _notes(model, entry), entry)


def _pools(bundle: Bundle, model: onnx.ModelProto, options: FitOptions) -> list[Pool]:
    states = stated(model)
    if states is None:
        raise EmbedgeValueError(
            f"{bundle.root}: was exported by an embedge that does not say where the states of its layers are; export "
            "it again"
        )
    inner = range(1, len(states) - 1)  # the last is pooled by the graph, the first knows no context
    if options.layers > len(inner):
        raise EmbedgeValueError(
            f"layers: expected at most {len(inner)}, as many as the model has before its last, found {options.layers}",
            arguments=["layers"],
        )
    return [Pool(state, "mean") for state in inner[len(inner) - options.layers :]]


def _notes(model: onnx.ModelProto, entry: dict[str, Any]) -> dict[str, str]:
    """Metadata of the new graph: the base's, but for what it gives."""
    notes = {e.key: e.value for e in model.metadata_props}
    return notes | {
        "embedge.task": MAPS,
        "embedge.output": json.dumps({"embeddings": entry["tasks"]}),
    }


def _figures(found: NDArray[np.float32], expected: NDArray[np.float32]) -> dict[str, float]:
    cosines = cosine_rows(found, expected)
    figures = {
        "texts": len(found),
        "cosine_mean": round(float(cosines.mean()), 6),
        "cosine_min": round(float(cosines.min()), 6),
    }
    if len(found) > _NEIGHBOURS:
        overlap = top_k_overlap(found, expected, _NEIGHBOURS)
        figures["top10_overlap"] = round(overlap, 4)
    return figures
