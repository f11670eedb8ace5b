"""The object that turns texts into vectors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.arguments import check_choice, check_flag
from embedge.runtime.base_embedder import BaseEmbedder
from embedge.runtime.encode.fingerprint import (
    check_fingerprint,
    fingerprint_of,
    others_of,
    parts_of,
)
from embedge.runtime.encode.lookup import choose_mapped, choose_prompt
from embedge.runtime.encode.request import CallOptions, MappedRequest
from embedge.runtime.encode.sequences import TokenIds
from embedge.runtime.encode.tensors import converter
from embedge.runtime.encode.vectors import Vectors, collect, no_results
from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.images.mixed import encode_mixed
from embedge.runtime.inputs import as_images, as_items, as_texts, warn_of_paths
from embedge.runtime.options import (
    EmbedderOptions,
    EncodeOptions,
    FingerprintOptions,
    ImageOptions,
    takes_sentences,
)
from embedge.runtime.scoring.similarity import similarity, similarity_pairwise

if TYPE_CHECKING:
    from embedge.runtime.options import Inputs

__all__ = ["Embedder"]


class Embedder(BaseEmbedder):
    """Embeds texts and images with a bundle, without torch. Safe to share between threads.

    A graph, of a task or of the vision tower, is opened at its first use. ``max_sessions`` and
    ``memory_limit`` bound how many stay open; the longest unused is closed first, and a call waits
    while those in use leave no room. Images need the vision tower and then a task's graph, one
    after the other: the limit need not have room for both. As a context manager it closes its graphs
    at the end.

    Args:
        bundle: the bundle's folder.
        task: what calls embed for that name no task; ``None``: the bundle's only one.
        precision: "int8", "int4", …; ``None``: the bundle's only one; "auto": the fastest on this
            machine under ``memory_limit`` and ``min_cosine``, see :attr:`precision`. Vectors of
            different precisions should not meet in one index: store :meth:`fingerprint` beside them.
        device: "cpu", "cuda", "cuda:1" for the second GPU, or "auto": cuda where it works and the
            precision has kernels for it.
        threads: threads of a run; ``None``: the cores that this process really has.
        max_sessions: most graphs open at once; ``None``: all.
        memory_limit: most bytes of open graphs, or "2GB", each counted as its file and the external
            data it uses (activations come on top, and are given back after each run); ``None``: no
            limit.
        min_cosine: with "auto", lowest mean cosine of every task's vectors to the unquantized model's,
            as `embedge bench --record` measured it; ``None``: any.
        verify: "size" compares every file's size with the manifest, "full" its SHA-256 too, "none"
            neither.
        prompts: texts by name, beside those of every task and in the place of those of the same name.
        default_prompt_name: the prompt of calls that name none, in the place of the task's default.
        truncate_dim: as for :meth:`encode`, of calls that name none.
        max_seq_length: most tokens of a text, fewer than the model takes; ``None``: as many.

    Raises:
        BundleError: if the bundle is missing, damaged, or too new.
        EmbedgeValueError: for an argument that cannot be used, with the list of what can.
        DeviceError: if ``device="cuda"`` does not work here, with the fix.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        task: str | None = None,
        precision: str | None = None,
        device: str = "auto",
        threads: int | None = None,
        max_sessions: int | None = None,
        memory_limit: int | str | None = None,
        min_cosine: float | None = None,
        verify: str = "size",
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        truncate_dim: int | None = None,
        max_seq_length: int | None = None,
    ) -> None:
        options = EmbedderOptions(
            task=task,
            precision=precision,
            device=device,
            threads=threads,
            max_sessions=max_sessions,
            memory_limit=memory_limit,
            min_cosine=min_cosine,
            verify=verify,
            prompts=prompts,
            default_prompt_name=default_prompt_name,
            truncate_dim=truncate_dim,
            max_seq_length=max_seq_length,
        )
        super().__init__(bundle, options)

    @overload
    def encode(
        self,
        inputs: Inputs,
        *,
        multi_vector: Literal[False] = ...,
        output_format: Literal["float32"] = ...,
        convert_to_tensor: Literal[False] = ...,
        **options: Unpack[EncodeOptions],
    ) -> Vectors: ...

    @overload
    def encode(
        self,
        inputs: Inputs,
        *,
        multi_vector: bool,
        output_format: Literal["float32"] = ...,
        convert_to_tensor: Literal[False] = ...,
        **options: Unpack[EncodeOptions],
    ) -> Vectors | list[Vectors]: ...

    @overload
    def encode(
        self,
        inputs: Inputs,
        *,
        multi_vector: bool = ...,
        output_format: str = ...,
        convert_to_tensor: bool = ...,
        **options: Unpack[EncodeOptions],
    ) -> Any: ...

    @takes_sentences
    def encode(
        self,
        inputs: Inputs,
        *,
        task: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        max_batch_tokens: int | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
        show_progress_bar: bool | None = None,
        on_truncate: str = "warn",
        multi_vector: bool = False,
        output_format: str = "float32",
        ranges: Any = None,
        pool_factor: float = 1,
        convert_to_tensor: bool = False,
        convert_to_numpy: bool = True,
    ) -> Any:
        """Vectors of some texts, and images where the bundle takes them, in their order.

        A text without a single token is a zero vector, with a warning. Lone surrogates are read as
        U+FFFD. A vector does not depend on the others of the call, but for its last bit, which padding may change.

        Args:
            inputs: texts and images, or one. A string is always a text; an image is a path
                object, the bytes of a file, a PIL image or an array, see :meth:`encode_image`.
            task: may be left out where the bundle has exactly one.
            prompt_name: a prompt of the task to put before every text; ``None``: the task's
                default. Images take none.
            prompt: a text to put there instead; ``prompt_name`` is then ignored.
            batch_size: most texts or images of a batch.
            max_batch_tokens: most padded tokens of a batch; decides the real batch. ``None``: what
                runs fastest here.
            truncate_dim: one of the declared dimensions, or any where none are declared. The vector
                is cut and, where the source normalizes, normalized again. ``None``: what the source
                cuts to, most often nothing.
            normalize_embeddings: L2-normalize in any case.
            show_progress_bar: on standard error; ``None``: no.
            on_truncate: "ignore", "warn" (once per Embedder) or "error" when a text is longer than
                :attr:`max_seq_length` and gets cut.
            multi_vector: give a vector per token instead, from models with such a head. Late-interaction
                models have no other.
            output_format: "float32", "float16", "int8", "uint8", "binary" (int8) or "ubinary" (uint8), what
                sentence-transformers calls ``precision`` and :func:`embedge.quantize_embeddings` makes.
            ranges: for "int8" and "uint8": floats ``[2, dim]``, the lowest and highest value of each dimension;
                ``None``: those that the bundle has of the task, :meth:`get_output_ranges`.
            pool_factor: with ``multi_vector``, join the vectors of a document to about ``1 / pool_factor`` as many,
                as sentence-transformers' ``HierarchicalTokenPooling`` does.
            convert_to_tensor: give torch's tensors, where torch is installed.
            convert_to_numpy: ``True``, as vectors are NumPy's without ``convert_to_tensor``.

        Returns:
            float32 ``[items, dim]``, ``[dim]`` for one text or image, ``[0, dim]`` for none. With
            ``multi_vector`` a list of float32 ``[tokens, multi_vector_dim]``, or one array. In another
            ``output_format`` its codes; of bits there are ``⌈dim / 8⌉``.

        Raises:
            EmbedgeValueError: for an argument that cannot be used.
            TextTooLongError: for a text that would be cut, under "error".
            ImageError: for an image that cannot be used.
            BundleError: if the task's graph cannot be opened.
            InferenceError: if the graph fails.
        """
        return self._encode(
            inputs,
            task=task,
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            max_batch_tokens=max_batch_tokens,
            truncate_dim=truncate_dim,
            normalize_embeddings=normalize_embeddings,
            show_progress_bar=show_progress_bar,
            on_truncate=on_truncate,
            multi_vector=multi_vector,
            output_format=output_format,
            ranges=ranges,
            pool_factor=pool_factor,
            convert_to_tensor=convert_to_tensor,
            convert_to_numpy=convert_to_numpy,
        )

    def _encode(
        self,
        inputs: Inputs,
        *,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
        convert_to_numpy: bool = True,
        **options: Any,
    ) -> Any:
        """:meth:`encode` with the role of the texts among its options."""
        convert = converter(to_tensor=convert_to_tensor, to_numpy=convert_to_numpy)
        items, single = as_texts(inputs) if self._images is None else as_items(inputs)
        if self._images is not None:
            warn_of_paths(items)
        request = self._request(**options)
        results = no_results(request, len(items))
        vectors = encode_mixed(items, request, results, texts=self._texts, images=self._images)
        collect(vectors, results, shown=show_progress_bar)
        return convert(results[0] if single else results)

    @overload
    def encode_query(
        self,
        inputs: Inputs,
        *,
        multi_vector: Literal[False] = ...,
        output_format: Literal["float32"] = ...,
        convert_to_tensor: Literal[False] = ...,
        **options: Unpack[EncodeOptions],
    ) -> Vectors: ...

    @overload
    def encode_query(
        self,
        inputs: Inputs,
        *,
        multi_vector: bool,
        output_format: Literal["float32"] = ...,
        convert_to_tensor: Literal[False] = ...,
        **options: Unpack[EncodeOptions],
    ) -> Vectors | list[Vectors]: ...

    @overload
    def encode_query(
        self,
        inputs: Inputs,
        *,
        multi_vector: bool = ...,
        output_format: str = ...,
        convert_to_tensor: bool = ...,
        **options: Unpack[EncodeOptions],
    ) -> Any: ...

    @takes_sentences
    def encode_query(
        self,
        inputs: Inputs,
        *,
        multi_vector: bool = False,
        output_format: str = "float32",
        convert_to_tensor: bool = False,
        **options: Unpack[EncodeOptions],
    ) -> Any:
        """:meth:`encode` with the task's prompt "query"; without one, its default or none.

        A late-interaction model cuts queries at their own length, and fills them up where it was trained so.

        Args:
            inputs: as for :meth:`encode`.
            multi_vector: as for :meth:`encode`.
            output_format: as for :meth:`encode`.
            convert_to_tensor: as for :meth:`encode`.
            options: as for :meth:`encode`; a ``prompt_name`` or ``prompt`` given wins.
        """
        options = self._query_role(options)
        return self._encode(
            inputs,
            multi_vector=multi_vector,
            output_format=output_format,
            convert_to_tensor=convert_to_tensor,
            role="query",
            **options,
        )

    @overload
    def encode_document(
        self,
        inputs: Inputs,
        *,
        multi_vector: Literal[False] = ...,
        output_format: Literal["float32"] = ...,
        convert_to_tensor: Literal[False] = ...,
        **options: Unpack[EncodeOptions],
    ) -> Vectors: ...

    @overload
    def encode_document(
        self,
        inputs: Inputs,
        *,
        multi_vector: bool,
        output_format: Literal["float32"] = ...,
        convert_to_tensor: Literal[False] = ...,
        **options: Unpack[EncodeOptions],
    ) -> Vectors | list[Vectors]: ...

    @overload
    def encode_document(
        self,
        inputs: Inputs,
        *,
        multi_vector: bool = ...,
        output_format: str = ...,
        convert_to_tensor: bool = ...,
        **options: Unpack[EncodeOptions],
    ) -> Any: ...

    @takes_sentences
    def encode_document(
        self,
        inputs: Inputs,
        *,
        multi_vector: bool = False,
        output_format: str = "float32",
        convert_to_tensor: bool = False,
        **options: Unpack[EncodeOptions],
    ) -> Any:
        """:meth:`encode` with the task's prompt "document", "passage" or "corpus"; without one, none.

        A task for documents alone, such as "retrieval.passage", has the prompt of its own name. A default prompt is
        left out: it is the queries' where documents have none of their own. A late-interaction model cuts documents at
        their own length, and leaves out vectors such as those of punctuation.

        Args:
            inputs: as for :meth:`encode`.
            multi_vector: as for :meth:`encode`.
            output_format: as for :meth:`encode`.
            convert_to_tensor: as for :meth:`encode`.
            options: as for :meth:`encode`; a ``prompt_name`` or ``prompt`` given wins.
        """
        options = self._document_role(options)
        return self._encode(
            inputs,
            multi_vector=multi_vector,
            output_format=output_format,
            convert_to_tensor=convert_to_tensor,
            role="document",
            **options,
        )

    @takes_sentences
    def encode_tasks(
        self,
        inputs: str | Sequence[str],
        *,
        tasks: Sequence[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        role: Literal["query", "document"] | None = None,
        batch_size: int = 32,
        max_batch_tokens: int | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
        show_progress_bar: bool | None = None,
        on_truncate: str = "warn",
        output_format: str = "float32",
        ranges: Any = None,
    ) -> dict[str, NDArray[Any]]:
        """Vectors of some texts for several tasks, from one pass, by the maps that `embedge fit-maps` has added.

        The pass has the adapter of one task, the base, whose vectors are those of :meth:`encode`. The others' come
        near those of their own graphs: :attr:`maps` says how near. Store their :meth:`fingerprint` with ``mapped``.

        Args:
            inputs: texts, or one.
            tasks: of which tasks; ``None``: all that the maps give.
            prompt_name: as for :meth:`encode`; the prompts of all tasks have to be the same text.
            prompt: as for :meth:`encode`.
            role: "query" or "document": with the prompt of :meth:`encode_query` or :meth:`encode_document`.
            batch_size: as for :meth:`encode`.
            max_batch_tokens: as for :meth:`encode`.
            truncate_dim: as for :meth:`encode`.
            normalize_embeddings: as for :meth:`encode`.
            show_progress_bar: as for :meth:`encode`.
            on_truncate: as for :meth:`encode`.
            output_format: as for :meth:`encode`; 8-bit codes are by the ranges of each task.
            ranges: as for :meth:`encode`, of all tasks.

        Returns:
            by task what :meth:`encode` gives for it: float32 ``[texts, dim]``, ``[dim]`` for one text.

        Raises:
            EmbedgeValueError: if the precision has no maps, they do not give a task, or for another argument
                that cannot be used.
            TextTooLongError: for a text that would be cut, under "error".
            BundleError: if the graph cannot be opened.
            InferenceError: if the graph fails.
        """
        texts, single = as_texts(inputs)
        request = self._mapped_request(
            tasks,
            prompt_name=prompt_name,
            prompt=prompt,
            role=role,
            batch_size=batch_size,
            max_batch_tokens=max_batch_tokens,
            truncate_dim=truncate_dim,
            normalize_embeddings=normalize_embeddings,
            on_truncate=on_truncate,
            output_format=output_format,
            ranges=ranges,
        )
        results = no_results(request, len(texts))
        vectors = self._texts.encode(texts, range(len(texts)), request, results)
        collect(vectors, results, shown=show_progress_bar)
        found = {}
        for place, of_task in enumerate(request.by_row.values()):
            codes = of_task.output.zeros(len(texts), of_task.dim)
            for index, row in enumerate(results):
                codes[index] = row[place]
            found[of_task.task] = codes[0] if single else codes
        return found

    def _mapped_request(self, tasks: Sequence[str] | None, **options: Any) -> MappedRequest:
        _, names = choose_mapped(self._manifest, self._precision, tasks)
        if options.get("truncate_dim") is None:
            options["truncate_dim"] = self._dim
        calls = {name: CallOptions(**self._in_role({**options, "task": name})) for name in names}
        return MappedRequest.of_tasks(self._manifest, self._precision, calls)

    @overload
    def encode_image(
        self,
        images: Inputs,
        *,
        multi_vector: Literal[False] = ...,
        output_format: Literal["float32"] = ...,
        convert_to_tensor: Literal[False] = ...,
        **options: Unpack[ImageOptions],
    ) -> Vectors: ...

    @overload
    def encode_image(
        self,
        images: Inputs,
        *,
        multi_vector: bool,
        output_format: Literal["float32"] = ...,
        convert_to_tensor: Literal[False] = ...,
        **options: Unpack[ImageOptions],
    ) -> Vectors | list[Vectors]: ...

    @overload
    def encode_image(
        self,
        images: Inputs,
        *,
        multi_vector: bool = ...,
        output_format: str = ...,
        convert_to_tensor: bool = ...,
        **options: Unpack[ImageOptions],
    ) -> Any: ...

    def encode_image(
        self,
        images: Inputs,
        *,
        task: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        max_pixels: int | None = None,
        min_pixels: int | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
        show_progress_bar: bool | None = None,
        multi_vector: bool = False,
        output_format: str = "float32",
        ranges: Any = None,
        pool_factor: float = 1,
        convert_to_tensor: bool = False,
        convert_to_numpy: bool = True,
    ) -> Any:
        """Vectors of some images, in their order; the bundle needs a vision tower.

        Args:
            images: images, or one: a path (a string too), the bytes of an image file, a PIL image,
                or an array ``[height, width]`` or ``[height, width, 1, 3 or 4]`` of uint8, uint16,
                bool or floats from 0 to 1. Several pages or frames: the first.
            task: as for :meth:`encode`.
            prompt_name: refused, images take no prompt.
            prompt: likewise.
            batch_size: most images of a batch.
            max_pixels: pixels that larger images are scaled down to; ``None``: as the source does.
                More pixels are more tokens: finer, and slower.
            min_pixels: pixels that smaller images are scaled up to; ``None``: as the source does.
            truncate_dim: as for :meth:`encode`.
            normalize_embeddings: as for :meth:`encode`.
            show_progress_bar: as for :meth:`encode`.
            multi_vector: as for :meth:`encode`.
            output_format: as for :meth:`encode`.
            ranges: as for :meth:`encode`.
            pool_factor: as for :meth:`encode`.
            convert_to_tensor: as for :meth:`encode`.
            convert_to_numpy: as for :meth:`encode`.

        Returns:
            float32 ``[images, dim]``, ``[dim]`` for one image, ``[0, dim]`` for none. With
            ``multi_vector`` a list of float32 ``[tokens, multi_vector_dim]``, or one array. In another
            ``output_format`` its codes.

        Raises:
            ImageError: for an image that cannot be used, with its index.
            EmbedgeValueError: for another argument that cannot be used, or without a vision tower.
            EmbedgeImportError: without Pillow.
            BundleError: if a graph cannot be opened.
            InferenceError: if a graph fails.
        """
        if self._images is None or self._model.image is None:
            where = "" if self._model.image is None else f" at precision {self._precision!r}"
            raise EmbedgeValueError(
                f"{self._bundle.root}: the bundle has no vision tower{where}; it embeds: "
                f"{', '.join(self.modalities)}"
            )
        if prompt_name is not None or prompt is not None:
            raise EmbedgeValueError("images take no prompt; leave prompt_name and prompt out")
        convert = converter(to_tensor=convert_to_tensor, to_numpy=convert_to_numpy)
        items, single = as_images(images)
        request = self._request(
            task=task,
            prompt="",
            batch_size=batch_size,
            truncate_dim=truncate_dim,
            normalize_embeddings=normalize_embeddings,
            multi_vector=multi_vector,
            output_format=output_format,
            ranges=ranges,
            pool_factor=pool_factor,
        )
        from embedge.runtime.images.patches import pixel_range  # few bundles take images

        pixels = pixel_range(self._model.image, min_pixels, max_pixels)
        results = no_results(request, len(items))
        vectors = self._images.encode(
            items, range(len(items)), request, name="images", pixels=pixels
        )
        collect(vectors, results, shown=show_progress_bar, unit="image")
        return convert(results[0] if single else results)

    @overload
    def count_tokens(  # type: ignore[overload-overlap] # a string is a sequence of strings too
        self,
        inputs: str,
        *,
        task: str | None = ...,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
    ) -> int: ...

    @overload
    def count_tokens(
        self,
        inputs: Sequence[str],
        *,
        task: str | None = ...,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
    ) -> NDArray[np.int64]: ...

    def count_tokens(
        self,
        inputs: str | Sequence[str],
        *,
        task: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> int | NDArray[np.int64]:
        """The number of tokens of each text, with its prompt and special tokens, before it is cut.

        :meth:`encode` cuts a text with more than :attr:`max_seq_length`.

        Args:
            inputs: texts, or one.
            task: as for :meth:`encode`.
            prompt_name: as for :meth:`encode`.
            prompt: as for :meth:`encode`.

        Returns:
            int64 ``[texts]``, a whole number for one text.

        Raises:
            EmbedgeValueError: for an argument that cannot be used.
        """
        texts, single = as_texts(inputs)
        name = self._chosen_task(task)
        prefix = choose_prompt(name, self._manifest.tasks[name], prompt_name, prompt)
        counts = self._tokenizer.count([prefix + text for text in texts])
        return counts[0] if single else np.array(counts, np.int64)

    def tokenize(
        self,
        texts: str | Sequence[str],
        *,
        task: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        role: Literal["query", "document"] | None = None,
    ) -> list[TokenIds]:
        """The tokens that :meth:`encode` would run for some texts, for :meth:`encode_tokens`.

        With them a server counts and joins the texts of several calls before the graph runs.

        Args:
            texts: texts, or one.
            task: as for :meth:`encode`.
            prompt_name: as for :meth:`encode`.
            prompt: as for :meth:`encode`.
            role: "query" or "document": as :meth:`encode_query` or :meth:`encode_document` has them.

        Returns:
            the tokens of each text with its prompt, cut at the model's limit: int64 ``ids`` ``[tokens]``, and
            whether they were ``truncated``.

        Raises:
            EmbedgeValueError: for an argument that cannot be used, or a token that the model's table lacks.
        """
        named = {"task": task, "prompt_name": prompt_name, "prompt": prompt, "role": role}
        late = self._model.late_interaction is not None
        request = self._request(multi_vector=late, **self._in_role(named))
        return self._texts.tokenize(as_texts(texts)[0], request)

    @overload
    def encode_tokens(
        self,
        tokens: Sequence[TokenIds],
        *,
        task: str | None = ...,
        truncate_dim: int | None = ...,
        normalize_embeddings: bool = ...,
        multi_vector: Literal[False] = ...,
        one_thread: bool = ...,
        output_format: Literal["float32"] = ...,
    ) -> Vectors: ...

    @overload
    def encode_tokens(
        self,
        tokens: Sequence[TokenIds],
        *,
        task: str | None = ...,
        truncate_dim: int | None = ...,
        normalize_embeddings: bool = ...,
        multi_vector: bool,
        one_thread: bool = ...,
        output_format: Literal["float32"] = ...,
        pool_factor: float = ...,
    ) -> Vectors | list[Vectors]: ...

    @overload
    def encode_tokens(
        self,
        tokens: Sequence[TokenIds],
        *,
        task: str | None = ...,
        truncate_dim: int | None = ...,
        normalize_embeddings: bool = ...,
        multi_vector: bool = ...,
        output_format: str,
        ranges: Any = ...,
        pool_factor: float = ...,
        one_thread: bool = ...,
    ) -> Any: ...

    def encode_tokens(
        self,
        tokens: Sequence[TokenIds],
        *,
        task: str | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
        multi_vector: bool = False,
        one_thread: bool = False,
        output_format: str = "float32",
        ranges: Any = None,
        pool_factor: float = 1,
    ) -> Any:
        """Vectors of what :meth:`tokenize` gave: those of :meth:`encode`, but for the last bit.

        That bit may differ with the padding of a batch, which the other texts of a call decide.

        Args:
            tokens: of texts, with any prompts and roles.
            task: as for :meth:`encode`.
            truncate_dim: as for :meth:`encode`.
            normalize_embeddings: as for :meth:`encode`.
            multi_vector: as for :meth:`encode`.
            one_thread: take one thread, so that as many calls as :meth:`calls_at_once` says share the cores. It
                changes nothing where that is 1.
            output_format: as for :meth:`encode`.
            ranges: as for :meth:`encode`.
            pool_factor: as for :meth:`encode`; for documents.

        Returns:
            float32 ``[texts, dim]``, or with ``multi_vector`` a list of float32 ``[tokens, multi_vector_dim]``.
            A text without a token has a zero vector.

        Raises:
            EmbedgeValueError: for an argument that cannot be used.
            BundleError: if the task's graph cannot be opened.
            InferenceError: if the graph fails.
        """
        request = self._request(
            task=task,
            prompt="",  # among the tokens already
            truncate_dim=truncate_dim,
            normalize_embeddings=normalize_embeddings,
            multi_vector=multi_vector,
            one_thread=one_thread,
            output_format=output_format,
            ranges=ranges,
            pool_factor=pool_factor,
        )
        for index, text in enumerate(tokens):
            if not isinstance(text, TokenIds):
                raise EmbedgeValueError(
                    f"tokens[{index}]: expected what tokenize gives, found {type(text).__name__}; "
                    "call encode_tokens(model.tokenize(texts))",
                    arguments=["tokens"],
                )
        results = no_results(request, len(tokens))
        sequences = [(index, text) for index, text in enumerate(tokens) if len(text)]
        collect(self._runner.run(sequences, request), results, shown=False)
        return results

    def calls_at_once(self, task: str | None = None) -> int:
        """How many calls of :meth:`encode_tokens` with ``one_thread`` keep the cores busy; 1: a call takes them all.

        Args:
            task: as for :meth:`encode`.

        Raises:
            EmbedgeValueError: for a task that the bundle does not have.
        """
        return self._graphs.concurrency(self._chosen_task(task))

    def fingerprint(self, **options: Unpack[FingerprintOptions]) -> str:
        """Of which kind the vectors of a call are, as a short string to store beside them.

        It is the same over runs, copies of the bundle, tasks that are added to it, and machines of one class of
        arithmetic. It differs with whatever decides a vector besides its text: see :meth:`fingerprint_parts`.

        Args:
            options: ``task``, ``prompt_name``, ``prompt``, ``truncate_dim``, ``normalize_embeddings``,
                ``multi_vector``, ``output_format``, ``ranges`` and ``pool_factor`` as for :meth:`encode`,
                ``role``: "query" or "document" for the prompt of :meth:`encode_query` or
                :meth:`encode_document`, and ``mapped``: of a task of :meth:`encode_tasks`. Name what the stored
                vectors were made with.

        Returns:
            "e1:" and 16 hexadecimal digits.

        Raises:
            EmbedgeValueError: for an argument that cannot be used.
            BundleError: if a bundle of an earlier embedge, whose weights are then read, is damaged.
        """
        return fingerprint_of(self.fingerprint_parts(**options))

    def fingerprint_parts(self, **options: Unpack[FingerprintOptions]) -> dict[str, Any]:
        """What a fingerprint is made of, by name; strings, numbers, truth values, ``None`` and objects of them.

        ``model`` and ``task`` are names for people. The others count: ``graph``, ``vision``, ``tokenizer``,
        ``tokens``, ``precision``, ``numerics``, ``pooling``, ``settings``, ``output``, ``dim``, ``normalized``,
        ``max_length`` and ``prompt``; of an ``output_format`` and a ``pool_factor`` ``format``, ``ranges`` and
        ``pool_factor`` too.

        Args:
            options: as for :meth:`fingerprint`.

        Raises:
            EmbedgeValueError: likewise.
            BundleError: likewise.
        """
        mapped = check_flag("mapped", options.pop("mapped", False))
        request = self._request(**self._in_role({"truncate_dim": None, **options}))
        if mapped:
            request = self._mapped_request([request.task], **vars(request.options))
        return parts_of(self._bundle, self._manifest, self._precision, self._device, request)

    def check_fingerprint(
        self, stored: str | Mapping[str, Any], **options: Unpack[FingerprintOptions]
    ) -> None:
        """Refuse an index whose vectors are of another kind than those of a call.

        Args:
            stored: what :meth:`fingerprint` or, better, :meth:`fingerprint_parts` gave when its vectors were
                made. The parts tell all that differs; a fingerprint alone tells it where another task,
                precision, dimension, prompt or machine of this bundle has it.
            options: as for :meth:`fingerprint`.

        Raises:
            FingerprintError: they differ; with the names of the parts that do in ``differing``.
            EmbedgeValueError: for an argument that cannot be used.
        """
        parts = self.fingerprint_parts(**options)
        check_fingerprint(stored, parts, others_of(self._manifest, parts))

    def get_output_ranges(
        self,
        task: str | None = None,
        *,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
        multi_vector: bool = False,
    ) -> Vectors:
        """The ranges by which :meth:`encode` makes 8-bit codes of a call's vectors.

        Args:
            task: as for :meth:`encode`.
            truncate_dim: as for :meth:`encode`.
            normalize_embeddings: as for :meth:`encode`.
            multi_vector: as for :meth:`encode`.

        Returns:
            float32 ``[2, dim]``: the lowest and the highest value of each dimension.

        Raises:
            EmbedgeValueError: for an argument that cannot be used, or a bundle without ranges.
        """
        request = self._request(
            task=task,
            prompt="",
            truncate_dim=truncate_dim,
            normalize_embeddings=normalize_embeddings,
            multi_vector=multi_vector,
            output_format="int8",
        )
        assert request.output.ranges is not None
        return request.output.ranges

    def similarity(self, a: Any, b: Any) -> Vectors:
        """Similarity of each of ``a`` to each of ``b``, as the source model defines it.

        Args:
            a: vectors ``[n, dim]``, one vector ``[dim]``, or a list of multi-vectors ``[tokens,
                dim]``, which are scored by late interaction; of a late-interaction model one
                ``[tokens, dim]`` too.
            b: like ``a``.

        Returns:
            float32 ``[n, m]``.

        Raises:
            EmbedgeValueError: if the two differ in kind or in dimension.
        """
        return similarity(a, b, self._model.similarity)

    def similarity_pairwise(self, a: Any, b: Any) -> Vectors:
        """Similarity of each of ``a`` to that of ``b`` in the same place, as the source defines it.

        Args:
            a: as for :meth:`similarity`.
            b: like ``a``, and as many.

        Returns:
            float32 ``[n]``.

        Raises:
            EmbedgeValueError: if the two differ in kind, number or dimension.
        """
        return similarity_pairwise(a, b, self._model.similarity)

    def _in_role(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """A call's options with the prompt of its ``role``, which may be left out."""
        call: dict[str, Any] = {"task": None, **options}
        role = call.pop("role", None)
        if role is None:
            return call
        check_choice("role", role, ("query", "document"))
        asked = EncodeOptions(
            task=call["task"], prompt_name=call.get("prompt_name"), prompt=call.get("prompt")
        )
        call |= self._query_role(asked) if role == "query" else self._document_role(asked)
        return {**call, "role": role}

    def _query_role(self, options: EncodeOptions) -> EncodeOptions:
        return self._with_role(options, ("query",))

    def _document_role(self, options: EncodeOptions) -> EncodeOptions:
        options = self._with_role(options, ("document", "passage", "corpus"))
        if options.get("prompt_name") is None and options.get("prompt") is None:
            options["prompt"] = ""
        return options

    def _with_role(self, options: EncodeOptions, names: Sequence[str]) -> EncodeOptions:
        """A call's options with the first of some prompts that its task declares.

        A task for one role, such as "retrieval.passage" of jina-embeddings-v3, has its own name's for that role.
        """
        if options.get("prompt_name") is not None or options.get("prompt") is not None:
            return options
        task = self._chosen_task(options.get("task"))
        own = [task] if task.rpartition(".")[2] in names else []
        prompts = self._manifest.tasks[task].prompts
        return {**options, "prompt_name": next((n for n in [*names, *own] if n in prompts), None)}
