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
from dataclasses import dataclass, replace

from embedge.bench.errors import BenchArgumentError
from embedge.bench.options import Profile
from embedge.bench.report.report import Report, Row

__all__ = ["TARGETS", "Check", "check_targets", "profile_for"]

# What they need measured, so that asking for a target measures no more.
_OF_VECTORS, _OF_QUALITY, _OF_LATENCY = {1, 2, 3}, {2}, {4}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One promise on one row, or in one place."""

    target: int
    what: str
    found: str
    wanted: str
    passed: bool

    def line(self) -> str:
        """Return a line for the terminal."""
        verdict = "pass" if self.passed else "FAIL"
        return f"{verdict}  target {self.target}  {self.what}: {self.found} (wanted {self.wanted})"


def profile_for(targets: Sequence[int], profile: Profile) -> Profile:
    """Return what of ``profile`` the named targets need measured.

    Raises:
        BenchArgumentError: no such target.
    """
    _check_known(targets)
    named = set(targets)
    profile = replace(profile, process_repeats=0)
    if not named & _OF_VECTORS:
        profile = replace(profile, texts=64, invariance=1)
    if not named & _OF_QUALITY:
        profile = replace(profile, eval_sets=0)
    if not named & _OF_LATENCY:
        return replace(profile, latency_tasks=0, others=False)
    return (
        profile
        if profile.rows is not None
        else replace(profile, latency_tasks=None, peer_tasks=None)
    )


def check_targets(report: Report, targets: Sequence[int]) -> list[Check]:
    """Return the checks of the named targets; a target that the report cannot answer fails.

    Raises:
        BenchArgumentError: no such target.
    """
    _check_known(targets)
    return [
        check
        for number in targets
        for check in list(TARGETS[number](report)) or [_unmeasured(number)]
    ]


def _check_known(targets: Sequence[int]) -> None:
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        raise BenchArgumentError(f"--target {unknown[0]}: known are {', '.join(map(str, TARGETS))}")


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
                yield _at_most(2, f"{name} on {evaluation}, points lost", lost, points, digits=2)


def _invariant(report: Report) -> Iterator[Check]:
    for row in report.rows:
        if row.role == "embedge":
            name = f"{row.task} {row.precision or row.system}"
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
            yield _at_most(
                5, f"{precision}, all tasks, of one fp32 backbone", share, limit, digits=3
            )


def _rows(report: Report, precision: str) -> list[Row]:
    return [row for row in report.rows if row.precision == precision]


def _at_least(target: int, what: str, found: float | None, wanted: float) -> Check:
    if found is None:
        return _unmeasured(target, what)
    shown = f"{found:.8g}" if isinstance(found, float) else str(found)
    return Check(
        target=target, what=what, found=shown, wanted=f"at least {wanted}", passed=found >= wanted
    )


def _at_most(target: int, what: str, found: float, wanted: float, digits: int) -> Check:
    shown = f"{found:.{digits}f}"
    return Check(
        target=target, what=what, found=shown, wanted=f"at most {wanted}", passed=found <= wanted
    )


def _unmeasured(target: int, what: str = "") -> Check:
    return Check(
        target=target, what=what or "it", found="not measured", wanted="a figure", passed=False
    )


TARGETS: dict[int, Callable[[Report], Iterator[Check]]] = {
    1: _exact,
    2: _close,
    3: _invariant,
    4: _fast,
    5: _small,
}
