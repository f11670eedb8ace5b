"""The bundles that are served, by name, and how one takes the place of another while requests go on."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedge.runtime.arguments import listed
from embedge.runtime.embedder import Embedder
from embedge.runtime.errors import (
    BundleError,
    EmbedgeError,
    EmbedgeImportError,
    EmbedgeValueError,
    ImageError,
)
from embedge.runtime.scoring.similarity import TOKEN_KINDS
from embedge.runtime.server.errors import ApiError, shown

__all__ = ["Models", "ServedModel", "Source", "source_of"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")

# A text that all threads share, and texts that make batches which run at the same time.
_LONG, _SEVERAL = 128, 64
_PIXELS = 64  # a side of an image

log = logging.getLogger("embedge.server")


@dataclass(frozen=True)
class Source:
    """A bundle to serve: what clients call it, and its folder."""

    name: str
    folder: Path


def source_of(argument: str) -> Source:
    """A bundle as the command names it: ``FOLDER`` or ``NAME=FOLDER``.

    Raises:
        EmbedgeValueError: for a name that cannot be told from a task or a precision.
    """
    name, equals, folder = argument.partition("=")
    if not equals:
        name, folder = os.path.basename(os.path.abspath(argument)), argument  # a link's own name
    if not _NAME.fullmatch(name):
        raise EmbedgeValueError(
            f"{argument}: expected a name of letters, digits and . _ - / such as small={folder}, found {name!r}"
        )
    return Source(name, Path(folder))


@dataclass(eq=False)
class ServedModel:
    """A bundle, opened at one precision.

    Attributes:
        name: what clients call it, without precision and task.
        embedder: the bundle.
        manifest_sha256: of the manifest that it was opened with.
        created: seconds since 1970 when it was opened.
        rates: tokens a second of a batch, as measured, by whether it is of images, and whether it had all cores.
        users: requests that hold it, their inputs in the queue or not.
        pairs: tasks by role where each is for one, such as ``{"retrieval": {"query": "retrieval.query", "document":
            "retrieval.passage"}}``.
    """

    name: str
    embedder: Embedder
    manifest_sha256: str
    created: int = field(default_factory=lambda: int(time.time()))
    rates: dict[tuple[bool, bool], float] = field(default_factory=dict)
    users: int = 0

    def __post_init__(self) -> None:
        self.late = self.embedder.similarity_fn_name in TOKEN_KINDS
        self.fingerprints: dict[tuple[Any, ...], str] = {}
        self.checked: set[Any] = set()  # of requests' forms, those that were found right
        self.around = _around(self.embedder)
        self.pairs = _pairs(self.embedder.tasks)
        self.calls_at_once = {
            task: self.embedder.calls_at_once(task) for task in self.embedder.tasks
        }

    def pair_of(self, task: str) -> Mapping[str, str] | None:
        """The tasks of queries and of documents, by role, where a task is one of two such or names both."""
        if task in self.embedder.tasks:
            return next((pair for pair in self.pairs.values() if task in pair.values()), None)
        return self.pairs.get(task)

    def ids(self, task: str | None, precision: bool) -> str:
        """What ``model`` calls it in a request."""
        at = f"@{self.embedder.precision}" if precision else ""
        return f"{self.name}{at}" + (f":{task}" if task is not None else "")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps its graphs open while a request means to run on them."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1

    def warm_up(self) -> None:
        """Opens each task's graph in every way that requests do, so that what is broken shows now.

        Nothing of the bundle's folder is read later, but what a memory limit has closed.

        Raises:
            EmbedgeError: if one cannot be opened, or fails.
        """
        embedder, late = self.embedder, self.late
        for task in embedder.tasks:
            [short] = embedder.tokenize("warm", task=task, prompt="")
            [long] = embedder.tokenize("warm " * _LONG, task=task, prompt="")
            for tokens in ([short], [long], [short] * _SEVERAL):  # each may run on another session
                for one_thread in (False, True):
                    embedder.encode_tokens(
                        tokens, task=task, multi_vector=late, one_thread=one_thread
                    )
            embedder.fingerprint(task=task, multi_vector=late)
        if "image" in embedder.modalities:
            self._warm_up_images()

    def _warm_up_images(self) -> None:
        image = np.zeros((_PIXELS, _PIXELS, 3), np.uint8)
        try:
            self.embedder.encode([image], task=self.embedder.tasks[0], multi_vector=self.late)
        except (EmbedgeImportError, ImageError) as error:  # texts can be embedded without Pillow
            log.warning("%s takes no images: %s", self.name, error)


class Models:
    """What is served; opened at the start, and again by :meth:`reload`.

    Args:
        sources: names differ.
        precisions: at which each is opened, the first being the one of requests that name none; ``None``: the
            bundle's only one. Not "auto", by which another start may choose another, of other vectors.
        options: of every ``Embedder``.

    Raises:
        EmbedgeValueError: two of one name, or an option that a bundle does not have.
        BundleError: if a bundle is missing, damaged, or too new.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        precisions: Sequence[str | None] = (None,),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if "auto" in precisions:
            raise EmbedgeValueError(
                "precision is 'auto'; expected names, as another start may choose another precision, whose vectors do "
                "not fit those of an index; `embedge inspect BUNDLE` lists them",
                arguments=["precision"],
            )
        self._precisions = list(dict.fromkeys(precisions))
        self._options = dict(options or {})
        self._sources = {source.name: source for source in sources}
        if len(self._sources) < len(sources):
            names = [source.name for source in sources]
            twice = next(name for name in names if names.count(name) > 1)
            raise EmbedgeValueError(
                f"two bundles are called {twice!r}; name one of them, such as other={sources[-1].folder}"
            )
        self._models = {source.name: self._open(source) for source in sources}

    def __iter__(self) -> Iterator[ServedModel]:
        return (model for models in self._models.values() for model in models.values())

    def find(self, name: str) -> tuple[ServedModel, str | None]:
        """The model that a request names, and the task that stands with it.

        Raises:
            ApiError: 404, with the models that there are.
        """
        before, colon, task = name.partition(":")
        base, at, precision = before.partition("@")
        models = self._models.get(base)
        if models is None:
            raise self._not_found(f"no model {shown(base)}; there are {listed(self._models)}")
        model = models.get(precision) if at else next(iter(models.values()))
        if model is None:
            raise self._not_found(
                f"{base} is not served at {shown(precision)}, but {listed(models)}"
            )
        if colon and task not in (*model.embedder.tasks, *model.pairs):
            raise self._not_found(
                f"{base} has no task {shown(task)}; it has {listed(model.embedder.tasks)}"
            )
        return model, task if colon else None

    def listing(self) -> list[dict[str, Any]]:
        """The models as ``/v1/models`` lists them: each by its name, and with each of its tasks."""
        return [
            _listed(model, precision=index > 0, task=task)
            for models in self._models.values()
            for index, model in enumerate(models.values())
            for task in (None, *dict.fromkeys([*model.embedder.tasks, *model.pairs]))
        ]

    def reload(self) -> list[ServedModel]:
        """Opens bundles whose manifest is another one now; one that cannot be opened stays as it was.

        Returns:
            what was replaced, to be closed once nothing runs on it any more.
        """
        replaced: list[ServedModel] = []
        for source in self._sources.values():
            old = self._models[source.name]
            if all(model.manifest_sha256 == _manifest_sha256(source) for model in old.values()):
                log.info("%s: unchanged", source.name)
                continue
            try:
                new = self._open(source)
            except EmbedgeError as error:
                log.error("%s stays as it was: %s", source.name, error)
                continue
            except (
                Exception
            ):  # whatever a library makes of a damaged file; the others are still to be opened
                log.exception("%s stays as it was", source.name)
                continue
            self._models[source.name] = new
            replaced += old.values()
            log.info("%s: opened anew from %s", source.name, source.folder)
        return replaced

    def close(self) -> None:
        """Closes the graphs."""
        for model in self:
            model.embedder.close()

    def _open(self, source: Source) -> dict[str, ServedModel]:
        """A bundle at each precision, by the precision's name; where one cannot be opened, none stays open."""
        models = {}
        sha256 = _manifest_sha256(source)
        with ExitStack() as opened:
            for precision in self._precisions:
                embedder = Embedder(source.folder, precision=precision, **self._options)
                opened.callback(embedder.close)
                model = ServedModel(source.name, embedder, sha256 or "")
                model.warm_up()
                models[embedder.precision] = model
            if _manifest_sha256(source) != sha256:
                raise BundleError(
                    f"{source.folder}: was replaced while it was opened; open it again"
                )
            opened.pop_all()
        return models

    @staticmethod
    def _not_found(message: str) -> ApiError:
        return ApiError(404, message, param="model", code="model_not_found")


def _pairs(tasks: Sequence[str]) -> dict[str, dict[str, str]]:
    """What two tasks have in common by name, one for queries and one for documents, and the two by role."""
    names = [task.removesuffix(".query") for task in tasks if task.endswith(".query")]
    return {
        name: {"query": f"{name}.query", "document": f"{name}.passage"}
        for name in names
        if f"{name}.passage" in tasks
    }


def _listed(model: ServedModel, *, precision: bool, task: str | None) -> dict[str, Any]:
    embedder = model.embedder
    of_task: dict[str, Any]
    if task in embedder.tasks:
        of_task = {"task": task, "prompts": embedder.get_prompts(task)}
    else:
        of_task = {"tasks": list(embedder.tasks if task is None else model.pairs[task].values())}
    return {
        "id": model.ids(task, precision),
        "object": "model",
        "created": model.created,
        "owned_by": "embedge",
        "embedge": of_task
        | {
            "precision": embedder.precision,
            "dim": embedder.dim,
            "multi_vector_dim": embedder.multi_vector_dim,
            "max_tokens": embedder.max_seq_length,
            "modalities": list(embedder.modalities),
            "similarity": embedder.similarity_fn_name,
        },
    }


def _manifest_sha256(source: Source) -> str | None:
    """Of the manifest that is there now; ``None`` where it cannot be read, which opening the bundle tells of."""
    try:
        return hashlib.sha256((source.folder / "manifest.json").read_bytes()).hexdigest()
    except OSError:
        return None


def _around(embedder: Embedder) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind each text."""
    both = embedder.tokenize(["", "a"], task=embedder.tasks[0], prompt="")
    specials, probe = (tokens.ids.tolist() for tokens in both)
    for before in range(len(specials), -1, -1):
        behind = len(specials) - before
        ends = probe[len(probe) - behind :] if behind else []
        if probe[:before] == specials[:before] and ends == specials[before:]:
            return specials[:before], specials[before:]
    return [], []
