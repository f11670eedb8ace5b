"""What a caller names, found in a bundle's manifest: a precision, a task, a prompt, a length of vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from embedge.runtime.arguments import check_positive, listed
from embedge.runtime.bundle.manifest import Manifest, Model, Task, TaskMaps
from embedge.runtime.errors import EmbedgeValueError

__all__ = [
    "choose_dim",
    "choose_mapped",
    "choose_prompt",
    "choose_task",
    "find_precision",
    "with_max_length",
    "with_prompts",
]


def find_precision(manifest: Manifest, precision: str | None) -> str:
    """The precision named, or the bundle's only one; unpacked ones are asked for by name."""
    known = manifest.precisions
    if precision is None:
        stored = [name for name, settings in known.items() if not settings.unpack]
        if len(stored) > 1:
            named, automatic = f'precision="{stored[0]}"', 'precision="auto"'
            raise EmbedgeValueError(
                f"the bundle has several precisions: {listed(known)}; choose one, such as {named}, or "
                f"{automatic}",
                arguments=[named, automatic],
            )
        return next(iter(stored or known))
    if not isinstance(precision, str) or precision not in known:
        raise EmbedgeValueError(
            f"the bundle has no precision {precision!r}; it has {listed(known)}"
        )
    return precision


def choose_task(manifest: Manifest, precision: str, task: str | None) -> str:
    """The task named, or the only one; it has a graph at the precision."""
    known = manifest.precisions[precision].graphs
    if task is None:
        if len(known) != 1:
            named = f'task="{next(iter(known))}"'
            raise EmbedgeValueError(
                f"the bundle has several tasks: {listed(known)}; choose one, such as {named}",
                arguments=[named],
            )
        return next(iter(known))
    if isinstance(task, str) and task in known:
        return task
    if isinstance(task, str) and task in manifest.tasks:
        raise EmbedgeValueError(
            f"task {task!r} has no graph at precision {precision!r}, which has {listed(known)}"
        )
    raise EmbedgeValueError(f"the bundle has no task {task!r}; it has {listed(known)}")


def choose_mapped(
    manifest: Manifest, precision: str, tasks: Sequence[str] | None
) -> tuple[TaskMaps, list[str]]:
    """The maps of a precision, and the tasks named of those that they give, or all.

    Raises:
        EmbedgeValueError: if there are no maps, or none of a task.
    """
    maps = manifest.precisions[precision].maps
    if maps is None:
        raise EmbedgeValueError(
            f"precision {precision!r} has no maps, which give several tasks' vectors from one pass; fit them on texts "
            f"such as you embed: `embedge fit-maps BUNDLE --texts FILE --precision {precision}`"
        )
    if tasks is None:
        return maps, list(maps.tasks)
    if isinstance(tasks, str) or not tasks:
        raise EmbedgeValueError(
            f"tasks: expected a list of some of {listed(maps.tasks)}, found {tasks!r}"
        )
    for task in tasks:
        if task not in maps.tasks:
            raise EmbedgeValueError(
                f"the maps of precision {precision!r} give no task {task!r}; they give {listed(maps.tasks)}"
            )
    return maps, list(dict.fromkeys(tasks))


def choose_prompt(name: str, task: Task, prompt_name: str | None, prompt: str | None) -> str:
    """The text to put before every text, "" for none; an explicit prompt wins over a name."""
    if prompt is not None:
        if not isinstance(prompt, str):
            raise EmbedgeValueError(f"prompt: expected a string, found {type(prompt).__name__}")
        return prompt
    chosen = task.default_prompt if prompt_name is None else prompt_name
    if chosen is None:
        return ""
    if isinstance(chosen, str) and chosen in task.prompts:
        return task.prompts[chosen]
    if not task.prompts:
        raise EmbedgeValueError(
            f"task {name!r} has no prompt {chosen!r}: it declares none; leave prompt_name out",
            arguments=["prompt_name"],
        )
    raise EmbedgeValueError(
        f"task {name!r} has no prompt {chosen!r}; it has {listed(task.prompts)}"
    )


def with_prompts(
    tasks: Mapping[str, Task],
    prompts: Mapping[str, str] | None,
    default_prompt_name: str | None,
    task: str | None,
) -> dict[str, Task]:
    """Tasks with an Embedder's own prompts.

    Args:
        tasks: of the bundle.
        prompts: win over a task's prompts of the same name.
        default_prompt_name: becomes the default of the tasks that have it.
        task: has to have it; ``None``: all have to.
    """
    given = {
        name: replace(of_task, prompts={**of_task.prompts, **(prompts or {})})
        for name, of_task in tasks.items()
    }
    if default_prompt_name is None:
        return given
    for name in given if task is None else [task]:
        choose_prompt(name, given[name], default_prompt_name, None)
    return {
        name: replace(of_task, default_prompt=default_prompt_name)
        if default_prompt_name in of_task.prompts
        else of_task
        for name, of_task in given.items()
    }


def choose_dim(model: Model, truncate_dim: int | None) -> int:
    """The length of the vectors to give."""
    default = model.truncate_dim or model.dim
    if truncate_dim is None:
        return default
    declared = model.matryoshka_dims
    expected = f"1 to {model.dim}" if declared is None else f"one of {listed(map(str, declared))}"
    try:
        dim = check_positive("truncate_dim", truncate_dim)
    except EmbedgeValueError:
        dim = 0
    allowed = range(1, model.dim + 1) if declared is None else {*declared, model.dim, default}
    if dim not in allowed:
        raise EmbedgeValueError(
            f"truncate_dim is {truncate_dim!r}; the bundle has {expected}",
            arguments=["truncate_dim"],
        )
    return dim


def with_max_length(model: Model, length: int, *, least: int) -> Model:
    """A model whose texts are cut at fewer tokens.

    Args:
        model: of the bundle.
        length: most tokens of a text.
        least: fewest that leave room for a text.

    Raises:
        EmbedgeValueError: for more than the model takes, too few, or a late-interaction model.
    """
    check_positive("max_seq_length", length)
    if model.late_interaction is not None:
        rules = model.late_interaction
        raise EmbedgeValueError(
            f"max_seq_length is {length}: a late-interaction model has a length of queries, {rules.query_length}, and "
            f"one of documents, {rules.document_length}, as it was trained; leave it out",
            arguments=["max_seq_length"],
        )
    if not least <= length <= model.max_length:
        raise EmbedgeValueError(
            f"max_seq_length is {length}; expected {least} to {model.max_length}, as many tokens as the model takes; "
            "longer texts are to be split",
            arguments=["max_seq_length"],
        )
    return replace(model, max_length=int(length))
