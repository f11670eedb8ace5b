"""LlamaIndex: an index, an ingestion pipeline and what is stored of them, with the real package."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest

from embedge.runtime import EmbedgeValueError, FingerprintError
from tests.integrations.conftest import DOCUMENTS, Expected, near
from tests.runtime.conftest import TinyBundle, bundles_in

pytest.importorskip("llama_index.core", reason="make test-integrations has LlamaIndex")

from llama_index.core import VectorStoreIndex
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.schema import TextNode
from llama_index.core.storage.kvstore import SimpleKVStore

from embedge.integrations.llama_index import EmbedgeEmbedding


def embedding(bundle: TinyBundle, **fields: Any) -> EmbedgeEmbedding:
    return EmbedgeEmbedding(bundle.path, **{"precision": "fp32", "task": "code", **fields})


def nodes() -> list[TextNode]:
    return [TextNode(text=text, id_=f"node-{text}") for text in DOCUMENTS]


def test_vectors_are_lists_of_floats(bundle: TinyBundle, expected: Expected) -> None:
    model = embedding(bundle)
    vector = model.get_query_embedding("w1 w2")
    assert type(vector) is list and {type(value) for value in vector} == {float}
    near(vector, expected.query("w1 w2"))
    near(model.get_text_embedding("w1 w2"), expected.documents(["w1 w2"])[0])
    near(model.get_text_embedding_batch(DOCUMENTS), expected.documents(DOCUMENTS))
    near(
        embedding(bundle, embed_batch_size=2).get_text_embedding_batch(DOCUMENTS),
        expected.documents(DOCUMENTS),
    )


def test_asynchronous_calls(bundle: TinyBundle, expected: Expected) -> None:
    model = embedding(bundle, embed_batch_size=2, num_workers=2)

    async def embed() -> tuple[Any, ...]:
        return (
            await model.aget_query_embedding("w1 w2"),
            await model.aget_text_embedding("w1 w2"),
            await model.aget_text_embedding_batch(DOCUMENTS),
        )

    query, text, batch = asyncio.run(embed())
    near(query, expected.query("w1 w2"))
    near(text, expected.documents(["w1 w2"])[0])
    near(batch, expected.documents(DOCUMENTS))


@pytest.mark.parametrize("query", ["w1 w2", "w6 w5", "w9"])
def test_a_search_finds_what_the_weights_say(
    bundle: TinyBundle, expected: Expected, query: str
) -> None:
    index = VectorStoreIndex(nodes(), embed_model=embedding(bundle))
    hits = index.as_retriever(similarity_top_k=5).retrieve(query)
    assert [hit.node.get_content() for hit in hits] == expected.found(query)


def test_instructions_win_over_the_tasks_prompts(bundle: TinyBundle, expected: Expected) -> None:
    model = embedding(bundle, query_instruction="w9 ", text_instruction="")
    near(model.get_query_embedding("w1"), expected.vector("w9 w1"))
    near(model.get_text_embedding("w1"), expected.vector("w1"))


def test_a_dictionary_and_a_pickle_give_the_same(bundle: TinyBundle, expected: Expected) -> None:
    model = embedding(bundle, truncate_dim=4, query_instruction="w9 ")
    stored = model.to_dict()
    assert stored["class_name"] == "EmbedgeEmbedding"
    assert stored["fingerprint"] == model.fingerprint
    for other in (
        EmbedgeEmbedding.from_dict(stored),
        EmbedgeEmbedding.from_json(model.to_json()),
        pickle.loads(pickle.dumps(model)),
    ):
        assert other.to_dict() == stored
        assert other.embedder is model.embedder
        near(other.get_query_embedding("w1"), Expected(bundle, dim=4).vector("w9 w1"))
    assert model.model_name == "tiny:code"
    assert embedding(bundle, model_name="mine").model_name == "mine"


def test_a_stored_one_of_another_kind_is_refused(bundle: TinyBundle) -> None:
    stored = embedding(bundle).to_dict()
    with pytest.raises(FingerprintError) as raised:
        EmbedgeEmbedding.from_dict(stored | {"task": "retrieval"})
    assert raised.value.differing == ("graph",)


def test_what_cannot_be_used_is_an_error_at_once(bundle: TinyBundle) -> None:
    with pytest.raises(EmbedgeValueError, match="no task 'sorting'"):
        embedding(bundle, task="sorting")
    with pytest.raises(EmbedgeValueError, match="truncate_dim is 5"):
        embedding(bundle, truncate_dim=5)
    with pytest.raises(ValueError, match="embed_batch_size"):
        embedding(bundle, embed_batch_size=0)
    with pytest.raises(ValueError, match="truncate_dims"):
        embedding(bundle, truncate_dims=4)
    with pytest.raises(ValueError, match="frozen"):
        embedding(bundle).task = "retrieval"


def test_a_cache_by_text_alone_is_refused_where_queries_have_a_prompt(
    bundle: TinyBundle, tmp_path: Any
) -> None:
    with pytest.raises(EmbedgeValueError, match="embeddings_cache: .*one vector a text"):
        embedding(bundle, embeddings_cache=SimpleKVStore())
    plain = bundles_in(tmp_path)("plain")
    model = EmbedgeEmbedding(plain.path, embeddings_cache=SimpleKVStore())
    assert model.get_text_embedding("w1") == model.get_text_embedding("w1")


def test_a_pipelines_cache_tells_kinds_apart(bundle: TinyBundle, expected: Expected) -> None:
    cache = IngestionCache()
    for task in ("code", "retrieval"):
        model = embedding(bundle, task=task)
        found = IngestionPipeline(transformations=[model], cache=cache).run(nodes=nodes())
        near([node.embedding for node in found], Expected(bundle, task).documents(DOCUMENTS))
    hashes = {
        get_transformation_hash(nodes(), embedding(bundle, **changed))
        for changed in ({}, {"task": "retrieval"}, {"truncate_dim": 4}, {"text_instruction": ""})
    }
    assert len(hashes) == 4
