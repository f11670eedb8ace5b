"""Writes a weighted sum of LoRA adapters as one adapter: the base from which `embedge fit-maps` maps to each task.

PEFT joins them by their ranks (``combination_type="cat"``), so the sum is exact.

    python examples/sum_adapters.py MODEL OUT FOLDER=WEIGHT FOLDER=WEIGHT …
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from transformers import AutoModel


def sum_adapters(model: Path, out: Path, weights: Sequence[tuple[Path, float]]) -> None:
    """Write ``Σ weight · adapter`` in PEFT's format.

    Args:
        model: folder of the model that the adapters are for.
        out: the new adapter's folder, which must not exist.
        weights: folder of each adapter and its weight.
    """
    names = [f"adapter_{number}" for number in range(len(weights))]
    first, *others = zip(names, weights, strict=True)
    joined = PeftModel.from_pretrained(
        AutoModel.from_pretrained(model), str(first[1][0]), adapter_name=first[0]
    )
    for name, (folder, _) in others:
        joined.load_adapter(str(folder), adapter_name=name)
    joined.add_weighted_adapter(names, [w for _, w in weights], "sum", combination_type="cat")
    with tempfile.TemporaryDirectory() as work:
        joined.save_pretrained(work, selected_adapters=["sum"])
        (Path(work) / "sum" / "README.md").unlink(missing_ok=True)
        shutil.copytree(Path(work) / "sum", out)


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
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"{options.out}: expected no such folder, found one; name another")
    sum_adapters(options.model, options.out, options.weights)


if __name__ == "__main__":
    main()
