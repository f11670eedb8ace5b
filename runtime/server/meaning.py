"""Which task and which prompt a request means, in the words of several interfaces.

What says so:
    * ``model``: ``NAME:TASK``; ``task``: a task of the bundle, or Jina's ``TASK.query`` and ``TASK.passage``. Where
      these are two tasks of the bundle, ``TASK`` with a role is one of them.
    * ``input_type``: Cohere's ``search_query`` and ``search_document``, Voyage's ``query`` and ``document``,
      ``passage``: first a prompt of the task of that very name, else as ``Embedder.encode_query`` and
      ``encode_document`` have them. Any other is the name of a prompt of the task, or of a task.
    * ``prompt_name``, ``prompt``: as ``Embedder.encode`` has them.

What agrees with nothing in the bundle is an error, and so are two that say different things.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from embedge.runtime.arguments import listed
from embedge.runtime.server.errors import ApiError, invalid, shown
from embedge.runtime.server.fields import MeaningFields, RerankFields
from embedge.runtime.server.models import ServedModel

__all__ = ["Meaning", "meaning_of", "rerank_meanings"]

Role = Literal["query", "document"]

_ROLES: dict[str, Role] = {
    "query": "query",
    "search_query": "query",
    "document": "document",
    "search_document": "document",
    "passage": "document",
}
_ROLE_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What the texts of a request are embedded as.

    Attributes:
        task: of the bundle.
        prompt_name: as ``Embedder.encode`` has it.
        prompt: likewise.
        role: as ``Embedder.tokenize`` has it.
    """

    task: str
    prompt_name: str | None = None
    prompt: str | None = None
    role: Role | None = None

    @property
    def options(self) -> dict[str, Any]:
        """For ``Embedder.tokenize``."""
        return dict(vars(self))


def meaning_of(model: ServedModel, task: str | None, fields: MeaningFields) -> Meaning:
    """What a request means.

    Args:
        model: that it names.
        task: that it names with the model; ``None``: none.
        fields: of the request.

    Raises:
        ApiError: 400, with the field and what the bundle has.
    """
    said = [
        f"{name} {shown(value)}"
        for name in ("input_type", "prompt_name", "prompt")
        if (value := getattr(fields, name)) is not None
    ]
    named, role, prompt_name = _task_named(model, fields.task)
    if role is not None:
        said.insert(0, f"task {shown(fields.task or '')}")
    if len(said) > 1:
        raise invalid(f"{' and '.join(said)} both choose a prompt; send one of them", "input_type")
    if task is not None and named is not None and task != named:
        raise invalid(f"model names the task {task!r} and task names {named!r}; send one", "task")
    chosen = task or named or model.embedder.task
    if chosen is not None:
        chosen = _task_in_role(model, chosen, role or _ROLES.get(fields.input_type or ""))
    if fields.input_type is not None:
        chosen, role, prompt_name = _of_input_type(model, chosen, fields.input_type)
    if chosen is None:
        raise _several(model)
    if model.late and role is None:
        raise invalid(
            f"{model.name} is a late-interaction model, whose queries and documents differ; expected input_type "
            '"query" or "document"',
            "input_type",
        )
    if fields.prompt_name is not None:
        prompt_name = _prompt_named(model, chosen, fields.prompt_name)
    return Meaning(task=chosen, prompt_name=prompt_name, prompt=fields.prompt, role=role)


def rerank_meanings(
    model: ServedModel, task: str | None, fields: RerankFields
) -> tuple[Meaning, Meaning]:
    """What the query and the documents of a request are embedded as.

    Args:
        model: as for :func:`meaning_of`.
        task: likewise.
        fields: of the request.

    Raises:
        ApiError: likewise, and for what chooses a role, as a request has both.
    """
    for name in ("input_type", "prompt", "prompt_name"):
        if getattr(fields, name) is not None:
            raise invalid(
                f"{name}: the query and the documents have prompts of their own; leave it out", name
            )
    for field, named in (("model", task), ("task", fields.task)):
        if named is not None and (base := _base_of_role(model, named)) is not None:
            raise invalid(
                f"{field} names the task {shown(named)}, which is for one role; the query and the documents have one "
                f"each: name the task {base!r}",
                field,
            )
    query, documents = (
        meaning_of(
            model, task, MeaningFields(model=fields.model, task=fields.task, input_type=role)
        )
        for role in ("query", "document")
    )
    return query, documents


def _base_of_role(model: ServedModel, task: str) -> str | None:
    """The task without its role, where it names one."""
    base, _, last = task.rpartition(".")
    if task in model.embedder.tasks:
        return base if model.pair_of(task) is not None else None
    return base if base in model.embedder.tasks and last in _ROLES else None


def _task_in_role(model: ServedModel, task: str, role: Role | None) -> str:
    """The task of a role, where the bundle has one for queries and one for documents.

    Args:
        model: of the request.
        task: that it names: one of the two, both by what their names have in common, or another.
        role: that it names.
    """
    pair = model.pair_of(task)
    if pair is None or (role is None and task in pair.values()):
        return task
    if role is None:
        raise invalid(
            f"{model.name} has {pair['query']!r} for queries and {pair['document']!r} for documents; expected "
            f'input_type "query" or "document" beside {task!r}, or one of these tasks',
            "input_type",
        )
    if task in pair.values() and task != pair[role]:
        raise invalid(
            f"the task {task!r} of {model.name} is not for the role {role}; name the task {pair[role]!r}",
            "input_type",
        )
    return pair[role]


def _prompt_named(model: ServedModel, task: str, name: str) -> str:
    prompts = model.embedder.get_prompts(task)
    if name not in prompts:
        raise invalid(
            f"task {task!r} of {model.name} has no prompt {shown(name)}; it has {listed(prompts)}",
            "prompt_name",
        )
    return name


def _task_named(model: ServedModel, task: str | None) -> tuple[str | None, Role | None, str | None]:
    """The task of the bundle, the role, and the name of the prompt that ``task`` means."""
    tasks = model.embedder.tasks
    if task is None or task in tasks or task in model.pairs:
        return task, None, None
    base, _, last = task.rpartition(".")
    role = _ROLES.get(last)
    if base in tasks and role is not None:
        prompts = model.embedder.get_prompts(base)
        if last in prompts:
            return base, role, last
        if model.late or any(name in prompts for name in _ROLE_PROMPTS[role]):
            return base, role, None
        raise invalid(
            f"task {task!r}: the task {base!r} of {model.name} has no prompt for the role {role}; it has "
            f"{listed(prompts)}",
            "task",
        )
    raise invalid(f"{model.name} has no task {shown(task)}; it has {listed(tasks)}", "task")


def _of_input_type(
    model: ServedModel, task: str | None, input_type: str
) -> tuple[str | None, Role | None, str | None]:
    """The task, the role and the name of the prompt that ``input_type`` means: first the task's own of that name."""
    tasks, role = model.embedder.tasks, _ROLES.get(input_type)
    prompts = model.embedder.get_prompts(task) if task is not None else {}
    if role is None and task is not None and input_type in tasks and input_type != task:
        raise invalid(
            f"the task is {task!r} and input_type names the task {input_type!r}; send one",
            "input_type",
        )
    if input_type in prompts:
        return task, role, input_type
    if role is not None:
        return task, role, None
    if task is None and input_type in tasks:
        return input_type, None, None
    where = f"task {task!r}" if task is not None else "tasks"
    known = prompts if task is not None else tasks
    raise invalid(
        f"input_type {shown(input_type)} is none of {', '.join(_ROLES)}, nor of the {where} of {model.name}, which has "
        f"{listed(known)}",
        "input_type",
    )


def _several(model: ServedModel) -> ApiError:
    tasks = model.embedder.tasks
    return invalid(
        f"{model.name} has several tasks: {listed(tasks)}; choose one, such as model "
        f'"{model.name}:{tasks[0]}"',
        "task",
    )
