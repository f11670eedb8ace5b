"""What requests mean, and what they are refused for: tasks, prompts, models, forms, keys, limits."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedge.runtime import Embedder
from tests.helpers.serving import Client, Http, error_of, served, vectors_in
from tests.runtime.conftest import DIM, MakeBundle, TinyBundle, bundles_in


class TestMeaning:
    @pytest.mark.parametrize(
        ("fields", "method", "options"),
        [
            ({}, "encode", {}),
            ({"input_type": "query"}, "encode_query", {}),
            ({"input_type": "search_query"}, "encode_query", {}),
            ({"input_type": "document"}, "encode_document", {}),
            ({"input_type": "search_document"}, "encode_document", {}),
            ({"input_type": "passage"}, "encode_document", {}),
            ({"task": "code.query"}, "encode_query", {}),
            ({"task": "code.passage"}, "encode_document", {}),
            ({"task": "code", "prompt_name": "passage"}, "encode", {"prompt_name": "passage"}),
            ({"prompt": "w7 "}, "encode", {"prompt": "w7 "}),
            ({"prompt": ""}, "encode", {"prompt": ""}),
        ],
    )
    def test_words_of_several_interfaces(
        self,
        client: Client,
        tasks_bundle: TinyBundle,
        fields: dict[str, str],
        method: str,
        options: dict[str, str],
    ) -> None:
        [vector] = vectors_in(client.embed("w1 w2", "bundle:code", **fields))
        expected = getattr(Embedder(tasks_bundle.path, task="code"), method)("w1 w2", **options)
        np.testing.assert_array_equal(vector, expected)

    @pytest.mark.parametrize(
        ("model", "fields"),
        [
            ("bundle:code", {}),
            ("bundle", {"task": "code"}),
            ("bundle", {"input_type": "code"}),
            ("bundle@fp32:code", {}),
            ("bundle:code", {"task": "code"}),
        ],
    )
    def test_ways_to_name_a_task(
        self, client: Client, tasks_bundle: TinyBundle, model: str, fields: dict[str, str]
    ) -> None:
        [vector] = vectors_in(client.embed("w1", model, **fields))
        np.testing.assert_allclose(vector, tasks_bundle.expected("code", [2, 5, 3]), atol=1e-6)

    @pytest.mark.parametrize(
        ("model", "fields", "status", "said"),
        [
            ("bundle", {}, 400, 'has several tasks: retrieval, code; choose one, such as model "b'),
            ("bundle", {"task": "sts"}, 400, "bundle has no task 'sts'; it has retrieval, code"),
            ("bundle:sts", {}, 404, "bundle has no task 'sts'"),
            ("other", {}, 404, "no model 'other'; there are bundle"),
            ("bundle@int8", {}, 404, "not served at 'int8', but fp32"),
            ("bundle:code", {"task": "retrieval"}, 400, "names the task 'code' and task names"),
            ("bundle:code", {"task": "retrieval.query"}, 400, "names the task 'code'"),
            ("bundle:code", {"input_type": "clustering"}, 400, "input_type 'clustering' is none"),
            ("bundle:code", {"prompt_name": "sts"}, 400, "has no prompt 'sts'; it has query"),
            ("bundle:code", {"prompt_name": "query", "input_type": "query"}, 400, "both choose"),
            ("bundle", {"task": "code.query", "prompt": "a"}, 400, "both choose a prompt"),
        ],
    )
    def test_what_agrees_with_nothing_is_refused(
        self, client: Client, model: str, fields: dict[str, str], status: int, said: str
    ) -> None:
        assert said in error_of(client.embed("w1", model, **fields), status)["message"]

    def test_a_tasks_own_prompts_come_first(self, make_bundle: MakeBundle) -> None:
        prompts = {"query": "w1 ", "search_query": "w2 ", "document": "w3 ", "passage": "w4 "}
        bundle = make_bundle("own", prompts=prompts)
        model = Embedder(bundle.path)
        with served(str(bundle.path)) as client:
            for name in prompts:
                expected = model.encode("w5", prompt_name=name)
                for fields in ({"input_type": name}, {"task": f"retrieval.{name}"}):
                    [vector] = vectors_in(client.embed("w5", "own", **fields))
                    np.testing.assert_array_equal(vector, expected)
            [vector] = vectors_in(client.embed("w5", "own", input_type="search_document"))
        np.testing.assert_array_equal(vector, model.encode_document("w5"))

    @pytest.mark.parametrize("name", ["task", "input_type", "prompt_name", "model", "prompt"])
    def test_what_a_client_sent_is_told_in_a_few_characters(
        self, client: Client, name: str
    ) -> None:
        fields = {"model": "bundle:code", "input_type": "w", name: "w" * 5000}
        if name in ("prompt_name", "model"):
            del fields["input_type"]
        response = client.post(json={"input": "w1", **fields})
        assert len(response.text) < 700
        assert error_of(response, response.status_code)["message"]

    def test_a_role_that_a_task_has_no_prompt_for(self, make_bundle: MakeBundle) -> None:
        bundle = make_bundle("bare")
        with served(str(bundle.path)) as client:
            error = error_of(client.embed("w1", "bare", task="retrieval.query"), 400)
        assert "has no prompt for the role query; it has none" in error["message"]


class TestRerank:
    def test_documents_in_the_order_of_their_scores(
        self, client: Client, tasks_bundle: TinyBundle
    ) -> None:
        documents = [f"w{i} w{i + 3}" for i in range(9)]
        model = Embedder(tasks_bundle.path, task="code")
        expected = model.encode_document(documents) @ model.encode_query("w1")
        answer = client.rerank("w1", documents, "bundle:code", return_documents=True).json()
        assert answer["scoring"] == "cosine"
        found = [result["index"] for result in answer["results"]]
        assert found == list(np.argsort(-expected))
        for result in answer["results"]:
            assert result["relevance_score"] == pytest.approx(expected[result["index"]], abs=1e-5)
            assert result["document"] == {"text": documents[result["index"]]}

    def test_the_best_and_documents_as_objects(self, client: Client) -> None:
        documents = [{"text": "w1"}, "w2", {"text": "w3"}]
        answer = client.rerank("w2", documents, "bundle:code", top_n=1).json()
        assert [set(result) for result in answer["results"]] == [{"index", "relevance_score"}]
        assert answer["usage"]["total_tokens"] == 4 + 3 * 4

    def test_late_interaction_where_there_is_a_vector_a_token(
        self, make_bundle: MakeBundle
    ) -> None:
        bundle = make_bundle("multi", multi_vector=True)
        with served(str(bundle.path)) as client:
            answer = client.rerank("w1 w2", ["w3", "w4 w5"], "multi").json()
        assert answer["scoring"] == "maxsim"
        model = Embedder(bundle.path)
        query, *documents = model.encode(["w1 w2", "w3", "w4 w5"], multi_vector=True)
        expected = [(query @ document.T).max(1).sum() for document in documents]
        scores = {result["index"]: result["relevance_score"] for result in answer["results"]}
        assert [scores[0], scores[1]] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(
        ("texts", "said"),
        [
            ({"query": "w9"}, "query has 'w9', a token"),
            ({"documents": ["w1", "w9"]}, "documents[1] has 'w9', a token"),
            ({"query": "w1 " * 40}, "query is longer than the 16 tokens"),
            ({"documents": ["w1", "w1 " * 40]}, "documents[1] is longer than the 16 tokens"),
            ({"documents": ["w1"] * 2049}, "documents: expected at most 2048, found 2049"),
        ],
    )
    def test_texts_are_named_as_they_came(
        self,
        bundle: TinyBundle,
        monkeypatch: pytest.MonkeyPatch,
        texts: dict[str, Any],
        said: str,
    ) -> None:
        from embedge.runtime.sessions.graphs import Graphs

        body = {"model": "bundle", "query": "w1", "documents": ["w2"], **texts}
        with served(str(bundle.path)) as client:
            monkeypatch.setattr(Graphs, "token_rows", lambda self, name: 7)
            error = error_of(client.post("/v1/rerank", json=body), 400)
        assert error["message"].startswith(said)
        assert error["param"] == next(iter(texts))

    def test_a_document_whose_run_fails_is_named(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from embedge.runtime.errors import EmbedgeValueError
        from embedge.runtime.server.queue import Kind

        def run(kind: Kind, items: Any, one_thread: bool) -> Any:
            raise EmbedgeValueError("inputs[2] cannot be")

        monkeypatch.setattr(Kind, "run", run)
        error = error_of(client.rerank("w1", ["w2", "w3"], "bundle:code"), 400)
        assert (error["message"], error["param"]) == ("documents[1] cannot be", "documents")

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"query": 3}, "query"),
            ({"documents": []}, "documents"),
            ({"documents": "w1"}, "documents"),
            ({"documents": [["w1"]]}, "documents"),
            ({"top_n": 0}, "top_n"),
            ({"input_type": "query"}, "input_type"),
            ({"prompt": "w1"}, "prompt"),
        ],
    )
    def test_refusals(self, client: Client, fields: dict[str, Any], param: str) -> None:
        body = {"model": "bundle:code", "query": "w1", "documents": ["w2"], **fields}
        response = client.post("/v1/rerank", json=body)
        assert error_of(response, 400)["param"] == param


@pytest.fixture(scope="module")
def roles_bundle(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """A task for queries and one for documents, each with its instruction as the default, as jina-embeddings-v3 has."""
    names = ("retrieval.query", "retrieval.passage", "code")
    prompts = {"retrieval.query": "w1 ", "retrieval.passage": "w2 "}
    bundle = bundles_in(tmp_path_factory.mktemp("roles"))("v3", tasks=names, prompts=prompts)

    def defaults(manifest: dict[str, Any]) -> None:
        for name in prompts:
            manifest["tasks"][name]["default_prompt"] = name

    bundle.edit(defaults)
    return bundle


@pytest.fixture(scope="module")
def roles_client(roles_bundle: TinyBundle) -> Iterator[Client]:
    with served(str(roles_bundle.path)) as client:
        yield client


class TestTasksForOneRole:
    @pytest.mark.parametrize(
        ("model", "fields", "task"),
        [
            ("v3:retrieval.query", {}, "retrieval.query"),
            ("v3:retrieval.query", {"input_type": "query"}, "retrieval.query"),
            ("v3:retrieval.passage", {"input_type": "search_document"}, "retrieval.passage"),
            ("v3", {"task": "retrieval.passage", "input_type": "document"}, "retrieval.passage"),
            ("v3", {"input_type": "retrieval.passage"}, "retrieval.passage"),
            ("v3:retrieval", {"input_type": "query"}, "retrieval.query"),
            ("v3@fp32:retrieval", {"input_type": "passage"}, "retrieval.passage"),
            ("v3", {"task": "retrieval", "input_type": "search_query"}, "retrieval.query"),
        ],
    )
    def test_a_role_is_its_task_with_its_instruction(
        self,
        roles_client: Client,
        roles_bundle: TinyBundle,
        model: str,
        fields: dict[str, str],
        task: str,
    ) -> None:
        [vector] = vectors_in(roles_client.embed("w7", model, **fields))
        prompt = {"retrieval.query": 5, "retrieval.passage": 6}[task]
        expected = roles_bundle.expected(task, [2, prompt, 11, 3])
        np.testing.assert_allclose(vector, expected, atol=1e-6)

    @pytest.mark.parametrize(
        ("model", "fields", "said"),
        [
            (
                "v3:retrieval.passage",
                {"input_type": "query"},
                "'retrieval.passage' of v3 is not for the role query; name the task 'retrieval.query'",
            ),
            (
                "v3",
                {"task": "retrieval.query", "input_type": "search_document"},
                "not for the role document; name the task 'retrieval.passage'",
            ),
            (
                "v3:retrieval.passage",
                {"input_type": "retrieval.query"},
                "the task is 'retrieval.passage' and input_type names the task 'retrieval.query'",
            ),
            ("v3:retrieval", {}, 'expected input_type "query" or "document" beside \'retrieval\''),
        ],
    )
    def test_the_other_roles_task_is_refused(
        self, roles_client: Client, model: str, fields: dict[str, str], said: str
    ) -> None:
        assert said in error_of(roles_client.embed("w7", model, **fields), 400)["message"]

    @pytest.mark.parametrize(
        ("model", "fields"), [("v3:retrieval", {}), ("v3", {"task": "retrieval"})]
    )
    def test_a_rerank_takes_both(
        self, roles_client: Client, roles_bundle: TinyBundle, model: str, fields: dict[str, str]
    ) -> None:
        numbers = range(3, 12)
        documents = [f"w{number}" for number in numbers]
        answer = roles_client.rerank("w7", documents, model, **fields).json()
        query = roles_bundle.expected("retrieval.query", [2, 5, 11, 3])
        expected = [
            query @ roles_bundle.expected("retrieval.passage", [2, 6, number + 4, 3])
            for number in numbers
        ]
        scores = {found["index"]: found["relevance_score"] for found in answer["results"]}
        assert [scores[i] for i in range(9)] == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize(
        ("model", "fields", "param"),
        [
            ("v3:retrieval.query", {}, "model"),
            ("v3", {"task": "retrieval.passage"}, "task"),
            ("v3", {"task": "code.query"}, "task"),
        ],
    )
    def test_a_rerank_names_no_role(
        self, roles_client: Client, model: str, fields: dict[str, str], param: str
    ) -> None:
        error = error_of(roles_client.rerank("w7", ["w8"], model, **fields), 400)
        named = fields.get("task") or model.partition(":")[2]
        assert error["message"] == (
            f"{param} names the task {named!r}, which is for one role; the query and the documents have one each: "
            f"name the task {named.partition('.')[0]!r}"
        )
        assert error["param"] == param

    def test_a_document_whose_run_fails_is_named(
        self, roles_client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from embedge.runtime.errors import EmbedgeValueError
        from embedge.runtime.server.queue import Kind

        run = Kind.run

        def failing(kind: Kind, items: Any, one_thread: bool) -> Any:
            if kind.task == "retrieval.passage":
                raise EmbedgeValueError("inputs[1] cannot be")
            return run(kind, items, one_thread)

        monkeypatch.setattr(Kind, "run", failing)
        error = error_of(roles_client.rerank("w1", ["w2", "w3"], "v3:retrieval"), 400)
        assert (error["message"], error["param"]) == ("documents[1] cannot be", "documents")

    def test_both_are_listed_by_what_they_have_in_common(self, roles_client: Client) -> None:
        listed = {model["id"]: model for model in roles_client.get("/v1/models").json()["data"]}
        both = ["retrieval.query", "retrieval.passage"]
        assert listed["v3:retrieval"]["embedge"]["tasks"] == both
        for name in ("v3:retrieval", "v3@fp32:retrieval"):
            one = roles_client.get(f"/v1/models/{name}").json()
            assert (one["id"], one["embedge"]["tasks"]) == (name, both)


class TestForm:
    @pytest.mark.parametrize(
        ("fields", "param", "said"),
        [
            ({"model": None}, "model", "model is missing"),
            ({"input": None}, "input", "input is missing"),
            ({"input": []}, "input", "found an empty list"),
            ({"input": 3}, "input", "found 3"),
            ({"input": ["w1", 3.5]}, "input", "input[1]: expected a text"),
            ({"input": ["w1", None]}, "input", "input[1]: expected a text"),
            ({"input": [{"video": "a"}]}, "input", "found an object with 'video'"),
            ({"model": 3}, "model", "model: expected a string, found 3"),
            ({"dimensions": "4"}, "dimensions", "expected a whole number, found '4'"),
            ({"dimensions": True}, "dimensions", "expected a whole number"),
            ({"dimensions": 1e40}, "dimensions", "expected a whole number"),
            ({"encoding_format": "hex"}, "encoding_format", "expected float or base64"),
            ({"truncate": "START"}, "truncate", 'expected true, false, "NONE" or "END"'),
            ({"truncate": []}, "truncate", 'expected true, false, "NONE" or "END"'),
            ({"truncate": True, "truncation": True}, "truncation", "say the same"),
            ({"late_chunking": True}, "late_chunking", "unknown field 'late_chunking'; known are"),
        ],
    )
    def test_each_refusal_names_the_field(
        self, client: Client, fields: dict[str, Any], param: str, said: str
    ) -> None:
        body = {"model": "bundle:code", "input": "w1", **fields}
        error = error_of(client.post(json=body), 400)
        assert said in error["message"]
        assert (error["param"], error["type"]) == (param, "invalid_request_error")

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 5000, b'"\\ud800"'])
    def test_what_is_no_json_object(self, client: Client, body: bytes) -> None:
        response = client.post(content=body, headers={"content-type": "application/json"})
        assert error_of(response, 400)["code"] == "invalid_json"

    def test_pages_of_other_sites_cannot_send_requests(self, client: Client) -> None:
        body = json.dumps({"model": "bundle:code", "input": "w1"})
        response = client.post(content=body, headers={"content-type": "text/plain"})
        error = error_of(response, 415)
        assert error["message"].endswith("Content-Type: application/json, found text/plain")

    def test_other_paths_and_methods(self, client: Client) -> None:
        assert "/v1/embeddings" in error_of(client.get("/v1/nothing"), 404)["message"]
        assert error_of(client.get("/v1/embeddings"), 405)["code"] == "method_not_allowed"

    def test_a_slash_too_many_is_not_sent_elsewhere(self, client: Client) -> None:
        for path in ("/health/", "/v1/embeddings/"):
            response = client.get(path, headers={"host": "elsewhere.example"})
            assert "no path" in error_of(response, 404)["message"]

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "LocalHost.:1"])
    def test_requests_to_this_machine(self, tasks_bundle: TinyBundle, host: str) -> None:
        with served(str(tasks_bundle.path), local=True) as client:
            assert client.get("/v1/models", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize(
        "host", ["evil.example", "localhost.evil.example:8000", "10.0.0.1", ""]
    )
    def test_a_page_cannot_reach_this_machine_by_a_name_of_its_own(
        self, tasks_bundle: TinyBundle, host: str
    ) -> None:
        headers = {"host": host}
        body = {"model": "bundle:code", "input": "w1"}
        with served(str(tasks_bundle.path), local=True) as client:
            for response in (
                client.post(json=body, headers=headers),
                client.get("/metrics", headers=headers),
            ):
                assert "Host to be localhost" in error_of(response, 403)["message"]
            assert client.get("/health", headers=headers).status_code == 200

    def test_models(self, client: Client) -> None:
        listed = client.get("/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["bundle", "bundle:retrieval", "bundle:code"]
        assert listed[2]["embedge"]["dim"] == DIM
        assert client.get("/v1/models/bundle@fp32:code").json()["embedge"]["task"] == "code"
        error_of(client.get("/v1/models/other"), 404)

    def test_health_and_readiness(self, client: Client) -> None:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").json() == {"status": "ready"}

    def test_metrics(self, tasks_bundle: TinyBundle) -> None:
        with served(str(tasks_bundle.path)) as client:
            client.embed("w1 w2", "bundle:code")
            client.embed("w1 w2", "other")
            lines = client.get("/metrics").text.splitlines()
        where = 'model="bundle",precision="fp32",task="code"'
        assert f"embedge_tokens_total{{{where}}} 4.0" in lines
        assert f"embedge_inputs_total{{{where}}} 1.0" in lines
        for status in (200, 404):
            counted = f'embedge_requests_total{{path="/v1/embeddings",status="{status}"}} 1.0'
            assert counted in lines
        assert "embedge_queued_tokens 0.0" in lines

    def test_metrics_are_named_as_prometheus_has_it(self, tasks_bundle: TinyBundle) -> None:
        """https://prometheus.io/docs/practices/naming, what `promtool check metrics` holds names to."""
        parser = pytest.importorskip("prometheus_client.parser")
        with served(str(tasks_bundle.path)) as client:
            client.embed("w1 w2", "bundle:code")
            families = list(parser.text_string_to_metric_families(client.get("/metrics").text))
        own = {family.name: family for family in families if family.name.startswith("embedge_")}
        assert len(own) >= 10
        for name, family in own.items():
            assert re.fullmatch("[a-z_]+", name) and family.documentation.endswith(".")
            assert not re.search("milli|micro|minutes|_ms$|kilo|mega", name)  # base units alone
            ends = {"_total"} if family.type == "counter" else {"_count", "_sum", "_bucket"}
            for sample in family.samples:
                if family.type in ("counter", "histogram"):
                    rest = sample.name.removeprefix(name)
                    assert rest in ends | {"_created"}, sample.name
                assert "le" in sample.labels or not set(sample.labels) & {"id", "user", "input"}
        assert {family.type for family in own.values()} == {"counter", "histogram", "gauge"}


class TestKeys:
    @pytest.mark.parametrize("sent", [None, "Bearer other", "Basic first", "Bearer", "Bearer é"])
    def test_a_request_without_a_key(self, tasks_bundle: TinyBundle, sent: str | None) -> None:
        headers = {} if sent is None else {"authorization": sent.encode()}
        with served(str(tasks_bundle.path), keys=("first", "second")) as client:
            for response in (
                client.post(json={"model": "bundle:code", "input": "w1"}, headers=headers),
                client.get("/v1/models", headers=headers),
                client.get("/metrics", headers=headers),
            ):
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
            assert client.get("/health").status_code == 200

    @pytest.mark.parametrize("key", ["first", "second"])
    def test_any_of_the_keys_opens(self, tasks_bundle: TinyBundle, key: str) -> None:
        with served(str(tasks_bundle.path), keys=("first", "second")) as client:
            headers = {"authorization": f"Bearer {key}"}
            response = client.post(json={"model": "bundle:code", "input": "w1"}, headers=headers)
        assert len(vectors_in(response)) == 1


class TestLimits:
    def test_a_body_that_is_too_large(self, tasks_bundle: TinyBundle) -> None:
        async def in_parts(http: Http) -> Any:
            async def parts() -> Any:
                for _ in range(100):
                    yield b" " * 100

            headers = {"content-type": "application/json"}
            return await http.post("/v1/embeddings", content=parts(), headers=headers)

        with served(str(tasks_bundle.path), max_body=1000) as client:
            error = error_of(client.embed("w1 " * 1000, "bundle:code"), 413)
            assert "at most 1000 bytes" in error["message"]
            error_of(client.run(in_parts), 413)  # of a length that is not told before
            assert len(vectors_in(client.embed("w1", "bundle:code"))) == 1

    def test_inputs_and_tokens_of_a_request(self, tasks_bundle: TinyBundle) -> None:
        with served(str(tasks_bundle.path), max_inputs=3, max_request_tokens=10) as client:
            error = error_of(client.embed(["w1"] * 4, "bundle:code"), 400)
            assert "at most 3, found 4" in error["message"]
            error = error_of(client.embed(["w1 w2"] * 3, "bundle:code"), 400)
            assert "at most 10 tokens, found 12" in error["message"]
            assert len(vectors_in(client.embed(["w1"] * 3, "bundle:code"))) == 3

    def test_the_count_is_looked_at_before_the_inputs(self, tasks_bundle: TinyBundle) -> None:
        with served(str(tasks_bundle.path), max_inputs=3) as client:
            error = error_of(client.embed([None] * 4, "bundle:code"), 400)
            assert "at most 3, found 4" in error["message"]
            [vector] = vectors_in(client.embed([2, *[5] * 9, 3], "bundle:code"))
        assert vector.shape == (DIM,)

    def test_a_prompt_counts_before_each_text(self, tasks_bundle: TinyBundle) -> None:
        with served(str(tasks_bundle.path), max_body=1000) as client:
            error = error_of(client.embed(["w1"] * 50, "bundle:code", prompt="w1 w2 " * 4), 400)
            assert error["param"] == "prompt"
            assert error["message"].startswith(
                "prompt: 24 characters before each of 50 texts make 1300, expected at most 1000"
            )
            assert len(vectors_in(client.embed(["w1"] * 50, "bundle:code", prompt="w1 "))) == 50

    def test_long_prompts_are_read_away_from_the_loop_and_not_kept(
        self, tasks_bundle: TinyBundle
    ) -> None:
        import threading

        with served(str(tasks_bundle.path)) as client:
            [model] = client.service._models
            tokenize, threads = model.embedder.tokenize, set[str]()

            def noted(*arguments: Any, **options: Any) -> Any:
                threads.add(threading.current_thread().name)
                return tokenize(*arguments, **options)

            model.embedder.tokenize = noted  # type: ignore[method-assign]
            response = client.embed(["w1"] * 100, "bundle:code", prompt="w1 " * 50, truncate=True)
            assert len(vectors_in(response)) == 100
            assert model.fingerprints == {}
        assert {name.startswith("embedge-help") for name in threads} == {True}

    def test_a_text_that_cannot_fit_is_refused_unread(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Embedder, "tokenize", None)
        error = error_of(client.embed(["w1", "w1 " * 400], "bundle:code"), 400)
        assert error["message"].startswith("input[1] is longer than the 1024 characters")
        assert error["code"] == "context_length_exceeded"

    def test_a_prompt_that_leaves_no_room_is_refused_unread(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Embedder, "tokenize", None)
        response = client.embed("w1", "bundle:code", prompt="w1 " * 400, truncate=True)
        error = error_of(response, 400)
        assert error["message"].startswith("prompt: expected at most 1024 characters, as the model")
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_no_more_of_a_text_is_read_than_is_kept(
        self, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, side: str
    ) -> None:
        bundle = make_bundle("long")
        bundle.edit(lambda manifest: manifest["tokenizer"].update(truncation_side=side))
        numbers = [number % 60 for number in range(20_000)]
        text = " ".join(f"w{number}" for number in numbers)
        tokenize, lengths = Embedder.tokenize, list[int]()

        def noted(self: Embedder, texts: list[str], **options: Any) -> Any:
            lengths.extend(map(len, texts))
            return tokenize(self, texts, **options)

        with served(str(bundle.path)) as client:
            monkeypatch.setattr(Embedder, "tokenize", noted)
            vectors = vectors_in(client.embed(["w1", text], "long", truncate=True))
        kept = numbers[:14] if side == "right" else numbers[-14:]
        ids = [[2, 5, 3], [2, *(number + 4 for number in kept), 3]]
        expected = [bundle.expected("retrieval", one) for one in ids]
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
        assert max(lengths) == 64 * 16

    @pytest.mark.parametrize("text", ["w1" + " " * 2000 + "w2 " * 20, "w1 " * 9 + "w" * 2000])
    def test_a_text_that_cannot_be_cut_unread_is_refused(self, client: Client, text: str) -> None:
        error = error_of(client.embed(["w1", text], "bundle:code", truncate=True), 400)
        assert error["message"] == (
            f"input[1] has {len(text)} characters, of which 512 make fewer tokens than the model takes; shorten it to "
            "1024 characters"
        )
        assert error["code"] == "context_length_exceeded"
        response = client.embed(["w1", text[:1024]], "bundle:code", truncate=True)
        assert len(vectors_in(response)) == 2

    def test_texts_are_read_until_they_are_too_many(
        self, tasks_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from embedge.runtime.server import api

        monkeypatch.setattr(api, "_GROUP_CHARACTERS", 40)
        texts = [
            f"w{number} w1" for number in range(10, 50)
        ]  # two fit into a group, with 9 for a prompt
        with served(str(tasks_bundle.path)) as client:
            joined = vectors_in(client.embed(texts, "bundle:code"))
            error = error_of(client.embed([*texts[:3], "w1 " * 20], "bundle:code"), 400)
        expected = [
            tasks_bundle.expected("code", [2, number + 4, 5, 3]) for number in range(10, 50)
        ]
        np.testing.assert_allclose(joined, expected, atol=1e-6)
        assert error["message"].startswith("input[3] is longer than the 16 tokens")
        read, tokenize = list[str](), Embedder.tokenize

        def noted(self: Embedder, texts: list[str], **options: Any) -> Any:
            read.extend(texts)
            return tokenize(self, texts, **options)

        with served(str(tasks_bundle.path), max_request_tokens=10) as client:
            monkeypatch.setattr(Embedder, "tokenize", noted)
            error = error_of(client.embed(texts, "bundle:code"), 400)
        assert "at most 10 tokens, found 16 or more; send" in error["message"]
        assert read == texts[:4]

    def test_too_many_requests_at_once(self, tasks_bundle: TinyBundle) -> None:
        async def many(http: Http) -> list[Any]:
            body = {"model": "bundle:code", "input": "w1"}
            return await asyncio.gather(*(http.post("/v1/embeddings", json=body) for _ in range(9)))

        with served(str(tasks_bundle.path), max_requests=2) as client:
            responses = client.run(many)
        statuses = [response.status_code for response in responses]
        assert statuses.count(200) >= 2
        refused = [response for response in responses if response.status_code != 200]
        assert refused
        for response in refused:
            assert error_of(response, 429)["code"] == "rate_limit_exceeded"
            assert 1 <= int(response.headers["retry-after"]) <= 60


EXAMPLES = 60 * int(os.environ.get("EMBEDGE_FUZZ", "1"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = (
    *("model", "input", "task", "input_type", "prompt_name", "prompt", "truncate", "truncation"),
    *("user", "dimensions", "encoding_format", "normalize_embeddings", "multi_vector"),
    *("query", "documents", "top_n", "return_documents"),
)
BODIES = st.fixed_dictionaries(
    {}, optional={name: JSON | st.sampled_from(["bundle:code", "code", "w1"]) for name in FIELDS}
)


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(body=BODIES | JSON, path=st.sampled_from(["/v1/embeddings", "/v1/rerank"]))
def test_any_json_is_answered(client: Client, body: Any, path: str) -> None:
    content = json.dumps(body).encode()
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    if response.status_code == 200:
        assert response.json()["object"] == "list"
    else:
        error = error_of(response, response.status_code)
        assert response.status_code in (400, 404)
        assert error["message"]


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None)
@given(body=st.binary(max_size=200))
def test_any_bytes_are_answered(client: Client, body: bytes) -> None:
    response = client.post(content=body, headers={"content-type": "application/json"})
    assert error_of(response, 400)["message"]
