"""Trains the small page model of ``page_search/checkpoint`` on the CPU, in two stages."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from page_search.train import Plan, Trainer, read


def main() -> None:
    """Run a stage: ``read`` writes the tower, ``find`` the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("read", "find"))
    parser.add_argument("--tower", type=Path, required=True, help="safetensors file of the tower")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint, for find")
    parser.add_argument("--steps", type=int, default=2000, help="of read")
    parser.add_argument("--backbone-steps", type=int, default=Plan.backbone)
    parser.add_argument("--adapter-steps", type=int, default=Plan.adapter, help="of each task")
    parser.add_argument("--pages", type=int, default=Plan.pages, help="that find trains on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.stage == "read":
        read(options.tower, options.steps)
        return
    if options.out is None:
        parser.error("find writes a checkpoint: name its folder with --out")
    plan = Plan(options.backbone_steps, options.adapter_steps, options.pages)
    Trainer(options.out, options.tower, plan).run()


if __name__ == "__main__":
    main()
