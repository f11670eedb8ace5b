"""Queries and documents of one task as vectors: what each framework's class holds."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from embedge.runtime import Embedder, EmbedgeImportError, EmbedgeValueError, FingerprintError
from embedge.runtime.errors import warn
from embedge.runtime.host.install_advice import install_command
from embedge.runtime.inputs import as_texts

__all__ = ["EncoderOptions", "TaskEncoder", "missing_framework"]

_DEFAULTS = {
    "precision": None,
    "device": "auto",
    "threads": None,
    "memory_limit": None,
    "prompts": None,
}
_OF_CALLS = ("truncate_dim", "normalize_embeddings", "batch_size", "on_truncate")
_embedders: WeakValueDictionary[str, Embedder] = WeakValueDictionary()
_opening = threading.Lock()


class EncoderOptions(TypedDict, total=False):
    """How a bundle is opened and its texts are embedded, all as ``Embedder`` and its ``encode`` have it.

    Attributes:
        query_task: what queries are embedded for, where documents have a task of their own, as of
            jina-embeddings-v3; left out: the same.
        precision: "int8", "int4", …, or "auto"; left out: the bundle's only one.
        truncate_dim: length of the vectors; left out: what the source cuts to, most often nothing.
        normalize_embeddings: whether to make vectors of length 1 in any case.
        device: "cpu", "cuda", "cuda:1", or "auto".
        threads: of a run; left out: the cores that this process really has.
        memory_limit: most bytes of open graphs, or "2GB".
        prompts: texts by name in place of the task's: "query" for queries, "document" for documents.
        batch_size: most texts of a batch.
        on_truncate: "ignore", "warn" or "error" for a text that is too long.
    """

    query_task: str | None
    precision: str | None
    truncate_dim: int | None
    normalize_embeddings: bool
    device: str
    threads: int | None
    memory_limit: int | str | None
    prompts: Mapping[str, str] | None
    batch_size: int
    on_truncate: str


class TaskEncoder:
    """Embeds queries and documents for one task of a bundle. Safe to share between threads.

    Encoders of one bundle that are opened alike share one ``Embedder`` as long as one of them lives,
    whatever their tasks and lengths of vectors.

    Args:
        bundle: the bundle's folder.
        task: what documents are embedded for; left out: the bundle's only one.
        fingerprint: of an index's documents, as :attr:`fingerprint`, :attr:`stored_fingerprint` or
            ``Embedder.fingerprint_parts`` gave it; vectors of another kind are refused.
        options: see :class:`EncoderOptions`.

    Raises:
        BundleError: if the bundle is missing, damaged, or too new.
        EmbedgeValueError: for an option that cannot be used, or a bundle without vectors of texts.
        DeviceError: if ``device="cuda"`` does not work here.
        FingerprintError: if the index is of another kind.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        task: str | None = None,
        fingerprint: str | Mapping[str, Any] | None = None,
        **options: Unpack[EncoderOptions],
    ) -> None:
        known = set(EncoderOptions.__annotations__)
        if unknown := set(options) - known:
            raise TypeError(
                f"unexpected options: {', '.join(sorted(unknown))}; there are: "
                f"{', '.join(sorted(known))}"
            )
        given: dict[str, Any] = dict(options)
        self.embedder = _shared_embedder(
            bundle, {name: given[name] for name in _DEFAULTS if name in given}
        )
        self._calls = {name: given[name] for name in _OF_CALLS if name in given}
        refused = self.embedder.encode_document([], task=task, **self._calls)  # where it has to be
        self.dim: int = refused.shape[1]
        self.task = task or self.embedder.tasks[0]
        self.query_task = given.get("query_task") or _task_of_queries(
            self.task, self.embedder.tasks
        )
        self.embedder.encode_query([], task=self.query_task, **self._calls)
        self.bundle = os.path.abspath(bundle)  # a link stays one: what it leads to is compared
        self.options: EncoderOptions = {**options, "precision": self.embedder.precision}
        if self.query_task != self.task:
            self.options["query_task"] = self.query_task
        if fingerprint is not None:
            self.check_fingerprint(fingerprint)

    @functools.cached_property
    def stored_fingerprint(self) -> dict[str, Any]:
        """The fingerprint of documents with its parts, which tell what differs: JSON to be stored with an index."""
        parts = self.embedder.fingerprint_parts(role="document", **self._kind())
        return {"fingerprint": self.fingerprint, "parts": parts}

    @property
    def model_name(self) -> str:
        """The source model's name, for people."""
        name: str = self.stored_fingerprint["parts"]["model"]
        return name

    def query(self, text: str) -> NDArray[np.float32]:
        """The vector of a query, float32 ``[dim]``.

        Raises:
            EmbedgeValueError: if it is no string.
        """
        texts, single = as_texts(text)
        if not single:
            raise EmbedgeValueError(
                f"text: expected a string, found {type(text).__name__}; embed one query at a time"
            )
        return self.queries(texts)[0]

    def queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors of queries, float32 ``[texts, dim]``."""
        return self.embedder.encode_query(_listed(texts), task=self.query_task, **self._calls)

    def documents(
        self, texts: Sequence[str], *, show_progress_bar: bool = False
    ) -> NDArray[np.float32]:
        """The vectors of documents, float32 ``[texts, dim]``.

        Args:
            texts: of the documents.
            show_progress_bar: on standard error.

        Raises:
            EmbedgeValueError: if they are no list of strings, with the index of what is none.
        """
        return self.embedder.encode_document(
            _listed(texts), task=self.task, show_progress_bar=show_progress_bar, **self._calls
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the documents' vectors, to be stored beside an index; see ``Embedder.fingerprint``."""
        return self.embedder.fingerprint(role="document", **self._kind())

    def prompts_differ(self) -> bool:
        """Whether a text has another vector as a query than as a document."""
        as_query = {**self._kind(), "task": self.query_task}
        return self.embedder.fingerprint(role="query", **as_query) != self.fingerprint

    def check_fingerprint(self, stored: str | Mapping[str, Any]) -> None:
        """Refuses an index whose documents have vectors of another kind.

        Another class of arithmetic alone, of another machine, is a warning: it moves a vector less than a
        precision does.

        Args:
            stored: what :attr:`fingerprint` or, better, :attr:`stored_fingerprint` gave when the index was made.

        Raises:
            FingerprintError: naming what differs, as far as that is known.
        """
        try:
            self.embedder.check_fingerprint(stored, role="document", **self._kind())
        except FingerprintError as error:
            if error.differing != ("numerics",):
                raise
            warn(str(error))

    def _kind(self) -> dict[str, Any]:
        names = ("truncate_dim", "normalize_embeddings")
        return {"task": self.task, **{n: self._calls[n] for n in names if n in self._calls}}

    def __repr__(self) -> str:
        precision = self.embedder.precision
        return f"{self.bundle!r}, task={self.task!r}, precision={precision!r}, dim={self.dim}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as its arguments, with the precision, the task and the fingerprint that it has.

        Where it is opened again, vectors of another kind are refused.
        """
        again = functools.partial(
            TaskEncoder, task=self.task, fingerprint=self.stored_fingerprint, **self.options
        )
        return again, (self.bundle,)


def missing_framework(module: str, extra: str, error: ImportError) -> EmbedgeImportError:
    """What to say where a module of this package cannot import its framework.

    Args:
        module: its name.
        extra: of embedge, which brings the framework.
        error: the import's.
    """
    return EmbedgeImportError(
        f"embedge.integrations.{module} cannot import its framework: {error}; install it: {install_command(extra)}"
    )


def _shared_embedder(bundle: str | os.PathLike[str], options: Mapping[str, Any]) -> Embedder:
    """The Embedder that is open with such options, or a new one; a replaced bundle has another manifest."""
    try:
        root = os.path.realpath(bundle)
        manifest = os.stat(os.path.join(root, "manifest.json"))
    except (OSError, TypeError, ValueError):
        return Embedder(bundle, **options)  # says what is wrong
    state = (manifest.st_ino, manifest.st_mtime_ns, manifest.st_size)

    def key(precision: object) -> str:
        return repr((root, state, sorted({**_DEFAULTS, **options, "precision": precision}.items())))

    asked = key(options.get("precision"))
    with _opening:
        embedder = _embedders.get(asked)
        if embedder is None:
            opened = Embedder(bundle, **options)
            embedder = _embedders.setdefault(key(opened.precision), opened)  # "auto" took one
            _embedders[asked] = embedder
        return embedder


def _task_of_queries(task: str, tasks: Sequence[str]) -> str:
    """The task of queries where none is named.

    Raises:
        EmbedgeValueError: if documents or queries have a task of their own.
    """
    name, _, role = task.rpartition(".")
    queries, documents = f"{name}.query", f"{name}.passage"
    if role in ("query", "passage") and {queries, documents} <= {*tasks}:
        raise EmbedgeValueError(
            f"task {task!r}: the bundle has {documents!r} for documents and {queries!r} for queries; pass "
            f'task="{documents}" and query_task="{queries}", or {task!r} for both',
            arguments=[f'task="{documents}"', f'query_task="{queries}"'],
        )
    return task


def _listed(texts: Sequence[str]) -> list[str]:
    found, single = as_texts(texts)
    if single:
        raise EmbedgeValueError(
            "texts: expected a list of strings, found one string; put it into a list"
        )
    return found
