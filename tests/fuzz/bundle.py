"""Mutates the files of bundles and looks at what the runtime makes of them.

    python -m tests.fuzz.bundle --seed 1 --count 3000

Two small bundles, an encoder and a decoder, with several tasks, all CPU precisions and prepared files. Each
mutation takes one of these ways:

    as it lies   one file is changed, and the manifest is not: with ``verify="full"`` the vectors are the
                 same or the bundle is refused
    prepared     one file of ``embedge prepare`` is changed: the vectors are the same, since what is bad
                 there is left out
    manifest     ``manifest.json`` is changed, which nothing signs: vectors of the stated length, or refused
    signed       a file is changed and the manifest's sizes and hashes follow, as an attacker would: vectors
                 of the stated length, or refused

No way may end in a crash, a hang, an exception that is no ``EmbedgeError``, or a file outside of the bundle
that is opened or written. Seeds that did are printed.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from embedge.runtime import Embedder
from tests.fuzz.child import FAULTS, Outcome, Wrong, run
from tests.fuzz.mutate import mutate_file

__all__ = ["WAYS", "Subject", "make_subjects", "mutation"]

WAYS = ("as it lies", "prepared", "manifest", "signed")
TEXTS = ["hello world, how are you?", "a", "0123456789 !", "x" * 50]
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Subject:
    """A bundle, and its vectors by precision and task.

    Attributes:
        vectors: float32 ``[texts, dim]``.
    """

    bundle: Path
    vectors: dict[tuple[str, str], Any]


def make_subjects(root: Path) -> list[Subject]:
    """Export, prepare and embed with the bundles that are mutated."""
    sys.path.insert(0, str(_ROOT / "tests" / "export"))
    from embedge.export import export_bundle
    from embedge.runtime.cli.main import main
    from tests.helpers.models import make_model, save

    subjects = []
    for name, pooling in (("bert", "mean"), ("qwen2", "lasttoken")):
        source = save(make_model(name), root / name, pooling=pooling)
        bundle = export_bundle(
            source,
            adapters={"a": None, "b": None},
            precisions=["fp32", "int8", "int4"],
            out=root / f"{name}-bundle",
            calibration="none",
        )
        main(["prepare", str(bundle), "--pack-only"])
        precisions = json.loads((bundle / "manifest.json").read_bytes())["precisions"]
        vectors = {
            (precision, task): _embed(bundle, precision, task, "full")
            for precision, settings in precisions.items()
            for task in settings["graphs"]
        }
        subjects.append(Subject(bundle, vectors))
    return subjects


def _embed(bundle: Path, precision: str, task: str, verify: str) -> Any:
    return Embedder(bundle, precision=precision, threads=1, verify=verify).encode(TEXTS, task=task)


def mutation(
    subjects: Sequence[Subject], root: Path, seed: int, ways: Sequence[str] = WAYS
) -> tuple[str, Outcome]:
    """What is changed by a seed, and how embedding with it ends."""
    rng = random.Random(seed)
    subject, way = rng.choice(subjects), rng.choice(list(ways))
    target = root / "bundle"
    shutil.rmtree(target, ignore_errors=True)
    # Links: a mutation puts a new file in the place of the one it changes.
    shutil.copytree(subject.bundle, target, copy_function=os.link)
    precision, task = rng.choice(sorted(subject.vectors))
    files = sorted(p for p in target.rglob("*") if p.is_file() and p.name != "manifest.json")
    if way == "prepared":
        of_graph = ("prepared", precision, task)
        near = [p for p in files if "prepared" in p.parts and p.name == "tuning.json"]
        file = rng.choice(near + [p for p in files if all(part in p.parts for part in of_graph)])
    elif way == "manifest":
        file = target / "manifest.json"
    else:
        files = [p for p in files if "prepared" not in p.parts and p.suffix != ".md"]
        near = [p for p in files if p.parent.name in (precision, target.name)]
        file = rng.choice(near or files)
    graph = way == "signed" and file.suffix == ".onnx" and rng.random() < 0.8
    what = _mutate_graph(file, rng) if graph else mutate_file(file, rng)
    if way == "signed":
        shutil.rmtree(target / "prepared")
        _sign(target)
    what = f"{way}: {file.relative_to(target)} for {precision}/{task}: {what}"
    expected = subject.vectors[precision, task]
    exact = way in ("as it lies", "prepared")

    def work() -> str:
        found = _embed(target, precision, task, "full")
        if exact and not np.array_equal(found, expected):
            raise Wrong(f"other vectors: off by {np.abs(found - expected).max()}")
        if not np.isfinite(found).all() or len(found) != len(TEXTS):
            raise Wrong(f"vectors {found.shape}, finite: {np.isfinite(found).all()}")
        return "vectors"

    outcome = run(work, root=root, allowed=[target])
    if way == "prepared" and outcome.kind == "refused":
        outcome = Outcome(
            "wrong", f"a bad prepared file makes the bundle unusable: {outcome.detail}"
        )
    return what, outcome


def _sign(bundle: Path) -> None:
    """Let the manifest have the sizes and hashes of the files that are there."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for name, entry in manifest["files"].items():
        file = bundle / name
        if file.is_file() and file.stat().st_size < 1 << 30:
            data = file.read_bytes()
            entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    path.unlink()
    path.write_text(json.dumps(manifest))


def _mutate_graph(file: Path, rng: random.Random) -> str:
    """Change fields of an ONNX model, which stays a message of ONNX."""
    model = onnx.load(file, load_external_data=False)
    steps = [_mutate_message(model, rng) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
    file.unlink()
    file.write_bytes(model.SerializeToString())
    return "; ".join(steps)


def _mutate_message(model: Any, rng: random.Random) -> str:
    """Change one field of a random message below ``model``."""
    message, path = model, "model"
    while True:
        fields = [(f, v) for f, v in message.ListFields() if f.name != "doc_string"]
        if not fields:
            return f"{path}: empty"
        field, value = rng.choice(fields)
        path = f"{path}.{field.name}"
        is_message = field.type == field.TYPE_MESSAGE
        if field.is_repeated:
            index = rng.randrange(len(value))
            path = f"{path}[{index}]"
            if not is_message or rng.random() < 0.15:
                return f"{path}: {_mutate_list(value, index, is_message, rng)}"
            message = value[index]
        elif is_message:
            message = value
        else:
            return f"{path}: {_mutate_field(message, field.name, value, rng)}"


def _mutate_list(values: Any, index: int, is_message: bool, rng: random.Random) -> str:
    way = rng.choice(("delete", "double", "other", "changed"))
    old, other = copy.deepcopy(values[index]), copy.deepcopy(values[rng.randrange(len(values))])
    if way == "delete" or (way == "changed" and is_message):
        del values[index]
        return "deleted"
    if way == "double":
        values.append(old)
    elif is_message:
        values[index].CopyFrom(other)
    else:
        values[index] = other if way == "other" else _scalar(old, rng)
    return way


def _mutate_field(message: Any, name: str, value: Any, rng: random.Random) -> str:
    if rng.random() < 0.2:
        message.ClearField(name)
        return "cleared"
    for _ in range(8):
        new = _scalar(value, rng)
        try:
            setattr(message, name, new)
        except (ValueError, TypeError):  # out of the field's range
            continue
        return f"{value!r:.40} → {new!r:.40}"
    return "as it was"


_NAMES = (
    *(
        "",
        "x",
        "input_ids",
        "attention_mask",
        "embedding",
        "../x",
        "/etc/passwd",
        "com.microsoft",
        "embedge",
    ),
    *(
        "MatMul",
        "Gather",
        "If",
        "Loop",
        "Reshape",
        "Attention",
        "MatMulNBits",
        "GroupQueryAttention",
    ),
)


def _scalar(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bytes):
        text = bytearray(value or b"\0")
        text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        return rng.choice((bytes(text), value[: len(value) // 2], value * 2, b""))
    if isinstance(value, str):
        return rng.choice((*_NAMES, value[:-1], value + "_", value[::-1]))
    if isinstance(value, float):
        return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf"), value * 2))
    largest = (1 << 31) - 1
    return rng.choice(
        (0, 1, -1, 2, 3, 7, 16, 1000, largest, -largest, 1 << 40, -(1 << 62), value + 1, value - 1)
    )


def main() -> int:
    """Run mutations by seed; print those that ended badly, and how all ended."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.bundle", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=1, help="of the first mutation")
    parser.add_argument(
        "--count", type=int, default=1000, help="mutations, each with a seed of its own"
    )
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS), help="only these")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="embedge-fuzz-") as folder:
        subjects = make_subjects(Path(folder))
        for seed in range(args.seed, args.seed + args.count):
            what, outcome = mutation(subjects, Path(folder), seed, args.way)
            counts[f"{what.partition(':')[0]}: {outcome.kind}"] += 1
            if outcome.is_fault:
                print(f"seed {seed}: {what}\n    {outcome.kind}: {outcome.detail.strip()[-1500:]}")
                sys.stdout.flush()
            if args.count == 1 and not outcome.is_fault:
                print(f"{what}\n    {outcome.kind}: {outcome.detail.strip()[-1500:]}")
    for name in sorted(counts):
        print(f"{counts[name]:6}  {name}")
    print(f"{args.count} mutations in {time.monotonic() - begin:.0f} s")
    return int(any(name.endswith(f": {kind}") for name in counts for kind in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
