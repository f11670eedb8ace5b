"""``embedge export``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import Any

from embedge.export.options import ExportOptions
from embedge.export.pipeline import export
from embedge.export.progress import Progress, StepCost
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.cli.messages import printable
from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.host.progress import LogLines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options: those of :class:`ExportOptions`, which has their defaults."""
    parser.description = "Merge each task LoRA into its own graph and quantize it."
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("source", help="model folder in the Hugging Face layout, or hub id")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=FOLDER",
        help="task name and its PEFT LoRA adapter; may be repeated (default: those the model brings)",
    )  # fmt: skip
    parser.add_argument(
        "--no-adapter", action="append", default=[], metavar="NAME",
        help="a task of the bare backbone",
    )  # fmt: skip
    parser.add_argument(
        "--precision", nargs="+", action="extend", metavar="P", dest="precisions",
        help="fp32, int8, int4 (CPU), fp16, int4-fp16 (CUDA) (default: int8)",
    )  # fmt: skip
    parser.add_argument(
        "--modality", metavar="M", help="all, or text to leave a vision tower out (default: all)"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the bundle to write")
    parser.add_argument(
        "--matryoshka", metavar="64,128,…", dest="matryoshka_dims", help="dimensions to truncate to"
    )
    parser.add_argument(
        "--pooling",
        help="mean, cls, lasttoken, …, where the model does not say; several: cls+max",
    )
    parser.add_argument(
        "--calibration", metavar="FILE",
        help="calibration texts, one per line or JSONL; 'default' or 'none'",
    )  # fmt: skip
    parser.add_argument(
        "--keep", action="append", metavar="PATTERN=PRECISION",
        help="leave layers of these names at fp32 or int8",
    )  # fmt: skip
    parser.add_argument("--int4-block-size", type=int, metavar="N")
    parser.add_argument(
        "--int4-method", metavar="M", help="gptq, or rtn: faster and less exact (default: gptq)"
    )
    parser.add_argument(
        "--int8-method", metavar="M",
        help="gptq or rtn (default: gptq below a hidden size of 1536, else rtn)",
    )  # fmt: skip
    parser.add_argument(
        "--portable", action="store_true",
        help="8-bit weights that ONNX Runtime multiplies exactly on every processor, without embedge too; "
        "half a bit less exact",
    )  # fmt: skip
    parser.add_argument(
        "--layout", metavar="L",
        help="merged, a graph for each task; or shared, one quantized backbone and a low-rank branch for each "
        "task (default: merged)",
    )  # fmt: skip
    parser.add_argument(
        "--branch-rank", type=int, metavar="R",
        help="columns of the low-rank branches beside int8 and int4 weights, a multiple of 16: closer and "
        "larger (default with --layout shared: 16 at int8 below a hidden size of 512, else 32, three times that at "
        "int4, and what holds the adapters; else none)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", metavar="SIZE",
        help="at int4: most bytes of a task, e.g. 2.0GB; the most sensitive layers get 8 bits",
    )  # fmt: skip
    parser.add_argument(
        "--base-quantization", metavar="HOW",
        help="how bitsandbytes had quantized the base when the adapters were trained on it (QLoRA): nf4, fp4 or "
        "int8, and after commas double_quant, block_size=64, dtype=bfloat16, skip=MODULE+MODULE",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    parser.add_argument(
        "--quiet",
        action="store_true",
        default=False,
        help="say nothing of how far it is, nor of licences",
    )
    parser.epilog = """examples:
  embedge export MODEL --no-adapter plain --out bundle
  embedge export MODEL --adapter code=FOLDER --precision int8 int4 --out bundle
  embedge export organization/name --precision int8 --out bundle"""


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    given = vars(args)
    options: dict[str, Any] = {
        f.name: given[f.name] for f in fields(ExportOptions) if f.name in given
    }
    options["adapters"] = _adapters(args)
    if "keep" in given:
        options["keep"] = dict(_pair("--keep", pair, "PATTERN=PRECISION") for pair in args.keep)
    if "matryoshka_dims" in given:
        options["matryoshka_dims"] = _dims(args.matryoshka_dims)
    progress = Progress(
        show=False if args.quiet else None,
        finished=_print_cost,
        lines=None if args.quiet else LogLines(),
        told=None if args.quiet else _tell,
    )
    out = export(ExportOptions(**options), progress)
    size = sum(entry.size for entry in Bundle(out, verify="none").manifest.files.values())
    print(f"wrote {out} ({size / 1e6:.1f} MB)")
    return 0


def _tell(line: str) -> None:
    print(f"embedge: {printable(line)}", file=sys.stderr, flush=True)


def _print_cost(cost: StepCost) -> None:
    """A line for a task that is done, at once: a log of an export of hours says how far it is."""
    memory = "" if cost.peak_mb is None else f", peak {cost.peak_mb:.0f} MB anonymous memory"
    print(f"{cost.step}: {cost.seconds:.1f} s{memory}", flush=True)


def _adapters(args: argparse.Namespace) -> dict[str, str | None]:
    adapters: dict[str, str | None] = {}
    for name, folder in [
        *(_pair("--adapter", pair, "NAME=FOLDER") for pair in args.adapter),
        *((name, None) for name in args.no_adapter),
    ]:
        if name in adapters:
            raise EmbedgeValueError(f"task {name!r} is given twice; give each task one adapter")
        adapters[name] = folder
    return adapters


def _pair(option: str, text: str, form: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise EmbedgeValueError(f"{option} {text!r}: expected {form}")
    return name, value


def _dims(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise EmbedgeValueError(
            f"--matryoshka {text!r}: expected integers separated by commas, like 64,128,256"
        ) from error
