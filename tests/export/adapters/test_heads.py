"""What an adapter trains beside the backbone's Linears: heads are left out, rows of the token table count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from embedge.export import AdapterError, export_bundle
from embedge.runtime import Embedder
from tests.helpers.models import Reference, cosines, make_model, random_texts, save

BOUND = 0.999999
TEXTS = random_texts(12)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    kinds = {"bert": "mean", "xlm-roberta": "cls", "modernbert": "mean", "qwen2": "lasttoken"}
    return {
        kind: save(make_model(kind), root / kind, pooling=pooling)
        for kind, pooling in kinds.items()
    }


def train(source: Path, folder: Path, auto: str, options: dict[str, Any], **loading: Any) -> Any:
    """Save a random adapter of a task's class around the model in ``source``; return PEFT's model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, auto).from_pretrained(source, **loading)
        adapted = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 8, **options}))
        generator = torch.Generator().manual_seed(3)
        for _, parameter in sorted(adapted.named_parameters()):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                size = 0.7 / parameter.shape[-1] ** 0.5
                parameter.data = (
                    noise * size if parameter.ndim > 1 else parameter.data + 0.1 * noise
                )
        adapted.save_pretrained(folder)
    return adapted.eval()


def reference(source: Path, adapted: Any) -> Any:
    """Vectors of the backbone inside of PEFT's unmerged model."""
    torchs = Reference(source)
    torchs.model = adapted.get_base_model().base_model
    return torchs.encode(TEXTS)


def exported(source: Path, adapter: Path, out: Path) -> tuple[Embedder, list[str]]:
    """The bundle, and what the export warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        export_bundle(source, adapters={"task": adapter}, precisions=["fp32"], out=out)
    return Embedder(out, precision="fp32", threads=1), [str(w.message) for w in said]


QUERIES = ["query", "value"]
PROJECTIONS = ["q_proj", "v_proj"]
KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], str]] = {
    "BERT's classifier": (
        *("bert", "AutoModelForSequenceClassification"),
        *({"task_type": "SEQ_CLS", "target_modules": QUERIES}, {}, "classifier"),
    ),
    "BERT's classifier, all Linears, DoRA": (
        *("bert", "AutoModelForSequenceClassification"),
        {"task_type": "SEQ_CLS", "target_modules": "all-linear", "use_dora": True},
        *({}, "classifier, pooler"),
    ),
    "BERT's answers": (
        *("bert", "AutoModelForQuestionAnswering"),
        *(
            {"task_type": "QUESTION_ANS", "target_modules": QUERIES, "bias": "all"},
            {},
            "qa_outputs",
        ),
    ),
    "BERT's words, all Linears": (
        *("bert", "AutoModelForMaskedLM"),
        *({"target_modules": r".*(query|dense|decoder)"}, {}, "cls"),
    ),
    "BERT's words, whole head": (
        *("bert", "AutoModelForMaskedLM"),
        *({"target_modules": QUERIES, "modules_to_save": ["cls", "LayerNorm"]}, {}, "cls"),
    ),
    "BERT's pooler": (
        *("bert", "AutoModel"),
        *({"target_modules": "all-linear"}, {}, "pooler; if it was trained for pooler_output, "),
    ),
    "XLM-R's classifier of two layers": (
        *("xlm-roberta", "AutoModelForSequenceClassification"),
        *({"task_type": "SEQ_CLS", "target_modules": "all-linear"}, {}, "classifier"),
    ),
    "XLM-R's words": (
        *("xlm-roberta", "AutoModelForMaskedLM"),
        *({"target_modules": [*QUERIES, "lm_head.dense"]}, {}, "lm_head"),
    ),
    "ModernBERT's classifier": (
        *("modernbert", "AutoModelForSequenceClassification"),
        *({"task_type": "SEQ_CLS", "target_modules": "all-linear"}, {}, "classifier, head"),
    ),
    "ModernBERT's words": (
        *("modernbert", "AutoModelForMaskedLM"),
        *(
            {"target_modules": ["Wqkv"], "modules_to_save": ["head", "decoder"]},
            {},
            "decoder, head",
        ),
    ),
    "Qwen2's score": (
        *("qwen2", "AutoModelForSequenceClassification"),
        *({"task_type": "SEQ_CLS", "target_modules": PROJECTIONS}, {}, "score"),
    ),
    "Qwen2's words, tied, both saved": (
        *("qwen2", "AutoModelForCausalLM"),
        {
            "task_type": "CAUSAL_LM",
            "target_modules": PROJECTIONS,
            "modules_to_save": ["embed_tokens", "lm_head"],
        },
        *({"tie_word_embeddings": True}, "lm_head"),
    ),
    "Qwen2's words, tied, LoRA on both": (
        *("qwen2", "AutoModelForCausalLM"),
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        *({"tie_word_embeddings": True}, "lm_head"),
    ),
    "Qwen2's words, LoRA on the head": (
        *("qwen2", "AutoModelForCausalLM"),
        *({"target_modules": [*PROJECTIONS, "lm_head"]}, {}, "lm_head"),
    ),
    "trained rows of the table": (
        *("bert", "AutoModel"),
        {"target_modules": QUERIES, "trainable_token_indices": {"word_embeddings": [5, 90, 7]}},
        *({}, ""),
    ),
    "trained rows of the table, tied": (
        *("qwen2", "AutoModelForCausalLM"),
        {"target_modules": PROJECTIONS, "trainable_token_indices": [5, 90, 7]},
        *({"tie_word_embeddings": True}, ""),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_pefts_backbone(
    kind: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    family, auto, options, loading, left_out = KINDS[kind]
    adapted = train(sources[family], tmp_path / "adapter", auto, options, **loading)

    model, said = exported(sources[family], tmp_path / "adapter", tmp_path / "bundle")

    assert cosines(model.encode(TEXTS), reference(sources[family], adapted)).min() >= BOUND
    assert cosines(model.encode(TEXTS), Reference(sources[family]).encode(TEXTS)).min() < 0.999
    notes = [note for note in said if "left out" in note]
    assert len(notes) == bool(left_out)
    assert all(f"left out what no vector depends on: {left_out}" in note for note in notes)


@pytest.mark.slow
def test_an_untrained_head_is_left_out_without_a_word(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    adapted = train(
        sources["bert"], tmp_path / "adapter", "AutoModel", {"target_modules": "all-linear"}
    )
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.pooler.dense.lora_B.weight"].zero_()
    save_file(tensors, file)

    model, said = exported(sources["bert"], tmp_path / "adapter", tmp_path / "bundle")

    assert said == []
    assert cosines(model.encode(TEXTS), reference(sources["bert"], adapted)).min() >= BOUND


def test_a_module_that_may_make_the_vector_is_no_head(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    train(sources["bert"], tmp_path / "adapter", "AutoModel", {"target_modules": QUERIES})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.projection.weight": torch.ones(8, 32)}, file)

    with pytest.raises(AdapterError, match=r"projection\.weight: finds no tensor of the model"):
        exported(sources["bert"], tmp_path / "adapter", tmp_path / "bundle")


@pytest.mark.parametrize(
    ("rows", "change", "expected"),
    [
        (
            {"word_embeddings": [5, 6]},
            {},
            "shape [3, 32], expected [2, 32] by trainable_token_indices",
        ),
        ({"other": [1, 2, 3]}, {}, "adapter_config.json names no tokens for it"),
        (
            {"word_embeddings": [5, 6, 400]},
            {},
            "token 400, the model has 96: the vocabulary was resized",
        ),
    ],
    ids=["another number of rows", "another table", "a token beyond the table"],
)
def test_trained_rows_that_do_not_fit_are_named(
    rows: dict[str, list[int]],
    change: dict[str, Any],
    expected: str,
    sources: dict[str, Path],
    tmp_path: Path,
) -> None:
    options = {
        "target_modules": QUERIES,
        "trainable_token_indices": {"word_embeddings": [5, 90, 7]},
    }
    train(sources["bert"], tmp_path / "adapter", "AutoModel", options)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "trainable_token_indices": rows})
    )

    with pytest.raises(AdapterError) as caught:
        exported(sources["bert"], tmp_path / "adapter", tmp_path / "bundle")

    assert expected in str(caught.value)


def run_command(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a shell's command in a folder, and what it gives to ``python`` in this process, which has torch."""
    python = folder / "python"
    python.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n')
    python.chmod(0o755)
    path = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, shell=True, check=True, cwd=folder, env=path, capture_output=True, text=True
    )
    option, code, *arguments = done.stdout.split("\0")[:-1]
    assert option == "-c"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(code, {"__name__": "__main__"})


@pytest.mark.slow
def test_a_resized_vocabulary_is_refused_with_a_command_that_merges_it(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = sources["qwen2"], tmp_path / "the adapter"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["[new]"])
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(len(tokenizer))
    options = {"r": 3, "target_modules": PROJECTIONS, "modules_to_save": ["embed_tokens"]}
    adapted = get_peft_model(model, LoraConfig(**options)).eval()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    with pytest.raises(
        AdapterError, match="97 tokens, the model has 96: the vocabulary was res"
    ) as caught:
        exported(source, folder, tmp_path / "bundle")

    command = "cp " + str(caught.value).partition(": cp ")[2]
    run_command(command, tmp_path, monkeypatch)
    merged = tmp_path / "MERGED"
    export_bundle(merged, adapters={"task": None}, precisions=["fp32"], out=tmp_path / "bundle")
    ours = Embedder(tmp_path / "bundle", precision="fp32", threads=1).encode([*TEXTS, "a[new]b"])
    torchs = Reference(merged)
    torchs.model = adapted.get_base_model().base_model
    assert cosines(ours, torchs.encode([*TEXTS, "a[new]b"])).min() >= BOUND
