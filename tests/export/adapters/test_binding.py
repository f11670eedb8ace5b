"""Whatever cannot be merged exactly is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedge.export.adapters.adapter import Adapter
from embedge.export.errors import AdapterError
from embedge.export.source.checkpoint import Checkpoint
from tests.helpers.peft_models import BOUND, QUERY, bind, edit_config, edit_weights, save_adapter


def test_keys_with_the_adapters_name_in_them_are_read(tmp_path: Path) -> None:
    """A raw state_dict, as older tools save it, has ``lora_A.default.weight``."""
    merged = save_adapter(
        tmp_path, use_dora=True, modules_to_save=["pooler"], target_modules=["query"]
    )

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            new = key.replace(".lora_A.", ".lora_A.default.").replace(
                ".lora_B.", ".lora_B.default."
            )
            new = new.replace("magnitude_vector", "magnitude_vector.default.weight")
            new = new.replace("pooler.dense", "pooler.modules_to_save.default.dense")
            tensors[new] = tensors.pop(key)

    edit_weights(tmp_path, rename)

    bound = bind(tmp_path)

    assert "pooler.dense.weight" in bound.touched
    assert all(np.abs(bound.read(key) - merged[key].numpy()).max() <= BOUND for key in bound.keys())


MISFITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a key of no tensor": (
        lambda t: t.update({"base_model.model.pooler.missing.weight": torch.ones(2)}),
        "base_model.model.pooler.missing.weight: finds no tensor of the model",
    ),
    "LoRA on no tensor": (
        lambda t: t.update(
            {f"{QUERY}x.lora_{f}.weight": t[f"{QUERY}.lora_{f}.weight"].clone() for f in "AB"}
        ),
        f"{QUERY}x.lora_A.weight: finds no tensor of the model",
    ),
    "A without B": (
        lambda t: t.pop(f"{QUERY}.lora_B.weight"),
        "encoder.layer.0.attention.self.query: has lora_A but no lora_B",
    ),
    "a shape": (
        lambda t: t.update({f"{QUERY}.lora_B.weight": torch.ones(40, 3)}),
        f"{QUERY}.lora_A.weight, {QUERY}.lora_B.weight: their product of shape [40, 24] does not "
        "fit encoder.layer.0.attention.self.query.weight of shape [24, 24]",
    ),
    "the shape of a full tensor": (
        lambda t: t.update({"base_model.model.pooler.dense.weight": torch.ones(24, 25)}),
        "base_model.model.pooler.dense.weight: shape [24, 25] does not "
        "fit pooler.dense.weight of shape [24, 24]",
    ),
    "a rank unlike the config": (
        lambda t: t.update(
            {
                f"{QUERY}.lora_A.weight": torch.ones(2, 24),
                f"{QUERY}.lora_B.weight": torch.ones(24, 2),
            }
        ),
        "encoder.layer.0.attention.self.query: rank 2 in the weights, 3 by adapter_config.json; set r "
        "and rank_pattern in adapter_config.json as they were in training",
    ),
    "a kind of key that PEFT's LoRA does not have": (
        lambda t: t.update({f"{QUERY}.lora_diag": torch.ones(3)}),
        f"{QUERY}.lora_diag: not a key that PEFT's LoRA has",
    ),
    "a magnitude without DoRA": (
        lambda t: t.update({f"{QUERY}.lora_magnitude_vector": torch.ones(24)}),
        f"{QUERY}.lora_magnitude_vector: not used, adapter_config.json does not set use_dora",
    ),
    "a LoRA bias without lora_bias": (
        lambda t: t.update({f"{QUERY}.lora_B.bias": torch.ones(24)}),
        f"{QUERY}.lora_B.bias: not used, adapter_config.json does not set lora_bias",
    ),
    "a bias where PEFT reads the base layer's": (
        lambda t: t.update({f"{QUERY}.bias": torch.ones(24)}),
        f"{QUERY}.bias: this module has LoRA, where PEFT reads only {QUERY}.base_layer.bias",
    ),
    "a base layer's tensor without LoRA": (
        lambda t: t.update({"base_model.model.pooler.dense.base_layer.bias": torch.ones(24)}),
        "base_model.model.pooler.dense.base_layer.bias: a base layer's tensor, but the file has "
        "no LoRA for pooler.dense",
    ),
    "two adapters in one file": (
        lambda t: t.update({f"{QUERY}.lora_A.other.weight": torch.ones(3, 24)}),
        f"{QUERY}.lora_A.weight: a second lora_A beside "
        f"{QUERY}.lora_A.other.weight; is it another adapter's?",
    ),
    "two values for one tensor": (
        lambda t: t.update(
            {
                f"base_model.model.{m}.dense.bias": torch.full((24,), float(i))
                for i, m in enumerate(["pooler", "pooler.modules_to_save"])
            }
        ),
        "base_model.model.pooler.modules_to_save.dense.bias: another value for pooler.dense.bias "
        "than base_model.model.pooler.dense.bias",
    ),
    "the same module under two names": (
        lambda t: t.update(
            {
                f"base_model.model.bert.{QUERY[17:]}.lora_{f}.weight": t[
                    f"{QUERY}.lora_{f}.weight"
                ].clone()
                for f in "AB"
            }
        ),
        f"{QUERY}.lora_A.weight: a second LoRA for encoder.layer.0.attention.self.query.weight "
        f"beside base_model.model.bert.{QUERY[17:]}.lora_A.weight",
    ),
    "LoRA on a convolution": (
        lambda t: t.update(
            {
                f"{QUERY}.lora_A.weight": torch.ones(3, 24, 1),
                f"{QUERY}.lora_B.weight": torch.ones(24, 3, 1),
            }
        ),
        f"{QUERY}.lora_A.weight: shape [3, 24, 1], expected [rank, "
        "in]; LoRA on convolutions is not supported",
    ),
    "NaN": (
        lambda t: t[f"{QUERY}.lora_B.weight"].__setitem__((4, 1), float("nan")),
        f"tensor '{QUERY}.lora_B.weight' holds nan at [4, 1], expected finite numbers",
    ),
    "infinity": (
        lambda t: t[f"{QUERY}.lora_A.weight"].__setitem__((0, 0), float("inf")),
        f"tensor '{QUERY}.lora_A.weight' holds inf at [0, 0], expected finite numbers",
    ),
    "a copy of the base without the trained tensor": (
        lambda t: t.update({"base_model.model.pooler.original_module.dense.bias": torch.ones(24)}),
        "base_model.model.pooler.original_module.dense.bias: a copy of "
        "the base's tensor without the trained one",
    ),
    "integers": (
        lambda t: t.update(
            {"base_model.model.pooler.dense.bias": torch.ones(24, dtype=torch.int64)}
        ),
        "tensor 'base_model.model.pooler.dense.bias' is I64, expected F16, BF16, F32 or F64",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_whatever_does_not_fit_is_an_error_that_names_it(misfit: str, tmp_path: Path) -> None:
    change, expected = MISFITS[misfit]
    save_adapter(tmp_path, target_modules=["query"])
    edit_weights(tmp_path, change)

    with pytest.raises(AdapterError) as caught:
        bind(tmp_path)

    assert expected in str(caught.value)
    assert "1 problem:" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": ["query"]},
        {"target_modules": r".*\.query"},
        {"exclude_modules": ["dense"]},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_tensors_that_peft_leaves_out_are_refused_by_name(
    change: dict[str, Any], tmp_path: Path
) -> None:
    save_adapter(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(AdapterError, match="PEFT leaves it out.*set target_modules in"):
        bind(tmp_path)


def test_all_misfits_stand_in_one_message(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"])

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(f"{QUERY}.lora_A.weight")
        tensors["classifier.weight"] = torch.ones(2, 24)

    edit_weights(tmp_path, spoil)

    with pytest.raises(AdapterError) as caught:
        bind(tmp_path)

    assert str(caught.value) == (
        f"adapter 'code' ({tmp_path / 'adapter'}) does not fit the model 'base', 2 problems: "
        "classifier.weight: finds no tensor of the model; encoder.layer.0.attention.self.query: "
        "has lora_B but no lora_A; use it with the model that it was trained on, as PEFT saved it"
    )


def test_an_adapter_of_another_model_is_one_problem_that_names_both(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"])

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("encoder.layer", "layers")] = tensors.pop(key)

    edit_weights(tmp_path, rename)
    edit_config(tmp_path, base_model_name_or_path="someone/decoder")

    with pytest.raises(AdapterError) as caught:
        bind(tmp_path)

    assert str(caught.value) == (
        f"adapter 'code' ({tmp_path / 'adapter'}) does not fit the model 'base', 1 problem: none of "
        "its 2 modules is in this bert: it was trained on 'decoder' and has "
        "layers.0.attention.self.query.weight, the model has "
        "encoder.layer.0.attention.output.dense.weight; use it with the model that it was trained on, "
        "as PEFT saved it"
    )


def test_a_model_whose_tensors_it_finds_is_not_another_one(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"])
    edit_config(tmp_path, r=2)
    edit_weights(tmp_path, lambda t: t.update({"classifier.weight": torch.ones(2)}))

    with pytest.raises(
        AdapterError, match=r"3 problems: classifier\.weight: finds no tensor of the"
    ):
        bind(tmp_path)


def test_of_many_problems_the_first_are_listed_and_all_counted(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"])
    edit_weights(
        tmp_path, lambda t: t.update({f"classifier.{i}.weight": torch.ones(2) for i in range(9)})
    )

    with pytest.raises(AdapterError) as caught:
        bind(tmp_path)

    assert "9 problems: classifier.0.weight: finds no tensor" in str(caught.value)
    assert "classifier.3.weight: finds no tensor of the model; and 5 more; use it" in str(
        caught.value
    )


def test_a_missing_magnitude_is_an_error(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"])
    edit_config(tmp_path, use_dora=True)

    with pytest.raises(
        AdapterError,
        match=r"0\.attention\.self\.query: has lora_A, lora_B but no lora_magnitude_vector",
    ):
        bind(tmp_path)


def test_a_missing_tensor_of_modules_to_save_is_an_error(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"], modules_to_save=["pooler"])
    edit_weights(tmp_path, lambda t: t.pop("base_model.model.pooler.dense.bias"))

    with pytest.raises(
        AdapterError,
        match=r"pooler\.dense\.bias: belongs to modules_to_save 'pooler', but the adapter",
    ):
        bind(tmp_path)


def test_a_name_that_finds_several_tensors_is_an_error(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"])
    adapter, checkpoint = (
        Adapter.load(tmp_path / "adapter", "code"),
        Checkpoint(tmp_path / "base"),
    )

    def too_short(key: str) -> str:
        return ".".join(key.split(".")[-2:])

    with pytest.raises(
        AdapterError,
        match=r"finds several tensors of the model: encoder\.layer\.0\S+, encoder\.layer\.1",
    ):
        adapter.bind(checkpoint, too_short)
