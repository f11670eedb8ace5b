"""The bench of a bundle that takes images: pages against torch with LoRA by hand, budgets, alignment, a choice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedge.bench import BenchOptions, Report, run, run_bench
from embedge.bench.errors import BenchArgumentError
from embedge.bench.measure.process import measure_process
from embedge.bench.options import Profile
from embedge.bench.plan import make_plan
from embedge.bench.report.choose import candidates, choose
from embedge.bench.report.configurations import configurations
from embedge.bench.report.write import write_report
from embedge.export import export_bundle
from embedge.runtime.cli import choose as command
from embedge.runtime.cli.main import main
from tests.helpers.jina_v4 import Reference, write_checkpoint
from tests.helpers.pictures import picture

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:adapter .* was trained on")]
SMALL = Profile(
    texts=12, rows=None, rounds=1, singles=0, invariance=0, process_repeats=1, pages=2,
    torch_quality=False, peer_tasks=1, latency_tasks=1,
)  # fmt: skip
SIZES = [(112, 140), (140, 112), (84, 168), (168, 168), (112, 112), (196, 84)]
WORDS = ("river", "stone", "cloud", "forest", "candle", "mirror")
BUDGET = 28 * 28 * 8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("v4") / "tiny")


@pytest.fixture(scope="module")
def bundle(source: Path) -> Path:
    out = source.parent / "bundle"
    return export_bundle(source, precisions=["fp32", "int8"], out=out, calibration="none")


def images() -> list[Image.Image]:
    return [Image.fromarray(picture(*size, seed)) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def labelled(source: Path) -> Path:
    """A question a page, by two of them the last, and one page that nobody asks for."""
    folder = source.parent
    for number, image in enumerate(images()):
        image.save(folder / f"{number}.png")
    rows: list[dict[str, Any]] = [
        {"query": f"where is the {word}", "image": f"{min(number, 4)}.png"}
        for number, word in enumerate(WORDS)
    ]
    rows.append({"query": None, "image": "5.png"})
    (folder / "pages.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "pages.jsonl"


@pytest.fixture(scope="module")
def options(bundle: Path, source: Path, labelled: Path) -> BenchOptions:
    return BenchOptions(
        bundle=bundle,
        reference=source,
        tasks=["retrieval"],
        evaluations=[("retrieval", labelled)],
        threads=1,
        profile=SMALL,
        shapes=(),
        max_pixels=[BUDGET],
    )


def process_figures(job: Mapping[str, Any], repeats: int) -> dict[str, Any]:
    """What a child would say; a test of its own starts one."""
    assert repeats == 1
    count = len(job.get("pages", ()))
    peaks = {"after_first_task": {"peak": 1000 + count}, "after_batches": {"peak": 2000 + count}}
    times = {"imported_ms": 1.0, "first_vector_ms": 2.0, "first_vector_longest_ms": 3.0 + count}
    return {**times, **peaks, "after_first_vector": {}}


@pytest.fixture(scope="module")
def measured(options: BenchOptions) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure_process", process_figures)
        return run_bench(options)


def ndcg(scores: Sequence[Sequence[float]], depth: int) -> float:
    """Each question's page is the one of its number, the last two share page 4."""
    gains = []
    for number, its in enumerate(scores):
        page = min(number, 4)
        rank = 1 + sum(score > its[page] for score in its)
        gains.append(1 / np.log2(1 + rank) if rank <= depth else 0.0)
    return float(np.mean(gains))


def test_single_and_multi_vectors_of_pages_are_those_of_torch(
    measured: Report, source: Path
) -> None:
    reference = Reference(source, "retrieval")
    queries, query_tokens = reference.texts([f"where is the {w}" for w in WORDS], "Query: ")
    pages, page_tokens = reference.images(images())
    single = (queries @ pages.T).tolist()
    multi = [[(q @ p.T).max(1).sum() for p in page_tokens] for q in query_tokens]

    row = measured.row("retrieval", "embedge fp32")
    assert row is not None
    figures = row.quality["pages"]
    assert (figures["modality"], figures["items"], figures["pages"]) == ("image", 6, 6)
    for depth, at in ((5, figures["ndcg@5"]["64"]), (10, figures["dims"]["64"])):
        assert at["reference"] == pytest.approx(ndcg(single, depth), abs=1e-9)
        assert at["value"] == pytest.approx(at["reference"], abs=1e-9)
        tokens = figures["multi_vector"][f"ndcg@{depth}"]
        assert tokens["reference"] == pytest.approx(ndcg(multi, depth), abs=1e-9)
        assert tokens["value"] == pytest.approx(tokens["reference"], abs=1e-9)
    assert set(figures["formats"]) == {"float32", "float16", "int8", "binary", "binary+int8"}
    assert set(figures["queries"]) == {"fp32", "int8"}

    matches = [[page == min(number, 4) for page in range(6)] for number in range(6)]
    cosines = np.array(single)
    formats = figures["alignment"]["formats"]
    assert set(formats) == {"float16", "int8", "binary"}
    bits = [np.where(v > 0, 1.0, -1.0) for v in (queries, pages)]
    signs = bits[0] @ bits[1].T / bits[0].shape[1]
    assert formats["binary"]["matched"] == pytest.approx(signs[matches].mean(), abs=1e-3)
    assert formats["int8"]["matched"] == pytest.approx(cosines[matches].mean(), abs=5e-3)
    for name in ("value", "reference"):
        found = figures["alignment"][name]
        assert found["matched"] == pytest.approx(cosines[matches].mean(), abs=1e-4), name
        assert found["mismatched"] == pytest.approx(cosines[~np.array(matches)].mean(), abs=1e-4)
        assert found["texts_matched"] == pytest.approx(queries[4] @ queries[5], abs=1e-4)
        distance = np.linalg.norm(queries.mean(0) - pages.mean(0))
        assert found["gap"] == pytest.approx(distance, abs=1e-4)
    other = measured.row("retrieval", "embedge int8")
    assert other is not None
    after = other.quality["pages"]["alignment"]
    assert after["reference"] == figures["alignment"]["reference"]
    assert after["value"] != after["reference"]


def test_a_smaller_budget_has_fewer_tokens_and_the_quality_of_its_own_vectors(
    measured: Report, source: Path
) -> None:
    row = measured.row("retrieval", "embedge fp32")
    assert row is not None
    assert list(row.images) == ["602112", str(BUDGET)]
    full, small = row.images.values()
    reference = Reference(source, "retrieval")
    queries, _ = reference.texts([f"where is the {word}" for word in WORDS], "Query: ")
    pages, tokens = reference.images(images(), max_pixels=BUDGET)
    _, all_tokens = reference.images(images())
    assert small["tokens"] == np.mean([len(rows) for rows in tokens])
    assert full["tokens"] == np.mean([len(rows) for rows in all_tokens])
    assert small["tokens"] < full["tokens"]
    found = small["quality"]["ndcg@5"]
    assert found["value"] == pytest.approx(ndcg((queries @ pages.T).tolist(), 5), abs=1e-9)
    assert found["reference"] == full["quality"]["ndcg@5"]["reference"]
    assert full["pages"] == 2
    assert 0 < small["p50_ms"] <= small["p95_ms"]
    torch = measured.row("retrieval", "torch fp32")
    assert torch is not None
    assert list(torch.images) == ["602112"]


def test_pages_are_configurations_of_their_own_and_can_be_chosen(
    measured: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [c for c in configurations([measured]) if c.modality == "image"]
    assert {c.max_pixels for c in found} == {602112, BUDGET}
    assert {c.dim for c in found if c.max_pixels == BUDGET} == {64}
    int8 = next(c for c in found if c.precision == "int8")
    assert (int8.memory_bytes, int8.all_tasks_memory_bytes) == (1006, 2006)  # of six pages
    assert int8.cold_start_ms == 9
    assert int8.page_tokens
    chosen = choose([measured], {"index": 64 * 4 * 1e6}, prefer="latency").candidate
    assert chosen is not None
    assert chosen.modality == "image"  # nothing of texts was labelled

    files = write_report(measured, tmp_path)
    assert str(tmp_path.parents[1]) not in files[0].read_text("utf-8")  # no paths of this machine
    text = files[1].read_text("utf-8")
    assert "## Page images" in text
    assert "one a token" in text
    assert "## Texts beside images" in text
    assert main(["choose", str(files[0]), "--max-index", "1GB", "--prefer", "latency"]) == 0
    out = capsys.readouterr().out
    assert "model.encode_image(pages" in out
    assert "max_pixels=" in out
    assert "figures are of images; --modality text chooses for texts" in out


@pytest.mark.parametrize("output_format", ["float32", "float16", "int8", "binary", "binary+int8"])
def test_the_code_that_a_choice_of_pages_prints_runs(
    output_format: str, measured: Report, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = candidates([measured], None)
    chosen = next(c for c in found if c.output_format == output_format and c.dim == 32)
    monkeypatch.chdir(bundle.parent)
    names: dict[str, Any] = {"pages": images()[:3], "questions": list(WORDS)}

    code = "\n".join(command._code(chosen, measured)).replace("'bundle-chosen'", "'bundle'")
    exec(code, names)

    width = {"binary": 4}.get(output_format, 32)
    assert names["documents"].shape == (3, width)
    assert names["queries"].shape == (len(WORDS), width)
    if output_format == "binary+int8":
        assert names["rows"].shape == (len(WORDS), 3)


def test_a_process_of_its_own_embeds_pages_alone(bundle: Path, labelled: Path) -> None:
    files = [str(labelled.with_name(f"{number}.png")) for number in range(3)]
    job = {"system": "embedge", "bundle": str(bundle), "precision": "int8", "pages": files}

    found = measure_process(
        job | {"tasks": ["retrieval", "code"], "threads": 1, "device": "cpu"}, repeats=1
    )

    assert 0 < found["imported_ms"] < found["first_vector_ms"] == found["first_vector_longest_ms"]
    assert set(found) >= {"after_first_vector", "after_first_task", "after_batches"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peers": ["openvino"]}, "--peers openvino: .* takes images too"),
        ({"evaluations": ()}, "--max-pixels 6272: is measured on page images; add --eval"),
    ],
)
def test_what_pages_are_not_measured_by_is_refused(
    change: dict[str, Any], message: str, options: BenchOptions
) -> None:
    with pytest.raises(BenchArgumentError, match=message):
        make_plan(replace(options, **change))


def test_pages_for_a_bundle_of_texts_are_refused(
    model: Path, labelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plain"
    plain = export_bundle(
        model, adapters={"default": None}, precisions=["fp32"], out=out, calibration="none"
    )
    with pytest.raises(BenchArgumentError, match="is a set of page images; .* takes text alone"):
        make_plan(BenchOptions(bundle=plain, reference=model, evaluations=[("default", labelled)]))
