"""What maps between tasks are fitted on: vectors of tasks, and an output of a graph that is not in the bundle."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.embedder import Embedder
from embedge.runtime.encode.batch_size import CPU_BATCH_TOKENS_PER_THREAD
from embedge.runtime.encode.batches import pad_batch, plan_batches
from embedge.runtime.encode.prompted import prompted
from embedge.runtime.encode.sequences import TokenIds
from embedge.runtime.errors import BundleError
from embedge.runtime.host.cores import available_cores
from embedge.runtime.host.onnxruntime import open_session
from embedge.runtime.host.saturation import require_exact_matmuls
from embedge.runtime.kernels.library import own_kernels, use_own_kernels
from embedge.runtime.sessions.session import GraphSession, new_options
from embedge.runtime.sessions.task_inputs import task_inputs

__all__ = ["TaskPasses"]

Vectors = NDArray[np.float32]

_FOLDER = "session.model_external_initializers_file_folder_path"  # of a model that is no file
_BATCH = 32


class TaskPasses:
    """The graphs of one precision on some texts, on the CPU.

    Args:
        bundle: its folder.
        precision: one of its precisions.
        base: the task whose prompts the texts get.
        texts: without prompts; those without any but spaces are left out.
        threads: of a run; ``None``: the cores that this process really has.
        told: is called with the number of texts that a batch has had.

    Attributes:
        texts: with their prompts.

    Raises:
        EmbedgeError: if the bundle cannot be opened.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        precision: str,
        base: str,
        texts: Sequence[str],
        *,
        threads: int | None = None,
        told: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._bundle = Bundle(bundle, verify="none")
        self._precision, self._base = precision, base
        self._threads = threads or available_cores()
        self._told = told
        self._model = Embedder(bundle, precision=precision, device="cpu", threads=self._threads)
        self.texts = prompted(self._bundle.manifest, base, texts)

    def __enter__(self) -> TaskPasses:
        return self

    def __exit__(self, *_: object) -> None:
        self._model.close()

    def vectors(self, task: str) -> Vectors:
        """A task's vectors, float32 ``[texts, dim]``, whole."""
        dim = self._bundle.manifest.model.dim
        chunks = range(0, len(self.texts), _BATCH * 8)
        parts = []
        for start in chunks:
            texts = self.texts[start : start + _BATCH * 8]
            found: Vectors = self._model.encode(
                texts, task=task, prompt="", truncate_dim=dim, on_truncate="ignore"
            )
            parts.append(found)
            self._told(len(texts))
        return np.concatenate(parts)

    def outputs(self, graph: bytes, output: str) -> Vectors:
        """An output of a graph with the base task's inputs and external data, float32 ``[texts, …]``.

        Args:
            graph: an ONNX model.
            output: its name; the first axis is that of the texts.

        Raises:
            BundleError: if ONNX Runtime refuses the graph.
        """
        session = self._open(graph)
        model, settings = self._bundle.manifest.model, self._bundle.manifest.precisions
        tokens: list[TokenIds] = self._model.tokenize(self.texts, task=self._base, prompt="")
        batches = plan_batches(
            [len(sequence) for sequence in tokens],
            batch_size=_BATCH,
            max_batch_tokens=CPU_BATCH_TOKENS_PER_THREAD * self._threads,
        )
        found: dict[int, Any] = {}
        for batch in batches:
            sequences = [tokens[i] for i in batch]
            inputs = pad_batch(
                sequences,
                input_names=model.inputs,
                pad_token_id=self._bundle.manifest.tokenizer.pad_token_id,
                row_multiple=settings[self._precision].row_multiple,
                max_length=model.max_length,
            )
            rows = session.run(output, inputs)[: len(sequences)]
            found |= zip(batch.tolist(), rows, strict=True)
            self._told(len(sequences))
        return np.stack([found[i] for i in range(len(tokens))])

    def _open(self, graph: bytes) -> GraphSession:
        bundle, precision = self._bundle, self._precision
        file = bundle.graph(precision, self._base)
        own = bundle.multiplies_integers(precision) and own_kernels()
        exact = bundle.manifest.precisions[precision].saturates and not own
        options = new_options(threads=self._threads, exact=exact)
        if exact:
            require_exact_matmuls()
        if own:
            use_own_kernels(options, panels=False)
        options.add_session_config_entry(_FOLDER, str(file.parent))
        try:
            session = open_session(graph, options, ["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise BundleError(f"{file}: pools of its states cannot be run: {error}") from error
        tensors = bundle.task_tensors(precision, self._base)
        given = {} if tensors is None else task_inputs(tensors)
        return GraphSession(file, session, device="cpu", threads=self._threads, given=given)
