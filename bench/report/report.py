"""The figures of a run, as one value that goes to JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from embedge.bench.errors import BenchError

__all__ = ["REPORT_VERSION", "Report", "Row"]

REPORT_VERSION = "1.2"
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system on one task.

    Attributes:
        task: the bundle's task.
        system: name as shown.
        role: ``"embedge"``, ``"torch"`` or ``"peer"``.
        precision: of the bundle, ``None`` for other systems.
        bytes_on_disk: graph and weights of this task alone, ``None`` if unknown.
        single: ``p50_ms``, ``p95_ms``, ``p95_slow_ms`` (of the slowest time of each) of one text, tokenization
            and the prompt of ``role`` included; empty: not measured.
        shapes: ``median_ms``, ``p95_ms``, ``texts_per_s``, ``tokens_per_s``, ``rounds`` and
            ``times_of_torch_fp32`` (how many times as fast) by shape.
        fidelity: measures against the reference by dimension.
        fidelity_by_kind: cosines at full dimension by kind of text.
        quality: by evaluation file: ``metric``, ``modality``, ``items``, ``dims`` → value, reference, difference,
            low, high. All are 0…1. Of pages ``ndcg@5``, ``alignment`` and ``multi_vector`` too.
        images: of pages by ``max_pixels``: ``tokens`` a page, times of one page as in ``single``, ``quality``.
        invariance: how much a vector depends on its batch.
    """

    task: str
    system: str
    role: str
    precision: str | None = None
    bytes_on_disk: int | None = None
    single: Figures = field(default_factory=dict)
    shapes: dict[str, Figures] = field(default_factory=dict)
    fidelity: dict[str, Figures] = field(default_factory=dict)
    fidelity_by_kind: dict[str, Figures] = field(default_factory=dict)
    quality: dict[str, Figures] = field(default_factory=dict)
    invariance: Figures = field(default_factory=dict)
    images: dict[str, Figures] = field(default_factory=dict)

    @property
    def full_fidelity(self) -> Figures:
        """The measures at full dimension, empty when not measured."""
        return self.fidelity[max(self.fidelity, key=int)] if self.fidelity else {}

    @property
    def main_quality(self) -> Figures:
        """Value, reference, difference, low and high on the first set at full dimension."""
        if not self.quality:
            return {}
        dims = next(iter(self.quality.values()))["dims"]
        figures: Figures = dims[max(dims, key=int)]
        return figures


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run.

    Attributes:
        bundle: the folder's name.
        source: the manifest's ``source``.
        machine: processor, cores, threads, memory.
        versions: package to version.
        settings: what was measured and how much of it.
        notes: sentences a reader has to know.
        sizes: bytes by precision, and ``fp32_weights`` of the source.
        process: cold start, switch and memory by system.
        rows: one per task and system.
    """

    bundle: str
    source: Figures
    machine: Figures = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    settings: Figures = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    process: dict[str, Figures] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary, ``report_version`` first."""
        values = {"report_version": REPORT_VERSION, **asdict(self)}
        plain: dict[str, Any] = json.loads(json.dumps(values))  # tuples become lists
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Return the report that :meth:`to_dict` wrote.

        Raises:
            BenchError: of another major version, or not a report.
        """
        version = str(values.get("report_version"))
        if version.partition(".")[0] != REPORT_VERSION.partition(".")[0]:
            raise BenchError(f"report_version: expected {REPORT_VERSION}, found {version}")
        known = {k: v for k, v in values.items() if k in cls.__dataclass_fields__}
        rows = tuple(
            Row(**{k: v for k, v in row.items() if k in Row.__dataclass_fields__})
            for row in known.pop("rows", [])
        )
        return cls(**{**known, "notes": tuple(known.get("notes", ())), "rows": rows})

    def row(self, task: str, system: str) -> Row | None:
        """Return the row of a system on a task, ``None`` if there is none."""
        return next((r for r in self.rows if (r.task, r.system) == (task, system)), None)
