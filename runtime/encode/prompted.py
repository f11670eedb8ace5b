"""Texts as their task's calls embed them: with each of its prompts, and with none."""

from __future__ import annotations

from collections.abc import Sequence

from embedge.runtime.bundle.manifest import Manifest

__all__ = ["prompted"]


def prompted(manifest: Manifest, task: str, texts: Sequence[str]) -> list[str]:
    """Texts that are more than spaces, each prompt of a task, and none, before its share of them.

    Where a prompt's tokens are not pooled the texts stay as they are.
    """
    prompts = [""]
    if manifest.model.include_prompt:
        prompts = list(dict.fromkeys(["", *manifest.tasks[task].prompts.values()]))
    return [
        prompts[index % len(prompts)] + text for index, text in enumerate(texts) if text.strip()
    ]
