r"""Trains one LoRA adapter from which maps give the vectors of several others: a base for `embedge fit-maps`.

It starts from a weighted sum of the adapters and learns, with a matrix for each task, to give each adapter's vectors on
texts of its task. The matrices are left: `embedge fit-maps` fits its own to the quantized graphs.

    python examples/distill_base.py MODEL OUT --minutes 20 \
        --adapter retrieval=FOLDER --texts retrieval=passages.jsonl \
        --adapter code=FOLDER --texts code=functions.jsonl

MODEL is a folder that sentence-transformers loads; it says how tokens become a vector. Texts are JSONL: every string of
a row is a text, as the adapter gets them, prompts included. No labels are needed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from batches import batches
from joined_adapters import join_adapters, load_adapter, write_adapter
from jsonl import read_jsonl
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize

SEED = 11
REPORT_EVERY = 30
START_TEXTS = 320  # of each task, for the matrices to start from
RIDGE = 0.05
WARM_UP = 20  # steps
LEARNING_RATE, MATRIX_RATE = 8e-4, 3e-4
RELATIONS = 10.0  # weight of the texts' cosines among each other, beside the vectors themselves


class _Model:
    """A backbone with an adapter, as sentence-transformers runs it."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        # The backward pass of eager attention is the faster one on a CPU.
        self.transformer = SentenceTransformer(
            str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"}
        )
        self.transformer.max_seq_length = max_tokens

    @property
    def backbone(self) -> torch.nn.Module:
        model: torch.nn.Module = self.transformer[0].auto_model
        return model

    @backbone.setter
    def backbone(self, model: torch.nn.Module) -> None:
        self.transformer[0].auto_model = model

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [texts, dim], rows of length 1."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            vectors = self.transformer(self.transformer.preprocess(list(texts)))[
                "sentence_embedding"
            ]
        return normalize(vectors.float(), dim=-1)


def _teacher(folder: Path, adapter: Path, max_tokens: int, leave_out: Sequence[str]) -> _Model:
    model = _Model(folder, max_tokens)
    merged = load_adapter(model.backbone, adapter, leave_out=leave_out).merge_and_unload()
    model.backbone = merged.eval().requires_grad_(False)
    return model


def _student(
    folder: Path,
    adapters: Mapping[str, Path],
    weight: float,
    max_tokens: int,
    leave_out: Sequence[str],
) -> tuple[_Model, PeftModel]:
    model = _Model(folder, max_tokens)
    weights = [(adapter, weight) for adapter in adapters.values()]
    joined = join_adapters(model.backbone, weights, "base", leave_out)
    for name, parameter in joined.named_parameters():
        parameter.requires_grad = ".base." in name
    model.backbone = joined.eval()  # no dropout: the teachers have none
    return model, joined


def _started(student: torch.Tensor, teacher: torch.Tensor) -> torch.nn.Parameter:
    """The matrix near the identity that takes the one's vectors to the other's, by ridge regression."""
    dim = student.shape[1]
    identity = torch.eye(dim)
    strength = RIDGE * len(student) / dim
    left = student.T @ student + strength * identity
    return torch.nn.Parameter(torch.linalg.solve(left, student.T @ teacher + strength * identity))


def distill(
    folder: Path,
    out: Path,
    adapters: Mapping[str, Path],
    texts: Mapping[str, list[str]],
    *,
    weight: float = 0.5,
    minutes: float = 20,
    steps: int | None = None,
    batch_size: int = 32,
    max_tokens: int = 48,
    leave_out: Sequence[str] = (),
) -> dict[str, tuple[float, float]]:
    """Train the adapter and write it in PEFT's format.

    Args:
        folder: of the model.
        out: the new adapter's folder, which must not exist.
        adapters: folder of each task's adapter.
        texts: of each task, some hundreds at least.
        weight: of each adapter in the sum that it starts from.
        minutes: to train for.
        steps: to train for, in the place of minutes.
        batch_size: texts of a step.
        max_tokens: where texts are cut in training.
        leave_out: names of modules whose tensors in the adapters are left out.

    Raises:
        ValueError: for a tensor of an adapter that the model has no place for.

    Returns:
        ``1 - cosine`` to each adapter's vectors: of the first step and of the last ones, through the matrix.
    """
    torch.manual_seed(SEED)
    teachers = {
        name: _teacher(folder, adapter, max_tokens, leave_out) for name, adapter in adapters.items()
    }
    student, joined = _student(folder, adapters, weight, max_tokens, leave_out)
    streams = {name: batches(list(texts[name]), batch_size, f"{SEED}:{name}") for name in adapters}
    matrices = {}
    with torch.no_grad():
        for name, teacher in teachers.items():
            some = [
                text for _ in range(-(-START_TEXTS // batch_size)) for text in next(streams[name])
            ]
            matrices[name] = _started(student(some), teacher(some))
    trained = [parameter for parameter in joined.parameters() if parameter.requires_grad]
    groups = [{"params": trained}, {"params": list(matrices.values())}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    far: dict[str, list[float]] = {name: [] for name in adapters}
    begin, step = time.monotonic(), 0
    while True:
        seconds = time.monotonic() - begin
        done = step / steps if steps is not None else seconds / (60 * minutes)
        if done >= 1:
            break
        rate = min(1.0, (step + 1) / WARM_UP) * max(0.02, 1 - done)
        for group, highest in zip(
            optimizer.param_groups, (LEARNING_RATE, MATRIX_RATE), strict=True
        ):
            group["lr"] = rate * highest
        name = list(adapters)[step % len(adapters)]
        batch = next(streams[name])
        with torch.no_grad():
            wanted = teachers[name](batch)
        found = normalize(student(batch) @ matrices[name], dim=-1)
        distance = (1 - (found * wanted).sum(-1)).mean()
        relations = ((found @ found.T - wanted @ wanted.T) ** 2).mean()
        (distance + RELATIONS * relations).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        far[name].append(distance.item())
        step += 1
        if step % REPORT_EVERY == 0:
            shown = ", ".join(f"{n} {sum(d[-10:]) / len(d[-10:]):.4f}" for n, d in far.items())
            print(f"step {step}, {seconds:.0f} s, 1 - cosine: {shown}", flush=True)
    write_adapter(joined, "base", out)
    return {name: (d[0], sum(d[-10:]) / len(d[-10:])) for name, d in far.items() if d}


def _named(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator or not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=PATH of something that is there")
    return name, Path(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    for option, metavar in (("--adapter", "TASK=FOLDER"), ("--texts", "TASK=FILE")):
        parser.add_argument(option, metavar=metavar, type=_named, action="append", required=True)
    parser.add_argument("--weight", type=float, default=0.5, help="of each in the sum at the start")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--steps", type=int, help="in the place of --minutes")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=48, help="where texts are cut")
    parser.add_argument(
        "--leave-out", nargs="+", default=(), metavar="NAME", help="modules that the model lacks"
    )
    options = parser.parse_args(arguments)
    adapters: dict[str, Path] = dict(options.adapter)
    if options.out.exists():
        parser.error(f"{options.out}: expected no such folder, found one; name another")
    texts: dict[str, list[str]] = {name: [] for name in adapters}
    for name, file in options.texts:
        if name not in texts:
            parser.error(f"--texts {name}: expected a task of --adapter: {', '.join(adapters)}")
        texts[name] += [
            value for row in read_jsonl(file) for value in row.values() if isinstance(value, str)
        ]
    for name, found in texts.items():
        if len(found) < options.batch_size:
            parser.error(
                f"--texts {name}: expected at least {options.batch_size} texts, found {len(found)}"
            )
    try:
        distill(
            options.model,
            options.out,
            adapters,
            texts,
            weight=options.weight,
            minutes=options.minutes,
            steps=options.steps,
            batch_size=options.batch_size,
            max_tokens=options.max_tokens,
            leave_out=options.leave_out,
        )
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
