"""An export that was checked, before it writes: how each precision is made, by options, model and calibration."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedge.export.calibration.sensitivity import candidates, check_budget, within_budget
from embedge.export.calibration.smoothing import smoothing_constants
from embedge.export.calibration.tokens import TokenBatch
from embedge.export.graph.scheme import BranchRanks, Scheme
from embedge.export.model import Model
from embedge.export.options import ExportOptions
from embedge.export.progress import Progress
from embedge.export.schemes.branch import default_branch_rank, joint_rank, padded_rank, ranks_of
from embedge.export.schemes.floats import Float16Scheme
from embedge.export.schemes.int4 import Int4Scheme
from embedge.export.schemes.registry import BRANCHED, PRECISIONS, make_scheme
from embedge.export.schemes.smoothing_constants import SmoothingConstants
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.bundle.task_tensors import read_task_tensors
from embedge.runtime.errors import EmbedgeValueError

_WIDE = 1536  # hidden size
_INT8_SWEPT = (
    512  # hidden size below which int8 has sweeps: what they win there is little for their minutes
)
_SWEEPS = 2  # of coordinate descent, each about the time of GPTQ's arithmetic
ARITHMETIC = 1  # of shared graphs: changes with rotation, smoothing or folding, which added tasks have to match


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """An export after everything was checked and before anything is written.

    Attributes:
        options: what was asked for.
        model: what was read.
        old: manifest of the bundle that is added to, or ``None``.
        progress: takes steps and notes.
        constants: those of int8 inputs, filled by the first precision that needs them.
    """

    options: ExportOptions
    model: Model
    old: Manifest | None
    progress: Progress
    constants: dict[tuple[str, ...], SmoothingConstants] = field(default_factory=dict)

    @property
    def wide(self) -> bool:
        """Whether what costs minutes on a wide model and wins little there is left out."""
        return self.model.architecture.hidden_size >= _WIDE

    @property
    def block_size(self) -> int:
        """Input channels that share a scale at int4."""
        return self.options.int4_block_size or (128 if self.wide else 32)

    @property
    def shared(self) -> bool:
        """Whether tasks share a graph."""
        return self.options.layout == "shared"

    def branch_ranks(self, precision: str) -> BranchRanks:
        """Columns of the branches of a precision.

        Where the call names none, tasks that share a graph have those of the tasks that are there; else what was
        measured to do, and what holds the adapters of all Linears that read an input.
        """
        if precision not in BRANCHED:
            return BranchRanks()
        if self.options.branch_rank is not None or not self.shared:
            return BranchRanks(least=self.options.branch_rank or 0)
        there = self.old.precisions.get(precision) if self.old else None
        if there is not None and there.task_tensors:
            file = self.options.out / next(iter(there.task_tensors.values()))
            return ranks_of(read_task_tensors(file), int(there.options.get("branch_rank", 0)))
        least = default_branch_rank(self.model.architecture.hidden_size, precision)
        needed = {
            group.label: padded_rank(max(joint_rank(w, group) for w in self.model.tasks.values()))
            for group in self.model.plain_graphs[0].linear_groups.values()
        }
        return BranchRanks(least=least, larger={n: r for n, r in needed.items() if r > least})

    def methods(self, *, calibrated: bool) -> dict[str, str]:
        """How weights are rounded, "gptq" or "rtn", for "int8" and "int4"."""
        if not calibrated:
            return dict.fromkeys(("int8", "int4"), "rtn")
        int8 = self.options.int8_method or ("rtn" if self.wide else "gptq")
        return {"int8": int8, "int4": self.options.int4_method}

    def scheme(
        self, precision: str, *, keep: Mapping[str, str] | None = None, calibrated: bool = False
    ) -> Scheme:
        """How a precision stores and runs Linears and tables.

        Args:
            precision: its name.
            keep: precisions by pattern, where they are not the options'.
            calibrated: whether calibration's constants and methods are used.
        """
        return make_scheme(
            precision,
            constants=self.constants if calibrated else {},
            int4_block_size=self.block_size,
            methods=self.methods(calibrated=calibrated),
            keep=self.options.keep if keep is None else keep,
            portable=self.options.portable,
            branch_ranks=self.branch_ranks(precision),
            sweeps=self._sweeps(precision),
        )

    def _sweeps(self, precision: str) -> int:
        narrow = self.model.architecture.hidden_size < (
            _INT8_SWEPT if precision == "int8" else _WIDE
        )
        return _SWEEPS if narrow else 0

    def calibrate(
        self, precision: str, batches: Sequence[TokenBatch], scratch: Path
    ) -> tuple[dict[str, Scheme], list[str]]:
        """The schemes of a precision's graphs as calibration decides them.

        Args:
            precision: whose weights are stored.
            batches: calibration tokens; none: data-free constants and methods.
            scratch: folder for a layer's weights.

        Returns:
            Schemes by name, the precision's own first, and the layers that a budget gives 8 bits.

        Raises:
            EmbedgeValueError: 4 bits everywhere are above the budget.
            CheckpointError: a layer's inputs are not finite.
        """
        base = self.model.weights(self.model.base, self.scheme(precision))
        budget = self.options.budget if precision == "int4" else None
        if budget is not None:
            self._smallest(budget, batches)  # refuses before the texts run
        if PRECISIONS[precision].smoothed and not self.constants:  # the same for both
            architecture = self.model.architecture.text_only()
            found = smoothing_constants(
                architecture,
                base,
                batches[::2] if self.wide else batches,  # ranges need fewer tokens than GPTQ
                scratch=scratch,
                report=self.progress.layers(
                    "calibrating int8 on the backbone", len(architecture.layers)
                ),
            )
            self.constants.update(found)
        eight_bit: list[str] = []
        if budget is not None:
            int4 = self.scheme("int4", keep={}, calibrated=True)
            assert isinstance(int4, Int4Scheme)
            layers = len(self.model.architecture.layers)
            gains = candidates(
                self.model,
                base,
                batches,
                int4=int4,
                keep=self.options.keep,
                scratch=scratch,
                report=self.progress.layers("measuring sensitivity", layers),
            )
            smallest = self._smallest(budget, batches, calibrated=True)
            eight_bit = sorted(within_budget(gains, smallest, budget))
        keep = {**self.options.keep, **{glob.escape(label): "int8" for label in eight_bit}}
        beside = () if self.branch_ranks(precision).least else PRECISIONS[precision].beside
        names = (precision, *beside)
        schemes = {n: self.scheme(n, keep=keep, calibrated=bool(batches)) for n in names}
        return schemes, eight_bit

    def _smallest(
        self, budget: int, batches: Sequence[TokenBatch], *, calibrated: bool = False
    ) -> int:
        """Bytes of a task's tensors with 4 bits everywhere; the budget has to allow them.

        Calibration adds channels that are set apart.
        """
        scheme = self.scheme("int4", calibrated=calibrated)
        weights = self.model.weights(next(iter(self.model.tasks.values())), scheme)
        g = self.model.graph(weights, scheme)
        smallest = sum(initializer.nbytes for initializer in g.initializers.values())
        check_budget(smallest, budget, branches=self.options.branch_rank is not None)
        if not batches:
            raise EmbedgeValueError(
                f"budget {budget:,} bytes: it chooses layers by calibration texts, and none of those "
                "given has a token; give others (--calibration)"
            )
        return smallest

    def tower_scheme(self, precision: str) -> Scheme:
        """That of the vision tower: images lose more than texts, so no 4 bits but 8, or float16."""
        tower = PRECISIONS[precision].tower or precision
        if tower != precision and tower == "fp16":
            return Float16Scheme(rotates=True)  # as the language tower
        return self.scheme(tower)

    def stated_options(self, precision: str, *, calibrated: bool) -> dict[str, Any]:
        """What the manifest says about how a precision was made."""
        stated: dict[str, Any] = {}
        method = PRECISIONS[precision].method
        if method is not None:
            texts = self.options.calibration
            named = texts.name if isinstance(texts, Path) else texts
            stated["calibration"] = named if calibrated else "none"
            stated["keep"] = dict(self.options.keep)
            stated["method"] = self.methods(calibrated=calibrated)[method]
            stated["rotation"] = bool(self.model.architecture.streams())
            stated |= {"portable": True} if self.options.portable else {}
            stated |= {"layout": "shared", "arithmetic": ARITHMETIC} if self.shared else {}
            rank = self.branch_ranks(precision).least
            stated |= {"branch_rank": rank} if rank else {}
        if method == "int4":
            stated["block_size"] = self.block_size
        return stated
