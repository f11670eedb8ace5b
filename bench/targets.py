"""The project's measurable promises, checked on a report.

1  fp32 graphs against the independent reference: every cosine ≥ 0.999999, on ≥ 500 texts
2  int8: mean cosine ≥ 0.999 and quality within 0.3 points; int4: ≥ 0.985 and within 2 points
3  the same text alone, in mixed batches, in another order: cosine ≥ 0.999999
4  int8 ≥ 0.98× ONNX Runtime's best dynamic int8 at every shape, ≥ 2.7× torch fp32 in batches,
   from ≥ 15 rounds
5  all tasks together ≤ 0.55× (int8), 0.35× (int4) of one fp32 backbone
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from embedge.bench.errors import BenchArgumentError
from embedge.bench.report.report import Report, Row

__all__ = ["BARS", "Check", "check_bars"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One promise on one row, or in one place."""

    bar: int
    what: str
    found: str
    wanted: str
    passed: bool

    def line(self) -> str:
        """Return a line for the terminal."""
        verdict = "pass" if self.passed else "FAIL"
        return f"{verdict}  bar {self.bar}  {self.what}: {self.found} (wanted {self.wanted})"


def check_bars(report: Report, bars: Sequence[int]) -> list[Check]:
    """Return the checks of the named bars; a bar that the report cannot answer fails.

    Raises:
        BenchError: no such bar.
    """
    unknown = [bar for bar in bars if bar not in BARS]
    if unknown:
        raise BenchArgumentError(f"--bar {unknown[0]}: known are {', '.join(map(str, BARS))}")
    checks = []
    for bar in bars:
        found = list(BARS[bar](report))
        checks += found or [_unmeasured(bar)]
    return checks


def _exact(report: Report) -> Iterator[Check]:
    texts = report.settings.get("texts", 0)
    for row in _rows(report, "fp32"):
        yield _at_least(1, f"{row.task} min cosine", row.full_fidelity.get("cosine_min"), 0.999999)
        yield _at_least(1, f"{row.task} texts", texts, 500)


def _close(report: Report) -> Iterator[Check]:
    for precision, cosine, points in (("int8", 0.999, 0.3), ("int4", 0.985, 2.0)):
        for row in _rows(report, precision):
            name = f"{row.task} {precision}"
            yield _at_least(2, f"{name} mean cosine", row.full_fidelity.get("cosine_mean"), cosine)
            if not row.quality:
                yield _unmeasured(2, f"{name} quality")
            for evaluation, figures in row.quality.items():
                at = figures["dims"][max(figures["dims"], key=int)]
                lost = -at["difference"] * 100
                yield Check(
                    bar=2,
                    what=f"{name} on {evaluation}, points lost",
                    found=f"{lost:.2f}",
                    wanted=f"at most {points}",
                    passed=lost <= points,
                )


def _invariant(report: Report) -> Iterator[Check]:
    for row in report.rows:
        if row.role == "embedge":
            name = f"{row.task} {row.precision}"
            yield _at_least(3, f"{name} min cosine", row.invariance.get("cosine_min"), 0.999999)


def _fast(report: Report) -> Iterator[Check]:
    for row in _rows(report, "int8"):
        for shape, figures in row.shapes.items():
            name = f"{row.task} {shape}"
            yield _at_least(4, f"{name} rounds", figures["rounds"], 15)
            ratios = figures["times_as_fast_as"]
            best = min((v for k, v in ratios.items() if k.startswith("ORT ")), default=None)
            yield _at_least(4, f"{name} times ORT's best int8", best, 0.98)
            if not shape.startswith("1x"):
                yield _at_least(4, f"{name} times torch fp32", ratios.get("torch fp32"), 2.7)


def _small(report: Report) -> Iterator[Check]:
    whole = report.sizes.get("fp32_weights", 0)
    for precision, limit in (("int8", 0.55), ("int4", 0.35)):
        if precision in report.sizes and whole:
            share = report.sizes[precision] / whole
            yield Check(
                bar=5,
                what=f"{precision}, all tasks, of one fp32 backbone",
                found=f"{share:.3f}",
                wanted=f"at most {limit}",
                passed=share <= limit,
            )


def _rows(report: Report, precision: str) -> list[Row]:
    return [row for row in report.rows if row.precision == precision]


def _at_least(bar: int, what: str, found: float | None, wanted: float) -> Check:
    if found is None:
        return _unmeasured(bar, what)
    shown = f"{found:.8g}" if isinstance(found, float) else str(found)
    return Check(
        bar=bar, what=what, found=shown, wanted=f"at least {wanted}", passed=found >= wanted
    )


def _unmeasured(bar: int, what: str = "") -> Check:
    return Check(bar=bar, what=what or "it", found="not measured", wanted="a figure", passed=False)


BARS: dict[int, Callable[[Report], Iterator[Check]]] = {
    1: _exact,
    2: _close,
    3: _invariant,
    4: _fast,
    5: _small,
}
