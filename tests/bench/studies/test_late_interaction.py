"""The study of late-interaction bundles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sentence_transformers

from embedge.bench.errors import BenchError
from embedge.bench.studies import late_interaction as study
from embedge.export import export_bundle
from tests.helpers.late_models import write_pylate
from tests.helpers.models import linears, make_model, save, save_adapter

needs_native = pytest.mark.skipif(
    not hasattr(sentence_transformers, "MultiVectorEncoder"), reason="needs sentence-transformers 6"
)


@needs_native
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*the tokenizer has no token for")
def test_every_token_is_compared_with_the_adapter_unmerged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_pylate(tmp_path / "source", "bert")
    adapter = save_adapter(source, tmp_path / "adapter", target=linears("bert"))
    bundle = tmp_path / "bundle"
    tasks = {"plain": None, "mine": adapter}
    export_bundle(source, adapters=tasks, precisions=["fp32", "int8"], out=bundle)
    call = [str(bundle), "--reference", str(source), "--limit", "16"]

    assert study.main([*call, "--adapter", f"mine={adapter}"]) == 0

    *lines, last = capsys.readouterr().out.splitlines()
    found = {(one["task"], one["precision"]): one for one in json.loads(last)}
    assert [line.split(":")[0] for line in lines] == [" ".join(key) for key in found]
    assert set(found) == {(task, p) for task in tasks for p in ("fp32", "int8")}
    for (_, precision), one in found.items():
        least = 0.999999 if precision == "fp32" else 0.9
        assert min(one["query_min"], one["document_min"]) >= least
        assert one["query_mean"] >= one["query_min"]
        assert one["top10_overlap"] >= (0.99 if precision == "fp32" else 0.5)
        assert one["texts"] == 16
    assert found["mine", "int8"]["document_min"] < found["mine", "fp32"]["document_min"]

    assert study.main(call) == 1
    assert "task mine: expected --adapter mine=FOLDER" in capsys.readouterr().err


def test_a_bundle_of_single_vectors_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(make_model("bert"), tmp_path / "source")
    export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "bundle")
    assert study.main([str(tmp_path / "bundle"), "--reference", str(source)]) == 1
    assert "expected a bundle of a late-interaction model; embedge bench" in capsys.readouterr().err


def test_a_text_of_another_number_of_vectors_is_named() -> None:
    rows = [np.ones((3, 4), np.float32), np.ones((2, 4), np.float32)]
    with pytest.raises(BenchError, match=r"document 1: expected \[3, 4\].*found \[2, 4\]"):
        study._cosines(rows, [rows[0], rows[0]], "document")


def test_the_best_documents_are_counted() -> None:
    scores = np.arange(24.0).reshape(2, 12)
    assert study._overlap(scores, scores) == 1
    assert study._overlap(scores, -scores) == pytest.approx(8 / 10)


def test_without_sentence_transformers_6_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sentence_transformers, "MultiVectorEncoder", raising=False)
    with pytest.raises(BenchError, match=r'pip install "sentence-transformers>=6"'):
        study._Native(tmp_path, None, "t")
