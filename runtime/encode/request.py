"""What a call asks for: its options, checked when they are made, then looked up in a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embedge.runtime.arguments import check_choice, check_flag, check_pool_factor, check_positive
from embedge.runtime.bundle.contract import MAPS
from embedge.runtime.bundle.manifest import POOL_MASK, Manifest
from embedge.runtime.encode.lookup import choose_dim, choose_mapped, choose_prompt, choose_task
from embedge.runtime.encode.output_format import OutputFormat, choose_ranges
from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.scoring.quantization import OUTPUT_FORMATS

__all__ = ["ON_TRUNCATE", "CallOptions", "MappedRequest", "Request"]

ON_TRUNCATE = ("ignore", "warn", "error")


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """The options of ``Embedder.encode``, which states what each means, with their defaults.

    ``role`` is "query" from ``encode_query``, "document" from ``encode_document``. ``one_thread`` is of
    ``encode_tokens``.

    Raises:
        EmbedgeValueError: for one that cannot be used whatever the bundle is.
    """

    task: str | None = None
    prompt_name: str | None = None
    prompt: str | None = None
    batch_size: int = 32
    max_batch_tokens: int | None = None
    truncate_dim: int | None = None
    normalize_embeddings: bool = False
    on_truncate: str = "warn"
    multi_vector: bool = False
    role: str | None = None
    one_thread: bool = False
    output_format: str = "float32"
    ranges: Any = field(default=None, compare=False)
    pool_factor: float = 1

    def __post_init__(self) -> None:
        check_positive("batch_size", self.batch_size)
        if self.max_batch_tokens is not None:
            check_positive("max_batch_tokens", self.max_batch_tokens)
        check_flag("normalize_embeddings", self.normalize_embeddings)
        check_choice("on_truncate", self.on_truncate, ON_TRUNCATE)
        check_choice("output_format", self.output_format, OUTPUT_FORMATS)
        if check_pool_factor("pool_factor", self.pool_factor) > 1:
            self._check_pooled()
        if check_flag("multi_vector", self.multi_vector) and self.truncate_dim is not None:
            raise EmbedgeValueError(
                "truncate_dim is for single vectors, not multi_vector=True",
                arguments=["truncate_dim", "multi_vector=True"],
            )

    def _check_pooled(self) -> None:
        if not self.multi_vector:
            raise EmbedgeValueError(
                "pool_factor joins the vectors of a text's tokens; expected multi_vector=True with it",
                arguments=["pool_factor", "multi_vector=True"],
            )
        if self.role == "query":
            raise EmbedgeValueError(
                "pool_factor is for documents, whose vectors an index holds; leave it out for queries",
                arguments=["pool_factor"],
            )


@dataclass(frozen=True, kw_only=True)
class Request:
    """A call's options, and what they are in a bundle.

    Attributes:
        options: as they were given.
        task: whose graph runs.
        prefix: text to put before every text.
        dim: length of the vectors to give, before they become codes.
        output: what they are given as.
    """

    options: CallOptions
    task: str
    prefix: str
    dim: int
    output: OutputFormat

    def check_images(self) -> None:
        """Refuses codes of images by the ranges that texts of the task have.

        Raises:
            EmbedgeValueError: where the format needs ranges and the call gives none.
        """
        if self.output.ranges is not None and self.options.ranges is None:
            raise EmbedgeValueError(
                f"output_format {self.output.name!r}: the bundle's ranges are of the task's texts, and images lie "
                "elsewhere; pass ranges, those of ranges_of(vectors) of some hundred texts and images, and "
                "the same ones for texts",
                arguments=["output_format", "ranges"],
            )

    @classmethod
    def look_up(cls, manifest: Manifest, precision: str, options: CallOptions) -> Request:
        """What a call asks of a bundle at a precision.

        Raises:
            EmbedgeValueError: for an option that this bundle does not have, with what it has.
        """
        model, source = manifest.model, manifest.source.name
        task = choose_task(manifest, precision, options.task)
        if model.late_interaction is not None and not options.multi_vector:
            raise EmbedgeValueError(
                f"{source} is a late-interaction model, of a vector a token and none a text: pass multi_vector=True "
                "to encode_query for queries, and to encode_document for documents",
                arguments=["multi_vector=True"],
            )
        dim = choose_dim(model, options.truncate_dim)
        if options.multi_vector:
            if model.multi_vector_dim is None:
                raise EmbedgeValueError(
                    f"multi_vector: {source} has no multi-vector head; leave multi_vector out",
                    arguments=["multi_vector"],
                )
            dim = model.multi_vector_dim
        prefix = choose_prompt(task, manifest.tasks[task], options.prompt_name, options.prompt)
        if prefix and not model.include_prompt and POOL_MASK not in model.inputs:
            raise EmbedgeValueError(
                f"prompt: {source} leaves the tokens of a prompt out of its pooling, which this bundle's "
                "graphs cannot; leave the prompt out, or export the model again"
            )
        cut = not options.multi_vector and dim < model.dim and model.normalize
        ranges = choose_ranges(
            manifest,
            task,
            options.output_format,
            options.ranges,
            dim=dim,
            normalize=options.normalize_embeddings or cut,
            multi_vector=options.multi_vector,
        )
        output = OutputFormat(options.output_format, ranges)
        return cls(options=options, task=task, prefix=prefix, dim=dim, output=output)


@dataclass(frozen=True, kw_only=True)
class MappedRequest(Request):
    """A call for the vectors of several tasks from one pass; its own ``task`` is ``MAPS``.

    Attributes:
        by_row: the request of each task alone, by its row of the graph's output ``embeddings``.
        rows: how many rows that output has.
    """

    by_row: Mapping[int, Request]
    rows: int

    @classmethod
    def of_tasks(
        cls, manifest: Manifest, precision: str, options: Mapping[str, CallOptions]
    ) -> MappedRequest:
        """What a call asks of a bundle's maps.

        Args:
            manifest: the bundle's.
            precision: one of its precisions.
            options: by task, alike but for the task and the prompt.

        Raises:
            EmbedgeValueError: for an option that this bundle does not have, or if the tasks' prompts differ.
        """
        maps, tasks = choose_mapped(manifest, precision, list(options))
        requests = {task: Request.look_up(manifest, precision, options[task]) for task in tasks}
        first = requests[tasks[0]]
        for task, request in requests.items():
            if request.prefix != first.prefix:
                raise EmbedgeValueError(
                    f"prompts differ: {first.prefix!r} of {tasks[0]} and {request.prefix!r} of {task}, and one pass "
                    "has one; name tasks of the same, or pass prompt",
                    arguments=["tasks", "prompt"],
                )
        common = {**vars(first), "task": MAPS}
        by_row = {maps.tasks.index(task): request for task, request in requests.items()}
        return cls(**common, by_row=by_row, rows=len(maps.tasks))
