"""A bundle as a model of mteb: ``python -m embedge.bench.mteb_model BUNDLE --tasks SciFact --out FOLDER``.

mteb says of every batch which of its tasks it belongs to, and whether it holds queries or
documents. From that follow the bundle's task and prompt, as in mteb's own wrapper of
jina-embeddings-v4:

    programming tasks           code, prompts of queries and documents
    STS, PairClassification     text-matching, its default prompt
    everything else             retrieval, prompts of queries and documents; images without one

A bundle with a single task uses that one. mteb is imported when it is needed, and brought by the
``mteb`` extra.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from embedge.bench.errors import BenchArgumentError, BenchError
from embedge.runtime import Embedder, EmbedgeError, EmbedgeValueError
from embedge.runtime.host.install_advice import install_command

__all__ = ["EmbedgeEncoder", "TaskMetadata", "bundle_task", "main", "register_model"]

_SYMMETRIC_TYPES = ("STS", "PairClassification")


class TaskMetadata(Protocol):
    """What is read of mteb's description of a task."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def domains(self) -> Sequence[str] | None: ...
    @property
    def eval_langs(self) -> Sequence[str] | Mapping[str, Sequence[str]]: ...


def bundle_task(metadata: TaskMetadata, tasks: Sequence[str]) -> str:
    """Name of the bundle's task for a task of mteb.

    Args:
        metadata: mteb's description of its task.
        tasks: what the bundle has.

    Raises:
        BenchArgumentError: if the bundle lacks the task.
    """
    if len(tasks) == 1:
        return tasks[0]
    if _is_programming(metadata):
        wanted = "code"
    else:
        wanted = "text-matching" if metadata.type in _SYMMETRIC_TYPES else "retrieval"
    if wanted not in tasks:
        raise BenchArgumentError(
            f"mteb's {metadata.name} ({metadata.type}) needs the task {wanted!r}; the bundle has: "
            f"{', '.join(tasks)}"
        )
    return wanted


def _is_programming(metadata: TaskMetadata) -> bool:
    languages: Iterable[str]
    if isinstance(metadata.eval_langs, Mapping):
        languages = (name for names in metadata.eval_langs.values() for name in names)
    else:
        languages = metadata.eval_langs
    if any(name.endswith("-Code") for name in languages):
        return True
    return "Programming" in (metadata.domains or ())


class EmbedgeEncoder:
    """A bundle behind mteb's encoder protocol.

    Args:
        bundle: the bundle's folder.
        precision: as for :class:`~embedge.runtime.Embedder`.
        truncate_dim: length that vectors are cut to; ``None``: not cut.
        multi_vector: late interaction, for retrieval alone.
        max_pixels: pixels that larger images are scaled down to; ``None``: as the source does.
        options: further arguments of the Embedder.

    Raises:
        EmbedgeError: if the bundle cannot be opened so.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        precision: str | None = None,
        *,
        truncate_dim: int | None = None,
        multi_vector: bool = False,
        max_pixels: int | None = None,
        **options: Any,
    ) -> None:
        self.embedder = Embedder(bundle, precision=precision, **options)
        self._bundle = Path(bundle)
        self._settings: dict[str, Any] = {
            "truncate_dim": truncate_dim,
            "multi_vector": multi_vector,
        }
        self._max_pixels = max_pixels
        self._meta: Any = None

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        **ignored: Any,
    ) -> Any:
        """Vectors of mteb's batches, in their order.

        Args:
            inputs: batches of texts ("text") or of images ("image").
            task_metadata: which task they are of.
            hf_split: not used.
            hf_subset: not used.
            prompt_type: mteb's ``PromptType``: queries, documents or, where ``None``, neither.
            batch_size: most texts of a batch.
            show_progress_bar: on standard error.
            ignored: what else mteb passes on.

        Returns:
            float32 ``[items, dim]``; with ``multi_vector`` a list of ``[tokens, dim]``.

        Raises:
            BenchArgumentError: if the bundle cannot do the task.
            EmbedgeError: as for :meth:`~embedge.runtime.Embedder.encode`.
        """
        task = bundle_task(task_metadata, self.embedder.tasks)
        role = getattr(prompt_type, "value", prompt_type)
        if self._settings["multi_vector"] and role is None:
            raise BenchArgumentError(
                f"mteb's {task_metadata.name} ({task_metadata.type}) compares vectors, not "
                "multi-vectors; leave multi_vector out"
            )
        texts: list[str] = []
        images: list[Any] = []
        for batch in inputs:
            if ("text" in batch) == ("image" in batch):
                raise BenchArgumentError(
                    f"mteb's {task_metadata.name}: expected a text or an image in every row, found "
                    f"the columns {', '.join(batch)}"
                )
            if "text" in batch:
                texts.extend(batch["text"])
            else:
                # As they come: the pages of a whole corpus do not fit into memory.
                images.extend(self._encode_images(batch["image"], task))
        if texts and images:
            raise BenchArgumentError(f"mteb's {task_metadata.name}: texts and images mixed")
        if images:
            return images if self._settings["multi_vector"] else np.stack(images)
        encode: Callable[..., Any] = self.embedder.encode_query
        if role == "document":
            encode = self.embedder.encode_document
        elif task_metadata.type in _SYMMETRIC_TYPES and not _is_programming(task_metadata):
            encode = self.embedder.encode
        return encode(
            texts,
            task=task,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            **self._settings,
        )

    def _encode_images(self, images: Sequence[Any], task: str) -> Iterable[Any]:
        vectors: Iterable[Any] = self.embedder.encode_image(
            list(images), task=task, batch_size=1, max_pixels=self._max_pixels, **self._settings
        )
        return vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Similarity of each of one set to each of another, as the source model defines it.

        Args:
            embeddings1: what :meth:`encode` gave, or rows of it; tensors too.
            embeddings2: likewise.

        Returns:
            float32 ``[n, m]``.
        """
        return self.embedder.similarity(_as_arrays(embeddings1), _as_arrays(embeddings2))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Similarity of each of one set to the one at the same place in another.

        Args:
            embeddings1: as for :meth:`similarity`.
            embeddings2: as many.

        Returns:
            float32 ``[n]``.
        """
        one, other = _as_arrays(embeddings1), _as_arrays(embeddings2)
        return self.embedder.similarity_pairwise(one, other)

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb records about this model; the revision changes with the bundle's manifest."""
        if self._meta is not None:
            return self._meta
        from mteb.models.model_meta import ModelMeta

        manifest = (self._bundle / "manifest.json").read_bytes()
        settings = {**self._settings, "max_pixels": self._max_pixels}
        return ModelMeta.create_empty(
            {
                "name": f"embedge/{self._bundle.resolve().name}-{self.embedder.precision}",
                "revision": hashlib.sha256(manifest).hexdigest()[:16],
                "embed_dim": self.embedder.dim,
                "max_tokens": self.embedder.max_seq_length,
                "modalities": list(self.embedder.modalities),
                "experiment_kwargs": {k: v for k, v in settings.items() if v} or None,
            }
        )

    @mteb_model_meta.setter
    def mteb_model_meta(self, meta: Any) -> None:  # mteb.get_model sets what it was found by
        self._meta = meta


def register_model(
    bundle: str | os.PathLike[str],
    precision: str | None = None,
    *,
    name: str | None = None,
    **options: Any,
) -> str:
    """Make a bundle a model that ``mteb.get_model(name)`` gives in this process.

    Args:
        bundle: the bundle's folder.
        precision: as for :class:`EmbedgeEncoder`.
        name: ``organization/name``; ``None``: "embedge/" with the folder's name and the precision.
        options: of :class:`EmbedgeEncoder`.

    Returns:
        the name.

    Raises:
        EmbedgeError: if the bundle cannot be opened so.
        BenchError: without mteb.
    """
    _check_mteb()
    from mteb.models.model_implementations import MODEL_REGISTRY

    encoder = EmbedgeEncoder(bundle, precision, **options)
    given = {"precision": encoder.embedder.precision, **options}

    def load(
        _name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        embed_dim: int | None = None,
        **more: Any,
    ) -> EmbedgeEncoder:
        asked = {"device": device, "truncate_dim": embed_dim}
        return EmbedgeEncoder(
            bundle, **{**given, **more, **{k: v for k, v in asked.items() if v is not None}}
        )

    meta = encoder.mteb_model_meta
    meta = meta.model_copy(update={"loader": load, "name": name or meta.name})
    MODEL_REGISTRY[meta.name] = meta
    return str(meta.name)


def _check_mteb() -> None:
    if find_spec("mteb") is None:
        raise BenchError(f"mteb is not installed; run: {install_command('mteb', ['mteb'])}")


def _as_arrays(vectors: Any) -> Any:
    if isinstance(vectors, (list, tuple)):
        return [np.asarray(each) for each in vectors]
    return np.asarray(vectors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run tasks of mteb on a bundle, print their scores, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m embedge.bench.mteb_model", description="Run tasks of mteb on a bundle."
    )
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="NAME", help="mteb's names")
    parser.add_argument("--precision", metavar="NAME", help="(default: the bundle's only one)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    parser.add_argument("--truncate-dim", type=int, metavar="N", help="cut vectors to N")
    parser.add_argument("--multi-vector", action="store_true", help="late interaction")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="scale larger images down to N")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a run")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="(default: 32)")
    args = parser.parse_args(arguments)
    try:
        _evaluate(args)
    except EmbedgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, EmbedgeValueError) else 1
    return 0


def _evaluate(args: argparse.Namespace) -> None:
    _check_mteb()
    import mteb

    try:
        tasks = list(mteb.get_tasks(tasks=args.tasks))
    except KeyError as error:
        raise BenchArgumentError(
            f"--tasks: {str(error.args[0]).removeprefix('KeyError: ')}"
        ) from error
    model = EmbedgeEncoder(
        args.bundle,
        args.precision,
        truncate_dim=args.truncate_dim,
        multi_vector=args.multi_vector,
        max_pixels=args.max_pixels,
        threads=args.threads,
    )
    for task in tasks:  # before the first of them takes its hours
        bundle_task(task.metadata, model.embedder.tasks)
    cache = mteb.ResultCache(args.out)
    for task in tasks:
        results = mteb.evaluate(
            model, task, cache=cache, encode_kwargs={"batch_size": args.batch_size}
        )
        for result in results.task_results:
            score = 100 * result.get_score()
            print(f"{task.metadata.name}  {task.metadata.main_score}  {score:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
