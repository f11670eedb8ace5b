"""The page model of the examples: what it trains on, what was committed, and what it finds."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

import page_search.model
import torch
from draw_pages import main as draw_pdf
from page_search.evaluate import DIMS, HeldOut, code_search, held_out, matching, ndcg
from page_search.evaluate import page_search as measure
from page_search.model import FEATURES, PageModel, patches, small_size
from page_search.pages import HEIGHT, WIDTH, Page, draw_pages, render
from page_search.questions import ASKED, IMAGE_PROMPT, ask
from page_search.reading import CLASSES, NOTHING, targets
from qwen_vocabulary import write_tokenizer
from search_pages import main as search_pdf
from tokenizers import Tokenizer
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from embedge import Embedder
from embedge.bench.systems.qwen_vl import image_processor_class, vision_features
from embedge.export import export_bundle
from tests.helpers.jina_v4 import Reference

CHECKPOINT = Path(page_search.model.__file__).parent / "checkpoint"
PAGE = Page(
    subject="coffee",
    measure="exports",
    month="May",
    kind="bars",
    places=("Peru", "Chile", "Kenya"),
    values=(20, 70, 40),
    verbs=("rose", "fell", "grew"),
)


def some(count: int, seed: int, *, held_out: bool) -> list[Page]:
    return list(itertools.islice(draw_pages(seed, held_out=held_out), count))


class TestPages:
    def test_no_title_is_in_both(self) -> None:
        trained, kept = (
            {(page.subject, page.measure) for page in some(2000, 1, held_out=held)}
            for held in (False, True)
        )
        assert len(trained) > 500 and len(kept) > 100
        assert not trained & kept

    def test_held_out_words_are_all_trained(self) -> None:
        pages = some(1000, 1, held_out=False)
        trained = {word for page in pages for word in (page.subject, page.measure, *page.places)}
        for page in some(300, 2, held_out=True):
            assert {page.subject, page.measure, *page.places} <= trained

    def test_what_is_written_lies_on_the_sheet(self) -> None:
        for page in some(30, 3, held_out=False):
            image, words = render(page)
            assert image.size == (WIDTH, HEIGHT)
            assert {page.subject, page.measure, page.month, *page.places} <= {w for w, _ in words}
            for word, (left, top, right, bottom) in words:
                assert left >= 0 <= top and right <= WIDTH and bottom <= HEIGHT, (page, word)

    def test_a_feature_names_what_lies_below_it(self) -> None:
        found = targets([("Peru", (0, 28, 56, 56))])
        assert found.shape == (FEATURES, NOTHING + 1)
        assert found[5:7, CLASSES["Peru"]].min() > 0.9
        assert found[[0, 4, 7, 10], NOTHING].min() == 1


class TestQuestions:
    def test_a_page_answers_what_is_asked_of_it(self) -> None:
        draw = random.Random(1)
        for page in some(50, 4, held_out=False):
            for kind in ASKED:
                question = ask(page, draw, kind)
                assert question.answered_by(page), question

    @pytest.mark.parametrize(
        ("kind", "change"),
        [
            ("chart", {"kind": "pie"}),
            ("place", {"places": ("Rome", "Oslo", "Cuba")}),
            ("month", {"month": "June"}),
            ("places", {"places": ("Peru", "Chile", "Cuba")}),
            ("top", {"values": (90, 70, 40)}),
            ("top", {"kind": "text"}),
        ],
    )
    def test_another_page_does_not(self, kind: str, change: dict[str, object]) -> None:
        question = ask(PAGE, random.Random(2), kind)
        other = Page(**{**vars(PAGE), **change})
        assert question.answered_by(PAGE) and not question.answered_by(other)

    def test_what_a_text_says_of_a_place(self) -> None:
        text = Page(**{**vars(PAGE), "kind": "text"})
        question = ask(text, random.Random(3), "move")
        assert question.kind == "move" and question.answered_by(text)
        assert not question.answered_by(Page(**{**vars(text), "verbs": ("held",) * 3}))


def test_ndcg_by_hand() -> None:
    scores = np.array([[3, 2, 1], [1, 2, 3], [1, 2, 3]], np.float32)
    relevant = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 0]], np.bool_)
    expected = [1, 1 / np.log2(4), (1 / np.log2(3) + 1 / 2) / (1 + 1 / np.log2(3))]
    np.testing.assert_allclose(ndcg(scores, relevant), expected, rtol=1e-6)
    np.testing.assert_allclose(ndcg(scores, relevant, k=2)[1:2], [0])


@pytest.mark.slow
class TestTraining:
    def test_patches_are_those_of_transformers(self) -> None:
        images = [render(page)[0] for page in some(2, 5, held_out=False)]
        theirs = image_processor_class()(min_pixels=3136, max_pixels=602112)(
            images, return_tensors="pt"
        )
        assert torch.equal(patches(images).flatten(0, 1), theirs["pixel_values"])

    def test_the_faster_tower_gives_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        size = small_size(300, 22)
        tokens = size.tokens()
        start, end = tokens["vision_start_token_id"], tokens["vision_end_token_id"]
        torch.manual_seed(3)
        model = PageModel(size, [start, *[tokens["image_token_id"]] * FEATURES, end])
        pixels = patches([render(page)[0] for page in some(2, 6, held_out=False)])
        grids = torch.tensor([[1, HEIGHT // 14, WIDTH // 14]] * 2)
        with torch.no_grad():
            expected = vision_features(model.model.visual, pixels.flatten(0, 1), grids)
            for name in ("Qwen2_5_VLVisionAttention", "Qwen2_5_VisionPatchEmbed"):
                kind = getattr(qwen, name)
                monkeypatch.setattr(kind, "forward", kind.forward)  # restored behind the test
            page_search.model.train_faster()
            found = model.features(pixels).flatten(0, 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_the_cut_tokenizer_splits_as_the_whole_one(self, tmp_path: Path) -> None:
        whole, cut = tmp_path / "whole", CHECKPOINT
        whole.mkdir()
        write_tokenizer(whole)
        one, other = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (whole, cut))
        draw = random.Random(7)
        for page in some(100, 7, held_out=True):
            text = f"Query: {ask(page, draw).text}"
            assert one.encode(text).tokens == other.encode(text).tokens
        assert one.encode(IMAGE_PROMPT).tokens == other.encode(IMAGE_PROMPT).tokens


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed model at fp32 and int8."""
    folder = tmp_path_factory.mktemp("pages") / "bundle"
    export_bundle(CHECKPOINT, precisions=["fp32", "int8"], calibration="none", out=folder)
    return folder


@pytest.fixture(scope="module")
def data() -> HeldOut:
    return held_out(60)


@pytest.mark.slow
class TestCommitted:
    def test_vectors_are_torchs(self, bundle: Path) -> None:
        pages = some(4, 8, held_out=True)
        images = [render(page)[0] for page in pages]
        texts = [ask(page, random.Random(4)).text for page in pages]
        for task in ("retrieval", "text-matching", "code"):
            reference = Reference(CHECKPOINT, task=task)
            model = Embedder(bundle, precision="fp32", task=task)
            single, multi = reference.images(images)
            worst = (model.encode_image(images) * single).sum(1).min()
            found = model.encode_image(images, multi_vector=True)
            worst = min(worst, *((a * b).sum(1).min() for a, b in zip(found, multi, strict=True)))
            single, _ = reference.texts(texts, "Query: ")
            worst = min(worst, (model.encode_query(texts) * single).sum(1).min())
            assert worst > 0.99999

    def test_adapters_differ(self, bundle: Path) -> None:
        model = Embedder(bundle, precision="fp32")
        image = [render(PAGE)[0]]
        vectors = [model.encode_image(image, task=task)[0] for task in sorted(model.tasks)]
        cosines = [float(one @ other) for one, other in itertools.combinations(vectors, 2)]
        assert max(cosines) < 0.999

    def test_held_out_pages_are_found(self, bundle: Path, data: HeldOut) -> None:
        exact, int8 = (measure(Embedder(bundle, precision=p), data) for p in ("fp32", "int8"))
        assert exact["multi"] > 0.95
        assert exact["single"][max(DIMS)] > 0.85
        assert exact["multi"] > exact["single"][min(DIMS)]
        assert abs(exact["multi"] - int8["multi"]) < 0.05  # 60 questions: some change places
        assert abs(exact["single"][max(DIMS)] - int8["single"][max(DIMS)]) < 0.05

    def test_adapters_serve_their_tasks(self, bundle: Path) -> None:
        model = Embedder(bundle, precision="fp32")
        assert matching(model, pairs=60)["texts"] > 0.85
        code = [code_search(model, task, titles=20)["single"] for task in ("code", "retrieval")]
        assert code[0] > 0.65 and code[0] > code[1]


@pytest.mark.slow
def test_pages_of_a_pdf_are_searched(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pypdfium2")
    pdf, best = tmp_path / "pages.pdf", tmp_path / "best.png"
    draw_pdf([str(pdf), "--pages", "12"])
    pages = some(12, 9, held_out=True)
    wanted = pages[3]
    question = f"{wanted.subject} {wanted.measure} in {wanted.places[0]}"
    search_pdf([str(bundle), str(pdf), question, "--out", str(best)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == question
    assert all("page 4 (" in line.split(": ")[1].split(",")[0] for line in printed[1:])
    from PIL import Image

    found = np.asarray(Image.open(best), np.float32)
    expected = np.asarray(render(wanted, seed=5)[0], np.float32)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 10  # the PDF holds JPEG
