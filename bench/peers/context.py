"""What every peer starts from: the merged model of one task, as torch and as optimum's ONNX."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedge.bench.systems.reference import Reference
from embedge.bench.systems.source import Source
from embedge.bench.systems.tokens import TextTokens

__all__ = ["PeerContext"]


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
        """Return optimum's fp32 export, made on the first call."""
        if self._exported is None:
            folder = self.workdir / "optimum"
            _export(self.merged.backbone, folder)
            self._exported = folder / "model.onnx"
        return self._exported


def _export(model: Any, folder: Path) -> None:
    logging.getLogger("optimum").setLevel(logging.ERROR)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optimum.exporters.onnx import onnx_export_from_model

        onnx_export_from_model(
            model, folder, task="feature-extraction", opset=18, do_validation=False
        )
