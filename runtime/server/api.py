"""The endpoints: from a request's JSON to the answer's."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import orjson

from embedge.runtime.encode.sequences import TokenIds
from embedge.runtime.encode.vectors import Vectors
from embedge.runtime.errors import EmbedgeError, EmbedgeValueError, ImageError
from embedge.runtime.server import fields as read
from embedge.runtime.server.errors import ApiError, invalid, of_error
from embedge.runtime.server.limits import Limits
from embedge.runtime.server.meaning import Meaning, meaning_of, rerank_meanings
from embedge.runtime.server.models import Models, ServedModel
from embedge.runtime.server.queue import FailedItems, Inputs, Kind, Queue

__all__ = ["Api"]

Result = TypeVar("Result")
Place = Callable[[int], str]  # of an input among those that are read together, as messages name it

# What takes longer than to hand it to another thread.
_MANY_BYTES = 64_000
_MANY_CHARACTERS = 8_000
_MANY_VALUES = 100_000
_HELPERS = 2
_KNOWN_FINGERPRINTS = 256  # a model
# Of an image, before it was read. Its real number decides neither vectors nor usage.
_IMAGE_TOKENS = 1024
_MOST_CHARACTERS = 64  # a token; words of languages and lines of code have 2 to 8
# Of texts that are tokenized at once: tokenizers' own objects take some 100 bytes a character until then.
_GROUP_CHARACTERS = 1_000_000
_AT_INDEX = re.compile(r"^inputs\[(\d+)\]")
# What a caller of the library can set and a request cannot, and what a client can do.
_ADVICE = {
    "lower max_pixels": "send it cut, or scaled down",
    ", or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it": "",
}


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
        self._free_helpers = asyncio.Semaphore(_HELPERS)

    def close(self) -> None:
        """Ends the threads."""
        self._helpers.shutdown()

    async def embeddings(self, body: bytes | bytearray) -> bytes:
        """``POST /v1/embeddings``.

        Args:
            body: the request's JSON.

        Returns:
            the answer's JSON.

        Raises:
            ApiError: for a request that cannot be answered.
        """
        most = self._limits.max_inputs
        fields = await self._away(
            len(body) > _MANY_BYTES, lambda: read.embeddings(_parsed(body), most)
        )
        model, task = self._models.find(fields.model)
        with model.in_use():
            return await self._embeddings(model, task, fields)

    async def _embeddings(
        self, model: ServedModel, task: str | None, fields: read.EmbeddingsFields
    ) -> bytes:
        meaning = meaning_of(model, task, fields)
        kind = Kind(
            model,
            meaning.task,
            dim=fields.dimensions,
            normalize=fields.normalize_embeddings,
            multi_vector=fields.multi_vector or model.late,
        )
        _check(kind)
        items = fields.items
        images = [i for i, item in enumerate(items) if isinstance(item, bytes)]
        texts = [i for i, item in enumerate(items) if not isinstance(item, bytes)]
        _check_images(model, items, images)
        tokens = await self._tokens(
            model, meaning, [items[i] for i in texts], lambda i: f"input[{texts[i]}]", fields
        )
        count = sum(map(len, tokens))
        self._check_tokens("input", count, len(images))
        parts: list[Inputs] = []
        places: list[list[int]] = []
        if texts:
            parts.append(_inputs(kind, tokens))
            places.append(texts)
        if images:
            kind_of_images = Kind(
                model, kind.task, True, kind.dim, kind.normalize, kind.multi_vector
            )
            files = [items[i] for i in images]
            parts.append(Inputs(kind_of_images, files, [_IMAGE_TOKENS] * len(files)))
            places.append(images)
        found = await self._run(parts, lambda part, i: f"input[{places[part][i]}]")
        vectors: list[Any] = [None] * len(items)
        for where, of_part in zip(places, found, strict=True):
            for index, vector in zip(where, of_part, strict=True):
                vectors[index] = vector
        prompt = len(meaning.prompt or "")
        answer = {
            "object": "list",
            "model": fields.model,
            "data": vectors,
            "usage": {"prompt_tokens": count, "total_tokens": count},
            "fingerprint": await self._away(
                prompt > _MANY_CHARACTERS, lambda: _fingerprint(kind, meaning)
            ),
        }
        values = sum(vector.size for vector in vectors)
        as_base64 = fields.base64
        return await self._away(values > _MANY_VALUES, lambda: _encoded(answer, as_base64))

    async def rerank(self, body: bytes | bytearray) -> bytes:
        """``POST /v1/rerank``, in Jina's and Cohere's form.

        Scores are late interaction's (MaxSim) where the model has a vector a token, else the similarity that it
        declares: ``scoring`` in the answer says which.

        Args:
            body: as for :meth:`embeddings`.

        Returns:
            likewise.

        Raises:
            ApiError: likewise.
        """
        most = self._limits.max_inputs
        fields = await self._away(len(body) > _MANY_BYTES, lambda: read.rerank(_parsed(body), most))
        model, task = self._models.find(fields.model)
        with model.in_use():
            return await self._rerank(model, task, fields)

    async def _rerank(
        self, model: ServedModel, task: str | None, fields: read.RerankFields
    ) -> bytes:
        roles = rerank_meanings(model, task, fields)
        multi = model.embedder.multi_vector_dim is not None
        kinds = [Kind(model, role.task, multi_vector=multi) for role in roles]
        query = await self._tokens(model, roles[0], [fields.query], lambda i: "query", fields)
        documents = await self._tokens(
            model, roles[1], fields.documents, lambda i: f"documents[{i}]", fields
        )
        tokens = [*query, *documents]
        count = sum(map(len, tokens))
        self._check_tokens("documents", count, 0)
        if kinds[0] == kinds[1]:  # they run together
            parts = [_inputs(kinds[0], tokens)]
        else:
            parts = [_inputs(kinds[0], query), _inputs(kinds[1], documents)]
        found = await self._run(
            parts,
            lambda part, i: f"documents[{part + i - 1}]" if part + i else "query",
        )
        vectors = [vector for of_part in found for vector in of_part]
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

    def _check_tokens(self, name: str, of_texts: int, images: int, more: bool = False) -> None:
        """Refuses more tokens than a request may have.

        Args:
            name: of the field.
            of_texts: tokens of texts.
            images: how many.
            more: not all texts were read.
        """
        most, count = self._limits.max_request_tokens, of_texts + images * _IMAGE_TOKENS
        if count > most:
            counted = " or more" if more else ""
            counted += f" (an image counts as {_IMAGE_TOKENS})" if images else ""
            raise invalid(
                f"{name}: expected at most {most} tokens, found {count}{counted}; send several requests",
                name,
            )

    async def _tokens(
        self,
        model: ServedModel,
        meaning: Meaning,
        items: Sequence[Any],
        place: Place,
        fields: read.MeaningFields,
    ) -> list[TokenIds]:
        """The tokens of texts and of token ids, in their order, none too long.

        Args:
            model: whose tokenizer.
            meaning: of the request.
            items: texts and token ids.
            place: of each in the request.
            fields: of the request.
        """
        if not items:
            return []
        length = sum(map(len, items))
        self._check_prompt(model, meaning, length, len(items))
        if not fields.truncate:
            _check_lengths(model, items, place)
        characters = length + len(items) * _prompt_length(model, meaning)
        tokens = await self._away(
            characters > _MANY_CHARACTERS, lambda: self._tokenized(model, meaning, items, place)
        )
        for index, text in enumerate(tokens):
            if text.truncated and not fields.truncate:
                raise _too_long(place(index), f"{len(text)} tokens")
            if not len(text):
                raise _at(
                    place(index), f"{place(index)} has no tokens, and so no vector; leave it out"
                )
        return tokens

    def _tokenized(
        self, model: ServedModel, meaning: Meaning, items: Sequence[Any], place: Place
    ) -> list[TokenIds]:
        """The tokens of texts and of token ids, of no more than a request may have.

        Args:
            model: whose tokenizer.
            meaning: of the request.
            items: texts and token ids.
            place: of each in the request.
        """
        where = [index for index, item in enumerate(items) if isinstance(item, str)]
        prompt, most = _prompt_length(model, meaning), _most_characters(model)
        found: list[TokenIds] = []
        count = 0
        for group in _groups([prompt + min(len(items[index]), most) for index in where]):
            places = where[group]
            found += _of_texts(
                model, meaning, [items[i] for i in places], _place_among(places, place)
            )
            count += sum(map(len, found[group]))
            more = group.stop < len(where)
            self._check_tokens(place(0).partition("[")[0], count, 0, more)
        if len(where) < len(items):
            first = next(i for i, item in enumerate(items) if not isinstance(item, str))
            _check_takes_ids(model, meaning, place(first))
        of_texts = iter(found)
        return [
            next(of_texts) if isinstance(item, str) else _given_ids(model, item, place(index))
            for index, item in enumerate(items)
        ]

    def _check_prompt(self, model: ServedModel, meaning: Meaning, length: int, count: int) -> None:
        """Refuses a prompt beside which no text fits, or that makes more of a request than a body may hold.

        Args:
            model: whose limit.
            meaning: of the request.
            length: characters of the texts.
            count: of the texts, before each of which it stands.
        """
        prompt, most = len(meaning.prompt or ""), _most_characters(model)
        if prompt > most:
            raise invalid(
                f"prompt: expected at most {most} characters, as the model takes {model.embedder.max_seq_length} "
                f"tokens, found {prompt}; shorten it",
                "prompt",
                "context_length_exceeded",
            )
        if prompt and length + count * prompt > self._limits.max_body:
            raise invalid(
                f"prompt: {prompt} characters before each of {count} texts make {length + count * prompt}, expected at "
                f"most {self._limits.max_body}; shorten it, or send several requests",
                "prompt",
            )

    async def _run(
        self, parts: Sequence[Inputs], place: Callable[[int, int], str]
    ) -> list[list[Vectors]]:
        """The vectors of each part of a request.

        Args:
            parts: as :meth:`Queue.submit` takes them.
            place: of an input in the request, by its part and its index there.
        """
        try:
            return await self._queue.submit(*parts)
        except FailedItems as failed:
            part = next(i for i, inputs in enumerate(parts) if inputs.kind == failed.kind)
            indices = failed.indices
            raise _placed(
                failed.error, lambda i: place(part, indices[i]), place(part, 0)
            ) from failed

    async def _away(self, long: bool, work: Callable[[], Result]) -> Result:
        """What some work gives; long work is done in another thread, so that other requests go on."""
        if not long:
            return work()
        # What is given up while it waits here is gone; in the executor's own queue it would stay, with what it holds.
        await self._free_helpers.acquire()
        done = asyncio.get_running_loop().run_in_executor(self._helpers, work)
        done.add_done_callback(lambda _: self._free_helpers.release())
        return await asyncio.shield(
            done
        )  # a thread cannot be stopped, and is free when it has ended


def _parsed(body: bytes | bytearray) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the body is not JSON: {error}", None, "invalid_json") from error


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
        raise of_error(error) from error
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


def _check_lengths(model: ServedModel, items: Sequence[Any], place: Place) -> None:
    """Refuses texts that no tokenizer makes so few tokens of as the model takes, before they are read."""
    most = _most_characters(model)
    for index, item in enumerate(items):
        if isinstance(item, str) and len(item) > most:
            raise _too_long(place(index), f"{most} characters")


def _too_long(place: str, most: str) -> ApiError:
    return _at(
        place,
        f'{place} is longer than the {most} that the model takes; shorten it, or send "truncate": true',
        "context_length_exceeded",
    )


def _at(place: str, message: str, code: str | None = None) -> ApiError:
    """An input is wrong; the field is that which it came in."""
    return invalid(message, place.partition("[")[0], code)


def _prompt_length(model: ServedModel, meaning: Meaning) -> int:
    """Most characters of what is put before each text."""
    if meaning.prompt is not None:
        return len(meaning.prompt)
    return max(map(len, model.embedder.get_prompts(meaning.task).values()), default=0)


def _most_characters(model: ServedModel) -> int:
    """Of a text as long as the model takes; no tokenizer makes so few tokens of more."""
    return _MOST_CHARACTERS * model.embedder.max_seq_length


def _groups(lengths: Sequence[int]) -> Iterator[slice]:
    """Texts that follow each other, of so many characters that their tokens are made at once."""
    start = characters = 0
    for index, length in enumerate(lengths):
        if index > start and characters + length > _GROUP_CHARACTERS:
            yield slice(start, index)
            start, characters = index, 0
        characters += length
    if lengths:
        yield slice(start, len(lengths))


def _of_texts(
    model: ServedModel, meaning: Meaning, texts: Sequence[str], place: Place
) -> list[TokenIds]:
    """The tokens of texts, of which no more is read than decides them."""
    most = _most_characters(model)
    try:
        tokens = model.embedder.tokenize(
            [_kept(model, text, most) for text in texts], **meaning.options
        )
        for index, text in enumerate(texts):
            if len(text) > most:
                _check_cut(model, meaning, text, tokens[index], place(index))
    except EmbedgeError as error:
        raise _placed(error, place, place(0)) from error
    return tokens


def _kept(model: ServedModel, text: str, characters: int) -> str:
    """The end of a text that cutting keeps."""
    return text[:characters] if model.embedder.truncation_side == "right" else text[-characters:]


def _check_cut(
    model: ServedModel, meaning: Meaning, text: str, tokens: TokenIds, place: str
) -> None:
    """Refuses a text whose tokens more of its characters may change: a word of thousands, or spaces without end.

    Args:
        model: whose tokenizer.
        meaning: of the request.
        text: that was cut before it was read.
        tokens: of what was kept.
        place: of the text in the request.
    """
    half = _most_characters(model) // 2
    [of_half] = model.embedder.tokenize([_kept(model, text, half)], **meaning.options)
    if not of_half.truncated or not np.array_equal(of_half.ids, tokens.ids):
        raise _at(
            place,
            f"{place} has {len(text)} characters, of which {half} make fewer tokens than the model takes; shorten it "
            f"to {2 * half} characters",
            "context_length_exceeded",
        )


def _check_takes_ids(model: ServedModel, meaning: Meaning, place: str) -> None:
    """Refuses token ids where the model's could not be told from another's, or a prompt would be left out.

    Args:
        model: whose tokenizer.
        meaning: of the request.
        place: of the first of them.
    """
    if model.late or not any(model.around):
        why = (
            "queries and documents differ in their tokens"
            if model.late
            else "its tokenizer puts nothing around a text by which its ids can be told from another's"
        )
        raise _at(place, f"{place}: {model.name} takes no token ids, as {why}; send texts")
    tokenize = model.embedder.tokenize
    [alone], [after] = tokenize("", task=meaning.task, prompt=""), tokenize("", **meaning.options)
    if np.array_equal(alone.ids, after.ids):
        return
    if after.unpooled:
        raise _at(
            place,
            f"{place}: token ids take no prompt, whose tokens {model.name} leaves out of its pooling; send texts",
        )
    raise _at(
        place,
        f'{place}: token ids take no prompt; send "prompt": "" where they hold it already, or texts',
    )


def _given_ids(model: ServedModel, ids: list[int], place: str) -> TokenIds:
    """Token ids of the model's own tokenizer, as they are.

    Those of another tokenizer, such as OpenAI's, would give vectors without sense: they are told by the special
    tokens that the model's puts around each text.
    """
    before, behind = model.around
    most = model.embedder.max_seq_length
    ends = ids[len(ids) - len(behind) :] if behind else []
    if len(ids) < len(before) + len(behind) or ids[: len(before)] != before or ends != behind:
        raise _at(
            place,
            f"{place}: expected ids of {model.name}'s tokenizer, which begin with {before} and end with {behind}; "
            "those of another tokenizer give vectors without sense (in LangChain's OpenAIEmbeddings pass "
            "check_embedding_ctx_length=False); send texts",
        )
    if len(ids) > most:
        raise _at(
            place,
            f"{place}: expected at most {most} token ids, found {len(ids)}",
            "context_length_exceeded",
        )
    rows = np.array(ids, np.int64)
    return TokenIds(rows, np.zeros_like(rows), truncated=False)


def _place_among(places: Sequence[int], place: Place) -> Place:
    """The place of an input among some of them."""
    return lambda index: place(places[index])


def _placed(error: Exception, place: Place, first: str) -> ApiError:
    """An error of the library as an answer, naming the input by its place in the request.

    Args:
        error: names inputs by their indices.
        place: of each index.
        first: a place, where the error names no input.
    """
    if isinstance(error, ImageError):
        where = place(error.index)
        reason = error.reason
        for advice, other in _ADVICE.items():
            reason = reason.replace(advice, other)
        return _at(where, f"{where}: {reason}")
    answer = of_error(error, first.partition("[")[0])
    found = _AT_INDEX.match(str(answer))
    if found is None:
        return answer
    where = place(int(found[1]))
    return _at(where, where + str(answer)[found.end() :])


def _inputs(kind: Kind, tokens: Sequence[TokenIds]) -> Inputs:
    return Inputs(kind, tokens, [len(text) for text in tokens])


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
    if meaning.prompt:  # clients may send any number of them
        return kind.model.embedder.fingerprint(**call)
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
