"""Images, and lists of texts and images, through the Embedder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedge.runtime import (
    BundleError,
    Embedder,
    EmbedgeImportError,
    EmbedgeValueError,
    ImageError,
)
from tests.helpers.image_graphs import AROUND, TINY
from tests.helpers.pictures import picture, pictures

CLS, SEP, FIRST_WORD = 2, 3, 4
TOLERANCE = 1e-5  # float32 sums in another order


class TestResult:
    def test_vectors_are_those_of_the_graphs_in_the_images_order(
        self, with_images: Any, model: Embedder
    ) -> None:
        images = pictures()
        vectors = model.encode_image(images, task="code")
        assert vectors.dtype == np.float32
        assert vectors.shape == (len(images), 8)
        for vector, image in zip(vectors, images, strict=True):
            expected, _ = with_images.of_image("code", image)
            np.testing.assert_allclose(vector, expected, atol=TOLERANCE, rtol=0)

    def test_multi_vectors_have_a_row_for_every_token(
        self, with_images: Any, model: Embedder
    ) -> None:
        images = pictures()
        parts = model.encode_image(images, task="retrieval", multi_vector=True)
        for part, image in zip(parts, images, strict=True):
            _, expected = with_images.of_image("retrieval", image)
            assert part.shape == expected.shape
            np.testing.assert_allclose(part, expected, atol=TOLERANCE, rtol=0)
        assert parts[0].shape == (AROUND + 4, 4)

    def test_texts_and_images_share_a_list(self, with_images: Any, model: Embedder) -> None:
        images = pictures()
        mixed: list[Any] = []
        for index, image in enumerate(images):
            mixed += [f"w{index}", image]
        vectors = model.encode(mixed, task="retrieval")
        np.testing.assert_allclose(
            vectors[1::2],
            model.encode_image(images, task="retrieval"),
            atol=TOLERANCE,
            rtol=0,
        )
        for index, vector in enumerate(vectors[::2]):
            words = [CLS, FIRST_WORD + 60, FIRST_WORD + index, SEP]  # with the prompt "query:"
            expected, _ = with_images.of_text("retrieval", words)
            np.testing.assert_allclose(vector, expected, atol=TOLERANCE, rtol=0)
        parts = model.encode(mixed, task="retrieval", multi_vector=True)
        assert [len(part) for part in parts[:2]] == [4, AROUND + 4]

    def test_every_kind_of_image_gives_the_same_vector(
        self, model: Embedder, tmp_path: Path
    ) -> None:
        array = picture(12, 8)
        path = tmp_path / "page.png"
        Image.fromarray(array).save(path)
        kinds: list[Any] = [path, path.read_bytes(), Image.open(path), array]
        vectors = model.encode([*kinds, "page.png"], task="code")
        for vector in vectors[:4]:
            np.testing.assert_allclose(vector, vectors[0], atol=TOLERANCE, rtol=0)
        assert abs(vectors[4] @ vectors[0]) < 0.999  # a string is a text
        paths = model.encode_image([str(path), path], task="code")
        np.testing.assert_allclose(paths, vectors[:2], atol=TOLERANCE, rtol=0)

    @pytest.mark.parametrize("kind", ["str", "path", "bytes", "picture", "array", "grey"])
    def test_one_image_gives_one_vector(self, model: Embedder, tmp_path: Path, kind: str) -> None:
        array = picture(8, 8)
        path = tmp_path / "page.png"
        Image.fromarray(array).save(path)
        image: Any = {
            "str": str(path),
            "path": path,
            "bytes": path.read_bytes(),
            "picture": Image.fromarray(array),
            "array": array,
            "grey": array[:, :, 0],
        }[kind]
        assert model.encode_image(image, task="code").shape == (8,)
        rows: Any = model.encode_image(image, task="code", multi_vector=True)
        assert rows.shape == (AROUND + 4, 4)
        if kind != "str":
            assert model.encode(image, task="code").shape == (8,)

    def test_an_array_of_four_axes_is_a_list_of_images(self, model: Embedder) -> None:
        images = np.stack([picture(8, 8, seed) for seed in range(3)])
        np.testing.assert_array_equal(
            model.encode_image(images, task="code"), model.encode_image(list(images), task="code")
        )
        assert model.encode(images, task="code").shape == (3, 8)

    def test_no_image_gives_no_vector(self, model: Embedder) -> None:
        assert model.encode_image([], task="code").shape == (0, 8)
        assert model.encode_image([], task="code", truncate_dim=4).shape == (0, 4)
        assert model.encode_image([], task="code", multi_vector=True) == []

    def test_texts_alone_are_as_without_images(self, with_images: Any, model: Embedder) -> None:
        expected, rows = with_images.of_text("code", [CLS, FIRST_WORD, FIRST_WORD + 1, SEP])
        np.testing.assert_allclose(
            model.encode(["w0 w1", "w3"], task="code", prompt="")[0],
            expected,
            atol=TOLERANCE,
            rtol=0,
        )
        part = model.encode("w0 w1", task="code", prompt="", multi_vector=True)
        np.testing.assert_allclose(part, rows, atol=TOLERANCE, rtol=0)

    def test_truncation_and_normalization(self, model: Embedder) -> None:
        image = picture(8, 8)
        full = model.encode_image(image, task="code")
        cut = model.encode_image(image, task="code", truncate_dim=4)
        np.testing.assert_allclose(cut, full[:4] / np.linalg.norm(full[:4]), atol=TOLERANCE)
        with pytest.raises(EmbedgeValueError, match="truncate_dim is for single vectors"):
            model.encode_image(image, task="code", truncate_dim=4, multi_vector=True)

    def test_pixels_are_bounded_by_the_call(self, with_images: Any, model: Embedder) -> None:
        image = picture(16, 12)
        cases: list[tuple[dict[str, Any], int]]
        cases = [({}, 12), ({"max_pixels": 100}, 4), ({"min_pixels": 700}, 48)]
        for pixels, features in cases:
            vector = model.encode_image(image, task="code", **pixels)
            expected, rows = with_images.of_image("code", image, **pixels)
            assert len(rows) == AROUND + features
            np.testing.assert_allclose(vector, expected, atol=TOLERANCE, rtol=0)

    def test_padded_rows_of_a_batch_change_nothing(self, make_bundle: Any) -> None:
        padded = make_bundle("padded", images=True, precisions={"int4": {"row_multiple": 7}})
        model = Embedder(padded.path)
        for image in pictures()[:4]:
            expected, rows = padded.of_image("retrieval", image)
            np.testing.assert_allclose(model.encode_image(image), expected, atol=TOLERANCE, rtol=0)
            multi = model.encode_image(image, multi_vector=True)
            np.testing.assert_allclose(multi, rows, atol=TOLERANCE, rtol=0)

    def test_similarity_of_pages_is_late_interaction(self, model: Embedder) -> None:
        queries = model.encode(["w1", "w2 w3"], task="retrieval", multi_vector=True)
        pages = model.encode_image(pictures()[:3], task="retrieval", multi_vector=True)
        by_hand = [[(q @ p.T).max(axis=1).sum() for p in pages] for q in queries]
        np.testing.assert_allclose(model.similarity(queries, pages), by_hand, rtol=1e-5)


class TestRefusals:
    @pytest.mark.parametrize(
        ("image", "message"),
        [
            ("nowhere.png", r"images\[1\]: nowhere\.png: no such file"),
            ("https://example.org/a.png", r"images\[1\]: .* is a URL"),
            (b"not an image", r"images\[1\]: expected an image file .* found 12 bytes"),
            (np.zeros((0, 4, 3), np.uint8), r"images\[1\]: expected uint8"),
            (np.full((4, 4), 3.0), r"images\[1\]: expected floats from 0 to 1, found 3"),
            (np.zeros((4, 900, 3), np.uint8), r"images\[1\]: .* more than 200 times the other"),
        ],
        ids=["missing", "URL", "no image", "empty", "floats", "long"],
    )
    def test_a_bad_image_is_named_by_its_place(
        self, model: Embedder, image: Any, message: str
    ) -> None:
        with pytest.raises(ImageError, match=message) as caught:
            model.encode_image([picture(8, 8), image], task="code")
        assert caught.value.index == 1
        assert isinstance(caught.value, ValueError)

    def test_in_a_mixed_list_it_is_named_by_its_place_there(
        self, model: Embedder, tmp_path: Path
    ) -> None:
        with pytest.raises(ImageError, match=r"inputs\[2\]: .*x\.png: no such file") as caught:
            model.encode(["w1", picture(8, 8), tmp_path / "x.png"], task="code")
        assert caught.value.index == 2

    def test_more_tokens_than_the_model_takes_is_an_error_that_names_max_pixels(
        self, model: Embedder
    ) -> None:
        with pytest.raises(
            ImageError,
            match=r"images\[0\]: 32 × 36 pixels are 79 tokens, and the model takes 64; lower max_pi",
        ):
            model.encode_image([picture(32, 36)], task="code", max_pixels=10_000)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            ({"prompt_name": "query"}, "images take no prompt"),
            ({"prompt": ""}, "images take no prompt"),
            ({"max_pixels": 0}, "max_pixels is 0; expected a whole number"),
            ({"min_pixels": 100, "max_pixels": 50}, "min_pixels: expected at most"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"truncate_dim": 5}, "truncate_dim is 5; the bundle has one of 4, 8"),
            ({"task": None}, "several tasks"),
            ({"task": "vision"}, "no task 'vision'"),
        ],
        ids=str,
    )
    def test_wrong_options_are_refused_even_without_images(
        self, model: Embedder, call: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(EmbedgeValueError, match=message):
            model.encode_image([], **{"task": "code", **call})

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ([3], r"images\[0\]: expected a path, bytes, a PIL image .*found int"),
            (3, "images: expected an image or a list of images, found int"),
            ({}, "images: expected an image or a list of images, found dict"),
            (None, "images: expected an image or a list of images, found NoneType"),
        ],
    )
    def test_what_is_no_image_is_named(self, model: Embedder, images: Any, message: str) -> None:
        with pytest.raises(EmbedgeValueError, match=message):
            model.encode_image(images, task="code")

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            (["w1", 3], r"inputs\[1\]: expected a string or an image .*found int"),
            (["w1", ["w2"]], r"inputs\[1\]: expected a string or an image .*found list"),
            ({"a": 1}, "inputs: expected a string, an image or a list of them, found dict"),
        ],
    )
    def test_what_is_neither_text_nor_image_is_named(
        self, model: Embedder, inputs: Any, message: str
    ) -> None:
        with pytest.raises(EmbedgeValueError, match=message):
            model.encode(inputs, task="code")

    def test_an_array_of_strings_is_a_list_of_texts(self, model: Embedder) -> None:
        assert model.encode(np.array(["w1", "w2"]), task="code").shape == (2, 8)
        assert model.encode(np.array(["w1", "w2"], object), task="code").shape == (2, 8)

    def test_a_precision_without_the_tower_takes_texts_alone(self, with_images: Any) -> None:
        with_images.edit(lambda m: m["precisions"]["fp32"].update(vision=None))
        model = Embedder(with_images.path)
        assert model.modalities == ("text",)
        assert model.encode(["w1"], task="code").shape == (1, 8)
        with pytest.raises(EmbedgeValueError, match="no vision tower at precision 'fp32'"):
            model.encode_image(picture(8, 8), task="code")
        with pytest.raises(EmbedgeValueError, match=r"inputs\[0\]: expected a string, found nd"):
            model.encode([picture(8, 8)], task="code")

    def test_without_pillow_the_extra_is_named(
        self, model: Embedder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(EmbedgeImportError, match='run: pip install "pillow>='):
            model.encode_image([picture(8, 8)], task="code")

    def test_features_of_another_shape_than_the_manifest_says_are_an_error(
        self, with_images: Any
    ) -> None:
        with_images.edit(lambda m: m["model"]["image"].update(hidden_size=9))
        with pytest.raises(
            BundleError, match=r"vision\.onnx: expected features of shape \[1, 4, 9"
        ):
            Embedder(with_images.path).encode_image(picture(8, 8), task="code")


class TestFacts:
    def test_what_it_takes(self, model: Embedder, bundle: Any) -> None:
        assert model.modalities == ("text", "image")
        assert model.tasks == ("retrieval", "code")
        assert Embedder(bundle.path).modalities == ("text",)

    def test_a_progress_bar_counts_the_images(
        self, model: Embedder, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model.encode_image(pictures()[:3], task="code", show_progress_bar=True)
        err = capsys.readouterr().err
        assert "3/3" in err
        assert "image/s" in err

    def test_max_length_of_the_tiny_bundle_fits_its_images(self, with_images: Any) -> None:
        assert TINY.max_pixels // TINY.factor**2 + AROUND <= 64
