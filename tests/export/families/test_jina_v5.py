"""jina-embeddings-v5-text from its published layout to vectors, against transformers with PEFT unmerged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_sizes import SIZES as PUBLISHED_SIZES
from random_checkpoint import write_checkpoint
from safetensors.torch import load_file, save_file

from embedge.export import AdapterError, CheckpointError, export_bundle
from embedge.export.options import ExportOptions
from embedge.export.reading import read_model
from embedge.runtime import Embedder, EmbedgeValueError
from tests.helpers.bidirectional import NATIVE, TEXTS
from tests.helpers.jina_v5 import CONFIGS, LIMIT, PROMPTS, SIZES, TASKS, Reference, edit, write
from tests.helpers.models import cosines, random_texts, write_json

BOUND = 0.999999
SHORT = [text[:40] for text in TEXTS[:6]]
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")
PARTS = [(size, kind) for size in SIZES for kind in (*KINDS, *NORMS)]
PARTS += [("small", "q_norm"), ("small", "k_norm")]  # EuroBERT has none of them


@pytest.fixture(scope="module", params=SIZES)
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("v5")
    return {size: write(root / size, size, bos=size == "nano") for size in SIZES}


@pytest.fixture(scope="module")
def models(sources: dict[str, Path]) -> dict[str, Embedder]:
    return {size: opened(source, source.parent / f"{size}-b") for size, source in sources.items()}


def opened(source: Path, out: Path, **options: Any) -> Embedder:
    settings: dict[str, Any] = {"precisions": ["fp32"], "calibration": "none"}
    return Embedder(export_bundle(source, out=out, **{**settings, **options}), threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_task_equals_the_published_rule(
    task: str, size: str, sources: dict[str, Path], models: dict[str, Embedder]
) -> None:
    model, reference = models[size], Reference(sources[size], size, task)
    texts = TEXTS if task == "retrieval" else TEXTS[::3]
    for prompt in PROMPTS:
        expected = reference.vectors(texts, prompt)
        found = model.encode(texts, task=task, prompt_name=prompt, batch_size=8)
        assert cosines(found, expected).min() >= BOUND
    assert np.array_equal(model.encode(texts, task=task, batch_size=8), found)  # document
    alone = np.stack([model.encode(text, task=task) for text in texts[:8]])
    assert cosines(alone, expected[:8]).min() >= BOUND


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE, reason="needs transformers 5, which has EuroBERT")
def test_nano_is_transformers_own_eurobert(
    sources: dict[str, Path], models: dict[str, Embedder]
) -> None:
    expected = Reference(sources["nano"], "nano", "clustering", native=True).vectors(TEXTS)
    found = models["nano"].encode(TEXTS, task="clustering")
    assert cosines(found, expected).min() >= BOUND


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kind"), PARTS)
def test_every_kind_of_adapter_and_norm_reaches_the_vector(
    kind: str, size: str, sources: dict[str, Path], models: dict[str, Embedder]
) -> None:
    reference = Reference(sources[size], size, "retrieval", without=[kind])
    found = models[size].encode(SHORT, task="retrieval")
    assert cosines(found, reference.vectors(SHORT)).max() < BOUND


def test_tasks_prompts_and_sizes_are_declared(size: str, models: dict[str, Embedder]) -> None:
    model = models[size]
    assert model.tasks == TASKS
    assert model.max_seq_length == LIMIT
    assert model.similarity_fn_name == "cosine"
    with pytest.raises(EmbedgeValueError, match="'code'"):
        model.encode("a", task="code")
    with pytest.raises(EmbedgeValueError, match="'passage'"):
        model.encode("a", task="retrieval", prompt_name="passage")
    with pytest.raises(EmbedgeValueError, match="48"):
        model.encode("a", task="retrieval", truncate_dim=48)
    with pytest.raises(EmbedgeValueError, match="task"):
        model.encode("a")


@pytest.mark.parametrize("dim", [32, 64])
def test_a_shorter_vector_is_cut_then_normalized(
    dim: int, size: str, sources: dict[str, Path], models: dict[str, Embedder]
) -> None:
    expected = Reference(sources[size], size, "retrieval").vectors(SHORT, "query", dim)
    options: dict[str, Any] = {"task": "retrieval", "prompt_name": "query", "truncate_dim": dim}
    found = models[size].encode(SHORT, **options)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.slow
def test_queries_and_documents_get_their_prompts(size: str, models: dict[str, Embedder]) -> None:
    model = models[size]
    for method, prompt in ((model.encode_query, "query"), (model.encode_document, "document")):
        found = method(SHORT, task="clustering")
        assert np.array_equal(found, model.encode(SHORT, task="clustering", prompt=PROMPTS[prompt]))


def copied(source: Path, folder: Path) -> Path:
    return shutil.copytree(source, folder)


@pytest.mark.slow
def test_other_layouts_give_the_same_vectors(
    size: str, sources: dict[str, Path], models: dict[str, Embedder], tmp_path: Path
) -> None:
    """Tensors behind ``model.``, no sentence-transformers files, rope_parameters as version 5 writes them."""
    source = copied(sources[size], tmp_path / "source")
    file = source / "model.safetensors"
    tensors = {f"model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    for name in ("modules.json", "config_sentence_transformers.json"):
        (source / name).unlink()
    rope = {"rope_theta": CONFIGS[size]["rope_theta"], "rope_type": "default"}
    edit(source / "config.json", rope_parameters=rope, rope_theta=..., rope_scaling=...)
    model = opened(source, tmp_path / "out")
    assert np.array_equal(
        model.encode(SHORT, task="text-matching"),
        models[size].encode(SHORT, task="text-matching"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("with_modules", [True, False])
def test_a_merged_repository_is_one_task(
    with_modules: bool,
    size: str,
    sources: dict[str, Path],
    models: dict[str, Embedder],
    tmp_path: Path,
) -> None:
    task = "text-matching"
    source = copied(sources[size], tmp_path / f"jina-embeddings-v5-text-{size}-{task}")
    shutil.rmtree(source / "adapters")
    merged = Reference(sources[size], size, task).model.merge_and_unload()
    save_file(merged.state_dict(), source / "model.safetensors", metadata={"format": "pt"})
    backbone: dict[str, Any] = {"model_type": "qwen3", "architectures": ["Qwen3Model"]}
    if size == "nano":
        code = {"AutoModel": "modeling_eurobert.EuroBertModel"}
        backbone = {"model_type": "eurobert", "architectures": ["EuroBertModel"], "auto_map": code}
    edit(source / "config.json", **{"auto_map": ..., **backbone})
    if with_modules:
        kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        listed = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(kinds.items())
        ]
        write_json(source / "modules.json", listed)
        write_json(source / "1_Pooling/config.json", {"pooling_mode_lasttoken": True})
    else:
        (source / "modules.json").unlink()
        (source / "config_sentence_transformers.json").unlink()
    model = opened(source, tmp_path / "out")
    assert model.tasks == (task,)
    expected = models[size].encode(SHORT, task=task)
    assert cosines(model.encode(SHORT), expected).min() >= BOUND
    with pytest.raises(EmbedgeValueError, match="48"):
        model.encode("a", truncate_dim=48)


@pytest.mark.parametrize("end", ["copy", "retrieval"])
def test_a_folder_of_all_tasks_has_them_under_any_name(
    end: str, size: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = copied(sources[size], tmp_path / f"jina-embeddings-v5-text-{size}-{end}")
    model = read_model(ExportOptions(source=str(source), out=tmp_path / "out"))
    assert {task for task, adapter in model.adapters.items() if adapter} == set(TASKS)


def test_a_task_without_its_folder_does_not_get_an_adapter_of_none(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = copied(sources["nano"], tmp_path / "source")
    folders = source / "adapters"
    shutil.copytree(folders / "clustering", folders, dirs_exist_ok=True)
    shutil.rmtree(folders / "clustering")
    with pytest.raises(AdapterError, match="adapters/clustering: expected"):
        read_model(ExportOptions(source=str(source), out=tmp_path / "out"))


def test_files_of_sentence_transformers_that_name_no_prompt_are_followed(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = copied(sources["nano"], tmp_path / "source")
    file = source / "config_sentence_transformers.json"
    edit(file, prompts={}, default_prompt_name=None)
    settings = read_model(ExportOptions(source=str(source), out=tmp_path / "out")).settings
    assert (settings.prompts, settings.default_prompt_name) == ({}, None)


MODULE: dict[str, Any] = {"path": "", "type": "custom_st.Transformer"}


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"is_decoder": "no", "mask_token": ..., "hidden_dropout": ...},
         "is_decoder is 'no', expected null or true"),
        ("config.json", {"truncate_dim": 32}, "truncate_dim is 32, expected null; only code"),
        ("config.json", {"task_names": ["../x"]}, "task '../x'"),
        ("config.json", {"task_names": ...}, "task_names is None, expected a list of names"),
        ("config.json", {"task_names": ["retrieval", 3]}, "task_names is"),
        ("config.json", {"task_names": ["code"]}, "adapters/code: expected .* no such folder"),
        ("config.json", {"model_type": "eurobert", "architectures": None, "auto_map": ...},
         "the module custom_st.Transformer is not supported"),
        ("config.json", {"auto_map": {"AutoModel": "modeling.JinaEmbeddingsV5Model"}}, "never run"),
        ("config.json", {"jina_task": "retrieval", "lora_alpha": 3}, "lora_alpha is 3"),
        ("modules.json", [{**MODULE, "kwargs": ["task", "instruction"]}], "calls may give"),
        ("modules.json", [{**MODULE, "type": "custom_st.Other"}], "custom_st.Other is not supported"),
        ("modules.json", [MODULE, {"path": "1", "type": "sentence_transformers.models.Normalize"}],
         "not supported in this order"),
    ],
    ids=range(12),
)  # fmt: skip
def test_what_is_not_published_is_refused_by_name(
    file: str, changes: Any, message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = copied(sources["nano"], tmp_path / "source")
    if isinstance(changes, dict):
        edit(source / file, **changes)
    else:
        write_json(source / file, changes)
    adapters = {"t": None} if "model_type" in changes else None
    with pytest.raises((CheckpointError, EmbedgeValueError, ValueError), match=message):
        opened(source, tmp_path / "out", **({"adapters": adapters} if adapters else {}))


def test_a_size_that_the_weights_are_not_of_is_refused(
    size: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """``is_decoder`` says which: the other size's tensors are not there, or are left."""
    source = copied(sources[size], tmp_path / "source")
    file, other = source / "config.json", {"nano": "small", "small": "nano"}[size]
    edit(file, **dict.fromkeys(CONFIGS[size].keys() - CONFIGS[other].keys(), ...))
    if size == "small":
        edit(file, is_decoder=False)
    with pytest.raises(CheckpointError, match="q_norm|k_proj.weight: expected shape"):
        opened(source, tmp_path / "out")


def test_the_tokenizers_limit_is_not_the_published_codes(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = copied(sources["nano"], tmp_path / "source")
    edit(source / "tokenizer_config.json", model_max_length=20)
    out = export_bundle(source, precisions=["fp32"], out=tmp_path / "out", calibration="none")
    assert json.loads((out / "manifest.json").read_text())["model"]["max_length"] == LIMIT


@pytest.mark.slow
def test_outlier_channels_leave_int8_and_int4_near(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights whose stream has channels of up to 50 times the others, as trained models have them."""
    name, heads = (
        f"v5-{size}",
        {"heads": 4, "kv_heads": 4 if size == "nano" else 2, "head_size": 32},
    )
    few: dict[str, Any] = {"hidden": 128, "inner": 256, "vocabulary": 1000, "positions": 1024}
    tiny = replace(PUBLISHED_SIZES[name], layers=2, **heads, **few)
    monkeypatch.setitem(PUBLISHED_SIZES, name, tiny)
    source = write_checkpoint(name, tmp_path / name)
    texts = random_texts(60)
    out = export_bundle(
        source,
        adapters={"retrieval": source / "adapters"},
        precisions=["fp32", "int8", "int4"],
        out=tmp_path / "out",
    )
    exact, int8, int4 = (
        Embedder(out, precision=precision, threads=1).encode(texts)
        for precision in ("fp32", "int8", "int4")
    )
    assert cosines(int8, exact).mean() >= 0.9985
    assert cosines(int8, exact).min() >= 0.997
    assert cosines(int4, exact).mean() >= 0.98
