"""What a graph's metadata say to whoever opens it without embedge, under keys ``embedge.…``.

task, precision   what it is
inputs            where those lie that are no tokens, of a graph that tasks share
onnxruntime       least version that computes it right
session_config    the session option that its 8-bit matmuls need on x86-64 without VNNI
portable          that they need none
output            what has been done to ``embedding`` already, or what ``token_embeddings`` are
tokens            JSON: max_length, pad_token_id, truncation_side; rows are padded on the right
states            JSON: names of the token states before the first layer and after each
prompts           JSON: texts by name, and the name of the default one; none: no such key
late_interaction  JSON: as in the manifest, of models of one vector a token
runtime           "embedge", where no other opens it
"""

from __future__ import annotations

import json

from embedge.export.graph.builder import Graph
from embedge.export.model import Model
from embedge.runtime.bundle.contract import EXACT_OPTION, ONNXRUNTIME, UNPACKED_PRECISION

__all__ = ["graph_notes", "task_notes"]

_INTEGER_PRODUCT = "MatMulInteger"
_EXACT = f"{EXACT_OPTION}=1"
_PORTABLE = "two of its 8-bit products fit 16 bits: exact on every processor"


def graph_notes(g: Graph, precision: str, name: str) -> dict[str, str]:
    """Notes of any graph.

    Args:
        g: the graph.
        precision: its precision.
        name: the task, or that of the vision tower.
    """
    notes = {
        "embedge.task": name,
        "embedge.precision": precision,
        "embedge.onnxruntime": ONNXRUNTIME.partition(",")[0],
    }
    if any(node.op_type.startswith(_INTEGER_PRODUCT) for node in g.nodes):
        portable = not g.scheme.saturates and precision != UNPACKED_PRECISION
        key, note = ("portable", _PORTABLE) if portable else ("session_config", _EXACT)
        notes[f"embedge.{key}"] = note
    if precision == UNPACKED_PRECISION:
        notes["embedge.runtime"] = "embedge"
    return notes


def task_notes(model: Model, g: Graph, precision: str, task: str | None) -> dict[str, str]:
    """Notes of a task's graph.

    Args:
        model: what is exported.
        g: the graph.
        precision: its precision.
        task: its name; ``None`` of the graph that all tasks share.
    """
    normalized = ", of length 1" if model.settings.normalize else ""
    normalized += ", round(127 · tanh(x))" if model.settings.tanh_int8 else ""
    tokens = {
        "max_length": model.settings.max_length,
        "pad_token_id": model.tokenizer.pad_token_id,
        "truncation_side": model.tokenizer.truncation_side,
    }
    pooled = f"pooled ({model.pooling})" if model.pooling else "a vector a token"
    notes = graph_notes(g, precision, task or "") | {
        "embedge.output": f"{pooled}{normalized}",
        "embedge.tokens": json.dumps(tokens),
        "embedge.states": json.dumps(g.states),
    }
    if task is None:
        del notes["embedge.task"]
        notes["embedge.inputs"] = "those of a task: PRECISION/TASK.safetensors"
    prompts = {} if task is None else model.prompts(task)
    if prompts:
        said = {"texts": prompts, "default": model.settings.default_prompt_name}
        notes["embedge.prompts"] = json.dumps(said, sort_keys=True)
    if model.late_interaction is not None:
        notes["embedge.late_interaction"] = json.dumps(model.late_interaction, sort_keys=True)
    return notes
