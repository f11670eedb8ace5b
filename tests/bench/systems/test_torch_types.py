"""Which types of torch are measured: those that the device multiplies itself, or those named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from embedge.bench.errors import BenchArgumentError
from embedge.bench.systems import torch_types as module
from embedge.bench.systems.torch_types import choose_torch_types, multiplies_bfloat16


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_measured_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: native)
    notes: list[str] = []
    found = choose_torch_types(None, "cpu", notes)
    assert found == (("float32", "bfloat16") if native else ("float32",))
    assert len(notes) == (not native)
    assert native or "--torch-types float32 bfloat16" in notes[0]
    assert choose_torch_types(None, "cuda", notes) == ("float32", "bfloat16", "float16")


def test_named_types_are_measured_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: False)
    notes: list[str] = []
    assert choose_torch_types(["bfloat16", "float32"], "cpu", notes) == ("float32", "bfloat16")
    assert choose_torch_types(["none"], "cpu", notes) == ()
    assert notes == []


@pytest.mark.parametrize("wanted", [["float16"], ["float32", "int8"], ["none", "float32"]])
def test_other_types_are_refused(wanted: list[str]) -> None:
    with pytest.raises(BenchArgumentError, match="expected some of float32, bfloat16 on cpu"):
        choose_torch_types(wanted, "cpu", [])


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
    ],
)
def test_the_processor_is_asked_through_torch(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert multiplies_bfloat16() is expected
