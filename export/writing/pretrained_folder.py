"""One graph of a bundle as a folder of Hugging Face's layout, for sentence-transformers, optimum and fastembed.

Rules:
    * Their graphs give a state a token, and pooling is theirs. Here a text's vector, pooled and normalized by the
      graph, stands as the state of a single token, and pooling takes the first.
    * ``config.json`` says what a caller sees: BERT's inputs and the vector's length. The graph is what it is.
    * Each file's SHA-256 is compared as it is read; the folder appears under its name when it is whole and on the
      disk.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer

from embedge.runtime.bundle.contract import EXACT_OPTION
from embedge.runtime.bundle.files import GRAPH_BYTES, read_regular_file, system_reason
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.json_object import json_text
from embedge.runtime.bundle.licences import licence_name
from embedge.runtime.bundle.lock import sole_holder
from embedge.runtime.bundle.manifest import INPUTS, FileEntry, Manifest
from embedge.runtime.bundle.model_card import licence_lines
from embedge.runtime.bundle.writing import check_new, new_folder, recover, sync_files
from embedge.runtime.errors import BundleError, EmbedgeError, EmbedgeValueError

__all__ = ["save_pretrained"]

_STATES = "last_hidden_state"
_GRAPH = "model.onnx"
_MODULES = "sentence_transformers.models"


def save_pretrained(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    task: str | None = None,
    precision: str | None = None,
) -> Path:
    """Write a task's graph as a folder that ``SentenceTransformer(out, backend="onnx")`` opens.

    optimum's ``ORTModelForFeatureExtraction`` and fastembed's custom models open it too. The folder has the task's
    prompts, the length at which texts are cut and on which side, and the dimension that the source cuts vectors to.

    Args:
        bundle: the bundle's folder.
        out: the new folder, which must not exist or be empty.
        task: may be left out where the bundle has exactly one.
        precision: likewise; "fp32" and those of ``--portable`` run on any processor as they are.

    Returns:
        ``out`` as a path.

    Raises:
        EmbedgeValueError: for a task or precision that the bundle does not have, one that these programs cannot run,
            or an ``out`` that is taken.
        BundleError: if the bundle is damaged.
        EmbedgeError: if nothing can be written there.
    """
    source, target = Bundle(bundle), Path(out)
    precision = _the_one("precision", precision, source.manifest.precisions)
    task = _the_one("task", task, source.manifest.precisions[precision].graphs)
    _check_runnable(source, precision, task)
    real = Path(os.path.realpath(target))
    try:
        if real.is_relative_to(source.root.resolve()):
            raise EmbedgeValueError(f"{out}: lies in the bundle; name a folder outside it")
        check_new(target, real)
        real.parent.mkdir(parents=True, exist_ok=True)
        with sole_holder(real.parent / f".{real.name}.lock", lambda holder: _busy(target, holder)):
            recover(real)
            with new_folder(real, replace=False) as work:
                _fill(work, source, task, precision)
                sync_files(
                    work, [p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file()]
                )
    except OSError as error:
        raise EmbedgeError(
            f"{out}: cannot be written: {system_reason(error)}; nothing was left there: name another folder"
        ) from error
    return target


def _the_one(kind: str, name: str | None, known: Iterable[str]) -> str:
    names = list(known)
    if name in names:
        return name
    if name is None and len(names) == 1:
        return names[0]
    found = f"no {kind} {name!r}" if name is not None else f"several {kind}s"
    raise EmbedgeValueError(f"the bundle has {found}; choose one of {', '.join(names)}")


def _check_runnable(source: Bundle, precision: str, task: str) -> None:
    """Refuses graphs whose vectors need more than the inputs that these programs give."""
    manifest = source.manifest
    model, settings = manifest.model, manifest.precisions[precision]
    reason = None
    if model.late_interaction is not None:
        reason = "it gives a vector a token, and these programs pool them"
    elif model.image is not None:
        reason = "it takes images, whose inputs these programs do not make"
    elif not {*model.inputs} <= {*INPUTS}:
        reason = f"it reads {', '.join({*model.inputs} - {*INPUTS})}, which leaves prompts out of the pooling"
    elif not model.include_prompt:
        reason = "the source leaves the tokens of prompts out of its pooling, and these programs pool them"
    elif settings.row_multiple > 1:
        reason = (
            f"its rows × tokens have to be a multiple of {settings.row_multiple}, which these programs do not fill "
            "up to; export with --int4-block-size 32"
        )
    elif manifest.tokenizer.append_eos_token_id is not None:
        reason = "its tokenizer does not add the last token itself; export it again"
    elif settings.unpack:
        reason = "its weights are unpacked by embedge; take int4"
    elif settings.task_tensors:
        reason = "its tasks share a graph, each with inputs of its own; export with --layout merged"
    else:
        reason = _misplaced(source, precision, task)
    if reason is not None:
        raise EmbedgeValueError(
            f"{source.root}: {precision} cannot stand alone: {reason}", arguments=["precision"]
        )


def _misplaced(source: Bundle, precision: str, task: str) -> str | None:
    """What of a graph's weights does not lie beside it."""
    graph = PurePosixPath(source.manifest.precisions[precision].graphs[task])
    for name in source.graph_files(precision, task):
        path = PurePosixPath(name)
        if path != graph and (path.parent != graph.parent or path.name == _GRAPH):
            return f"its weights are in {name}, where these programs do not find them; export the bundle again"
    return None


def _fill(work: Path, source: Bundle, task: str, precision: str) -> None:
    manifest = source.manifest
    graphs = work / "onnx"
    graphs.mkdir()
    with source.reading([*source.graph_files(precision, task), manifest.tokenizer.file]):
        _write_graph(graphs, source, task, precision)
        _copy(source, manifest.tokenizer.file, work / "tokenizer.json")
    for name, content in _settings(manifest, task, work / "tokenizer.json").items():
        file = work / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json_text(content), "utf-8")
    (work / "README.md").write_text(_card(manifest, task, precision), "utf-8")


def _write_graph(folder: Path, source: Bundle, task: str, precision: str) -> None:
    """Writes ``model.onnx``, with the files of weights beside it."""
    path = source.manifest.precisions[precision].graphs[task]
    for name in source.graph_files(precision, task):
        if name != path:
            _copy(source, name, folder / Path(name).name)
    content = read_regular_file(source.file(path), GRAPH_BYTES)
    _compare(source, path, hashlib.sha256(content).hexdigest())
    model = onnx.load_model_from_string(content)
    dim = _as_states(model.graph, source.manifest)
    shape: list[str | int | None] = ["batch", 1, dim]
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(_STATES, TensorProto.FLOAT, shape))
    onnx.save(model, str(folder / _GRAPH))


def _as_states(graph: onnx.GraphProto, manifest: Manifest) -> int:
    """Adds what makes a state of a single token of each vector; returns its length."""
    dim, vector = manifest.model.dim, "embedding"
    cut = manifest.model.truncate_dim
    if cut is not None and cut < dim:
        dim = cut
        for name, value in (("cut.start", 0), ("cut.stop", dim), ("cut.axis", 1)):
            graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
        graph.node.append(
            helper.make_node("Slice", [vector, "cut.start", "cut.stop", "cut.axis"], ["cut"])
        )
        vector = "cut"
        if manifest.model.normalize:
            graph.node.append(
                helper.make_node("LpNormalization", ["cut"], ["cut.unit"], axis=-1, p=2)
            )
            vector = "cut.unit"
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "states.axis"))
    graph.node.append(helper.make_node("Unsqueeze", [vector, "states.axis"], [_STATES]))
    return dim


def _copy(source: Bundle, name: str, target: Path) -> None:
    shutil.copyfile(source.file(name), target)
    _compare(source, name, FileEntry.of(target).sha256)


def _compare(source: Bundle, name: str, found: str) -> None:
    """Refuses what was read of a file if its SHA-256 is not the manifest's."""
    expected = source.manifest.files[name].sha256
    if found != expected:
        raise BundleError(
            f"{source.root / name}: expected SHA-256 {expected}, found {found}; copy or export the bundle again"
        )


def _settings(manifest: Manifest, task: str, tokenizer_file: Path) -> dict[str, Any]:
    """The content of each file of settings."""
    model, of_task = manifest.model, manifest.tasks[task]
    dim = min(model.truncate_dim or model.dim, model.dim)
    pad_id = manifest.tokenizer.pad_token_id
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    pad = tokenizer.id_to_token(pad_id)
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
    return {
        "config.json": {
            "model_type": "bert",  # what a caller sees: its inputs, and the vector's length
            "architectures": ["BertModel"],
            "hidden_size": dim,
            "max_position_embeddings": model.max_length,
            "vocab_size": tokenizer.get_vocab_size(),
            "pad_token_id": pad_id,
            "embedge": {"source": manifest.source.name, "model_type": manifest.source.model_type},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.max_length,
            "truncation_side": manifest.tokenizer.truncation_side,
            "padding_side": "right",
            "pad_token": pad,
            "model_input_names": list(model.inputs),
            "clean_up_tokenization_spaces": False,
        },
        "special_tokens_map.json": {"pad_token": pad},
        "sentence_bert_config.json": {"max_seq_length": model.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": dict(of_task.prompts),
            "default_prompt_name": of_task.default_prompt,
            "similarity_fn_name": model.similarity,
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": dim,
            "pooling_mode_cls_token": True,
            "pooling_mode_mean_tokens": False,
        },
        "modules.json": [
            {"idx": int(name), "name": name, "path": path, "type": f"{_MODULES}.{kind}"}
            for name, path, kind in modules
        ],
    }


def _card(manifest: Manifest, task: str, precision: str) -> str:
    source, settings = manifest.source, manifest.precisions[precision]
    adapter = manifest.tasks[task].adapter
    licences = [licence_name(source.license)]
    licences += [f"of the adapter: {licence_name(adapter.license)}"] if adapter is not None else []
    lines = ["---", "library_name: sentence-transformers", "pipeline_tag: sentence-similarity"]
    lines += licence_lines(manifest, [task])
    lines += ["tags:", "- onnx", "- sentence-transformers", "- embedge", "---", ""]
    lines += [
        f"# {source.name}, task {task}, {precision}",
        "",
        "Written by embedge from a bundle. The graph pools and normalizes itself; its output is the vector of a text "
        "as the state of a single token, which `1_Pooling` takes.",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        'model = SentenceTransformer("path/to/this/folder", backend="onnx")',
        "```",
        "",
        f"- Licence: {'; '.join(licences)}.",
    ]
    if settings.saturates:
        lines += [
            f'- On x86-64 without VNNI it needs ONNX Runtime\'s session option `{EXACT_OPTION}` = "1": pass '
            '`model_kwargs={"session_options": options}`. Without it a run ends with an error there.'
        ]
    return "\n".join(lines) + "\n"


def _busy(out: Path, holder: str) -> EmbedgeError:
    return EmbedgeError(
        f"{out}: expected nobody else to write it at the same time, found {holder} writing it; wait until that is "
        "done, or name another folder"
    )
