"""The systems to compare with: which there are, which are installed, and how each is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module

from embedge.bench.errors import BenchArgumentError
from embedge.bench.peers.context import PeerContext, installed
from embedge.bench.peers.gguf import FAMILIES as GGUF_FAMILIES
from embedge.bench.systems.system import System

__all__ = ["PEERS", "Peer", "build_peers", "chosen_peers"]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A family of peers.

    Attributes:
        variants: ``module:function`` by name, from a :class:`PeerContext` to a system; the one to
            take alone first.
        usual: how many of them run when no peer is named.
        requires: modules that have to be installed; ``"a|b"`` is either of two.
        install: the packages that bring them.
        families: values of ``model_type`` that it is written for, ``None`` for any.
    """

    variants: Mapping[str, str]
    usual: int = 3
    requires: tuple[str, ...]
    install: str
    families: tuple[str, ...] | None = None

    def available(self) -> bool:
        """Return whether everything it needs is installed."""
        return all(any(map(installed, names.split("|"))) for names in self.requires)


_EXPORTER = "optimum.exporters.onnx|onnxscript"
PEERS = {
    "onnxruntime": Peer(
        variants={
            "int8-per-channel": "onnxruntime:per_channel_int8",
            "int8-optimized": "onnxruntime:optimized_int8",
            "int8": "onnxruntime:plain_int8",
            "int8-exact": "onnxruntime:exact_int8",
            "fp32": "onnxruntime:floating_point",
            "q4": "onnxruntime:blockwise_int4",
        },
        requires=(_EXPORTER, "onnxruntime"),
        install="onnxscript",
    ),
    "openvino": Peer(
        variants={
            "int8": "openvino:int8",
            "fp": "openvino:floating_point",
            "int8-dq128": "openvino:int8_dq128",
            "int8-dq32": "openvino:int8_dq32",
            "int4": "openvino:int4",
            "int4-dq128": "openvino:int4_dq128",
            "int4-dq32": "openvino:int4_dq32",
        },
        requires=(_EXPORTER, "openvino", "nncf"),
        install="onnxscript openvino nncf",
    ),
    "llama.cpp": Peer(
        variants={
            "q8_0": "llama_cpp:q8_0",
            "q4_k_m": "llama_cpp:q4_k_m",
            "q4_0": "llama_cpp:q4_0",
            "f16": "llama_cpp:f16",
        },
        requires=("gguf", "llama_cpp"),
        install="gguf llama-cpp-python",
        families=GGUF_FAMILIES,
    ),
    "torch": Peer(
        variants={"int8": "torch:dynamic_int8"},
        usual=0,
        requires=("torch.ao.quantization",),
        install="torch",
    ),
    "rounding": Peer(
        variants={"int8": "rounding:int8_weights", "int4": "rounding:int4_weights"},
        usual=0,
        requires=("torch",),
        install="torch",
    ),
    "bitsandbytes": Peer(
        variants={"int8": "bitsandbytes:int8", "nf4": "bitsandbytes:nf4"},
        usual=0,
        requires=("bitsandbytes", "accelerate"),
        install="bitsandbytes accelerate",
    ),
    "torchao": Peer(
        variants={"int8-dynamic": "torchao:int8_dynamic", "int4": "torchao:int4"},
        usual=0,
        requires=("torchao",),
        install="torchao",
    ),
}


def chosen_peers(
    names: Iterable[str] | None, note: Callable[[str], None], most: int | None = None
) -> list[str]:
    """Return the peers to run, each as ``peer:variant``.

    Args:
        names: of ``PEERS``, all variants of it; ``peer:variant``; only ``"none"``; or ``None`` for
            the usual variants of all that are installed.
        note: told about each peer that would run and is not installed.
        most: variants of a peer whose variants are not named, ``None`` for all.

    Raises:
        BenchError: an unknown name, or a named peer that is not installed.
    """
    wanted = [name for name in (PEERS if names is None else names) if name != "none"]
    chosen: list[str] = []
    missing: list[str] = []
    for name in wanted:
        family, separator, variant = name.lower().partition(":")
        if family not in PEERS:
            raise BenchArgumentError(f"--peers {name}: known are {', '.join(PEERS)}, none")
        peer = PEERS[family]
        if separator and variant not in peer.variants:
            known = ", ".join(f"{family}:{known}" for known in peer.variants)
            raise BenchArgumentError(f"--peers {name}: known are {known}")
        if not peer.available() and (names is not None or peer.usual):
            missing.append(family)
        usual = peer.usual if names is None else None
        variants = [variant] if separator else list(peer.variants)[:usual][:most]
        chosen += [f"{family}:{variant}" for variant in variants]
    missing = list(dict.fromkeys(missing))
    if missing and names is not None:
        packages = " ".join(PEERS[name].install for name in missing)
        raise BenchArgumentError(
            f"--peers {' '.join(missing)}: not installed; run: pip install {packages}"
        )
    for name in missing:
        note(f"{name} is not compared with: not installed (pip install {PEERS[name].install})")
    return [name for name in dict.fromkeys(chosen) if name.partition(":")[0] not in missing]


def build_peers(
    names: Iterable[str], context: PeerContext, note: Callable[[str], None]
) -> Iterator[System]:
    """Yield the named variants; one that cannot be built, or has a caveat, is told to ``note``.

    Args:
        names: from :func:`chosen_peers`.
        context: one task's merged model.
        note: takes a sentence for the report.
    """
    found = context.config.model_type
    for name in names:
        family, _, variant = name.partition(":")
        families = PEERS[family].families
        if families is not None and found not in families:
            note(f"{name} was not built: written for {', '.join(families)}, not for {found}")
            continue
        module, _, function = PEERS[family].variants[variant].partition(":")
        try:
            system: System = getattr(import_module(f"embedge.bench.peers.{module}"), function)(
                context
            )
        except Exception as error:  # a stranger's exporter: whatever it raises is its result
            reason = str(error).strip().splitlines() or [type(error).__name__]
            note(f"{name} was not built: {reason[0]}")
            continue
        caveat = getattr(system, "caveat", None)
        if caveat:
            note(f"{name}: {caveat}")
        yield system
