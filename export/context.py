"""One call's export, and what follows from its request and its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedge.export.graph.scheme import Float16Scheme, Scheme
from embedge.export.model import Model
from embedge.export.options import INT4, WIDE_MODEL, Request
from embedge.export.progress import Progress
from embedge.export.schemes.int8 import SmoothingConstants
from embedge.export.schemes.registry import make_scheme
from embedge.runtime.bundle.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class ExportContext:
    """An export after everything was checked and before anything is written.

    Attributes:
        request: what was asked for.
        model: what was read.
        old: manifest of the bundle that is added to, or ``None``.
        progress: takes steps and notes.
        constants: those of int8 inputs, filled by the first precision that needs them.
    """

    request: Request
    model: Model
    old: Manifest | None
    progress: Progress
    constants: dict[str, SmoothingConstants] = field(default_factory=dict)

    @property
    def block_size(self) -> int:
        """Input channels that share a scale at int4."""
        wide = self.model.family.hidden_size >= WIDE_MODEL
        return self.request.int4_block_size or (128 if wide else 32)

    def methods(self, *, calibrated: bool) -> dict[str, str]:
        """How weights are rounded, "gptq" or "rtn", for "int8" and "int4"."""
        if not calibrated:
            return dict.fromkeys(("int8", "int4"), "rtn")
        family = self.model.family
        rotated = bool(family.streams()) and family.hidden_size < WIDE_MODEL
        int8 = self.request.int8_method or ("gptq" if rotated else "rtn")
        return {"int8": int8, "int4": self.request.int4_method}

    def scheme(
        self, precision: str, *, keep: Mapping[str, str] | None = None, calibrated: bool = False
    ) -> Scheme:
        """How a precision stores and runs Linears and tables.

        Args:
            precision: its name.
            keep: precisions by pattern, where they are not the request's.
            calibrated: whether calibration's constants and methods are used.
        """
        return make_scheme(
            precision,
            constants=self.constants if calibrated else {},
            int4_block_size=self.block_size,
            methods=self.methods(calibrated=calibrated),
            keep=self.request.keep if keep is None else keep,
        )

    def tower_form(self, precision: str) -> Scheme:
        """That of the vision tower: images lose more than texts, so no 4 bits but 8, or float16."""
        if precision == "int4-fp16":
            return Float16Scheme(rotates=True)
        return self.scheme("int8" if precision == "int4" else precision)

    def options(self, precision: str, *, calibrated: bool) -> dict[str, Any]:
        """What the manifest says about how a precision was made."""
        request = self.request
        options: dict[str, Any] = {}
        if precision in ("int8", *INT4):
            kind = request.calibration
            named = kind.name if isinstance(kind, Path) else kind
            options["calibration"] = named if calibrated else "none"
            options["keep"] = dict(request.keep)
            method = "int8" if precision == "int8" else "int4"
            options["method"] = self.methods(calibrated=calibrated)[method]
            options["rotation"] = bool(self.model.family.streams())
        if precision in INT4:
            options["block_size"] = self.block_size
        return options


__all__ = ["ExportContext"]
