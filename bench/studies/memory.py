"""How much memory an export needs for a model of several gigabytes: ``python -m embedge.bench.studies.memory``.

A synthetic Qwen2-like model (seeded, float32, in shards, no tensor above 5 % of the whole) and a
random LoRA on all its Linears are written to a temporary folder and exported in a child process,
whose anonymous resident memory is sampled over its whole life, imports included. Files mapped into
memory do not count: the system takes those pages back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedge.bench.errors import BenchError
from embedge.bench.measure.process import child_error
from embedge.runtime.host.memory import process_memory

__all__ = ["Cost", "Shape", "export_cost", "main", "write_adapter", "write_model"]

BAR_BYTES = 1.2e9
_LARGEST_SHARE = 0.05
_RANK = 8
_INTERVAL_SECONDS = 0.02
_EXPORT = """
import sys
from embedge.export import export_bundle
source, adapter, precision, out, texts = sys.argv[1:]
export_bundle(
    source,
    adapters={"task": adapter},
    precisions=[precision],
    out=out,
    calibration=texts,
    pooling="mean",
)
"""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a synthetic model.

    Attributes:
        hidden: width of a token's state.
        intermediate: width of the gated MLP.
        layers: how many.
        vocabulary: rows of the embedding table.
    """

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @property
    def key_width(self) -> int:
        """Width of keys and values: two heads."""
        return 2 * self.head

    @property
    def head(self) -> int:
        """Width of a head."""
        return min(128, self.hidden // 4)

    @classmethod
    def of(cls, nbytes: float, *, hidden: int = 1536, intermediate: int = 8960) -> Shape:
        """The model of at least ``nbytes`` of float32 whose table is close to the largest share."""
        vocabulary = int(_LARGEST_SHARE * 0.98 * nbytes / 4 / hidden)
        layer = cls(hidden=hidden, intermediate=intermediate, layers=1, vocabulary=0)
        of_a_layer = sum(4 * o * i for o, i in layer.linears().values())
        layers = int(np.ceil((nbytes - 4 * vocabulary * hidden) / of_a_layer))
        return cls(hidden=hidden, intermediate=intermediate, layers=layers, vocabulary=vocabulary)

    def linears(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of a layer's Linears."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.key_width, self.hidden),
            "self_attn.v_proj": (self.key_width, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an export took.

    Attributes:
        precision: of the bundle.
        seconds: wall time of the process.
        peak: bytes, the largest anonymous resident memory seen.
    """

    precision: str
    seconds: float
    peak: int


def write_model(folder: Path, shape: Shape, seed: int = 0) -> int:
    """Write a model layer by layer, a shard each; returns its bytes of weights.

    Raises:
        BenchError: a tensor would exceed 5 % of the whole.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for number, tensors in enumerate(_shards(shape, rng)):
        name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        sizes |= {key: tensor.nbytes for key, tensor in tensors.items()}
    total = sum(sizes.values())
    largest = max(sizes, key=lambda key: sizes[key])
    if sizes[largest] > _LARGEST_SHARE * total:
        raise BenchError(f"{largest} is {sizes[largest] / total:.1%} of the model, expected ≤ 5 %")
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2Model"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // shape.head,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "vocab_size": shape.vocabulary,
    }
    _write_json(folder / "config.json", config)
    _write_tokenizer(folder, shape.vocabulary)
    return total


def write_adapter(folder: Path, shape: Shape, seed: int = 1) -> None:
    """Write a random LoRA on all Linears."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors: dict[str, NDArray[np.float32]] = {}
    for index in range(shape.layers):
        for name, (rows, columns) in shape.linears().items():
            key = f"base_model.model.layers.{index}.{name}"
            tensors[f"{key}.lora_A.weight"] = _random(rng, _RANK, columns)
            tensors[f"{key}.lora_B.weight"] = _random(rng, rows, _RANK)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    names = [name.rpartition(".")[2] for name in shape.linears()]
    settings = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 2 * _RANK, "target_modules": names}
    _write_json(folder / "adapter_config.json", settings)


def export_cost(
    source: Path, adapter: Path, precision: str, out: Path, calibration: str | Path = "default"
) -> Cost:
    """Export in a child process and watch its memory.

    Args:
        source: the model's folder.
        adapter: a LoRA's folder.
        precision: of the bundle.
        out: the bundle's folder.
        calibration: as of ``export_bundle``.

    Raises:
        BenchError: the export failed; with the last line it wrote.
    """
    started = time.monotonic()
    arguments = [str(source), str(adapter), precision, str(out), str(calibration)]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _EXPORT, *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(_INTERVAL_SECONDS)
    _, errors = process.communicate()
    if process.returncode:
        raise child_error(f"the export at {precision}", process.returncode, errors)
    return Cost(precision=precision, seconds=time.monotonic() - started, peak=peak)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 where a precision is above the bar."""
    parser = argparse.ArgumentParser(
        prog="python -m embedge.bench.studies.memory",
        description="Peak anonymous memory of exporting a synthetic model of several gigabytes.",
    )
    parser.add_argument("--gigabytes", type=float, default=3.0, help="10⁹ bytes of weights")
    parser.add_argument("--precision", nargs="+", default=["int8", "int4"])
    parser.add_argument("--folder", help="where the temporary files go (default: the system's)")
    args = parser.parse_args(arguments)
    shape = Shape.of(args.gigabytes * 1e9)
    within = True
    with tempfile.TemporaryDirectory(prefix="embedge-memory-", dir=args.folder) as place:
        source, adapter = Path(place) / "synthetic", Path(place) / "adapter"
        total = write_model(source, shape)
        write_adapter(adapter, shape)
        print(f"{total / 1e9:.2f} GB of weights: {shape}", flush=True)
        for precision in args.precision:
            cost = export_cost(source, adapter, precision, Path(place) / precision)
            within &= cost.peak <= BAR_BYTES
            print(
                f"{precision}: peak {cost.peak / 1e6:.0f} MB of anonymous memory "
                f"(bar {BAR_BYTES / 1e6:.0f} MB), {cost.seconds:.0f} s",
                flush=True,
            )
    return 0 if within else 1


# -- pieces -------------------------------------------------------------------------------------------


def _shards(shape: Shape, rng: np.random.Generator) -> Iterator[dict[str, NDArray[np.float32]]]:
    yield {
        "embed_tokens.weight": _random(rng, shape.vocabulary, shape.hidden),
        "norm.weight": np.ones(shape.hidden, np.float32),
    }
    for index in range(shape.layers):
        prefix = f"layers.{index}."
        tensors = {
            f"{prefix}{name}.weight": _random(rng, rows, columns)
            for name, (rows, columns) in shape.linears().items()
        }
        for name in ("q", "k", "v"):
            rows = shape.linears()[f"self_attn.{name}_proj"][0]
            tensors[f"{prefix}self_attn.{name}_proj.bias"] = _random(rng, 1, rows)[0]
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = np.ones(shape.hidden, np.float32)
        yield tensors


def _random(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    values = rng.standard_normal((rows, columns), dtype=np.float32)
    values *= np.float32(0.5 / columns**0.5)
    return values


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Words by spaces: those of the calibration texts, and numbers for the rest of the table."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from embedge.export.calibration.texts import packaged_texts

    words = sorted({word for text in packaged_texts() for word in text.split()})
    words = ["<unk>", "<pad>", *words, *(f"word {i}" for i in range(vocabulary))][:vocabulary]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "model_max_length": 512,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), "utf-8")


def _anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it has ended."""
    return process_memory(pid).get("RssAnon", 0)


if __name__ == "__main__":
    sys.exit(main())
