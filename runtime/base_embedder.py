"""A bundle opened at one precision: what it is, and what runs it."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.manifest import TaskMaps
from embedge.runtime.encode.batch_runner import BatchRunner
from embedge.runtime.encode.batch_size import settings_by_graph
from embedge.runtime.encode.lookup import (
    choose_dim,
    choose_task,
    find_precision,
    with_max_length,
    with_prompts,
)
from embedge.runtime.encode.request import CallOptions, MappedRequest, Request
from embedge.runtime.encode.sequences import TokenIds
from embedge.runtime.encode.texts import TextPipeline
from embedge.runtime.encode.tokenizer import read_tokenizer
from embedge.runtime.encode.vectors import Vectors
from embedge.runtime.host.cores import available_cores
from embedge.runtime.host.onnxruntime import load_onnxruntime
from embedge.runtime.options import EmbedderOptions
from embedge.runtime.sessions.device import choose_device, split_device
from embedge.runtime.sessions.graphs import Graphs
from embedge.runtime.sessions.prepared_graphs import PreparedGraphs
from embedge.runtime.sessions.session import SessionConfig
from embedge.runtime.tuning.cache import read_tuning
from embedge.runtime.tuning.choose_precision import AUTO, choose_automatically

if TYPE_CHECKING:
    from embedge.runtime.images.encode import ImagePipeline

__all__ = ["BaseEmbedder"]

_POOLS = (
    "one Embedder uses all cores by threads, so call encode; for several GPUs or machines open one in each process, "
    "which takes its share of the texts (docs/guides/serving.md)"
)
# Methods and attributes of sentence-transformers, and what to use here.
_ELSEWHERE = {
    "start_multi_process_pool": _POOLS,
    "stop_multi_process_pool": _POOLS,
    "encode_multi_process": _POOLS,
    "get_max_seq_length": "max_seq_length is an attribute",
    "to": "name the device when the Embedder is made: device=",
    "half": "name the precision when the Embedder is made: precision=",
    "save": "a bundle is a folder to copy; a part of it: embedge.subset_bundle",
    "save_pretrained": "embedge.save_pretrained writes a folder for sentence-transformers",
}


class BaseEmbedder:
    """What ``Embedder`` knows of its bundle, and runs it with; its graphs are opened when they are used.

    Args:
        bundle: the bundle's folder.
        options: how to open it, see ``Embedder``.

    Raises:
        BundleError: if the bundle is missing, damaged, or too new.
        EmbedgeValueError: for an option that this bundle does not have.
        DeviceError: if ``device="cuda"`` does not work here.
    """

    def __init__(self, bundle: str | os.PathLike[str], options: EmbedderOptions) -> None:
        self._options = options
        load_onnxruntime()  # a missing or wrong one shows here
        self._bundle = Bundle(bundle, verify=options.verify)
        manifest = self._bundle.manifest
        self._model = manifest.model
        device_kind, device_index = split_device(options.device)
        cores = available_cores() if options.threads is None else options.threads
        tuned = {} if device_kind == "cuda" else read_tuning(self._bundle, cores)
        precision = options.precision
        if precision == AUTO:
            precision = choose_automatically(
                self._bundle,
                tuned,
                device=device_kind,
                memory_limit=options.memory_bytes,
                min_cosine=options.min_cosine,
            )
        self._precision = find_precision(manifest, precision)
        self._settings = manifest.precisions[self._precision]
        self._task = options.task
        if options.task is not None:
            choose_task(manifest, self._precision, options.task)
        tasks = with_prompts(
            manifest.tasks, options.prompts, options.default_prompt_name, self._task
        )
        self._manifest = replace(manifest, tasks=tasks)
        self._dim = choose_dim(self._model, options.truncate_dim)
        self._device = choose_device(options.device, self._precision, self._settings.devices)
        device_kind, _ = split_device(self._device)
        config = SessionConfig(
            device=device_kind,
            device_index=device_index,
            threads=cores,
            arena=options.memory_bytes is None,
            prepared=PreparedGraphs(self._bundle),
        )
        measured = tuned.get(self._precision)
        self._graphs = graphs = Graphs(
            self._bundle,
            self._precision,
            config,
            settings=settings_by_graph(
                self._bundle,
                self._precision,
                config,
                measured=measured.settings if measured else None,
            ),
            max_sessions=options.max_sessions,
            memory_limit=options.memory_bytes,
        )
        self._tokenizer = read_tokenizer(self._bundle)
        self._runner = BatchRunner(
            graphs,
            self._model,
            pad_token_id=manifest.tokenizer.pad_token_id,
            row_multiple=self._settings.row_multiple,
            token_name=self._tokenizer.token_name,
        )
        self._texts = TextPipeline(self._tokenizer, self._runner, self._model)
        if options.max_seq_length is not None:
            self.max_seq_length = options.max_seq_length
        self._images: ImagePipeline | None = None
        if self._model.image is not None and self._settings.vision is not None:
            from embedge.runtime.images.encode import ImagePipeline  # few bundles take images

            self._images = ImagePipeline(
                graphs,
                self._runner,
                self._model.image,
                self._model.max_length,
                self._model.pooling,
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that have a graph at this precision."""
        return tuple(self._settings.graphs)

    @property
    def maps(self) -> TaskMaps | None:
        """The maps by which ``Embedder.encode_tasks`` gives several tasks' vectors; ``None``: none were fitted."""
        return self._settings.maps

    @property
    def task(self) -> str | None:
        """What calls embed for that name no task; ``None``: they have to name one."""
        return self._task or (self.tasks[0] if len(self.tasks) == 1 else None)

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts of :attr:`task` by name, see :meth:`get_prompts`."""
        return self.get_prompts()

    @property
    def default_prompt_name(self) -> str | None:
        """The prompt of :attr:`task` where a call names none; ``None``: no prompt."""
        return self._manifest.tasks[self._chosen_task(None)].default_prompt

    def get_prompts(self, task: str | None = None) -> dict[str, str]:
        """The prompts of a task by name.

        Args:
            task: as for ``Embedder.encode``.
        """
        return dict(self._manifest.tasks[self._chosen_task(task)].prompts)

    @property
    def dim(self) -> int:
        """Length of a vector where a call names no ``truncate_dim``."""
        return self._dim

    @property
    def multi_vector_dim(self) -> int | None:
        """Length of each of a text's vectors with ``multi_vector``; ``None``: there is no such head."""
        return self._model.multi_vector_dim

    def get_embedding_dimension(self) -> int:
        """Same as :attr:`dim`, under sentence-transformers' name."""
        return self.dim

    def get_sentence_embedding_dimension(self) -> int:
        """Same as :attr:`dim`, under sentence-transformers' former name."""
        return self.dim

    @property
    def similarity_fn_name(self) -> str:
        """How ``Embedder.similarity`` compares: "cosine" or "dot"; with late interaction "maxsim", or "meanmaxsim"."""
        return self._model.similarity

    @property
    def max_seq_length(self) -> int:
        """Most tokens of a text, special tokens included; can be set, to fewer than the model takes.

        Set it before other threads embed. Images keep the model's limit.
        """
        return self._manifest.model.max_length

    @max_seq_length.setter
    def max_seq_length(self, length: int) -> None:
        model = with_max_length(self._model, length, least=self._tokenizer.special_tokens + 1)
        if model.max_length == self.max_seq_length:
            return
        self._tokenizer = self._tokenizer.at_limit(model.max_length)
        self._texts = TextPipeline(self._tokenizer, self._runner, model)
        self._manifest = replace(self._manifest, model=model)

    @property
    def truncation_side(self) -> Literal["right", "left"]:
        """The end that a text loses which has more tokens."""
        return self._manifest.tokenizer.truncation_side

    @property
    def modalities(self) -> tuple[str, ...]:
        """What can be embedded at this precision: "text", or "text" and "image"."""
        return ("text",) if self._images is None else ("text", "image")

    @property
    def precision(self) -> str:
        """Name of the precision in use; with "auto", what it took."""
        return self._precision

    @property
    def device(self) -> str:
        """What runs the graphs: "cpu", "cuda" or "cuda:1"; with "auto", what it took."""
        return self._device

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self._bundle.root)!r}, precision={self._precision!r}, "
            f"device={self._device!r})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as its arguments: another process opens its own sessions, at the same precision."""
        shorter = self.max_seq_length < self._model.max_length
        chosen = replace(
            self._options,
            precision=self._precision,
            min_cosine=None,
            max_seq_length=self.max_seq_length if shorter else None,
        )
        return functools.partial(type(self), **vars(chosen)), (self._bundle.root,)

    if not TYPE_CHECKING:  # type checkers would take any name

        def __getattr__(self, name: str) -> Any:
            """Says where something is that sentence-transformers has under another name."""
            known = f"; {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}{known}",
                name=name,
                obj=self,
            )

    def close(self) -> None:
        """Closes the open graphs that no other thread uses; a later call opens them again."""
        self._graphs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run_ids(
        self, ids: Sequence[NDArray[np.int64]], *, task: str | None = None, mapped: bool = False
    ) -> Vectors:
        """Vectors of texts that are token ids already, not cut: what the graph gives for them.

        For measurements of the graphs by themselves.

        Args:
            ids: int64 ``[tokens]`` each, special tokens included.
            task: as for ``Embedder.encode``.
            mapped: by the precision's maps.

        Returns:
            float32 ``[texts, width]``.
        """
        request = self._request(task=task, truncate_dim=self._model.dim)
        if mapped:
            request = MappedRequest.of_tasks(
                self._manifest, self._precision, {request.task: request.options}
            )
        vectors = np.zeros((len(ids), request.dim), np.float32)
        texts = [TokenIds(row, np.zeros_like(row), False) for row in ids]
        for index, vector in self._runner.run(list(enumerate(texts)), request):
            vectors[index] = vector[0] if mapped else vector
        return vectors

    def _chosen_task(self, task: str | None) -> str:
        return choose_task(self._manifest, self._precision, self._task if task is None else task)

    def _request(self, **options: Any) -> Request:
        """A call's options, with what this object puts where a call names nothing."""
        options["task"] = self._task if options.get("task") is None else options["task"]
        if options.get("truncate_dim") is None and options.get("multi_vector", False) is False:
            options["truncate_dim"] = self._dim
        return Request.look_up(self._manifest, self._precision, CallOptions(**options))
