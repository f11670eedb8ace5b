"""Late-interaction bundles over HTTP: a vector a token, by the rules of queries and of documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest

from embedge.runtime import Embedder
from tests.helpers.serving import Client, error_of, served, vectors_in
from tests.runtime.conftest import MULTI_DIM, MakeBundle, TinyBundle

COMMA = 4 + 7  # the id of w7, which documents have no vector of
RULES = {
    "query_length": 6,
    "document_length": 8,
    "text_length": 7,
    "expansion": {"length": 6, "token_id": 1, "attend": False},
    "skipped_ids": [COMMA],
    "skipped_in": ["document"],
}


@pytest.fixture
def late(make_bundle: MakeBundle) -> TinyBundle:
    model = {"late_interaction": RULES, "similarity": "maxsim", "dim": MULTI_DIM}
    return make_bundle("late", multi_vector=True, model=model)


@pytest.fixture
def client(late: TinyBundle) -> Iterator[Client]:
    with served(str(late.path)) as client:
        yield client


@pytest.mark.parametrize(("role", "tokens"), [("query", 6), ("document", 4)])
def test_each_role_has_its_vectors(
    client: Client, late: TinyBundle, role: Literal["query", "document"], tokens: int
) -> None:
    text = "w1 w7 w2"  # [CLS] w1 w7 w2 [SEP]
    response = client.embed([text], "late", input_type=role)
    [found] = vectors_in(response)
    assert found.shape == (tokens, MULTI_DIM)
    encode = {"query": "encode_query", "document": "encode_document"}[role]
    [expected] = getattr(Embedder(late.path), encode)([text], multi_vector=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    model = Embedder(late.path)
    assert response.json()["fingerprint"] == model.fingerprint(role=role, multi_vector=True)


def test_tokens_for_several_calls_are_those_of_each_role(late: TinyBundle) -> None:
    model = Embedder(late.path)
    queries = model.tokenize(["w1", "w2 w7"], role="query")
    documents = model.tokenize("w7 w3", role="document")
    together = model.encode_tokens([*queries, *documents], multi_vector=True)
    apart = [
        *model.encode_query(["w1", "w2 w7"], multi_vector=True),
        *model.encode_document(["w7 w3"], multi_vector=True),
    ]
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_role_is_wanted(client: Client) -> None:
    error = error_of(client.embed("w1", "late"), 400)
    assert (error["param"], "late-interaction model" in error["message"]) == ("input_type", True)


def test_what_is_cut_is_told_with_the_length_of_its_role(client: Client) -> None:
    long = "w1 " * 10
    for role, most in (("query", 6), ("document", 8)):
        error = error_of(client.embed(long, "late", input_type=role), 400)
        assert f"longer than the {most} tokens" in error["message"]


def test_ids_and_dimensions_are_refused(client: Client) -> None:
    error = error_of(client.embed([2, 5, 3], "late", input_type="query"), 400)
    assert "takes no token ids" in error["message"]
    error = error_of(client.embed("w1", "late", input_type="query", dimensions=2), 400)
    assert error["param"] == "dimensions"


def test_rerank(client: Client, late: TinyBundle) -> None:
    documents = ["w3 w7", "w4 w5"]
    answer = client.rerank("w1 w2", documents, "late").json()
    assert answer["scoring"] == "maxsim"
    model = Embedder(late.path)
    [query] = model.encode_query(["w1 w2"], multi_vector=True)
    expected = [
        (query @ document.T).max(1).sum()
        for document in model.encode_document(documents, multi_vector=True)
    ]
    scores = {result["index"]: result["relevance_score"] for result in answer["results"]}
    assert [scores[0], scores[1]] == pytest.approx(expected, rel=1e-5)


def test_a_tokenizer_that_replaces_another_is_not_read(late: TinyBundle) -> None:
    text, model = "w1 w7 w2", Embedder(late.path)
    (late.path / "new").write_text("{}")
    (late.path / "new").replace(late.path / "tokenizer.json")
    for role, tokens in (("query", 6), ("document", 5), (None, 5)):
        [found] = model.tokenize(text, role=role)  # type: ignore[arg-type]
        assert found.ids[:5].tolist() == [2, 5, COMMA, 6, 3]
        assert len(found) == tokens
