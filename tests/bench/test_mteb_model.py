"""What a bundle does for mteb: which task and prompt, which scores."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.bench import mteb_model
from embedge.bench.errors import BenchArgumentError
from embedge.bench.mteb_model import EmbedgeEncoder, bundle_task, main
from embedge.export import export_bundle
from embedge.runtime import Embedder

pytestmark = pytest.mark.slow

ALL = ("retrieval", "text-matching", "code")


class PromptType(Enum):
    query = "query"
    document = "document"


@dataclass
class Metadata:
    type: str
    name: str = "Something"
    domains: Sequence[str] | None = None
    eval_langs: Sequence[str] | Mapping[str, Sequence[str]] = ("eng-Latn",)


class FakeEmbedder:
    """Writes down its calls; a vector is the text's length."""

    tasks: tuple[str, ...] = ALL

    def __init__(self, bundle: object, **options: Any) -> None:
        self.calls: list[tuple[str, list[Any], dict[str, Any]]] = []

    def _record(self, method: str, items: list[Any], options: dict[str, Any]) -> Any:
        self.calls.append((method, items, options))
        if options["multi_vector"]:
            return [np.full((2 + i, 3), i, np.float32) for i in range(len(items))]
        return np.array([[len(str(item)), 1] for item in items], np.float32)

    def encode(self, items: list[Any], **options: Any) -> Any:
        return self._record("encode", items, options)

    def encode_query(self, items: list[Any], **options: Any) -> Any:
        return self._record("encode_query", items, options)

    def encode_document(self, items: list[Any], **options: Any) -> Any:
        return self._record("encode_document", items, options)

    def encode_image(self, items: list[Any], **options: Any) -> Any:
        return self._record("encode_image", items, options)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mteb_model, "Embedder", FakeEmbedder)


def only_call(encoder: EmbedgeEncoder) -> tuple[str, list[Any], dict[str, Any]]:
    [call] = encoder.embedder.calls  # type: ignore[attr-defined]
    return call


@pytest.mark.parametrize(
    ("metadata", "prompt_type", "method", "task"),
    [
        (Metadata("Retrieval"), PromptType.query, "encode_query", "retrieval"),
        (Metadata("Retrieval"), PromptType.document, "encode_document", "retrieval"),
        (Metadata("Reranking"), PromptType.document, "encode_document", "retrieval"),
        (Metadata("DocumentUnderstanding"), PromptType.query, "encode_query", "retrieval"),
        (Metadata("Clustering"), None, "encode_query", "retrieval"),
        (Metadata("STS"), None, "encode", "text-matching"),
        (Metadata("PairClassification"), None, "encode", "text-matching"),
        (Metadata("Retrieval", domains=["Programming"]), PromptType.query, "encode_query", "code"),
        (
            Metadata("Retrieval", eval_langs=["eng-Latn", "python-Code"]),
            PromptType.document,
            "encode_document",
            "code",
        ),
        (
            Metadata("Retrieval", eval_langs={"go": ["eng-Latn", "go-Code"]}),
            PromptType.query,
            "encode_query",
            "code",
        ),
        (Metadata("STS", domains=["Programming"]), None, "encode_query", "code"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_task_and_prompt(
    metadata: Metadata, prompt_type: PromptType | None, method: str, task: str
) -> None:
    encoder = EmbedgeEncoder("bundle", "int8", truncate_dim=128)
    batches = [{"text": ["a", "bcd"]}, {"text": ["ef"], "id": ["3"]}]

    vectors = encoder.encode(batches, task_metadata=metadata, prompt_type=prompt_type, batch_size=7)

    called, items, options = only_call(encoder)
    assert (called, items, options["task"]) == (method, ["a", "bcd", "ef"], task)
    assert (options["truncate_dim"], options["batch_size"]) == (128, 7)
    assert vectors[:, 0].tolist() == [1, 3, 2]


@pytest.mark.usefixtures("fake")
def test_pages_are_images_of_retrieval_a_batch_at_a_time() -> None:
    encoder = EmbedgeEncoder("bundle", max_pixels=1000)
    batches = [{"image": ["page one", "two"], "id": ["1", "2"]}, {"image": ["three"]}]

    vectors = encoder.encode(
        batches, task_metadata=Metadata("DocumentUnderstanding"), prompt_type=PromptType.document
    )

    calls = encoder.embedder.calls  # type: ignore[attr-defined]
    assert [(method, items) for method, items, _ in calls] == [
        ("encode_image", ["page one", "two"]),
        ("encode_image", ["three"]),
    ]
    assert all(o["max_pixels"] == 1000 and o["task"] == "retrieval" for _, _, o in calls)
    assert vectors[:, 0].tolist() == [8, 3, 5]


@pytest.mark.usefixtures("fake")
def test_multi_vectors_stay_a_list() -> None:
    encoder = EmbedgeEncoder("bundle", multi_vector=True)

    vectors = encoder.encode(
        [{"image": ["a", "b"]}, {"image": ["c"]}],
        task_metadata=Metadata("DocumentUnderstanding"),
        prompt_type=PromptType.document,
    )

    assert [each.shape for each in vectors] == [(2, 3), (3, 3), (2, 3)]
    with pytest.raises(BenchArgumentError, match="leave multi_vector out"):
        encoder.encode([{"text": ["a"]}], task_metadata=Metadata("STS"))


@pytest.mark.parametrize("batch", [{"text": ["a"], "image": ["b"]}, {"audio": ["c"]}])
@pytest.mark.usefixtures("fake")
def test_rows_of_anything_else_are_refused_by_their_columns(batch: dict[str, list[str]]) -> None:
    with pytest.raises(BenchArgumentError, match=f"found the columns {', '.join(batch)}"):
        EmbedgeEncoder("bundle").encode([batch], task_metadata=Metadata("Retrieval"))


def test_a_bundle_with_one_task_uses_it() -> None:
    assert bundle_task(Metadata("STS"), ["plain"]) == "plain"


def test_a_task_that_is_not_there_is_an_error_with_those_that_are() -> None:
    metadata = Metadata("STS", name="STSBenchmark")

    with pytest.raises(BenchArgumentError) as found:
        bundle_task(metadata, ["retrieval", "code"])

    assert str(found.value) == (
        "mteb's STSBenchmark (STS) needs the task 'text-matching'; the bundle has: retrieval, code"
    )


@pytest.fixture(scope="module")
def bundle(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapters: dict[str, Any] = {"retrieval": adapter, "text-matching": None}
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    options: dict[str, Any] = {"precisions": ["int8"], "calibration": "none"}
    return Path(export_bundle(model, adapters=adapters, out=out, **options))


def test_similarities_are_the_embedders(bundle: Path) -> None:
    encoder = EmbedgeEncoder(bundle, "int8")
    vectors = encoder.embedder.encode(["abc", "bcd", "xyz"], task="retrieval")

    table = encoder.similarity(vectors, vectors)

    np.testing.assert_array_equal(table, encoder.embedder.similarity(vectors, vectors))
    pairwise = encoder.similarity_pairwise(vectors, vectors[::-1])
    np.testing.assert_allclose(pairwise, np.diag(table[:, ::-1]), atol=1e-6)
    rows = [np.stack([a, b]) for a, b in zip(vectors, vectors[::-1], strict=True)]
    multi = encoder.similarity_pairwise(rows, rows[::-1])
    np.testing.assert_allclose(multi, np.diag(encoder.similarity(rows, rows[::-1])), atol=1e-6)


def test_without_mteb_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(mteb_model, "find_spec", lambda name: None)

    assert main(["bundle", "--tasks", "SciFact", "--out", str(tmp_path)]) == 1
    assert 'pip install "mteb>=' in capsys.readouterr().err


# -- mteb itself --------------------------------------------------------------------------------------

needs_mteb = pytest.mark.skipif(find_spec("mteb") is None, reason="mteb is not installed")


def local_task(documents: Mapping[str, str], queries: Mapping[str, str]) -> Any:
    """A retrieval task of mteb's whose data are here; a query's document has its id."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalRetrieval",
            description="Random words.",
            reference=None,
            dataset={"path": "local/none", "revision": "1"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

        def load_data(self, **options: Any) -> None:
            self.corpus = {"test": {k: {"text": v} for k, v in documents.items()}}
            self.queries = {"test": dict(queries)}
            self.relevant_docs = {"test": {name: {name: 1} for name in queries}}
            self.convert_v1_dataset_format_to_v2(None)
            self.data_loaded = True

    return Local()


def own_ndcg(table: np.ndarray) -> float:
    """nDCG@10 where the one relevant document of row i is column i."""
    ranks = (table > np.diag(table)[:, None]).sum(axis=1)
    return float(np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean())


@needs_mteb
@pytest.mark.filterwarnings("default")
def test_mteb_scores_what_the_vectors_are_worth(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    import mteb

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijk"), 3)) for _ in range(40)]
    texts = [" ".join(rng.choice(words, 5)) for _ in range(30)]
    documents = {f"d{i}": text for i, text in enumerate(texts)}
    queries = {f"d{i}": " ".join(texts[i].split()[1:4]) for i in range(20)}
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [local_task(documents, queries)])
    embedder = Embedder(bundle, precision="int8")
    table = embedder.similarity(
        embedder.encode_query(list(queries.values()), task="retrieval"),
        embedder.encode_document(texts, task="retrieval"),
    )
    expected = own_ndcg(table)
    assert 0.2 < expected < 0.99  # otherwise nothing could go wrong
    out = tmp_path / "scores"

    status = main([str(bundle), "--tasks", "LocalRetrieval", "--out", str(out)])

    assert status == 0
    printed = capsys.readouterr().out.split()
    assert printed[:2] == ["LocalRetrieval", "ndcg_at_10"]
    assert float(printed[2]) == pytest.approx(100 * expected, abs=0.01)
    assert list(out.rglob("LocalRetrieval.json"))


@needs_mteb
@pytest.mark.filterwarnings("default")
def test_mteb_takes_multi_vectors(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    import mteb

    texts = {f"d{i}": f"{a}{b}" for i, (a, b) in enumerate(zip("abcdef", "bdfaec", strict=True))}
    rng = np.random.default_rng(0)
    rows = {
        text: rng.standard_normal((2 + i, 8), np.float32) for i, text in enumerate(texts.values())
    }
    encoder = EmbedgeEncoder(bundle, "int8", multi_vector=True)
    for method in ("encode_query", "encode_document"):
        monkeypatch.setattr(encoder.embedder, method, lambda found, **_: [rows[t] for t in found])

    results = mteb.evaluate(encoder, local_task(texts, texts), cache=None, show_progress_bar=False)

    table = encoder.similarity(list(rows.values()), list(rows.values()))
    assert results.task_results[0].get_score() == pytest.approx(own_ndcg(table), abs=1e-4)


# -- pages and pairs, on a bundle of texts and images ---------------------------------------------------


def metadata_of(**changes: Any) -> Any:
    """mteb's description of a task of our own."""
    from mteb.abstasks.task_metadata import TaskMetadata

    unknown = dict.fromkeys(
        ("date", "domains", "task_subtypes", "license", "annotations_creators", "dialect",
         "sample_creation", "bibtex_citation", "reference")
    )  # fmt: skip
    fields = {
        "description": "Random weights.",
        "dataset": {"path": "local/none", "revision": "1"},
        "eval_splits": ["test"],
        "eval_langs": ["eng-Latn"],
        **unknown,
        **changes,
    }
    return TaskMetadata(**fields)


@pytest.fixture(scope="module")
def pages_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random jina-embeddings-v4 of few words, whose ranks are neither all right nor all wrong."""
    from random_jina_v4 import write_checkpoint

    folder = tmp_path_factory.mktemp("pages")
    source = write_checkpoint(folder / "model", "short", seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the adapters name another base
        return export_bundle(source, precisions=["fp32"], calibration="none", out=folder / "bundle")


@pytest.fixture
def quiet_mteb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    import mteb

    return mteb


@needs_mteb
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("multi_vector", [True, False])
def test_mteb_ranks_pages_by_either_kind_of_vector(
    pages_bundle: Path, quiet_mteb: Any, multi_vector: bool
) -> None:
    """A task of the kind of ViDoRe's: queries are texts, documents are page images."""
    from datasets import Dataset
    from datasets import Image as ImageColumn
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from PIL import Image, ImageDraw

    pages = []
    for number in range(12):
        page = Image.new("RGB", (120 + 9 * number, 160), (255, 255 - 12 * number, 230))
        ImageDraw.Draw(page).text((8, 10 + 9 * number), f"page {number} " * 3, fill=(0, 0, 0))
        pages.append(page)
    queries = [f"what does page {number} say?" for number in range(8)]

    class Pages(AbsTaskRetrieval):
        metadata = metadata_of(
            name="LocalPages",
            type="DocumentUnderstanding",
            category="t2i",
            modalities=["text", "image"],
            main_score="ndcg_at_5",
        )

        def load_data(self, **options: Any) -> None:
            corpus = Dataset.from_dict(
                {"id": [f"p{i}" for i in range(12)], "image": pages}
            ).cast_column("image", ImageColumn())
            asked = Dataset.from_dict({"id": [f"q{i}" for i in range(8)], "text": queries})
            self.corpus, self.queries = {"test": corpus}, {"test": asked}
            self.relevant_docs = {"test": {f"q{i}": {f"p{i}": 1} for i in range(8)}}
            self.convert_v1_dataset_format_to_v2(None)
            self.data_loaded = True

    encoder = EmbedgeEncoder(pages_bundle, "fp32", multi_vector=multi_vector)
    result = quiet_mteb.evaluate(encoder, Pages(), cache=None, show_progress_bar=False)

    options: dict[str, Any] = {"task": "retrieval", "multi_vector": multi_vector}
    model = Embedder(pages_bundle)
    asked = model.encode_query(queries, **options)
    table = model.similarity(asked, model.encode_image(pages, **options))
    ranks = (table > np.diag(table)[:, None]).sum(axis=1)
    expected = float(np.where(ranks < 5, 1 / np.log2(ranks + 2), 0).mean())
    assert 0.01 < expected < 0.99  # the ranks decide
    assert result.task_results[0].get_score() == pytest.approx(expected, abs=1e-4)


@needs_mteb
@pytest.mark.filterwarnings("default")
def test_mteb_scores_pairs_by_text_matching(pages_bundle: Path, quiet_mteb: Any) -> None:
    from datasets import Dataset
    from mteb.abstasks.sts import AbsTaskSTS
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijk"), 4)) for _ in range(60)]
    first = [" ".join(rng.choice(words, 6)) for _ in range(40)]
    kept = rng.integers(0, 6, 40)
    second = [
        " ".join([*one.split()[:keep], *rng.choice(words, 6 - keep)])
        for one, keep in zip(first, kept, strict=True)
    ]

    class Pairs(AbsTaskSTS):
        min_score, max_score = 0, 5
        metadata = metadata_of(
            name="LocalPairs",
            type="STS",
            category="t2t",
            modalities=["text"],
            main_score="cosine_spearman",
        )

        def load_data(self, **options: Any) -> None:
            columns = {"sentence1": first, "sentence2": second, "score": kept.astype(float)}
            self.dataset = {"test": Dataset.from_dict(columns)}
            self.data_loaded = True

    encoder = EmbedgeEncoder(pages_bundle, "fp32")
    result = quiet_mteb.evaluate(encoder, Pairs(), cache=None, show_progress_bar=False)

    model = Embedder(pages_bundle)
    scores = {}
    for task in ("text-matching", "retrieval"):
        a, b = (model.encode(texts, task=task) for texts in (first, second))
        scores[task] = spearmanr((a * b).sum(axis=1), kept)[0]
    found = result.task_results[0].get_score()
    assert found == pytest.approx(scores["text-matching"], abs=1e-4)
    assert abs(scores["text-matching"] - scores["retrieval"]) > 1e-3  # another task would be seen
