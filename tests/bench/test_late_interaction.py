"""The bench of late-interaction bundles: every token against sentence-transformers, orders by MaxSim."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers

from embedge.bench import BenchOptions, Report, run_bench
from embedge.bench.errors import BenchArgumentError, BenchError
from embedge.bench.measure.multi_vector import multi_vectors, multi_vectors_against
from embedge.bench.measure.task import TaskData
from embedge.bench.measure.texts import EvalSet, Text
from embedge.bench.options import Profile, Shape
from embedge.bench.report.record import record
from embedge.bench.report.write import write_report
from embedge.bench.systems import multi_vector
from embedge.bench.systems.multi_vector import Rows, Scores
from embedge.bench.systems.source import Source
from embedge.export import export_bundle
from embedge.runtime import Embedder
from tests.helpers.late_models import write_pylate
from tests.helpers.models import linears, save_adapter

needs_native = pytest.mark.skipif(
    not hasattr(sentence_transformers, "MultiVectorEncoder"), reason="needs sentence-transformers 6"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*the tokenizer has no token for")
SMALL = Profile(texts=16, rows=None, rounds=1, singles=2, invariance=4, process_repeats=1)
WORDS = ("river", "stone", "cloud", "forest", "candle", "mirror", "garden", "winter", "bridge")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pylate(tmp_path_factory.mktemp("late") / "source", "bert")


@pytest.fixture(scope="module")
def adapter(source: Path) -> Path:
    return save_adapter(source, source.parent / "adapter", target=linears("bert"))


@pytest.fixture(scope="module")
def bundle(source: Path, adapter: Path) -> Path:
    return export_bundle(
        source,
        adapters={"plain": None, "mine": adapter},
        precisions=["fp32", "int8"],
        out=source.parent / "bundle",
    )


@pytest.fixture(scope="module")
def labelled(source: Path) -> tuple[Path, Path]:
    found, graded = source.parent / "found.jsonl", source.parent / "graded.jsonl"
    rows = [{"query": word, "passage": f"a {word} by the {word}"} for word in WORDS]
    found.write_text("\n".join(map(json.dumps, rows)))
    pairs = [
        {"text1": one, "text2": WORDS[-number], "score": number % 4}
        for number, one in enumerate(WORDS)
    ]
    graded.write_text("\n".join(map(json.dumps, pairs)))
    return found, graded


@pytest.fixture(scope="module")
def measured(bundle: Path, source: Path, adapter: Path, labelled: tuple[Path, Path]) -> Report:
    return run_bench(
        BenchOptions(
            bundle=bundle,
            reference=source,
            adapters={"mine": adapter},
            evaluations=[("mine", file) for file in labelled],
            threads=1,
            profile=SMALL,
        )
    )


@needs_native
@pytest.mark.slow
def test_every_token_is_compared_with_the_adapter_unmerged(measured: Report) -> None:
    systems = ["torch fp32", "embedge fp32", "embedge int8"]
    assert [(row.task, row.system) for row in measured.rows] == [
        (task, system) for task in ("plain", "mine") for system in systems
    ]
    for row in measured.rows:
        least = 0.9 if row.precision == "int8" else 0.999999
        assert list(row.fidelity) == ["16"]
        assert 1.0000001 >= row.full_fidelity["cosine_mean"] >= row.full_fidelity["cosine_min"]
        assert row.full_fidelity["cosine_min"] >= least
        assert row.full_fidelity["top10_overlap"] >= (0.5 if row.precision == "int8" else 0.99)
        assert row.fidelity_by_kind["all as queries"]["texts"] == 16
        assert row.single["p50_ms"] > 0
        assert not row.shapes
    exact, int8 = (measured.row("mine", f"embedge {p}") for p in ("fp32", "int8"))
    assert exact is not None
    assert int8 is not None
    assert int8.full_fidelity["cosine_mean"] < exact.full_fidelity["cosine_mean"]
    assert int8.invariance["cosine_min"] >= 0.999999


@needs_native
@pytest.mark.slow
def test_quality_is_that_of_maxsim(
    measured: Report, source: Path, labelled: tuple[Path, Path]
) -> None:
    row = measured.row("mine", "embedge fp32")
    assert row is not None
    assert list(row.quality) == ["found", "graded"]
    for figures in row.quality.values():
        at = figures["dims"]["16"]
        assert at["value"] == pytest.approx(at["reference"], abs=1e-6)
        assert at["low"] <= at["difference"] <= at["high"]
    # of the bare backbone, by its own vectors and by hand
    plain = multi_vector.native_class()(str(source), device="cpu")
    passages = [f"a {word} by the {word}" for word in WORDS]
    queries = plain.encode_query(list(WORDS), convert_to_numpy=True)
    documents = plain.encode_document(passages, convert_to_numpy=True)
    gains = []
    for number, query in enumerate(queries):
        scores = [(query @ document.T).max(1).sum() for document in documents]
        rank = 1 + sum(score > scores[number] for score in scores)
        gains.append(1 / np.log2(1 + rank))
    reference = multi_vector.MultiVectorReference(
        Source(path=source, transformer=source, pooling="none")
    )
    evaluation = EvalSet(name="found", first=WORDS, second=tuple(passages))
    data = TaskData(texts=[Text(text=word) for word in WORDS], evaluations=[evaluation], dims=[16])
    found = multi_vectors(reference, data).qualities["found"]
    assert found.value == pytest.approx(np.mean(gains), abs=1e-9)


@needs_native
@pytest.mark.slow
def test_a_report_is_written_and_recorded(measured: Report, bundle: Path, tmp_path: Path) -> None:
    files = write_report(measured, tmp_path / "report")
    text = files[1].read_text("utf-8")
    assert "all as documents" in text
    assert "late interaction: cosines are of the vectors of all tokens" in text
    assert measured.process["embedge int8"]["first_vector_ms"] > 0
    assert measured.process["torch fp32"]["first_vector_ms"] > 0
    record(measured, bundle)
    model = Embedder(bundle, precision="auto", min_cosine=0.9)
    assert model.precision == "int8"


class _Constant:
    """Gives rows of one kind, and scores by their first channel."""

    name = "constant"
    role = "embedge"
    precision: str | None = "fp32"
    bytes_on_disk: int | None = 0

    def __init__(self, tokens: int = 3, sign: float = 1.0) -> None:
        self._tokens = tokens
        self._sign = sign

    def encode(self, texts: Sequence[str], batch_size: int = 32, role: str | None = None) -> Rows:
        tokens = self._tokens if role == "document" else 3
        return [np.full((tokens, 4), self._sign * len(text), np.float32) for text in texts]

    def scores(self, queries: Rows, documents: Rows) -> Scores:
        return np.array([[q[0, 0] * d[0, 0] for d in documents] for q in queries], np.float32)


def _data() -> TaskData:
    return TaskData(texts=[Text(text="a" * n, kind=str(n % 2)) for n in range(1, 13)], dims=[4])


def test_rows_of_the_other_sign_and_their_kinds_are_told() -> None:
    reference = multi_vectors(_Constant(), _data())
    figures = multi_vectors_against(_Constant(sign=-1.0), _data(), reference, SMALL)
    assert figures["fidelity"]["4"]["cosine_mean"] == pytest.approx(-1)
    assert figures["fidelity"]["4"]["top10_overlap"] == 1  # both factors of a score changed sign
    assert figures["fidelity"]["4"]["pair_spearman"] == pytest.approx(1)
    assert {k: f["texts"] for k, f in figures["fidelity_by_kind"].items()} == {
        "all as queries": 12,
        "all as documents": 12,
        "1": 6,
        "0": 6,
    }
    assert figures["invariance"]["max_difference"] == 0


def test_a_text_of_another_number_of_vectors_is_named() -> None:
    reference = multi_vectors(_Constant(), _data())
    with pytest.raises(BenchError, match=r"document 0: expected \[3, 4\].*found \[2, 4\]"):
        multi_vectors_against(_Constant(tokens=2), _data(), reference, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peers": ["openvino"]}, "--peers openvino: .* leave the option out"),
        ({"torch_types": ["bfloat16"]}, "--torch-types bfloat16: "),
        ({"shapes": [Shape(batch=8, tokens=64)]}, "--shapes 8x64: "),
        ({"pooling": "mean"}, "--pooling mean: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_measured_of_them_is_refused(
    change: dict[str, Any], message: str, bundle: Path, source: Path
) -> None:
    with pytest.raises(BenchArgumentError, match=message):
        run_bench(BenchOptions(bundle=bundle, reference=source, **change))


@pytest.mark.slow
def test_without_sentence_transformers_6_it_says_what_to_install(
    bundle: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sentence_transformers, "MultiVectorEncoder", raising=False)
    with pytest.raises(BenchError, match=r'pip install "sentence-transformers>=6"'):
        run_bench(BenchOptions(bundle=bundle, reference=source))
