"""jina-embeddings-v3: five tasks of one checkpoint, as published and as transformers 5 has it."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from embedge.export import CheckpointError, export_bundle
from embedge.runtime import Embedder
from tests.helpers.exports import manifest
from tests.helpers.models import Reference, cosines, save, texts_of_lengths, write_json
from tests.helpers.published_encoders import (
    JINA_CODE,
    JINA_TASKS,
    jina_adapter,
    jina_config,
    jina_tensors,
    make_encoder,
    rewrite,
    save_lora,
)

LENGTHS = (3, 4, 5, 9, 17, 31, 63, 64, 65, 90, 127, 128, 200, 300, 400, 511, 512, 513, 900, 950)
TEXTS = texts_of_lengths(LENGTHS)
SHORT = texts_of_lengths((3, 7, 20, 40))

needs_5 = pytest.mark.skipif(
    "jina_embeddings_v3" not in transformers.CONFIG_MAPPING,
    reason="needs transformers 5, whose JinaEmbeddingsV3Model is the reference",
)


def as_published(source: Path) -> Path:
    """The published files beside the weights: remote code as the first module, prompts named by tasks."""
    modules = json.loads((source / "modules.json").read_text())
    modules[0] |= {"type": "custom_st.Transformer", "kwargs": ["task"]}
    write_json(source / "modules.json", modules)
    write_json(
        source / "config_sentence_transformers.json",
        {"prompts": JINA_TASKS, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    return rewrite(source, jina_tensors, jina_config)


def exported(source: Path, out: Path, **options: Any) -> Embedder:
    chosen: dict[str, Any] = {"precisions": ["fp32"], "calibration": "none", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "adapter '.*' was trained on")
        export_bundle(source, out=out, **chosen)
    return Embedder(out, precision=chosen["precisions"][-1], threads=1)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jina") / "native"
    return save(make_encoder("jina_embeddings_v3"), folder, max_length=1024)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jina") / "published"
    return as_published(save(make_encoder("jina_embeddings_v3"), folder, max_length=1024))


@pytest.fixture(scope="module")
def adapters(published: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, tensors = tmp_path_factory.mktemp("adapters"), load_file(published / "model.safetensors")
    names = {task: task.replace(".", "_").replace("-", "_") for task in JINA_TASKS}
    return {
        task: jina_adapter(tensors, number, root / names[task])
        for number, task in enumerate(JINA_TASKS)
    }


@pytest.fixture(scope="module")
def bundle(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "bundle"
    exported(published, out)
    return out


@needs_5
@pytest.mark.slow
@pytest.mark.parametrize("task", JINA_TASKS)
def test_each_task_of_the_checkpoint_is_that_of_peft_with_its_instruction(
    task: str, native: Path, adapters: dict[str, Path], bundle: Path
) -> None:
    theirs = Reference(native, adapters[task]).encode([JINA_TASKS[task] + text for text in TEXTS])
    model = Embedder(bundle, precision="fp32", task=task, threads=1)
    assert cosines(model.encode(TEXTS, batch_size=7), theirs).min() >= 0.999999
    alone = np.concatenate([model.encode([text]) for text in TEXTS])
    assert cosines(alone, theirs).min() >= 0.999999


@needs_5
@pytest.mark.slow
def test_without_a_task_the_base_alone_is_exported(
    native: Path, published: Path, tmp_path: Path
) -> None:
    model = exported(published, tmp_path / "out", adapters={"plain": None})
    assert cosines(model.encode(TEXTS), Reference(native).encode(TEXTS)).min() >= 0.999999


@pytest.mark.slow
def test_folders_beside_the_native_model_give_the_same_tasks(
    native: Path, adapters: dict[str, Path], bundle: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(native, tmp_path / "source")
    for folder in adapters.values():
        shutil.copytree(folder, source / folder.name)
    exported(source, tmp_path / "out")
    assert list(manifest(tmp_path / "out")["tasks"]) == list(JINA_TASKS)
    for task in JINA_TASKS:
        ours, theirs = (
            Embedder(b, precision="fp32", task=task, threads=1).encode(SHORT)
            for b in (tmp_path / "out", bundle)
        )
        assert cosines(ours, theirs).min() > 0.9999999


def test_a_bundle_has_the_tasks_with_their_instructions(bundle: Path) -> None:
    document = manifest(bundle)
    assert list(document["tasks"]) == list(JINA_TASKS)
    for task, entry in document["tasks"].items():
        assert entry["default_prompt"] == task
        assert entry["prompts"] == JINA_TASKS
        assert entry["adapter"]["name"] == task
    assert len({entry["adapter"]["sha256"] for entry in document["tasks"].values()}) == 5
    assert document["model"]["matryoshka_dims"] == [16, 32]
    assert document["model"]["pooling"] == "mean" and document["model"]["normalize"]


@pytest.mark.slow
def test_a_task_can_be_added_by_naming_the_models_folder(
    published: Path, bundle: Path, tmp_path: Path
) -> None:
    model = exported(published, tmp_path / "out", adapters={"separation": published})
    whole = Embedder(bundle, precision="fp32", task="separation", threads=1)
    assert np.array_equal(model.encode(SHORT), whole.encode(SHORT))


@pytest.mark.slow
def test_an_adapter_of_the_published_codes_names_is_merged(
    published: Path, native: Path, tmp_path: Path
) -> None:
    """LoRA on the fused Linear: its B has the rows of queries, keys and values."""
    fused = save_lora(
        tmp_path / "fused", {f"roberta.encoder.layers.{i}.mixer.Wqkv": (96, 32) for i in range(2)}
    )
    tensors = load_file(fused / "adapter_model.safetensors")
    parts = {}
    for key, value in tensors.items():
        for name, rows in zip(
            "qkv", value.chunk(3) if "lora_B" in key else [value] * 3, strict=True
        ):
            own = key.replace("roberta.encoder.", "").replace(
                "mixer.Wqkv", f"self_attn.{name}_proj"
            )
            parts[own] = rows.clone()
    apart = tmp_path / "apart"
    shutil.copytree(fused, apart)
    save_file(parts, apart / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((apart / "adapter_config.json").read_text())
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj"]}
    write_json(apart / "adapter_config.json", {**config, **targets})
    base = exported(published, tmp_path / "base", adapters={"t": None}).encode(SHORT)
    one = exported(published, tmp_path / "one", adapters={"t": fused}).encode(SHORT)
    other = exported(native, tmp_path / "other", adapters={"t": apart}).encode(SHORT)
    assert cosines(one, other).min() > 0.9999999
    assert cosines(one, base).min() < 0.999


@pytest.mark.slow
@pytest.mark.parametrize("saved", [2, 1])
def test_a_fused_linear_in_modules_to_save_takes_the_bases_place(
    saved: int, published: Path, tmp_path: Path
) -> None:
    modules = [f"roberta.encoder.layers.{i}.mixer.Wqkv" for i in range(2)]
    adapter = save_lora(tmp_path / "lora", {"roberta.encoder.layers.0.mlp.fc1": (56, 32)})
    file, generator = adapter / "adapter_model.safetensors", torch.Generator().manual_seed(3)
    own = {f"{m}.weight": torch.randn(96, 32, generator=generator) / 5 for m in modules[:saved]}
    own |= {f"{m}.bias": torch.randn(96, generator=generator) for m in modules[:saved]}
    full = {f"base_model.model.{key}": value for key, value in own.items()}
    save_file({**load_file(file), **full}, file, metadata={"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", {**config, "modules_to_save": ["Wqkv"]})
    if saved == 1:
        with pytest.raises(Exception, match="belongs to modules_to_save 'Wqkv'"):
            exported(published, tmp_path / "refused", adapters={"t": adapter})
        return
    ours = exported(published, tmp_path / "ours", adapters={"t": adapter}).encode(SHORT)
    source = shutil.copytree(published, tmp_path / "source")
    end = ".parametrizations.weight.original"
    base = load_file(source / "model.safetensors")
    base |= {key.replace(".weight", end): value for key, value in own.items()}
    save_file(base, source / "model.safetensors", metadata={"format": "pt"})
    lora = save_lora(tmp_path / "alone", {"roberta.encoder.layers.0.mlp.fc1": (56, 32)})
    theirs = exported(source, tmp_path / "theirs", adapters={"t": lora}).encode(SHORT)
    assert cosines(ours, theirs).min() > 0.9999999


@pytest.mark.slow
def test_every_part_of_the_adapters_reaches_the_vector(published: Path, tmp_path: Path) -> None:
    source = shutil.copytree(published, tmp_path / "source")
    task = {"adapters": {"text-matching": source}}
    before = exported(source, tmp_path / "before", **task).encode(SHORT)
    tensors = load_file(source / "model.safetensors")
    kinds = ("word_embeddings", "token_type_embeddings", "Wqkv", "out_proj", "fc1", "fc2")
    for kind in kinds:
        key = next(k for k in sorted(tensors) if f"{kind}.parametrizations.weight.0.lora_B" in k)
        changed = {**tensors, key: tensors[key] * 0}
        save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
        after = exported(source, tmp_path / kind, **task).encode(SHORT)
        assert cosines(before, after).min() < 0.99999, kind


def drop(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if part not in key}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_adaptations": ["a", "b"]},
            r"task_instructions is .* for each of lora_adaptations: a",
        ),
        (
            {"lora_adaptations": ["a", "b"], "task_instructions": {"a": "", "b": ""}},
            r"has the shape \[5, .*expected 2 matrices",
        ),
        ({"lora_adaptations": "all"}, "lora_adaptations is 'all'"),
        ({"task_instructions": None}, "task_instructions is None"),
        (
            {"task_instructions": {**JINA_TASKS, "separation": "Other: "}},
            "the prompt separation is '', and the instruction of that task 'Other: '",
        ),
        ({"lora_rank": 4}, "rank 3 in the weights, 4 by"),
        ({"lora_alpha": None}, "lora_alpha: expected a number"),
        ({"load_trained_adapters": False}, "load_trained_adapters is false"),
        ({"emb_pooler": "mean"}, "emb_pooler is 'mean'"),
        ({"is_causal": True}, "is_causal is true"),
        (
            {"auto_map": {**JINA_CODE, "AutoModel": "me/x--modeling_lora.XLMRobertaLoRA"}},
            "auto_map",
        ),
        ({"rotary_emb_base": None, "rope_theta": "x"}, "rope_theta: expected a number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_refused_by_name(
    changes: dict[str, Any], message: str, published: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(published, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", {**config, **changes})
    with pytest.raises(Exception, match=message):
        exported(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("lora_", "expected the adapters of retrieval.query"),
        ("layers.1.mlp.fc1.parametrizations.weight.0.lora_B", "has lora_A but no lora_B"),
        ("layers.1.mlp.fc1.parametrizations.weight.original", "finds no tensor"),
        ("layers.1.mlp.fc1.parametrizations.weight.0.", "weight beside adapters, and there is no"),
        ("layers.1.mlp.fc1.bias", r"fc1\.bias: expected this tensor"),
    ],
)
def test_missing_tensors_are_refused_by_name(
    part: str, message: str, published: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(published, tmp_path / "source")
    file = source / "model.safetensors"
    save_file(drop(load_file(file), part), file, metadata={"format": "pt"})
    with pytest.raises(Exception, match=message):
        exported(source, tmp_path / "out")


def test_a_module_of_other_code_is_refused(published: Path, tmp_path: Path) -> None:
    source = shutil.copytree(published, tmp_path / "source")
    modules = json.loads((source / "modules.json").read_text())
    modules[0] |= {"kwargs": ["task", "layers"]}
    write_json(source / "modules.json", modules)
    with pytest.raises(CheckpointError, match="calls may give"):
        exported(source, tmp_path / "out")
