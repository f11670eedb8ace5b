"""Vectors of bundles by ONNX Runtime alone and by embedge: ``python -m tests.helpers.plain_onnxruntime JSON``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from embedge.export.graph.saturation import ADVICE
from embedge.runtime import Embedder
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.host.saturation import saturates_u8s8
from embedge.runtime.kernels.library import own_kernels
from embedge.runtime.sessions.prepared_graphs import PreparedGraphs
from embedge.runtime.tuning.prepack_graphs import prepack_graph

__all__ = ["TASK", "found", "plain", "without_guard"]

TASK = "task"


def found(bundles: dict[str, str], texts: list[str]) -> dict[str, Any]:
    """What this processor gives at int8, as JSON has it.

    Args:
        bundles: their folders by name, each with the task :data:`TASK`.
        texts: what to embed.
    """
    return {
        "saturates": saturates_u8s8(),
        "kernels": own_kernels(),
        "vectors": {name: _of(Path(folder), texts) for name, folder in bundles.items()},
    }


def _of(bundle: Path, texts: list[str]) -> dict[str, Any]:
    graph = bundle / "int8" / f"{TASK}.onnx"
    given: dict[str, Any] = {
        "embedge": Embedder(bundle, threads=1).encode(texts, batch_size=len(texts)).tolist(),
        "asked": plain(bundle, graph, texts, exact=True).tolist(),
    }
    try:
        given["plain"] = plain(bundle, graph, texts).tolist()
    except Exception as error:  # ONNX Runtime's errors have no common base
        given["error"] = str(error)
    bare = without_guard(graph)
    if bare is not None:
        given["without guard"] = plain(bundle, bare, texts).tolist()
        bare.unlink()
    prepared = PreparedGraphs(Bundle(bundle))
    prepack_graph(prepared, "int8", TASK)
    given["prepared"] = Embedder(bundle, threads=1).encode(texts, batch_size=len(texts)).tolist()
    prepared.folders.remove()  # a masked processor has the name of the whole one
    return given


def plain(
    bundle: Path, graph: Path, texts: list[str], *, exact: bool = False
) -> NDArray[np.float32]:
    """float32 ``[texts, dim]`` as someone without embedge computes them.

    Args:
        bundle: for its tokenizer.
        graph: one of its graphs.
        texts: what to embed.
        exact: ask for exact 8-bit products.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(texts)
    ids = np.array([row.ids for row in rows], np.int64)
    given = {
        "input_ids": ids,
        "attention_mask": np.array([row.attention_mask for row in rows], np.int64),
        "token_type_ids": np.zeros_like(ids),
    }
    names = {value.name for value in session.get_inputs()}
    (vectors,) = session.run(["embedding"], {n: a for n, a in given.items() if n in names})
    return np.asarray(vectors, np.float32)


def without_guard(graph: Path) -> Path | None:
    """A copy of a graph beside it that does not stop where products saturate; ``None``: this one does not."""
    model = onnx.load(str(graph), load_external_data=False)
    nodes = model.graph.node
    guards = [node for node in nodes if node.name == ADVICE]
    if not guards:
        return None
    (guard,) = guards
    (added,) = [node for node in nodes if guard.output[0] in node.input]
    for node in nodes:
        for place, name in enumerate(node.input):
            if name == added.output[0]:
                node.input[place] = added.input[0]
    nodes.remove(guard)
    nodes.remove(added)
    path = graph.with_name("without-guard.onnx")
    onnx.save(model, str(path))
    return path


if __name__ == "__main__":
    print(json.dumps(found(**json.loads(sys.argv[1]))))
