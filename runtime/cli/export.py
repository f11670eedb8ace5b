"""``embedge export``."""

from __future__ import annotations

import argparse

from embedge.export.api import make_request
from embedge.export.pipeline import export
from embedge.export.progress import Progress, StepCost
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.host.progress import LogLines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = "Merge each task LoRA into its own graph and quantize it."
    parser.add_argument("source", help="model folder in the Hugging Face layout, or hub id")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="task name and its PEFT LoRA adapter; may be repeated (default: those the model brings)",
    )
    parser.add_argument(
        "--no-adapter",
        action="append",
        default=[],
        metavar="NAME",
        help="a task of the bare backbone",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        action="extend",
        metavar="P",
        help="fp32, int8, int4 (CPU), fp16, int4-fp16 (CUDA) (default: int8)",
    )
    parser.add_argument(
        "--modality",
        default="all",
        metavar="M",
        help="all, or text to leave a vision tower out (default: all)",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the bundle to write")
    parser.add_argument("--matryoshka", metavar="64,128,…", help="dimensions to truncate to")
    parser.add_argument("--pooling", help="mean, cls or lasttoken, where the model does not say")
    parser.add_argument(
        "--calibration",
        default="default",
        metavar="FILE",
        help="calibration texts, one per line or JSONL; 'default' or 'none'",
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN=PRECISION",
        help="leave layers of these names at fp32 or int8",
    )
    parser.add_argument("--int4-block-size", type=int, metavar="N")
    parser.add_argument(
        "--int4-method",
        default="gptq",
        metavar="M",
        help="gptq, or rtn: faster and less exact (default: gptq)",
    )
    parser.add_argument(
        "--int8-method",
        metavar="M",
        help="gptq or rtn (default: gptq for decoders and ModernBERT up to a hidden size of 1536, else rtn)",
    )
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        help="at int4: most bytes of a task, e.g. 2.0GB; the most sensitive layers get 8 bits",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    parser.add_argument("--quiet", action="store_true", help="do not say how far it is")
    parser.epilog = """examples:
  embedge export MODEL --no-adapter plain --out bundle
  embedge export MODEL --adapter code=FOLDER --precision int8 int4 --out bundle
  embedge export organization/name --precision int8 --out bundle"""


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    adapters: dict[str, str | None] = {}
    for name, folder in [
        *(_pair("--adapter", a, "NAME=FOLDER") for a in args.adapter),
        *((n, None) for n in args.no_adapter),
    ]:
        if name in adapters:
            raise EmbedgeValueError(f"task {name!r} is given twice; give each task one adapter")
        adapters[name] = folder
    request = make_request(
        args.source,
        adapters=adapters,
        precisions=args.precision or ["int8"],
        out=args.out,
        matryoshka_dims=_dims(args.matryoshka),
        pooling=args.pooling,
        calibration=args.calibration,
        keep=dict(_pair("--keep", k, "PATTERN=PRECISION") for k in args.keep),
        int4_block_size=args.int4_block_size,
        int4_method=args.int4_method,
        int8_method=args.int8_method,
        budget=args.budget,
        overwrite=args.overwrite,
        modality=args.modality,
    )
    progress = Progress(
        show=False if args.quiet else None,
        finished=_print_cost,
        lines=None if args.quiet else LogLines(),
    )
    out = export(request, progress)
    size = sum(entry.size for entry in Bundle(out, verify="none").manifest.files.values())
    print(f"wrote {out} ({size / 1e6:.1f} MB)")
    return 0


def _print_cost(cost: StepCost) -> None:
    """A line for a task that is done, at once: a log of an export of hours says how far it is."""
    memory = "" if cost.peak_mb is None else f", peak {cost.peak_mb:.0f} MB anonymous memory"
    print(f"{cost.step}: {cost.seconds:.1f} s{memory}", flush=True)


def _pair(option: str, text: str, form: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise EmbedgeValueError(f"{option} {text!r}: expected {form}")
    return name, value


def _dims(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise EmbedgeValueError(
            f"--matryoshka {text!r}: expected integers separated by commas, like 64,128,256"
        ) from error
