"""Adapters that cannot be merged exactly are refused by name, before their weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from embedge.export.adapters import refused_options as tables
from embedge.export.adapters.adapter import Adapter
from embedge.export.adapters.config import read_peft_config
from embedge.export.errors import AdapterError

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': PiSSA changes the base"),
    "PiSSA, fast": (
        {"init_lora_weights": "pissa_niter_16"},
        "init_lora_weights='pissa_niter_16': PiSSA changes",
    ),
    "OLoRA": ({"init_lora_weights": "olora"}, "OLoRA changes the base"),
    "CorDA": ({"init_lora_weights": "corda"}, "CorDA changes the base"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "LoftQ changes the base"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "LoRA-GA changes the base"),
    "an unknown initialization": (
        {"init_lora_weights": "brand_new"},
        "'brand_new': an unknown initialization",
    ),
    "LoftQ's config": (
        {"loftq_config": {"loftq_bits": 4}},
        "loftq_config={'loftq_bits': 4}: LoftQ changes",
    ),
    "CorDA's config": ({"corda_config": {"corda_method": "ipm"}}, "corda_config"),
    "LoRA-GA's config": ({"lora_ga_config": {"scale": "stable"}}, "lora_ga_config"),
    "KaSA": (
        {"kasa_config": {"beta": 1e-4}},
        "kasa_config={'beta': 0.0001}: KaSA changes the base",
    ),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens=[1, 2]: acts"),
    "layer replication": ({"layer_replication": [[0, 1]]}, "layer_replication=[[0, 1]]: repeats"),
    "target parameters": ({"target_parameters": ["w"]}, "target_parameters"),
    "trainable tokens that are none": (
        {"trainable_token_indices": {"embed_tokens": [3, -1]}},
        "trainable_token_indices is {'embed_tokens': [3, -1]}, expected a list of different token ids",
    ),
    "Megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "Arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    "QA-LoRA": ({"use_qalora": True}, "use_qalora=True"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "MonteCLoRA": ({"monteclora_config": {"num_samples": 8}}, "monteclora_config"),
    "a field of another PEFT": (
        {"use_brand_new": 0.5},
        "use_brand_new=0.5: a setting that embedge does not know",
    ),
    "another tuner": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA adapters are supported"),
    "no tuner": ({"peft_type": None}, "peft_type is None"),
    "DoRA with lora_bias": ({"use_dora": True, "lora_bias": True}, "use_dora with lora_bias"),
    "a rank of nothing": ({"r": 0}, "r is 0, expected a positive whole number"),
    "a rank pattern of nothing": ({"rank_pattern": {"query": -1}}, "rank_pattern['query'] is -1"),
    "an alpha that is no number": (
        {"lora_alpha": "8"},
        "lora_alpha is '8', expected a finite number",
    ),
    "a pattern that is no expression": (
        {"alpha_pattern": {"(": 1}},
        "alpha_pattern has the pattern '('",
    ),
    "patterns that are no mapping": (
        {"rank_pattern": [1]},
        "rank_pattern is [1], expected a mapping",
    ),
    "a bias of another kind": ({"bias": "some"}, "bias is 'some', expected none, all or lora_only"),
    "a flag that is a number": ({"use_dora": 2}, "use_dora is 2, expected true or false"),
    "modules that are no list": (
        {"modules_to_save": "pooler"},
        "modules_to_save is 'pooler', expected a list",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name_before_the_weights_are_read(
    kind: str, tmp_path: Path
) -> None:
    fields, expected = REFUSED[kind]
    (tmp_path / "adapter").mkdir()
    plain = {"peft_type": "LORA", "r": 3, "init_lora_weights": True}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(plain | fields))

    with pytest.raises(AdapterError) as caught:  # not: that there are no weights
        Adapter.load(tmp_path / "adapter", "code")

    assert expected in str(caught.value)
    assert "adapter_config.json" in str(caught.value)


def test_all_refused_settings_stand_in_one_message(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(
        json.dumps({"peft_type": "LORA", "init_lora_weights": "olora", "use_qalora": True})
    )

    with pytest.raises(AdapterError) as caught:
        Adapter.load(tmp_path, "code")

    assert str(caught.value) == (
        f"{file}: cannot be merged exactly: init_lora_weights='olora': OLoRA changes the base "
        "weights when it is set up, so the published base is not what it was trained on; "
        "use_qalora=True: pools the inputs of a quantized base (QA-LoRA), which is not "
        "implemented; save it as a plain LoRA with PEFT (save_pretrained(…, "
        "path_initial_model_for_weight_conversion=…)), or merge it into a copy of the model with PEFT "
        "and torch, and export MERGED as a model of its own (--no-adapter NAME): cp -rL MODEL MERGED && "
        'python -c "import sys, peft, transformers as t; b, a, new = sys.argv[1:]; '
        "m = t.AutoModel.from_pretrained(b); "
        'peft.PeftModel.from_pretrained(m, a).merge_and_unload().save_pretrained(new)" '
        f"MODEL {tmp_path} MERGED"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"alora_invocation_tokens": [1]},
        {"peft_type": "PREFIX_TUNING"},
        {"arrow_config": {"top_k": 3}},
    ],
)
def test_what_no_weight_can_stand_for_is_not_advised_to_be_merged(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA"} | fields))

    with pytest.raises(
        AdapterError, match="train a plain LoRA for this task, or export it without"
    ):
        Adapter.load(tmp_path, "code")


def test_every_field_of_pefts_lora_config_is_judged() -> None:
    """A new field has to be put into one of the tables, whatever its default."""
    judged = tables._USED | tables._HARMLESS | tables._REFUSED.keys()
    assert tables._REFUSED.keys() >= tables._NO_WEIGHT

    assert set(LoraConfig().to_dict()) <= judged
    assert not tables._USED & tables._HARMLESS
    assert not (tables._USED | tables._HARMLESS) & tables._REFUSED.keys()


TARGETS: dict[str, dict[str, Any]] = {
    "ends of names": {"target_modules": ["query", "layer.1.attention.self.value"]},
    "an expression": {"target_modules": r".*\.0\..*(query|value)"},
    "all Linears": {"target_modules": "all-linear"},
    "others excluded": {"target_modules": ["query", "value"], "exclude_modules": ["value"]},
    "an expression excluded": {"target_modules": ["query"], "exclude_modules": r".*layer\.1\..*"},
    "one layer": {"target_modules": ["query", "value"], "layers_to_transform": 1},
    "layers by name": {
        "target_modules": ["query"],
        "layers_to_transform": [0],
        "layers_pattern": "layer",
    },
    "layers of another name": {
        "target_modules": ["query"],
        "layers_to_transform": [0],
        "layers_pattern": ["blocks"],
    },
}


@pytest.mark.parametrize("case", TARGETS)
def test_what_is_adapted_is_what_peft_adapts(case: str, tmp_path: Path) -> None:
    config = LoraConfig(**TARGETS[case])
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", **TARGETS[case]}))
    settings = read_peft_config(file)
    modules = [
        f"{prefix}encoder.layer.{layer}.attention.self.{name}"
        for prefix in ("", "bert.")
        for layer in (0, 1)
        for name in ("query", "key", "value")
    ]
    everything = TARGETS[case]["target_modules"] == "all-linear"
    for module in modules:
        expected = everything or bool(check_target_module_exists(config, module))
        assert settings.targets.names(module) == expected, module


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("target_modules", "(", "target_modules is '\\(', expected a regular expression"),
        ("target_modules", [1], "target_modules is \\[1\\], expected a list of module names"),
        ("exclude_modules", 3, "exclude_modules is 3, expected a list of module names"),
        ("layers_to_transform", "1", "layers_to_transform is '1', expected a layer's number"),
    ],
)
def test_targets_of_another_type_are_refused(
    field: str, value: Any, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", field: value}))
    with pytest.raises(AdapterError, match=message):
        read_peft_config(file)
