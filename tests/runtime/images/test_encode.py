"""Images, and lists of texts and images, through the Embedder."""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from embedge.runtime import (
    BundleError,
    Embedder,
    EmbedgeError,
    EmbedgeImportError,
    EmbedgeValueError,
    ImageError,
)
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.host.onnxruntime import open_session
from embedge.runtime.images import encode as pipeline
from embedge.runtime.images.patches import ImagePatches
from embedge.runtime.sessions.session import GraphSession
from tests.helpers.image_graphs import AROUND, TINY
from tests.helpers.threads import all_ended, workers

CLS, SEP, FIRST_WORD = 2, 3, 4
TOLERANCE = 1e-5  # float32 sums in another order
SIZES = [(8, 8), (4, 4), (16, 8), (8, 16), (12, 20), (8, 8), (4, 64), (28, 24), (5, 9), (8, 8)]


def picture(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    generator = np.random.default_rng([seed, width, height])
    return generator.integers(0, 256, (height, width, 3)).astype(np.uint8)


def pictures() -> list[NDArray[np.uint8]]:
    return [picture(*size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture
def model(with_images: Any) -> Embedder:
    return Embedder(with_images.path)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Graph and shape (images × patches, or rows × tokens) of every run."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    run = GraphSession.run

    def recording(self: GraphSession, output: str, inputs: Any) -> Any:
        main = inputs["pixel_values" if "pixel_values" in inputs else "input_ids"]
        seen.append((self.file.stem, main.shape[:2]))
        return run(self, output, inputs)

    monkeypatch.setattr(GraphSession, "run", recording)
    return seen


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


class TestRuns:
    def test_images_of_one_number_of_patches_share_runs_of_the_vision_tower(
        self, model: Embedder, runs: list[tuple[str, tuple[int, ...]]]
    ) -> None:
        # 16 patches: three of 8 × 8; 32: 16 × 8 and 8 × 16
        images = [picture(*size) for size in ((8, 8), (16, 8), (8, 8), (8, 16), (8, 8), (4, 4))]
        model.encode_image(images, task="code")
        vision = [shape for name, shape in runs if name == "vision"]
        assert sorted(vision) == [(1, 4), (2, 32), (3, 16)]
        assert runs.index(("vision", (1, 4))) < min(
            place for place, (name, _) in enumerate(runs) if name == "code"
        )

    def test_runs_stay_below_the_patch_budget_but_take_one_image(
        self,
        with_images: Any,
        runs: list[tuple[str, tuple[int, ...]]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("embedge.runtime.encode.batch_size.CPU_BATCH_TOKENS_PER_THREAD", 20)
        model = Embedder(with_images.path, threads=2)
        images = [picture(8, 8, seed) for seed in range(5)] + [picture(28, 24)]
        model.encode_image(images, task="code")
        vision = [shape for name, shape in runs if name == "vision"]
        assert sorted(vision) == [(1, 16), (1, 168), (2, 16), (2, 16)]
        tokens = [shape for name, shape in runs if name == "code"]
        assert sum(rows for rows, _ in tokens) == 6
        assert all(rows == 1 or rows * length <= 40 for rows, length in tokens)

    def test_batch_size_bounds_both_graphs(
        self, model: Embedder, runs: list[tuple[str, tuple[int, ...]]]
    ) -> None:
        model.encode_image([picture(8, 8, seed) for seed in range(7)], task="code", batch_size=2)
        assert sum(shape[0] for name, shape in runs if name == "vision") == 7
        assert all(shape[0] <= 2 for _, shape in runs)

    @pytest.mark.parametrize("limit", [1, 700, 1 << 30])
    def test_features_and_patches_are_bounded_whatever_the_windows(
        self,
        model: Embedder,
        runs: list[tuple[str, tuple[int, ...]]],
        monkeypatch: pytest.MonkeyPatch,
        limit: int,
    ) -> None:
        images = pictures()
        expected = model.encode_image(images, task="code")
        runs.clear()
        monkeypatch.setattr(pipeline, "_WINDOW_BYTES", limit)
        monkeypatch.setattr(pipeline, "_CHUNK_BYTES", limit)
        np.testing.assert_allclose(
            model.encode_image(images, task="code"), expected, atol=TOLERANCE, rtol=0
        )
        phases = [name for name, _ in runs]
        turns = sum(a != b for a, b in itertools.pairwise(phases))
        assert {1: turns == 2 * len(images) - 1, 700: turns > 1, 1 << 30: turns == 1}[limit]

    def test_patches_of_two_chunks_are_held_at_most(
        self, model: Embedder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alive: weakref.WeakSet[Any] = weakref.WeakSet()
        most = [0]
        read = pipeline.ImagePipeline._read

        def watched(self: Any, *arguments: Any) -> Any:
            most[0] = max(most[0], len(alive))
            patches = read(self, *arguments)
            alive.add(patches)
            return patches

        monkeypatch.setattr(pipeline.ImagePipeline, "_read", watched)
        monkeypatch.setattr(ImagePatches, "__hash__", object.__hash__)
        monkeypatch.setattr(pipeline, "_CHUNK_BYTES", 3 * 16 * 24 * 4)  # three of 8 × 8
        model.encode_image([picture(8, 8, seed) for seed in range(30)], task="code")
        assert 0 < most[0] < 6  # those of the chunk in the graph, and of the one that is read

    def test_the_next_chunk_is_read_while_the_graph_runs(
        self, model: Embedder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[int] = []
        changed = threading.Condition()
        original = pipeline.ImagePipeline._read

        def watched(self: Any, image: Any, index: int, *arguments: Any) -> Any:
            with changed:
                read.append(index)
                changed.notify_all()
            return original(self, image, index, *arguments)

        run = GraphSession.run
        looked = [0]

        def waiting(self: GraphSession, output: str, inputs: Any) -> Any:
            if "pixel_values" in inputs:
                looked[0] += 1
                with changed:
                    assert changed.wait_for(lambda: len(read) > min(looked[0], 4), timeout=10)
                    assert len(read) <= looked[0] + 1
            return run(self, output, inputs)

        monkeypatch.setattr(pipeline.ImagePipeline, "_read", watched)
        monkeypatch.setattr(GraphSession, "run", waiting)
        monkeypatch.setattr(pipeline, "_CHUNK_BYTES", 1)  # an image each
        vectors = model.encode_image([picture(8, 8, seed) for seed in range(5)], task="code")
        assert read == [0, 1, 2, 3, 4]
        assert looked == [5]
        assert np.abs(vectors).max(axis=1).min() > 0

    def test_a_bad_image_of_a_later_chunk_is_named_and_leaves_no_thread(
        self, model: Embedder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipeline, "_CHUNK_BYTES", 1)
        images: list[Any] = [picture(8, 8, seed) for seed in range(4)]
        images[2] = b"not an image"
        before = workers()
        with pytest.raises(ImageError, match=r"images\[2\]: expected an image file") as caught:
            model.encode_image(images, task="code")
        assert caught.value.index == 2
        assert all_ended(before)

    def test_threads_give_what_each_image_gives_alone(self, make_bundle: Any) -> None:
        constants = {"a": {"dtype": "uint8", "full": 128, "reduced": 64}}
        precisions = {"int8": {"activation_constants": constants}}
        tiny = make_bundle("integer", images=True, precisions=precisions)
        images = pictures()
        vectors = Embedder(tiny.path, threads=3).encode_image(images)
        for vector, image in zip(vectors, images, strict=True):
            expected, _ = tiny.of_image("retrieval", image)
            np.testing.assert_allclose(vector, expected, atol=TOLERANCE, rtol=0)

    def test_two_threads_share_both_graphs_under_a_limit_for_one(self, with_images: Any) -> None:
        model = Embedder(with_images.path, max_sessions=1)
        images = pictures()
        expected = model.encode_image(images, task="code")
        failures: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(5):
                    vectors = model.encode([*images, "w1"], task="code")[:-1]
                    np.testing.assert_allclose(vectors, expected, atol=TOLERANCE, rtol=0)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        assert failures == []


class TestLowMemory:
    def test_the_vision_tower_is_closed_before_the_tasks_graph_opens(
        self, with_images: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = Bundle(with_images.path)
        sizes = {name: bundle.graph_bytes("fp32", name) for name in ("vision", "code")}
        alive: weakref.WeakSet[GraphSession] = weakref.WeakSet()
        opened: list[tuple[str, list[str]]] = []
        init = GraphSession.__init__

        def opening(file: str, *options: Any) -> Any:
            opened.append((Path(file).stem, [session.file.stem for session in alive]))
            return open_session(file, *options)

        def recording(self: GraphSession, *arguments: Any, **options: Any) -> None:
            init(self, *arguments, **options)
            alive.add(self)

        monkeypatch.setattr("embedge.runtime.sessions.session.open_session", opening)

        monkeypatch.setattr(GraphSession, "__init__", recording)
        monkeypatch.setattr(pipeline, "_WINDOW_BYTES", 1)
        monkeypatch.setattr(pipeline, "_CHUNK_BYTES", 1)
        model = Embedder(with_images.path, memory_limit=max(sizes.values()))
        images = pictures()[:2]
        vectors = model.encode([*images, "w1"], task="code")
        # One session at a time, and the text finds the task's graph open.
        assert opened == [("vision", []), ("code", []), ("vision", []), ("code", [])]
        np.testing.assert_allclose(
            vectors, Embedder(with_images.path).encode([*images, "w1"], task="code"), atol=TOLERANCE
        )

    def test_a_limit_below_the_vision_tower_is_refused_with_its_size(
        self, with_images: Any
    ) -> None:
        size = Bundle(with_images.path).graph_bytes("fp32", "vision")
        model = Embedder(with_images.path, memory_limit=size - 1)
        with pytest.raises(EmbedgeError, match=rf"'vision' and its weights take {size} bytes"):
            model.encode_image(picture(8, 8), task="code")


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
            ({"max_pixels": 0}, "max_pixels: expected a positive"),
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
