"""What every peer starts from: the merged model of one task, as torch and as ONNX."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from embedge.bench.systems.reference import Reference
from embedge.bench.systems.source import Source
from embedge.bench.systems.tokens import TextTokens

__all__ = ["PeerContext", "installed"]


@dataclass(kw_only=True)
class PeerContext:
    """One task's merged model and a folder for what peers make of it.

    Attributes:
        merged: torch, fp32, the adapter added to the weights.
        threads: threads of every session.
        workdir: an existing folder, the caller's to remove.
    """

    merged: Reference
    threads: int
    workdir: Path
    _exported: Path | None = field(default=None, init=False)

    @property
    def source(self) -> Source:
        """The model's settings."""
        return self.merged.source

    @property
    def tokens(self) -> TextTokens:
        """The model's tokenizer."""
        return self.merged.tokens

    @property
    def config(self) -> Any:
        """The transformer's configuration."""
        return self.merged.backbone.config

    def onnx(self) -> Path:
        """Return an fp32 export, made on the first call: optimum's where it is installed, else torch's."""
        if self._exported is None:
            folder = self.workdir / "exported"
            export = _by_optimum if installed("optimum.exporters.onnx") else _by_torch
            export(self.merged.backbone, folder)
            self._exported = folder / "model.onnx"
        return self._exported


def installed(name: str) -> bool:
    """Whether there is a module of that name, in packages that need not be there and go with the others."""
    if name.startswith("optimum.") and transformers_version() >= (4, 58):
        return False  # optimum-onnx takes none newer
    try:
        return find_spec(name) is not None
    except ImportError:  # a parent package is missing
        return False


def transformers_version() -> tuple[int, ...]:
    """Its first two numbers."""
    return tuple(map(int, version("transformers").split(".")[:2]))


def _by_optimum(model: Any, folder: Path) -> None:
    logging.getLogger("optimum").setLevel(logging.ERROR)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optimum.exporters.onnx import onnx_export_from_model

        onnx_export_from_model(
            model, folder, task="feature-extraction", opset=18, do_validation=False
        )


class _HiddenStates(torch.nn.Module):
    """A backbone with two inputs and one output."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden


def _by_torch(model: Any, folder: Path) -> None:
    """``torch.onnx``, which follows the classes of every transformers; it needs onnxscript."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    ids = torch.arange(14).reshape(2, 7)
    names = ["input_ids", "attention_mask"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _HiddenStates(model).eval(),
            (ids, torch.ones_like(ids)),  # two tensors: one would be one input of the graph
            folder / "model.onnx",
            input_names=names,
            output_names=["last_hidden_state"],
            dynamic_shapes=dict.fromkeys(names, axes),
            dynamo=True,
            opset_version=18,
            external_data=True,
            verbose=False,
        )
