"""Writes a weighted sum of LoRA adapters as one adapter: the base from which `embedge fit-maps` maps to each task.

python examples/sum_adapters.py MODEL OUT FOLDER=WEIGHT FOLDER=WEIGHT …
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from joined_adapters import join_adapters, write_adapter
from transformers import AutoModel


def sum_adapters(
    model: Path, out: Path, weights: Sequence[tuple[Path, float]], leave_out: Sequence[str] = ()
) -> None:
    """Write ``Σ weight · adapter`` in PEFT's format.

    Args:
        model: folder of the model that the adapters are for.
        out: the new adapter's folder, which must not exist.
        weights: folder of each adapter and its weight.
        leave_out: names of modules whose tensors are left out.

    Raises:
        ValueError: for a tensor that the model has no place for.
    """
    joined = join_adapters(AutoModel.from_pretrained(model), weights, "sum", leave_out)
    write_adapter(joined, "sum", out)


def _weighted(text: str) -> tuple[Path, float]:
    folder, _, weight = text.rpartition("=")
    if not (Path(folder) / "adapter_config.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected FOLDER=WEIGHT with the folder of a PEFT adapter, such as adapters/code=0.9"
        )
    try:
        return Path(folder), float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a number behind =, found {weight!r}"
        ) from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sum."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("out", type=Path, help="the new adapter's folder")
    parser.add_argument("weights", type=_weighted, nargs="+", metavar="FOLDER=WEIGHT")
    parser.add_argument(
        "--leave-out", nargs="+", default=(), metavar="NAME", help="modules that the model lacks"
    )
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"{options.out}: expected no such folder, found one; name another")
    try:
        sum_adapters(options.model, options.out, options.weights, options.leave_out)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
