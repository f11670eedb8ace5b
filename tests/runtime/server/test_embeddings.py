"""``/v1/embeddings``: what is taken, what comes back, and that vectors are the library's."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.runtime import Embedder
from tests.helpers.pictures import picture
from tests.helpers.serving import Client, Http, array_of, error_of, served, vectors_in
from tests.runtime.conftest import MULTI_DIM, MakeBundle, TinyBundle

CODE = {"model": "bundle:code"}


def png_bytes() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture(40, 24)).save(file, "PNG")
    return file.getvalue()


def same(one: Any, other: Any) -> None:
    assert np.asarray(one).dtype == np.float32
    np.testing.assert_array_equal(one, other, strict=True)


def near(one: Any, other: Any) -> None:
    """Float32 products may differ in their last bit with the rows of a batch."""
    np.testing.assert_allclose(one, other, atol=1e-6, rtol=0)


class TestTexts:
    def test_a_text_has_the_vector_that_its_weights_give(
        self, client: Client, tasks_bundle: TinyBundle
    ) -> None:
        [vector] = vectors_in(client.embed("w1 w2", "bundle:code"))
        np.testing.assert_allclose(vector, tasks_bundle.expected("code", [2, 5, 6, 3]), atol=1e-6)

    @pytest.mark.parametrize("encoding", [{}, {"encoding_format": "base64"}])
    def test_texts_keep_their_places_and_are_the_librarys_to_the_bit(
        self, client: Client, tasks_bundle: TinyBundle, encoding: dict[str, str]
    ) -> None:
        texts = [f"w{i} w{i + 1} " * (i % 5 + 1) for i in range(20)]
        response = client.embed(texts, "bundle:code", **encoding)
        same(vectors_in(response), Embedder(tasks_bundle.path, task="code").encode(texts))
        assert response.headers["content-type"] == "application/json"
        answer = response.json()
        assert (answer["object"], answer["model"]) == ("list", "bundle:code")
        assert {one["object"] for one in answer["data"]} == {"embedding"}

    def test_tokens_are_counted_with_their_prompt(self, client: Client) -> None:
        usage = client.embed(["w1", "w2 w3"], "bundle:code", input_type="query").json()["usage"]
        assert usage == {"prompt_tokens": 4 + 5, "total_tokens": 9}

    def test_dimensions(self, client: Client, tasks_bundle: TinyBundle) -> None:
        [vector] = vectors_in(client.embed("w1", "bundle:code", dimensions=4))
        same(vector, Embedder(tasks_bundle.path, task="code").encode("w1", truncate_dim=4))
        error = error_of(client.embed("w1", "bundle:code", dimensions=3), 400)
        assert error["message"] == "dimensions is 3; the bundle has one of 2, 4, 8"
        assert (error["type"], error["param"]) == ("invalid_request_error", "dimensions")

    def test_an_answer_says_of_which_kind_its_vectors_are(
        self, client: Client, tasks_bundle: TinyBundle
    ) -> None:
        model = Embedder(tasks_bundle.path, task="code")
        plain = client.embed("w1", "bundle:code").json()["fingerprint"]
        asked = client.embed("w1", "bundle:code", dimensions=2, input_type="document").json()
        assert plain == model.fingerprint()
        assert asked["fingerprint"] == model.fingerprint(role="document", truncate_dim=2) != plain

    def test_a_text_that_is_too_long_is_refused_unless_it_may_be_cut(
        self, client: Client, tasks_bundle: TinyBundle
    ) -> None:
        long = "w1 " * 40
        error = error_of(client.embed(["w1", long], "bundle:code"), 400)
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith("input[1] is longer than the 16 tokens")
        expected = Embedder(tasks_bundle.path, task="code").encode(long, on_truncate="ignore")
        for cut in ({"truncate": True}, {"truncate": "END"}, {"truncation": True}):
            response = client.embed(long, "bundle:code", **cut)
            same(vectors_in(response)[0], expected)
            assert response.json()["usage"]["prompt_tokens"] == 16
        for whole in ({"truncate": "NONE"}, {"truncate": False}):
            error_of(client.embed(long, "bundle:code", **whole), 400)

    def test_normalize_embeddings(self, make_bundle: MakeBundle) -> None:
        bundle = make_bundle("small", model={"normalize": False})
        with served(str(bundle.path)) as client:
            [vector] = vectors_in(client.embed("w1", "small", normalize_embeddings=True))
        same(vector, Embedder(bundle.path).encode("w1", normalize_embeddings=True))

    def test_a_text_without_tokens_has_no_vector(self, make_bundle: MakeBundle) -> None:
        bundle = make_bundle("bare", special_tokens=False)
        with served(str(bundle.path)) as client:
            error = error_of(client.embed(["w1", " "], "bare"), 400)
            assert error["message"].startswith("input[1] has no tokens")
            error = error_of(client.embed([1, 2], "bare"), 400)
            assert "can be told from another's" in error["message"]

    def test_a_token_that_the_table_lacks_is_named_in_its_place(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from embedge.runtime.sessions.graphs import Graphs

        monkeypatch.setattr(Graphs, "token_rows", lambda self, name: 7)
        error = error_of(client.embed(["w1", "w1 w9"], "bundle:code"), 400)
        assert error["message"].startswith("input[1] has 'w9', a token")


class TestTokenIds:
    def test_ids_of_the_models_tokenizer(self, client: Client, tasks_bundle: TinyBundle) -> None:
        expected = Embedder(tasks_bundle.path, task="code").encode(["w1 w2", "w3"])
        same(vectors_in(client.embed([2, 5, 6, 3], "bundle:code")), expected[:1])
        both = client.embed([[2, 5, 6, 3], [2, 7, 3]], "bundle:code", encoding_format="base64")
        same(vectors_in(both), expected)
        assert both.json()["usage"]["prompt_tokens"] == 7

    def test_ids_of_another_tokenizer_are_refused(self, client: Client) -> None:
        error = error_of(client.embed([[9906, 1917]], "bundle:code"), 400)
        assert "begin with [2] and end with [3]" in error["message"]
        assert "check_embedding_ctx_length=False" in error["message"]

    def test_ids_take_no_prompt(self, client: Client) -> None:
        error = error_of(client.embed([2, 5, 3], "bundle:code", input_type="query"), 400)
        assert 'send "prompt": ""' in error["message"]
        assert vectors_in(client.embed([2, 5, 3], "bundle:code", prompt=""))

    def test_a_model_that_leaves_prompts_out_of_its_pooling_wants_texts(
        self, make_bundle: MakeBundle
    ) -> None:
        prompts = {"query": "w1 "}
        bundle = make_bundle("apart", images=True, prompts=prompts, model={"include_prompt": False})
        with served(str(bundle.path)) as client:
            error = error_of(client.embed([2, 5, 3], "apart", input_type="query"), 400)
            assert error["message"].endswith("leaves out of its pooling; send texts")
            assert len(vectors_in(client.embed([2, 5, 3], "apart"))) == 1

    @pytest.mark.parametrize("ids", [[2, -1, 3], [2, 1 << 40, 3], [2, *[5] * 20, 3], [[]]])
    def test_ids_that_cannot_be(self, client: Client, ids: list[Any]) -> None:
        assert error_of(client.embed(ids, "bundle:code"), 400)["param"] == "input"


class TestImages:
    def test_images_and_texts_in_one_request(
        self, image_client: Client, image_bundle: TinyBundle
    ) -> None:
        image = png_bytes()
        uri = "data:image/png;base64," + base64.b64encode(image).decode()
        parts = [
            "w1",
            {"image": uri},
            {"type": "image_url", "image_url": {"url": uri}},
            {"text": "w2"},
            {"type": "text", "text": "w1"},
        ]
        model = Embedder(image_bundle.path)
        near(
            vectors_in(image_client.embed(parts, "images")),
            model.encode(["w1", image, image, "w2", "w1"]),
        )

    def test_texts_and_images_are_let_in_together(self, image_bundle: TinyBundle) -> None:
        uri = "data:image/png;base64," + base64.b64encode(png_bytes()).decode()
        bundle = str(image_bundle.path)
        with served(bundle, max_queued_tokens=100, max_request_tokens=2000) as client:
            assert len(vectors_in(client.embed(["w1", {"image": uri}], "images"))) == 2
            [model] = client.service._models
            assert {images for images, _ in model.rates} == {False, True}
            error = error_of(client.embed(["w1", {"image": uri}, {"image": uri}], "images"), 400)
            assert "found 2051 (an image counts as 1024)" in error["message"]

    def test_an_image_of_too_many_tokens(self, make_bundle: MakeBundle) -> None:
        pytest.importorskip("PIL")
        bundle = make_bundle("few", images=True, model={"max_length": 8})
        uri = "data:image/png;base64," + base64.b64encode(png_bytes()).decode()
        with served(str(bundle.path)) as client:
            error = error_of(client.embed(["w1", {"image": uri}], "few"), 400)
        assert error["message"].startswith("input[1]: ")
        assert error["message"].endswith("the model takes 8; send it cut, or scaled down")

    def test_what_is_no_image_is_named_in_its_place(self, image_client: Client) -> None:
        uri = "data:image/png;base64," + base64.b64encode(b"no image").decode()
        error = error_of(image_client.embed(["w1", {"image": uri}], "images"), 400)
        assert error["message"].startswith("input[1]: ")
        assert error["param"] == "input"

    @pytest.mark.parametrize(
        ("image", "said"),
        [
            ("https://example.org/a.png", "URLs are not fetched"),
            ("file:///etc/passwd", "URLs are not fetched"),
            ("/etc/passwd", "expected an image as data:image/png;base64,…"),
            ("data:image/png;base64,!!", "not base64"),
            ("data:text/plain;base64,YQ==", "expected an image as"),
        ],
    )
    def test_nothing_is_fetched(self, image_client: Client, image: str, said: str) -> None:
        assert said in error_of(image_client.embed([{"image": image}], "images"), 400)["message"]

    def test_an_image_as_a_text_is_refused(self, image_client: Client) -> None:
        error = error_of(image_client.embed("data:image/png;base64,AAAA", "images"), 400)
        assert '{"image": "data:image/…"}' in error["message"]

    def test_a_model_without_images(self, client: Client) -> None:
        uri = "data:image/png;base64," + base64.b64encode(png_bytes()).decode()
        error = error_of(client.embed([{"image": uri}], "bundle:code"), 400)
        assert error["message"] == "input[0] is an image; bundle embeds: text"


class TestMultiVectors:
    @pytest.mark.parametrize("encoding", ["float", "base64"])
    def test_a_vector_a_token(self, make_bundle: MakeBundle, encoding: str) -> None:
        bundle = make_bundle("multi", multi_vector=True)
        with served(str(bundle.path)) as client:
            response = client.embed(
                ["w1 w2", "w3"], "multi", multi_vector=True, encoding_format=encoding
            )
        expected = Embedder(bundle.path).encode(["w1 w2", "w3"], multi_vector=True)
        shapes = [one.get("shape") for one in response.json()["data"]]
        assert shapes == ([[4, MULTI_DIM], [3, MULTI_DIM]] if encoding == "base64" else [None] * 2)
        for vector, right in zip(vectors_in(response), expected, strict=True):
            same(vector.reshape(right.shape), right)

    def test_a_model_without_such_a_head(self, client: Client) -> None:
        error = error_of(client.embed("w1", "bundle:code", multi_vector=True), 400)
        assert (error["param"], "no multi-vector head" in error["message"]) == (
            "multi_vector",
            True,
        )


class TestManyAtOnce:
    @pytest.mark.slow
    def test_each_of_many_concurrent_requests_gets_its_own_vectors(
        self, client: Client, tasks_bundle: TinyBundle
    ) -> None:
        generator = np.random.default_rng(0)

        def asked(number: int) -> dict[str, Any]:
            words = generator.integers(0, 60, (number % 4 + 1, number % 9 + 1))
            texts = [" ".join(f"w{word}" for word in row) for row in words]
            role = (None, "query", "document")[number % 3]
            task = ("code", "retrieval")[number % 2]
            return {"texts": texts, "role": role, "task": task, "dim": (None, 4)[number // 6 % 2]}

        calls = [asked(number) for number in range(120)]

        async def all_of_them(http: Http) -> list[Any]:
            bodies = [
                {
                    "model": f"bundle:{call['task']}",
                    "input": call["texts"],
                    "input_type": call["role"],
                    "dimensions": call["dim"],
                    "encoding_format": "base64",
                }
                for call in calls
            ]
            posted = (http.post("/v1/embeddings", json=body) for body in bodies)
            return await asyncio.gather(*posted)

        model = Embedder(tasks_bundle.path)
        encode = {
            None: model.encode,
            "query": model.encode_query,
            "document": model.encode_document,
        }
        for call, response in zip(calls, client.run(all_of_them), strict=True):
            expected = encode[call["role"]](
                call["texts"], task=call["task"], truncate_dim=call["dim"]
            )
            near(vectors_in(response), expected)

    def test_integer_products_are_the_same_to_the_bit_in_any_company(
        self, int8_bundle: tuple[Path, Any]
    ) -> None:
        texts = [f"w{word}" for word in range(30)]
        with served(f"int8={int8_bundle[0]}", verify="none") as client:

            async def one_by_one(http: Http) -> list[Any]:
                bodies = ({"model": "int8", "input": text} for text in texts)
                posted = (http.post("/v1/embeddings", json=body) for body in bodies)
                return await asyncio.gather(*posted)

            found = [vectors_in(response)[0] for response in client.run(one_by_one)]
        same(found, Embedder(int8_bundle[0], verify="none").encode(texts))


@pytest.mark.slow  # to import the client
def test_the_openai_client(client: Client, tasks_bundle: TinyBundle) -> None:
    openai = pytest.importorskip("openai")
    import httpx2

    expected = Embedder(tasks_bundle.path, task="code").encode(["w1", "w2 w3"])

    async def scenario(_: Http) -> None:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=client.service.app))
        async with openai.AsyncOpenAI(
            base_url="http://server/v1", api_key="none", http_client=http, max_retries=0
        ) as api:
            create = api.embeddings.create
            [one] = (await create(model="bundle:code", input="w1")).data
            same(array_of(one.embedding), expected[0])
            several = await create(model="bundle:code", input=["w1", "w2 w3"], user="me")
            same([array_of(each.embedding) for each in several.data], expected)
            assert several.usage.total_tokens == 7
            ids = await create(model="bundle:code", input=[[2, 5, 3], [2, 6, 7, 3]])
            same([array_of(each.embedding) for each in ids.data], expected)
            digits = await create(model="bundle:code", input="w1", encoding_format="float")
            same(array_of(digits.data[0].embedding), expected[0])
            short = await create(model="bundle:code", input="w1", dimensions=2)
            assert len(short.data[0].embedding) == 2
            asked = await create(
                model="bundle", input="w1", extra_body={"task": "code", "input_type": "query"}
            )
            assert asked.usage.prompt_tokens == 4
            with pytest.raises(openai.NotFoundError, match="no model 'gpt'; there are bundle"):
                await create(model="gpt", input="w1")
            with pytest.raises(openai.BadRequestError, match="dimensions is 5") as refused:
                await create(model="bundle:code", input="w1", dimensions=5)
            assert refused.value.param == "dimensions"
            listed = [model.id async for model in api.models.list()]
            assert listed == ["bundle", "bundle:retrieval", "bundle:code"]
            assert (await api.models.retrieve("bundle:code")).owned_by == "embedge"

    client.run(scenario)
