"""The export itself: read, check, write every precision, then the manifest."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

from threadpoolctl import ThreadpoolController

from embedge.export.calibration.texts import calibration_texts, with_prompts
from embedge.export.calibration.tokens import MAX_TOKENS_PER_TEXT, TokenBatch, token_batches
from embedge.export.errors import ExportError
from embedge.export.options import ExportOptions, check_dims
from embedge.export.plan import ExportPlan
from embedge.export.progress import Progress
from embedge.export.reading import read_model
from embedge.export.schemes.registry import PORTABLE, PRECISIONS
from embedge.export.writing.bundle import additions, clear_up, new_bundle
from embedge.export.writing.existing import check_kept, read_existing
from embedge.export.writing.files import list_files, relative_files, write_new
from embedge.export.writing.lock import sole_exporter
from embedge.export.writing.manifest import base_quantization, manifest_of
from embedge.export.writing.model_card import write_card
from embedge.export.writing.precision import write_precision
from embedge.export.writing.same_source import check_same_source
from embedge.runtime.bundle.contract import MANIFEST
from embedge.runtime.bundle.files import system_reason
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.json_object import json_text
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.bundle.writing import check_replaceable, replace_file, sync_files
from embedge.runtime.errors import EmbedgeError, EmbedgeValueError, EmbedgeWarning
from embedge.runtime.host.cores import available_cores
from embedge.runtime.host.onnxruntime import load_onnxruntime
from embedge.runtime.output_ranges import calibrate_ranges, cheapest_precision, without_ranges

_RANGE_TEXTS = 512  # most that ranges of vectors are taken from
_RANGE_BYTES = 512 << 20  # of a graph that is opened for them: an export takes little memory


def export(options: ExportOptions, progress: Progress) -> Path:
    """Run an export; see :func:`embedge.export.export_bundle`."""
    try:
        with sole_exporter(options.out), _blas().limit(limits=_blas_threads(), user_api="blas"):
            texts = _export_alone(options, progress)
            out = options.out if options.out.is_dir() else Path(os.path.realpath(options.out))
            _calibrate_ranges(texts, out, progress)
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        raise ExportError(
            f"{options.source} could not be exported to {options.out}: {place}{system_reason(error)}; check "
            "that path and who may read it, and export again"
        ) from error
    return out


@cache
def _blas() -> ThreadpoolController:
    """Finds numpy's BLAS and scipy's, once: it looks through all libraries that are loaded."""
    return ThreadpoolController()


def _blas_threads() -> int:
    """Of numpy's BLAS and of scipy's: half of the cores, as each has threads that wait for work by spinning."""
    return max(1, available_cores() // 2)


def _export_alone(options: ExportOptions, progress: Progress) -> Sequence[str]:
    """Write the bundle; return the calibration texts, which are read once."""
    load_onnxruntime()  # a missing or wrong one shows before the work
    clear_up(options.out)
    old = read_existing(options.out, options.overwrite)
    texts = calibration_texts(options.calibration)
    model = read_model(options)
    progress.tell(f"licence of {model.checkpoint.name}: {model.described_licences()}")
    if (how := base_quantization(model)) is not None:
        progress.tell(f"base of {model.checkpoint.name}: as bitsandbytes quantizes it, {how}")
    dims = check_dims(options.matryoshka_dims or model.settings.matryoshka_dims or None, model.dim)
    if old is None:
        check_replaceable("out", options.out)
    else:
        check_same_source(options.out, model, dims, old)
    todo = _missing(options, list(model.adapters), old)
    if old is not None:
        _check_as_portable(options, todo, old)
    plan = ExportPlan(options=options, model=model, old=old, progress=progress)
    if old is None:
        with new_bundle(options.out, overwrite=options.overwrite) as folder:
            written = _write_precisions(plan, folder, todo, texts)
            write_new(folder / "tokenizer.json", model.tokenizer.text)
            new = relative_files(folder)
            manifest = manifest_of(
                model,
                matryoshka_dims=dims,
                precisions=written,
                files=list_files(folder, new),
                old=None,
            )
            _finish(folder, manifest, new)
    else:
        check_kept(options.out, todo)
        with additions(options.out) as folder:
            before = relative_files(folder)
            written = _write_precisions(plan, folder, todo, texts)
            # with what `bench --record` has written meanwhile
            old = read_existing(options.out, overwrite=False) or old
            new = {n for n in relative_files(folder) - before if n.split("/")[0] in written}
            manifest = manifest_of(
                model,
                matryoshka_dims=dims or old.model.matryoshka_dims,
                precisions=written,
                files={n: f.to_dict() for n, f in old.files.items()} | list_files(folder, new),
                old=old,
            )
            _finish(folder, manifest, new)
    return texts


def _calibrate_ranges(texts: Sequence[str], out: Path, progress: Progress) -> None:
    """Keep the ranges of the new tasks' vectors in the manifest, from the calibration texts.

    The bundle is whole before: where a graph is too large for this, or cannot run here, it is told and left to
    ``embedge ranges``.
    """
    if not texts:
        return
    bundle = Bundle(out, verify="none")
    late = bundle.manifest.model.late_interaction is not None
    most = min(MAX_TOKENS_PER_TEXT, bundle.manifest.model.max_length)
    taken = []
    for task in without_ranges(bundle.manifest):
        try:
            _check_small(bundle, task)
            taken.append(task)
        except EmbedgeError as error:
            _tell_left_out(progress, out, [task], error)
    try:
        with catch_warnings():
            simplefilter("ignore", EmbedgeWarning)  # of few texts, which the caller has chosen
            if taken:
                calibrate_ranges(
                    out,
                    texts[:: -(-len(texts) // _RANGE_TEXTS)],
                    tasks=taken,
                    max_seq_length=None if late else most,
                )
    except EmbedgeError as error:
        _tell_left_out(progress, out, taken, error)


def _check_small(bundle: Bundle, task: str) -> None:
    """Refuses a graph that would take more memory than the export."""
    size = bundle.graph_bytes(cheapest_precision(bundle, task), task)
    if size > _RANGE_BYTES:
        raise EmbedgeError(f"the graph has {size / 1e6:.0f} MB")


def _tell_left_out(
    progress: Progress, out: Path, tasks: Sequence[str], reason: EmbedgeError
) -> None:
    names = shlex.join(tasks)
    progress.tell(
        f"ranges of 8-bit vectors of {names}: left out: {reason}; take them by: "
        f"embedge ranges {shlex.quote(str(out))} --task {names} --texts FILE"
    )


def _write_precisions(
    plan: ExportPlan, folder: Path, todo: Mapping[str, Sequence[str]], texts: Sequence[str]
) -> dict[str, Any]:
    """Write every precision's graphs; the manifest's entries by precision."""
    model, batches = plan.model, list[TokenBatch]()
    if texts and _uses_calibration(plan.options, todo):
        ids = model.tokenizer.encode(
            with_prompts(texts, model.settings),
            min(MAX_TOKENS_PER_TEXT, model.settings.max_length),
        )
        batches = token_batches(ids, model.tokenizer.pad_token_id, model.architecture.hidden_size)
    written: dict[str, Any] = {}
    for precision, tasks in todo.items():
        written |= write_precision(plan, folder, precision, tasks, batches)
    return written


def _finish(folder: Path, manifest: Manifest, new: Iterable[str]) -> None:
    """Write the card, wait for the disk, and then the manifest, with which the new files count."""
    write_card(folder, manifest)
    sync_files(folder, new)
    replace_file(folder / MANIFEST, json_text(manifest.to_dict()))


def _uses_calibration(options: ExportOptions, todo: Mapping[str, Sequence[str]]) -> bool:
    """Whether a precision's numbers depend on calibration texts."""
    wanted = [PRECISIONS[name] for name in todo]
    rounded = any(precision.method == "int4" for precision in wanted)
    return any(p.smoothed for p in wanted) or (rounded and options.int4_method == "gptq")


def _check_as_portable(options: ExportOptions, todo: Iterable[str], old: Manifest) -> None:
    """Refuse to add tasks to a precision whose graphs promise something else of their 8-bit products."""
    for precision in todo:
        there = old.precisions.get(precision)
        if precision in PORTABLE and there is not None and there.portable != options.portable:
            found, advice = ("is", "add") if there.portable else ("is not", "leave out")
            raise EmbedgeValueError(
                f"{options.out}: its {precision} {found} portable, and all tasks of a precision have to be "
                f"alike; {advice} --portable, choose another --out, or --overwrite the bundle"
            )


def _missing(
    options: ExportOptions, names: Sequence[str], old: Manifest | None
) -> dict[str, list[str]]:
    """Tasks to write, by precision."""
    todo = {}
    for precision in options.precisions:
        there = old.precisions[precision].graphs if old and precision in old.precisions else {}
        tasks = [t for t in names if t not in there]
        if tasks:
            todo[precision] = tasks
    if not todo:
        raise EmbedgeValueError(
            f"{options.out}: already holds {', '.join(names)} at "
            f"{', '.join(options.precisions)}; nothing to add. Use --overwrite to export anew"
        )
    return todo
