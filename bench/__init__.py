"""Measures a bundle against the unquantized model and against other runtimes.

What comes out is one report: fidelity and task quality against torch in fp32 with the adapter
applied by PEFT, latency against torch and the peers that are installed, cold start, memory, bytes.

    Reference       the unquantized model, the yardstick of everything here
    BenchOptions    what to measure
    run_bench       measures it and returns a Report
    Report          the figures; ``to_dict`` and ``from_dict`` are inverses
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from embedge.runtime import EmbedgeError
from embedge.runtime.host.install_advice import install_command

if TYPE_CHECKING:
    from embedge.bench.options import BenchOptions
    from embedge.bench.report.report import Report
    from embedge.bench.run import run_bench
    from embedge.bench.systems.reference import Reference

__all__ = ["BenchOptions", "Reference", "Report", "run_bench"]

_REQUIRED = ("matplotlib", "onnx", "peft", "psutil", "torch", "tqdm", "transformers")
# Looked up on first use, so that `embedge bench --help` does not wait for torch.
_HOMES = {
    "BenchOptions": "options",
    "Reference": "systems.reference",
    "Report": "report.report",
    "run_bench": "run",
}


class MissingBenchError(EmbedgeError, ImportError):
    """A package of the ``bench`` extra is not installed."""


_missing = [name for name in _REQUIRED if find_spec(name) is None]
if _missing:
    raise MissingBenchError(
        f"embedge.bench needs {', '.join(_missing)}, which is not installed; "
        f"run: {install_command('bench')}"
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
