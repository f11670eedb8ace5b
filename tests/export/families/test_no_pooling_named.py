"""Decoders whose files do not say how tokens become a vector: refused, or as sentence-transformers with a warning."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from embedge.export import export_bundle
from embedge.runtime import Embedder
from embedge.runtime.errors import EmbedgeValueError, EmbedgeWarning
from tests.helpers.models import cosines, make_model, random_texts, save, write_json

TEXTS = random_texts(12)
LOST = "does not say how tokens become a vector (it has no modules.json"
CAUSAL: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"]}
V5_PROMPTS = {"prompts": {"query": "Query: ", "document": "Document: "}}


def bare(folder: Path, kind: str = "qwen3", **config: Any) -> Path:
    """A decoder without the files of sentence-transformers."""
    source = save(make_model(kind), folder, pooling="lasttoken")
    for name in ("modules.json", "sentence_bert_config.json"):
        (source / name).unlink()
    file = source / "config.json"
    write_json(file, json.loads(file.read_text()) | config)
    return source


def exported(source: Path, out: Path, **options: Any) -> Embedder:
    export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=out, **options)
    return Embedder(out, precision="fp32", threads=1)


@pytest.mark.parametrize(
    ("config", "name", "files", "sign"),
    [
        ({"architectures": ["Qwen3Model"]}, "mine", {}, ""),
        ({"architectures": None}, "mine", {}, ""),
        (CAUSAL, "mine", {"config_sentence_transformers.json": V5_PROMPTS}, "config_sentence_t"),
        (CAUSAL | {"task_names": ["retrieval"]}, "mine", {}, "config.json has task_names"),
        (CAUSAL | {"matryoshka_dims": [16]}, "mine", {}, "config.json has matryoshka_dims"),
        (CAUSAL | {"_name_or_path": "Qwen/Qwen3-Embedding-0.6B"}, "mine", {}, "called qwen3-emb"),
        (CAUSAL, "jina-embeddings-v5-text-small-retrieval-mlx", {}, "it is called jina-embed"),
    ],
    ids=["backbone", "no class", "prompts", "tasks", "sizes", "parent", "name"],
)
def test_an_embedder_that_lost_its_modules_is_refused(
    config: dict[str, Any], name: str, files: dict[str, Any], sign: str, tmp_path: Path
) -> None:
    source = bare(tmp_path / name, **config)
    for file, content in files.items():
        write_json(source / file, content)
    with pytest.raises(EmbedgeValueError) as caught:
        exported(source, tmp_path / "out")
    said = str(caught.value)
    assert LOST in said and sign in said and "--pooling" in said
    assert "jina-embeddings-v5-text-small-TASK" in said
    assert not (tmp_path / "out").exists()


def test_a_decoder_without_a_causal_mask_is_refused(tmp_path: Path) -> None:
    source = bare(tmp_path / "mine", "llama", architectures=["LlamaForCausalLM"], is_causal=False)
    with pytest.raises(EmbedgeValueError, match="--pooling"):
        exported(source, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "pooling"), [("Qwen3ForCausalLM", None), ("Qwen3Model", "mean")]
)
def test_what_is_taken_is_what_sentence_transformers_takes(
    architecture: str, pooling: str | None, tmp_path: Path
) -> None:
    source = bare(tmp_path / "mine", architectures=[architecture])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = exported(source, tmp_path / "out", pooling=pooling)
    said = [str(w.message) for w in caught if issubclass(w.category, EmbedgeWarning)]
    assert len(said) == (pooling is None)
    assert all("lasttoken pooling without normalization is taken" in line for line in said)
    theirs = SentenceTransformer(str(source), device="cpu", local_files_only=True)
    expected = np.asarray(theirs.encode(TEXTS))
    assert cosines(model.encode(TEXTS), expected).min() >= 0.99999
    np.testing.assert_allclose(model.encode(TEXTS), expected, rtol=0, atol=1e-4)


def test_the_warning_names_a_next_step_that_works(tmp_path: Path) -> None:
    source = bare(tmp_path / "mine", "qwen3", **CAUSAL)
    with pytest.warns(EmbedgeWarning, match=r"Give pooling= \(--pooling\) where"):
        exported(source, tmp_path / "guessed")
    with warnings.catch_warnings():
        warnings.simplefilter("error", EmbedgeWarning)
        exported(source, tmp_path / "named", pooling="lasttoken")
