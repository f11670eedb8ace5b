"""The systems to compare with: which there are, which are installed, and how each is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from embedge.bench._errors import BenchArgumentError
from embedge.bench._gguf import FAMILIES as GGUF_FAMILIES
from embedge.bench._peer_context import PeerContext
from embedge.bench._systems import System

__all__ = ["PEERS", "Peer", "build_peers", "chosen_peers"]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A family of peers.

    Attributes:
        builders: ``module:function`` of each variant, from a :class:`PeerContext` to a system; the
            strongest first.
        requires: modules that have to be installed.
        install: the packages that bring them.
        families: values of ``model_type`` that it is written for, ``None`` for any.
    """

    builders: tuple[str, ...]
    requires: tuple[str, ...]
    install: str
    families: tuple[str, ...] | None = None

    def available(self) -> bool:
        """Return whether everything it needs is installed."""
        return all(_installed(name) for name in self.requires)


PEERS = {
    "onnxruntime": Peer(
        builders=(
            "_peer_onnxruntime:per_channel_int8",
            "_peer_onnxruntime:optimized_int8",
            "_peer_onnxruntime:plain_int8",
        ),
        requires=("optimum.exporters.onnx", "onnxruntime"),
        install="optimum-onnx",
    ),
    "openvino": Peer(
        builders=("_peer_openvino:openvino_int8",),
        requires=("optimum.exporters.onnx", "openvino", "nncf"),
        install="optimum-onnx openvino nncf",
    ),
    "llama.cpp": Peer(
        builders=(
            "_peer_llama_cpp:llama_cpp_q8_0",
            "_peer_llama_cpp:llama_cpp_q4_k_m",
            "_peer_llama_cpp:llama_cpp_q4_0",
            "_peer_llama_cpp:llama_cpp_f16",
        ),
        requires=("gguf", "llama_cpp"),
        install="gguf llama-cpp-python",
        families=GGUF_FAMILIES,
    ),
}


def chosen_peers(names: Iterable[str] | None, note: Callable[[str], None]) -> list[str]:
    """Return the peers to run: those named, or for ``None`` all that are installed.

    Args:
        names: from ``PEERS``, or only ``"none"``.
        note: told about each peer that is left out because it is not installed.

    Raises:
        BenchError: an unknown name, or a named peer that is not installed.
    """
    wanted = [name for name in (PEERS if names is None else names) if name != "none"]
    unknown = [name for name in wanted if name not in PEERS]
    if unknown:
        raise BenchArgumentError(f"--peers {' '.join(unknown)}: known are {', '.join(PEERS)}, none")
    missing = [name for name in wanted if not PEERS[name].available()]
    if missing and names is not None:
        packages = " ".join(PEERS[name].install for name in missing)
        raise BenchArgumentError(
            f"--peers {' '.join(missing)}: not installed; run: pip install {packages}"
        )
    for name in missing:
        note(f"{name} is not compared with: not installed (pip install {PEERS[name].install})")
    return [name for name in wanted if name not in missing]


def build_peers(
    names: Iterable[str],
    context: PeerContext,
    note: Callable[[str], None],
    variants: int | None = None,
) -> Iterator[System]:
    """Yield every variant of the named peers; one that cannot be built is told to ``note``.

    Args:
        names: from :func:`chosen_peers`.
        context: one task's merged model.
        note: takes a sentence for the report.
        variants: the most of each peer, ``None`` for all.
    """
    chosen = []
    for name in names:
        families, found = PEERS[name].families, context.config.model_type
        if families is None or found in families:
            chosen += PEERS[name].builders[:variants]
        else:
            note(f"{name} is not compared with: written for {', '.join(families)}, not for {found}")
    for builder in chosen:
        module, _, function = builder.partition(":")
        try:
            system: System = getattr(import_module(f"embedge.bench.{module}"), function)(context)
        except Exception as error:  # a stranger's exporter: whatever it raises is its result
            reason = str(error).strip().splitlines() or [type(error).__name__]
            note(f"{function.replace('_', ' ')} was not built: {reason[0]}")
            continue
        yield system


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
