"""A tiny real model: BERT with two layers and random weights, a WordPiece tokenizer, files of
sentence-transformers, a random LoRA adapter whose B is not zero and whose alpha is not its rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from embedge.bench.measure import latency
from embedge.bench.report.report import Report, Row
from embedge.runtime.tuning.turns import take_turns

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
WORDS += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
MAX_LENGTH = 24


@pytest.fixture(scope="module")
def one_core() -> bool:
    return True


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module", autouse=True)
def _no_pauses() -> Iterator[None]:
    """Runs follow each other at once; what their times are worth is no matter in tests."""

    def at_once(*arguments: Any, **options: Any) -> Iterator[None]:
        return take_turns(*arguments, **(options | {"pause_s": 0, "block_s": 0}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "take_turns", at_once)
        yield


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(8)  # what a careless file ships; nobody may follow it
    tokenizer.enable_padding(length=12)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
    ).save_pretrained(folder)


def write_modules(folder: Path, pooling: str, width: int = 32) -> None:
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, ("", "1_Pooling", "2_Normalize"), strict=True))
    ]
    (folder / "1_Pooling").mkdir()
    (folder / "2_Normalize").mkdir()
    flags = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}
    documents: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": MAX_LENGTH, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": "q ", "passage": "p "},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            **{f"pooling_mode_{flag}": name == pooling for name, flag in flags.items()},
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function from a pooling and a width to a model folder."""

    def make(pooling: str = "mean", width: int = 32) -> Path:
        folder = tmp_path_factory.mktemp(f"tiny-{pooling}-1")
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(WORDS),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.3,  # far from linear, so that mistakes show
        )
        BertModel(config).save_pretrained(folder)
        write_tokenizer(folder)
        write_modules(folder, pooling, width)
        return folder

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., Path]) -> Path:
    """A tiny mean-pooled model."""
    return make_model("mean")


@pytest.fixture(scope="session")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of rank 3 and alpha 5 for it."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["query", "value", "intermediate.dense"])
    peft_model = get_peft_model(BertModel.from_pretrained(model), config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    peft_model.save_pretrained(folder)
    return folder


def example_row(system: str, role: str, task: str = "search", **changes: Any) -> Row:
    fidelity = {"cosine_mean": 0.9995, "cosine_min": 0.998, "pair_spearman": 0.999}
    at = {"value": 0.8, "reference": 0.801, "difference": -0.001, "low": -0.003, "high": 0.001}
    shape = {"median_ms": 4.0, "p95_ms": 5.0, "rounds": 15, "texts_per_s": 250.0}
    ratios = {"torch fp32": 3.0, "ORT dynamic int8": 1.02}
    values: dict[str, Any] = {
        "bytes_on_disk": 23_000_000,
        "single": {"p50_ms": 2.5, "p95_ms": 4.0, "texts": 10},
        "shapes": {"32x32": shape | {"tokens_per_s": 8000.0, "times_as_fast_as": ratios}},
        "fidelity": {"32": fidelity | {"top10_overlap": 0.97}},
        "fidelity_by_kind": {"prose": {"texts": 5, "cosine_mean": 0.9995, "cosine_min": 0.998}},
        "quality": {"held-out": {"metric": "ndcg@10", "items": 50, "dims": {"32": at}}},
        "invariance": {"cosine_min": 1.0, "max_difference": 0.0, "texts": 5.0},
    }
    return Row(task=task, system=system, role=role, **(values | changes))


@pytest.fixture
def report() -> Report:
    """A small report with made-up figures."""
    return Report(
        bundle="tiny-bundle",
        source={"name": "tiny-1", "license": None},
        machine={"processor": "a processor", "threads": 2, "instructions": ["avx2"]},
        versions={"numpy": "2.0"},
        settings={"texts": 500},
        notes=("only a part was measured",),
        sizes={"fp32_weights": 90_000_000, "int8": 45_000_000},
        process={"embedge int8": {"imported_ms": 100.0, "first_vector_ms": 300.0}},
        rows=(
            example_row("torch fp32", "torch", bytes_on_disk=90_000_000),
            example_row("ORT dynamic int8", "peer"),
            example_row("embedge int8", "embedge", precision="int8"),
        ),
    )
