"""Trains the three adapters of a backbone with PEFT and saves them below ``adapters/``."""

from __future__ import annotations

import argparse
import json
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from allocator import keep_freed_memory
from backbone import Backbone, embed, embed_all
from batches import batches
from jsonl import read_jsonl
from losses import cosent, drift, info_nce, late_cosent, late_info_nce, over_widths
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tasks import BACKBONES, HERE, Task, backbone_of, columns, measure, read_eval, tasks_of
from tokenizers import Tokenizer

SEED = 7
MIXED_TEXTS = 32
VALIDATION_PAIRS = 400
SCALES = (1.0, 0.75, 0.5)
TOLERATED_LOSS = 0.0025
REPORT_EVERY = 20

Row = dict[str, Any]


def _new_adapter(backbone: Backbone) -> PeftModel:
    config = LoraConfig(
        r=backbone.rank,
        lora_alpha=backbone.alpha,
        target_modules=list(backbone.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="FEATURE_EXTRACTION",
        base_model_name_or_path=backbone.name,
    )
    model = get_peft_model(backbone.load(attention=backbone.attention), config).eval()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # autocast does it, and only once
    return model


def _task_loss(
    backbone: Backbone, model: PeftModel, tokenizer: Tokenizer, batch: list[Row]
) -> torch.Tensor:
    first_texts, second_texts = columns(backbone, batch)
    if "score" in batch[0]:
        both, tokens = embed_all(model, tokenizer, first_texts + second_texts)
        first, second = both.chunk(2)
        scores = torch.tensor([row["score"] for row in batch])
        loss = over_widths(partial(cosent, scores=scores), first, second, backbone.widths)
        if tokens:
            loss = loss + late_cosent(tokens[: len(batch)], tokens[len(batch) :], scores)
        return loss
    queries, query_tokens = embed_all(model, tokenizer, first_texts)
    passages, passage_tokens = embed_all(model, tokenizer, second_texts)
    loss = over_widths(info_nce, queries, passages, backbone.widths)
    if query_tokens:
        loss = loss + late_info_nce(query_tokens, passage_tokens)
    return loss


def _set_scale(model: PeftModel, scale: float) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", scale)


def _qualities(
    backbone: Backbone, model: PeftModel, sets: dict[str, list[Row]]
) -> dict[str, float]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return {name: measure(backbone, model, rows).quality() for name, rows in sets.items()}


def _choose_scale(
    backbone: Backbone, model: PeftModel, sets: dict[str, list[Row]]
) -> tuple[float, list[Row]]:
    """Return the factor of ``lora_alpha`` that serves the task best without forgetting.

    Args:
        backbone: What it was trained for.
        model: The trained adapter.
        sets: Rows of ``"validation"`` (the task's own kind) and of the dev sets (other kinds).

    Returns:
        The scale with the best validation quality among those that lose no more than
        ``TOLERATED_LOSS`` to the bare backbone on any dev set, or else the one that loses least;
        and all measurements.
    """
    with model.disable_adapter():
        bare = _qualities(backbone, model, sets)
    print(f"  bare: {bare}", flush=True)
    tried: list[Row] = []
    for scale in SCALES:
        _set_scale(model, scale)
        gains = {name: q - bare[name] for name, q in _qualities(backbone, model, sets).items()}
        shown = ", ".join(f"{name} {gain:+.4f}" for name, gain in gains.items())
        print(f"  scale {scale}: {shown}", flush=True)
        tried.append({"scale": scale, "gains": gains})
    _set_scale(model, 1.0)

    def rank(row: Row) -> tuple[bool, float]:
        worst = min(gain for name, gain in row["gains"].items() if name != "validation")
        kept = worst >= -TOLERATED_LOSS
        return (kept, row["gains"]["validation"] if kept else worst)

    return max(tried, key=rank)["scale"], tried


def _save(backbone: Backbone, model: PeftModel, scale: float, folder: Path) -> None:
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    if backbone.half:
        file = folder / "adapter_model.safetensors"
        halves = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(halves, file, metadata={"format": "pt"})
        file.chmod(0o644)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = backbone.name
    config["inference_mode"] = True
    alpha = round(backbone.alpha * scale, 4)
    config["lora_alpha"] = int(alpha) if alpha == int(alpha) else alpha
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train(backbone: Backbone, task: Task, data: Path, out: Path) -> Row:
    """Train one adapter, shrink it, save it, and return what was measured on the way.

    Args:
        backbone: What to train it for.
        task: What to train.
        data: Folder of the training files.
        out: Folder that gets a folder per adapter.
    """
    torch.manual_seed(SEED)
    draw = random.Random(f"{SEED}:{task.name}")
    files = {name: read_jsonl(data / f"{name}.jsonl") for name in task.mixture}
    for rows in files.values():
        draw.shuffle(rows)
    main_file = max(task.mixture, key=lambda name: task.mixture[name])
    validation = [files[main_file].pop() for _ in range(VALIDATION_PAIRS)]
    streams = {
        name: batches(rows, task.batch_size, f"{SEED}:{name}") for name, rows in files.items()
    }
    mixed = batches(read_jsonl(data / "mixed.jsonl"), MIXED_TEXTS, f"{SEED}:mixed")
    model = _new_adapter(backbone)
    tokenizer = backbone.tokenizer(backbone.train_tokens)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=task.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.learning_rate, task.steps, pct_start=0.1, cycle_momentum=False
    )
    started = time.monotonic()
    totals = [0.0, 0.0]
    for step in range(1, task.steps + 1):
        name = draw.choices(list(task.mixture), list(task.mixture.values()))[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = _task_loss(backbone, model, tokenizer, next(streams[name]))
            moved = torch.zeros(())
            if task.drift_weight:
                texts = [row["text"] for row in next(mixed)]
                with torch.no_grad(), model.disable_adapter():
                    teacher = embed(model, tokenizer, texts)
                moved = drift(embed(model, tokenizer, texts), teacher)
        (loss + task.drift_weight * moved).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        totals = [totals[0] + loss.item(), totals[1] + moved.item()]
        if step % REPORT_EVERY == 0:
            seconds = time.monotonic() - started
            print(
                f"{task.name} {step}/{task.steps} loss {totals[0] / REPORT_EVERY:.4f} "
                f"drift {totals[1] / REPORT_EVERY:.4f} {seconds:.0f} s",
                flush=True,
            )
            totals = [0.0, 0.0]
            _save(backbone, model, 1.0, out / task.name)
    scale, tried = 1.0, list[Row]()
    if task.dev:
        sets = {"validation": validation} | {name: read_eval(name) for name in task.dev}
        scale, tried = _choose_scale(backbone, model, sets)
    _save(backbone, model, scale, out / task.name)
    seconds = round(time.monotonic() - started, 1)
    print(f"{task.name}: scale {scale}, {seconds} s", flush=True)
    return {"scale": scale, "seconds": seconds, "tried": tried}


def main() -> None:
    """Train what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help="all by default")
    parser.add_argument("--backbone", choices=BACKBONES, default=BACKBONES[0])
    parser.add_argument("--model", type=Path, help="folder of the checkpoint, for smollm2")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--out", type=Path, help="adapters/ of the backbone by default")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    backbone = backbone_of(options.backbone, options.model)
    out = options.out or HERE / backbone.home
    out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    for task in tasks_of(backbone):
        if not options.tasks or task.name in options.tasks:
            report = train(backbone, task, options.data, out)
            text = json.dumps(report, indent=2) + "\n"
            (out / f"{task.name}-training.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
