"""The endpoints: from a request's JSON to the answer's."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import orjson

from embedge.runtime.encode.sequences import TokenIds
from embedge.runtime.encode.vectors import Vectors
from embedge.runtime.errors import EmbedgeError, EmbedgeValueError, ImageError
from embedge.runtime.server import fields as read
from embedge.runtime.server.errors import ApiError, invalid, of_embedge
from embedge.runtime.server.limits import Limits
from embedge.runtime.server.meaning import Meaning, meaning_of
from embedge.runtime.server.models import Models, ServedModel
from embedge.runtime.server.queue import FailedItems, Kind, Queue

__all__ = ["Api"]

Result = TypeVar("Result")

# What takes longer than to hand it to another thread.
_MANY_CHARACTERS = 8_000
_MANY_VALUES = 100_000
_HELPERS = 2
_KNOWN_FINGERPRINTS = 256  # a model; prompts of requests are without number
# Of an image, before it was read. Its real number decides neither vectors nor usage.
_IMAGE_TOKENS = 1024
_AT_INDEX = re.compile(r"^inputs\[(\d+)\]")


class Api:
    """Answers requests with the vectors and scores of some models.

    Args:
        models: by name.
        queue: runs their inputs.
        limits: of a request.
    """

    def __init__(self, models: Models, queue: Queue, limits: Limits) -> None:
        self._models = models
        self._queue = queue
        self._limits = limits
        self._helpers = ThreadPoolExecutor(_HELPERS, thread_name_prefix="embedge-help")

    def close(self) -> None:
        """Ends the threads."""
        self._helpers.shutdown()

    async def embeddings(self, document: Any) -> bytes:
        """``POST /v1/embeddings``.

        Args:
            document: the request's JSON, parsed.

        Returns:
            the answer's JSON.

        Raises:
            ApiError: for a request that cannot be answered.
        """
        fields = read.embeddings(document)
        model, task = self._models.find(fields.model)
        meaning = meaning_of(model, task, fields)
        kind = Kind(
            model,
            meaning.task,
            dim=fields.dimensions,
            normalize=fields.normalize_embeddings,
            multi_vector=fields.multi_vector or model.late,
        )
        _check(kind)
        self._check_count(fields.items, "input")
        items = fields.items
        vectors: list[Any] = [None] * len(items)
        images = [i for i, item in enumerate(items) if isinstance(item, bytes)]
        texts = [i for i, item in enumerate(items) if not isinstance(item, bytes)]
        _check_images(model, items, images)
        tokens = await self._tokens(model, meaning, [items[i] for i in texts], texts, fields)
        runs = []
        if texts:
            runs.append(self._run(kind, tokens, [len(text) for text in tokens], texts, vectors))
        if images:
            of_images = Kind(model, kind.task, True, kind.dim, kind.normalize, kind.multi_vector)
            files = [items[i] for i in images]
            runs.append(self._run(of_images, files, [_IMAGE_TOKENS] * len(files), images, vectors))
        await _all(runs)
        count = sum(map(len, tokens))
        answer = {
            "object": "list",
            "model": fields.model,
            "data": vectors,
            "usage": {"prompt_tokens": count, "total_tokens": count},
            "fingerprint": _fingerprint(kind, meaning),
        }
        values = sum(vector.size for vector in vectors)
        as_base64 = fields.base64
        return await self._away(values > _MANY_VALUES, lambda: _encoded(answer, as_base64))

    async def rerank(self, document: Any) -> bytes:
        """``POST /v1/rerank``, in Jina's and Cohere's form.

        Scores are late interaction's (MaxSim) where the model has a vector a token, else the similarity that it
        declares: ``scoring`` in the answer says which.

        Args:
            document: as for :meth:`embeddings`.

        Returns:
            likewise.

        Raises:
            ApiError: likewise.
        """
        fields = read.rerank(document)
        model, task = self._models.find(fields.model)
        if fields.input_type is not None:
            raise invalid(
                "input_type: a query and documents are what they are; leave it out", "input_type"
            )
        roles = _rerank_meanings(model, task, fields)
        self._check_count(fields.documents, "documents")
        multi = model.embedder.multi_vector_dim is not None
        kind = Kind(model, roles[0].task, multi_vector=multi)
        where = list(range(len(fields.documents)))
        query = await self._tokens(model, roles[0], [fields.query], [0], fields, "query")
        documents = await self._tokens(
            model, roles[1], fields.documents, where, fields, "documents"
        )
        tokens = [*query, *documents]
        count = sum(map(len, tokens))
        vectors: list[Any] = [None] * len(tokens)
        await self._run(kind, tokens, [len(text) for text in tokens], range(len(tokens)), vectors)
        scores = await self._away(len(tokens) > 1, lambda: _scores(model, vectors[0], vectors[1:]))
        order = np.argsort(-scores, kind="stable")[: fields.top_n]
        results: list[dict[str, Any]] = [
            {"index": int(index), "relevance_score": float(scores[index])} for index in order
        ]
        if fields.return_documents:
            for result in results:
                result["document"] = {"text": fields.documents[result["index"]]}
        kind_name = model.embedder.similarity_fn_name
        answer = {
            "object": "list",
            "model": fields.model,
            "scoring": kind_name if model.late or not multi else "maxsim",
            "results": results,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }
        return orjson.dumps(answer)

    def models(self) -> bytes:
        """``GET /v1/models``."""
        return orjson.dumps({"object": "list", "data": self._models.listing()})

    def model(self, name: str) -> bytes:
        """``GET /v1/models/NAME``.

        Raises:
            ApiError: 404, for a name that is not served.
        """
        self._models.find(name)
        listed = {model["id"]: model for model in self._models.listing()}
        if name not in listed:  # the first precision by its name
            model, task = self._models.find(name)
            listed[name] = {**listed[model.ids(task, False)], "id": name}
        return orjson.dumps(listed[name])

    def _check_count(self, items: Sequence[Any], name: str) -> None:
        most = self._limits.max_inputs
        if len(items) > most:
            raise invalid(
                f"{name}: expected at most {most}, found {len(items)}; send several requests", name
            )

    async def _tokens(
        self,
        model: ServedModel,
        meaning: Meaning,
        items: Sequence[Any],
        where: Sequence[int],
        fields: read.MeaningFields,
        name: str = "input",
    ) -> list[TokenIds]:
        """The tokens of texts and of token ids, in their order, none too long.

        Args:
            model: whose tokenizer.
            meaning: of the request.
            items: texts and token ids.
            where: their indices in the request, for messages.
            fields: of the request.
            name: of the field that they came in.
        """
        if not items:
            return []
        characters = sum(len(item) for item in items)
        tokens = await self._away(
            characters > _MANY_CHARACTERS, lambda: _tokenized(model, meaning, items, where, name)
        )
        for index, text in zip(where, tokens, strict=True):
            if text.truncated and not fields.truncate:
                raise invalid(
                    f"{name}[{index}] is longer than the {len(text)} tokens that the model takes; shorten it, or "
                    'send "truncate": true',
                    name,
                    "context_length_exceeded",
                )
            if not len(text):
                raise invalid(
                    f"{name}[{index}] has no tokens, and so no vector; leave it out", name
                )
        most, count = self._limits.max_request_tokens, sum(map(len, tokens))
        if count > most:
            raise invalid(
                f"{name}: expected at most {most} tokens, found {count}; send several requests",
                name,
            )
        return tokens

    async def _run(
        self,
        kind: Kind,
        items: Sequence[Any],
        costs: Sequence[int],
        where: Sequence[int],
        vectors: list[Any],
    ) -> None:
        """Puts the vectors of some inputs where they belong.

        Args:
            kind: of all of them.
            items: as :meth:`Queue.submit` takes them.
            costs: likewise.
            where: their indices in ``vectors``.
            vectors: get them.
        """
        try:
            found = await self._queue.submit(kind, items, costs)
        except FailedItems as failed:
            raise _of_failed(failed, where) from failed
        for index, vector in zip(where, found, strict=True):
            vectors[index] = vector

    async def _away(self, long: bool, work: Callable[[], Result]) -> Result:
        """What some work gives; long work is done in another thread, so that other requests go on."""
        if not long:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._helpers, work)


async def _all(runs: Sequence[Awaitable[None]]) -> None:
    """Awaits all; the first error gives the others up."""
    if len(runs) == 1:
        await runs[0]
        return
    tasks = [asyncio.ensure_future(run) for run in runs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _check(kind: Kind) -> None:
    """Refuses what the model has no vectors for, before anything waits."""
    if kind in kind.model.checked:
        return
    try:
        kind.model.embedder.encode_tokens(
            [],
            task=kind.task,
            truncate_dim=kind.dim,
            normalize_embeddings=kind.normalize,
            multi_vector=kind.multi_vector,
        )
    except EmbedgeValueError as error:
        raise of_embedge(error) from error
    kind.model.checked.add(kind)


def _check_images(model: ServedModel, items: Sequence[Any], images: Sequence[int]) -> None:
    """Refuses images that the model does not take, and those that came as texts."""
    takes = "image" in model.embedder.modalities
    if images and not takes:
        raise invalid(
            f"input[{images[0]}] is an image; {model.name} embeds: "
            f"{', '.join(model.embedder.modalities)}",
            "input",
        )
    if not takes:
        return
    for index, item in enumerate(items):
        if isinstance(item, str) and item.startswith("data:image/"):
            raise invalid(
                f'input[{index}] is an image as a text; send {{"image": "data:image/…"}} in its place',
                "input",
            )


def _tokenized(
    model: ServedModel, meaning: Meaning, items: Sequence[Any], where: Sequence[int], name: str
) -> list[TokenIds]:
    """The tokens of texts and of token ids."""
    texts = [
        (index, item) for index, item in zip(where, items, strict=True) if isinstance(item, str)
    ]
    try:
        of_texts = iter(model.embedder.tokenize([text for _, text in texts], **meaning.options))
    except EmbedgeError as error:
        raise _at_index(error, [index for index, _ in texts], name) from error
    return [
        next(of_texts) if isinstance(item, str) else _given_ids(model, meaning, item, index)
        for index, item in zip(where, items, strict=True)
    ]


def _given_ids(model: ServedModel, meaning: Meaning, ids: list[int], index: int) -> TokenIds:
    """Token ids of the model's own tokenizer, as they are.

    Those of another tokenizer, such as OpenAI's, would give vectors without sense: they are told by the special
    tokens that the model's puts around each text.
    """
    where = f"input[{index}]"
    before, behind = model.around
    embedder = model.embedder
    if model.late or not (before or behind):
        why = (
            "queries and documents differ in their tokens"
            if model.late
            else "its tokenizer puts nothing around a text by which its ids can be told from another's"
        )
        raise invalid(f"{where}: {model.name} takes no token ids, as {why}; send texts", "input")
    if _has_prompt(model, meaning):
        raise invalid(
            f'{where}: token ids take no prompt; send "prompt": "" where they hold it already, or texts',
            "input",
        )
    ends = ids[len(ids) - len(behind) :] if behind else []
    if len(ids) < len(before) + len(behind) or ids[: len(before)] != before or ends != behind:
        raise invalid(
            f"{where}: expected ids of {model.name}'s tokenizer, which begin with {before} and end with {behind}; "
            "those of another tokenizer give vectors without sense (in LangChain's OpenAIEmbeddings pass "
            "check_embedding_ctx_length=False); send texts",
            "input",
        )
    if len(ids) > embedder.max_seq_length:
        raise invalid(
            f"{where}: expected at most {embedder.max_seq_length} token ids, found {len(ids)}",
            "input",
            "context_length_exceeded",
        )
    rows = np.array(ids, np.int64)
    return TokenIds(rows, np.zeros_like(rows), truncated=False)


def _has_prompt(model: ServedModel, meaning: Meaning) -> bool:
    tokenize = model.embedder.tokenize
    [alone], [after] = tokenize("", task=meaning.task, prompt=""), tokenize("", **meaning.options)
    return not np.array_equal(alone.ids, after.ids)


def _of_failed(failed: FailedItems, where: Sequence[int]) -> ApiError:
    """What inputs that could not be embedded are answered with."""
    return _at_index(failed.error, [where[index] for index in failed.indices], "input")


def _at_index(error: Exception, indices: Sequence[int], name: str) -> ApiError:
    """An error of the library, whose message names inputs by their place in ``indices``."""
    if isinstance(error, ImageError):
        return invalid(f"{name}[{indices[error.index]}]: {error.reason}", name)
    if not isinstance(error, EmbedgeError):
        return ApiError(500, f"unexpected {type(error).__name__}: {error}", kind="server_error")
    answer = of_embedge(error, name)
    found = _AT_INDEX.match(str(answer))
    if found is None:
        return answer
    answer.args = (f"{name}[{indices[int(found[1])]}]" + str(answer)[found.end() :],)
    return answer


def _rerank_meanings(
    model: ServedModel, task: str | None, fields: read.RerankFields
) -> tuple[Meaning, Meaning]:
    """What the query and the documents are embedded as."""
    if fields.prompt is not None or fields.prompt_name is not None:
        raise invalid(
            "prompt and prompt_name: the query and the documents have prompts of their own; leave them out",
            "prompt" if fields.prompt is not None else "prompt_name",
        )
    asked = [
        read.MeaningFields(model=fields.model, task=fields.task, input_type=role)
        for role in ("query", "document")
    ]
    query, documents = (meaning_of(model, task, one) for one in asked)
    return query, documents


def _scores(model: ServedModel, query: Vectors, documents: Sequence[Vectors]) -> Vectors:
    """Of each document, float32 ``[documents]``."""
    several: Any = list(documents) if query.ndim == 2 else np.stack(documents)
    scores: Vectors = model.embedder.similarity([query], several)[0]
    return scores


def _fingerprint(kind: Kind, meaning: Meaning) -> str:
    """Of which kind the vectors of an answer are."""
    call = meaning.options | {
        "truncate_dim": kind.dim,
        "normalize_embeddings": kind.normalize,
        "multi_vector": kind.multi_vector,
    }
    known, key = kind.model.fingerprints, tuple(call.values())
    if key not in known:
        if len(known) >= _KNOWN_FINGERPRINTS:
            known.clear()
        known[key] = kind.model.embedder.fingerprint(**call)
    return known[key]


def _encoded(answer: dict[str, Any], as_base64: bool) -> bytes:
    """The JSON of an answer of vectors."""
    answer = {
        **answer,
        "data": [
            {"object": "embedding", "index": index} | _embedding(vector, as_base64)
            for index, vector in enumerate(answer["data"])
        ],
    }
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def _embedding(vector: Vectors, as_base64: bool) -> dict[str, Any]:
    """A vector as numbers or as base64, which does not say the shape of a vector a token."""
    if not as_base64:
        return {"embedding": np.ascontiguousarray(vector)}
    encoded = base64.b64encode(vector.astype("<f4").tobytes()).decode()
    shape = {"shape": list(vector.shape)} if vector.ndim > 1 else {}
    return {"embedding": encoded, **shape}
