"""What a bench run measures, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from embedge.bench.errors import BenchArgumentError
from embedge.runtime.sessions.device import PROVIDERS

__all__ = ["FULL", "QUICK", "SHAPES", "BenchOptions", "Profile", "Shape"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Token batches of one size.

    Attributes:
        batch: texts a batch.
        tokens: tokens a text, special tokens included.
    """

    batch: int
    tokens: int

    @property
    def name(self) -> str:
        """``"32x128"``: batch × tokens."""
        return f"{self.batch}x{self.tokens}"

    @staticmethod
    def parse(name: str) -> Shape:
        """Return the shape of a :attr:`name`.

        Raises:
            BenchError: it is none.
        """
        batch, _, tokens = name.partition("x")
        if not (batch.isdecimal() and tokens.isdecimal() and int(batch) and int(tokens)):
            raise BenchArgumentError(f"--shapes {name}: expected BATCHxTOKENS, such as 8x64")
        return Shape(batch=int(batch), tokens=int(tokens))

    def rounds(self, rounds: int) -> int:
        """Return how often to time it: what is short varies more, and costs less."""
        return rounds * (4 if self.batch == 1 and self.tokens <= 128 else 1)


SHAPES = tuple(Shape(batch=b, tokens=t) for b, t in ((1, 16), (1, 128), (32, 32), (32, 128)))


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How much is measured.

    Attributes:
        texts: most texts for fidelity, ``None`` for all.
        rows: most rows of an evaluation file.
        rounds: alternating rounds of a batch shape; a short single text gets four times as many.
        singles: texts that are timed one by one, 0 for none; of all texts, whatever the most for fidelity.
        single_rounds: times each of them is timed.
        pages: page images that are timed one by one, 0 for none.
        invariance: texts of the batch-invariance check, 0 for no check.
        eval_sets: most evaluation files a task.
        latency_tasks: tasks whose latency is measured; the graphs of the others differ only in
            the numbers they hold.
        warm_up: untimed rounds before the timed ones.
        process_repeats: child processes for cold start, task switch and memory, each system; 0 for none.
        peer_variants: the most variants of a peer that is not named with its variant.
        peer_tasks: tasks that peers are built for; building them takes longer than measuring them.
        torch_quality: measure merged torch fp32 too; else the reference's figures stand for it.
        others: measure merged torch and the usual peers where the call names none.

    Raises:
        BenchArgumentError: no round, or fewer texts than top-10 overlap needs.
    """

    texts: int | None
    rows: int | None
    rounds: int
    singles: int
    invariance: int
    eval_sets: int | None = None
    latency_tasks: int | None = None
    warm_up: int = 2
    process_repeats: int = 3
    peer_variants: int | None = None
    peer_tasks: int | None = None
    torch_quality: bool = True
    others: bool = True
    pages: int = 16
    single_rounds: int = 3

    def __post_init__(self) -> None:
        for option, number, least in (("rounds", self.rounds, 1), ("limit", self.texts, 11)):
            if number is not None and number < least:
                raise BenchArgumentError(f"--{option} {number}: expected a number from {least}")


FULL = Profile(
    texts=None,
    rows=None,
    rounds=15,
    singles=100,
    invariance=96,
    latency_tasks=1,
    peer_tasks=1,
    torch_quality=False,  # the adapter merged in float32 is the yardstick but for rounding
)
QUICK = Profile(
    texts=64,
    rows=120,
    rounds=3,
    singles=50,
    invariance=16,
    eval_sets=1,
    latency_tasks=1,
    warm_up=1,
    process_repeats=2,
    peer_variants=1,
    peer_tasks=1,
    torch_quality=False,
    pages=4,
    single_rounds=2,
)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure.

    Attributes:
        bundle: the bundle's folder.
        reference: the source model, a folder or a hub id.
        adapters: adapter folder by task; every task of the bundle that has one needs it.
        tasks: tasks to measure, ``None`` for all.
        precisions: precisions to measure, ``None`` for all that run on the device.
        texts: file of texts for fidelity, ``None`` for the bench's own.
        evaluations: task and labelled file, in order; the first of a task is its main one.
        peers: names of :data:`embedge.bench.peers.registry.PEERS` or ``peer:variant``, ``("none",)``, or
            ``None`` for the usual variants of all that are installed.
        peer_files: folder for the files that peers are made of, kept and taken from there by the next run;
            ``None``: they are made anew and removed.
        pooling: where the source's files name none.
        threads: threads of every system, ``None`` for the cores this process has.
        device: what every system runs on, "cpu" or "cuda"; the peers run on the CPU alone.
        profile: how much; ``FULL``, ``QUICK``, or one made of them.
        torch_types: in which merged torch is measured beside the bundle, "float32", "bfloat16" and on
            CUDA "float16", or ``("none",)``; ``None``: those that the device multiplies itself.
        shapes: of the token batches that are timed.
        max_pixels: image budgets to measure beside the bundle's own, pixels of a page.
    """

    bundle: Path
    reference: str | Path
    adapters: Mapping[str, Path] = field(default_factory=dict)
    tasks: Sequence[str] | None = None
    precisions: Sequence[str] | None = None
    texts: Path | None = None
    evaluations: Sequence[tuple[str, Path]] = ()
    peers: Sequence[str] | None = None
    peer_files: Path | None = None
    pooling: str | None = None
    threads: int | None = None
    device: str = "cpu"
    profile: Profile = FULL
    torch_types: Sequence[str] | None = None
    shapes: Sequence[Shape] = SHAPES
    max_pixels: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            BenchError: fewer than one thread or pixel, an unknown device, or peers on another than the CPU.
        """
        if self.threads is not None and self.threads < 1:
            raise BenchArgumentError(f"--threads {self.threads}: expected a whole number from 1")
        if wrong := [pixels for pixels in self.max_pixels if pixels < 1]:
            raise BenchArgumentError(f"--max-pixels {wrong[0]}: expected a whole number from 1")
        if self.device not in PROVIDERS:
            raise BenchArgumentError(
                f"--device {self.device}: expected one of {', '.join(PROVIDERS)}"
            )
        if self.device != "cpu" and set(self.peers or ()) - {"none"}:
            raise BenchArgumentError(
                f"--peers {' '.join(self.peers or ())}: they run on the CPU; leave them out with "
                f"--device {self.device}, which compares with torch"
            )
