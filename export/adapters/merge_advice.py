"""What to type where an adapter has to become a model of its own before it can be exported."""

from __future__ import annotations

import shlex
from pathlib import Path

__all__ = ["merge_advice"]


def merge_advice(
    base: Path, transformer: Path, adapter: Path, model_class: str, rows: int | None = None
) -> str:
    """Say how PEFT merges an adapter into a copy of its base that keeps pooling and prompts.

    Args:
        base: the base model's folder.
        transformer: the folder of its transformer, mostly the same.
        adapter: the adapter's folder.
        model_class: transformers' class that the adapter was trained in.
        rows: tokens that the base's table is resized to; the copy then takes the adapter's tokenizer.
    """
    resized = f"m.resize_token_embeddings({rows}); " if rows else ""
    tokenizer = "; t.AutoTokenizer.from_pretrained(a).save_pretrained(new)" if rows else ""
    code = (
        "import sys, peft, transformers as t; b, a, new = sys.argv[1:]; "
        f"m = t.{model_class}.from_pretrained(b); {resized}"
        "peft.PeftModel.from_pretrained(m, a).merge_and_unload().save_pretrained(new)"
        f"{tokenizer}"
    )
    inner = transformer.relative_to(base) if transformer != base else ""
    return (
        "merge it into a copy of the model with PEFT and torch, and export MERGED as a model of its own "
        f"(--no-adapter NAME): cp -rL {shlex.quote(str(base))} MERGED && "
        f'python -c "{code}" {shlex.quote(str(transformer))} {shlex.quote(str(adapter))} '
        f"{shlex.quote(f'MERGED/{inner}' if inner else 'MERGED')}"
    )
