"""The object that turns texts into vectors."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, overload

import numpy as np
from numpy.typing import NDArray

from embedge.runtime._arguments import (
    ON_TRUNCATE,
    as_texts,
    check_choice,
    check_flag,
    check_positive,
    choose_dim,
    choose_precision,
    choose_prompt,
    choose_task,
)
from embedge.runtime._bundle import Bundle
from embedge.runtime._cores import available_cores
from embedge.runtime._device import choose_device
from embedge.runtime._errors import EmbedgeValueError
from embedge.runtime._graphs import Graphs
from embedge.runtime._pipeline import Request, TextPipeline
from embedge.runtime._progress import Progress
from embedge.runtime._similarity import similarity
from embedge.runtime._tokenize import TextTokenizer, TokenIds

__all__ = ["Embedder"]

BATCH_SIZE = 32
Vectors = NDArray[np.float32]


class Embedder:
    """Embeds texts with a bundle, without torch. Safe to share between threads.

    A task's graph is opened at its first use. ``max_sessions`` and ``memory_limit`` bound how many
    stay open; the longest unused is closed first, and a call waits while those in use leave no
    room.

    Args:
        bundle: the bundle's folder.
        precision: "int8", "int4", …; ``None``: the bundle's only one.
        device: "cpu", "cuda", or "auto": cuda where it works and the precision has kernels for it.
        threads: threads of a run; ``None``: the cores that this process really has.
        max_sessions: most graphs open at once; ``None``: all.
        memory_limit: most bytes of open graphs, each counted as its file and the external data it
            uses (activations come on top, and are given back after each run); ``None``: no limit.
        verify: "size" compares every file's size with the manifest, "full" its SHA-256 too, "none"
            neither.

    Raises:
        BundleError: if the bundle is missing, damaged, or too new.
        EmbedgeValueError: for an argument that cannot be used, with the list of what can.
        DeviceError: if ``device="cuda"`` does not work here, with the fix.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        precision: str | None = None,
        device: str = "auto",
        threads: int | None = None,
        max_sessions: int | None = None,
        memory_limit: int | None = None,
        verify: str = "size",
    ) -> None:
        self._arguments: dict[str, Any] = {
            "precision": precision,
            "device": device,
            "threads": threads,
            "max_sessions": max_sessions,
            "memory_limit": memory_limit,
            "verify": verify,
        }
        limits = {"threads": threads, "max_sessions": max_sessions, "memory_limit": memory_limit}
        for name, value in limits.items():
            if value is not None:
                check_positive(name, value)
        self._bundle = Bundle(bundle, verify=verify)
        manifest = self._bundle.manifest
        self._model = manifest.model
        self._precision = choose_precision(manifest, precision)
        self._settings = manifest.precisions[self._precision]
        self._device = choose_device(device, self._precision, self._settings.devices)
        graphs = Graphs(
            self._bundle,
            self._precision,
            device=self._device,
            threads=available_cores() if threads is None else threads,
            max_sessions=max_sessions,
            memory_limit=memory_limit,
        )
        tokenizer = TextTokenizer(
            self._bundle.file(manifest.tokenizer.file), manifest.tokenizer, self._model.max_length
        )
        self._pipeline = TextPipeline(
            tokenizer,
            graphs,
            self._model,
            pad_token_id=manifest.tokenizer.pad_token_id,
            row_multiple=self._settings.row_multiple,
        )

    # -- what it is -----------------------------------------------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that have a graph at this precision."""
        return tuple(self._settings.graphs)

    @property
    def dim(self) -> int:
        """Length of a vector without truncation."""
        return self._model.dim

    def get_sentence_embedding_dimension(self) -> int:
        """Same as :attr:`dim`, under sentence-transformers' name."""
        return self._model.dim

    @property
    def max_seq_length(self) -> int:
        """Most tokens of a text, special tokens included."""
        return self._model.max_length

    @property
    def precision(self) -> str:
        """Name of the precision in use."""
        return self._precision

    @property
    def device(self) -> str:
        """What runs the graphs, "cpu" or "cuda"; with "auto", what it took."""
        return self._device

    def __repr__(self) -> str:
        return (
            f"Embedder({str(self._bundle.root)!r}, precision={self._precision!r}, "
            f"device={self._device!r})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as its arguments: another process opens its own sessions."""
        return functools.partial(Embedder, **self._arguments), (self._bundle.root,)

    # -- embedding ------------------------------------------------------------------------------

    @overload
    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        task: str | None = ...,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int = ...,
        max_batch_tokens: int | None = ...,
        truncate_dim: int | None = ...,
        normalize_embeddings: bool = ...,
        show_progress_bar: bool | None = ...,
        on_truncate: str = ...,
        multi_vector: Literal[False] = ...,
    ) -> Vectors: ...

    @overload
    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        task: str | None = ...,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int = ...,
        max_batch_tokens: int | None = ...,
        truncate_dim: int | None = ...,
        normalize_embeddings: bool = ...,
        show_progress_bar: bool | None = ...,
        on_truncate: str = ...,
        multi_vector: bool,
    ) -> Vectors | list[Vectors]: ...

    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        task: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = BATCH_SIZE,
        max_batch_tokens: int | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
        show_progress_bar: bool | None = None,
        on_truncate: str = "warn",
        multi_vector: bool = False,
    ) -> Vectors | list[Vectors]:
        """Vectors of some texts, in their order.

        A text without a single token is a zero vector, with a warning. Lone surrogates are read as
        U+FFFD. A vector does not depend on the other texts of the call.

        Args:
            sentences: texts, or one text.
            task: may be left out where the bundle has exactly one.
            prompt_name: a prompt of the task to put before every text; ``None``: the task's
                default.
            prompt: a text to put there instead; ``prompt_name`` is then ignored.
            batch_size: most texts of a batch.
            max_batch_tokens: most padded tokens of a batch; decides the real batch. ``None``: what
                runs fastest here.
            truncate_dim: one of the declared dimensions, or any where none are declared. The vector
                is cut and, where the source normalizes, normalized again.
            normalize_embeddings: L2-normalize in any case.
            show_progress_bar: on standard error, where tqdm is installed; ``None``: no.
            on_truncate: "ignore", "warn" (once per Embedder) or "error" when a text is longer than
                :attr:`max_seq_length` and gets cut.
            multi_vector: give a vector per token instead, from models with such a head.

        Returns:
            float32 ``[texts, dim]``, ``[dim]`` for one text, ``[0, dim]`` for no text. With
            ``multi_vector`` a list of float32 ``[tokens, multi_vector_dim]``, or one array for one
            text.

        Raises:
            EmbedgeValueError: for an argument that cannot be used.
        TextTooLongError: for a text that would be cut, under "error".
            BundleError: if the task's graph cannot be opened.
            InferenceError: if the graph fails.
        """
        texts, single = as_texts(sentences)
        request = self._request(
            task=task,
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            max_batch_tokens=max_batch_tokens,
            truncate_dim=truncate_dim,
            normalize_embeddings=normalize_embeddings,
            on_truncate=on_truncate,
            multi_vector=multi_vector,
        )
        with Progress(len(texts), shown=bool(show_progress_bar) and bool(texts)) as progress:
            if multi_vector:
                parts: list[Vectors] = [np.zeros((0, request.dim), np.float32)] * len(texts)
                self._pipeline.embed(texts, request, parts.__setitem__, progress.advance)
                return parts[0] if single else parts
            vectors = np.zeros((len(texts), request.dim), np.float32)
            self._pipeline.embed(texts, request, vectors.__setitem__, progress.advance)
            return vectors[0] if single else vectors

    def encode_query(self, sentences: str | Sequence[str], **options: Any) -> Any:
        """:meth:`encode` with the task's prompt "query"; without one, its default or none.

        Args:
            sentences: texts, or one text.
            options: as for :meth:`encode`; a ``prompt_name`` or ``prompt`` given wins.
        """
        return self.encode(sentences, **self._with_role(options, ("query",)))

    def encode_document(self, sentences: str | Sequence[str], **options: Any) -> Any:
        """:meth:`encode` with the task's prompt "document" or "passage"; without one, none.

        A default prompt is left out too: it is the queries' where documents have none of their own.

        Args:
            sentences: texts, or one text.
            options: as for :meth:`encode`; a ``prompt_name`` or ``prompt`` given wins.
        """
        options = self._with_role(options, ("document", "passage"))
        if options.get("prompt_name") is None and options.get("prompt") is None:
            options["prompt"] = ""
        return self.encode(sentences, **options)

    def encode_image(self, images: Any, *, task: str | None = None, **options: Any) -> NoReturn:
        """Vectors of images, from models with a vision tower; this version has none to run.

        Raises:
            EmbedgeValueError: always, with what the bundle can embed.
        """
        raise EmbedgeValueError(
            f"{self._bundle.root}: the bundle has no vision tower; it embeds: "
            f"{', '.join(self._model.modalities)}"
        )

    def similarity(self, a: Any, b: Any) -> Vectors:
        """Similarity of each of ``a`` to each of ``b``, as the source model defines it.

        Args:
            a: vectors ``[n, dim]``, one vector ``[dim]``, or a list of multi-vectors ``[tokens,
                dim]``, which are scored by late interaction.
            b: like ``a``.

        Returns:
            float32 ``[n, m]``.

        Raises:
            EmbedgeValueError: if the two differ in kind or in dimension.
        """
        return similarity(a, b, self._model.similarity)

    def run_ids(self, ids: Sequence[NDArray[np.int64]], *, task: str | None = None) -> Vectors:
        """Vectors of texts that are token ids already: what :meth:`encode` does after its tokenizer.

        For measurements of the graphs by themselves.

        Args:
            ids: int64 ``[tokens]`` each, special tokens included.
            task: as for :meth:`encode`.

        Returns:
            float32 ``[texts, dim]``.
        """
        request = self._request(task=task)
        vectors = np.zeros((len(ids), request.dim), np.float32)
        texts = [TokenIds(row, np.zeros_like(row), False) for row in ids]
        self._pipeline.embed_tokens(
            texts, range(len(ids)), request, vectors.__setitem__, lambda _: None
        )
        return vectors

    # -- inside ---------------------------------------------------------------------------------

    def _with_role(self, options: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """A call's options with the first of some prompts that its task declares."""
        if options.get("prompt_name") is not None or options.get("prompt") is not None:
            return dict(options)
        task = choose_task(self._bundle.manifest, self._precision, options.get("task"))
        prompts = self._bundle.manifest.tasks[task].prompts
        return {**options, "prompt_name": next((n for n in names if n in prompts), None)}

    def _request(
        self,
        *,
        task: str | None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = BATCH_SIZE,
        max_batch_tokens: int | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
        on_truncate: str = "warn",
        multi_vector: bool = False,
    ) -> Request:
        manifest = self._bundle.manifest
        name = choose_task(manifest, self._precision, task)
        dim = choose_dim(self._model, truncate_dim)
        if check_flag("multi_vector", multi_vector):
            if self._model.multi_vector_dim is None:
                raise EmbedgeValueError(
                    f"{self._bundle.root}: no multi-vector head; leave multi_vector out"
                )
            if truncate_dim is not None:
                raise EmbedgeValueError("truncate_dim is for single vectors, not multi_vector=True")
            dim = self._model.multi_vector_dim
        return Request(
            task=name,
            prefix=choose_prompt(name, manifest.tasks[name], prompt_name, prompt),
            batch_size=check_positive("batch_size", batch_size),
            max_batch_tokens=None
            if max_batch_tokens is None
            else check_positive("max_batch_tokens", max_batch_tokens),
            dim=dim,
            normalize=check_flag("normalize_embeddings", normalize_embeddings),
            on_truncate=check_choice("on_truncate", on_truncate, ON_TRUNCATE),
            multi_vector=multi_vector,
        )
