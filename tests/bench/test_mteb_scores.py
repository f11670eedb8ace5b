"""mteb itself on a bundle: its scores are what the vectors are worth."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.bench.mteb_model import EmbedgeEncoder, main, register_model
from embedge.export import export_bundle
from embedge.runtime import Embedder

pytestmark = pytest.mark.slow
needs_mteb = pytest.mark.skipif(find_spec("mteb") is None, reason="mteb is not installed")


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


def local_task(documents: Mapping[str, str], queries: Mapping[str, str]) -> Any:
    """A retrieval task of mteb's whose data are here; a query's document has its id."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    class Local(AbsTaskRetrieval):
        metadata = metadata_of(
            name="LocalRetrieval",
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            main_score="ndcg_at_10",
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
def test_a_registered_bundle_is_a_model_by_name(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    import mteb
    from mteb.models.model_implementations import MODEL_REGISTRY

    documents = {
        f"d{i}": f"{a} {b}" for i, (a, b) in enumerate(zip("abcdef", "bdface", strict=True))
    }
    queries = {name: text[:1] for name, text in documents.items()}
    name = register_model(bundle, "int8", name="me/tiny", truncate_dim=16)
    monkeypatch.setitem(MODEL_REGISTRY, name, MODEL_REGISTRY[name])  # gone after the test
    model = mteb.get_model(name)
    result = mteb.evaluate(
        model, local_task(documents, queries), cache=mteb.ResultCache(tmp_path / "scores")
    )
    embedder = Embedder(bundle, precision="int8")
    table = embedder.similarity(
        embedder.encode_query(list(queries.values()), task="retrieval", truncate_dim=16),
        embedder.encode_document(list(documents.values()), task="retrieval", truncate_dim=16),
    )
    [of_task] = result.task_results
    assert of_task.get_score() == pytest.approx(own_ndcg(table), abs=1e-4)
    assert model.mteb_model_meta.name == name == "me/tiny"
    assert register_model(bundle, "int8") == "embedge/tiny-int8"
    MODEL_REGISTRY.pop("embedge/tiny-int8")


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
