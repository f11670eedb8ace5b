"""Checks of a call's arguments, each with the list of what would have been right."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import replace
from fractions import Fraction
from io import IOBase
from typing import Any

import numpy as np

from embedge.runtime.bundle.manifest import Manifest, Model, Task
from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.images.load import is_image

__all__ = [
    "as_images",
    "as_items",
    "as_texts",
    "check_choice",
    "check_cosine",
    "check_flag",
    "check_positive",
    "check_threads",
    "choose_dim",
    "choose_precision",
    "choose_prompt",
    "choose_task",
    "parse_bytes",
    "with_prompts",
]

MAX_THREADS = 1024  # more than machines have; ONNX Runtime ends with std::bad_alloc far above it
ON_TRUNCATE = ("ignore", "warn", "error")


def as_texts(inputs: Any) -> tuple[list[str], bool]:
    """The texts of a call, and whether it was a single one.

    Raises:
        EmbedgeValueError: with the index and type of the first item that is not a string.
    """
    if isinstance(inputs, str):
        return [inputs], True
    expected = "a string or a list of strings"
    if isinstance(inputs, (bytes, bytearray)):
        raise EmbedgeValueError(f"inputs: expected {expected}, found {type(inputs).__name__}")
    texts = _listed_items("inputs", inputs, expected)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise EmbedgeValueError(f"inputs[{index}]: expected a string, found {_described(text)}")
    return texts, False


def as_items(inputs: Any) -> tuple[list[Any], bool]:
    """The texts (``str``) and images (anything else) of a call, and whether it was a single one.

    Raises:
        EmbedgeValueError: with the index and type of the first item that is neither.
    """
    if isinstance(inputs, str) or _is_one_image(inputs):
        return [inputs], True
    items = _listed_items("inputs", inputs, "a string, an image or a list of them")
    for index, item in enumerate(items):
        if not isinstance(item, str) and not is_image(item):
            raise EmbedgeValueError(
                f"inputs[{index}]: expected a string or an image (a path, bytes, a PIL image or "
                f"a numpy array), found {_described(item)}"
            )
    return items, False


def as_images(images: Any) -> tuple[list[Any], bool]:
    """The images of a call, strings being paths, and whether it was a single one.

    Raises:
        EmbedgeValueError: with the index and type of the first item that is none.
    """
    if isinstance(images, str) or _is_one_image(images):
        return [images], True
    items = _listed_items("images", images, "an image or a list of images")
    for index, item in enumerate(items):
        if not isinstance(item, str) and not is_image(item):
            raise EmbedgeValueError(
                f"images[{index}]: expected a path, bytes, a PIL image or a numpy array, found "
                f"{type(item).__name__}"
            )
    return items, False


def _is_one_image(value: Any) -> bool:
    """Whether a value is one image, not a list: an array of strings or of four axes is a list."""
    if isinstance(value, np.ndarray):
        return value.ndim < 4 and value.dtype.kind in "biuf"
    return is_image(value)


def _listed_items(name: str, value: Any, expected: str) -> list[Any]:
    """The items of a list, or of another thing that holds one item after the other.

    Raises:
        EmbedgeValueError: for what holds its items otherwise, with the way to a list.
    """
    found, advice = type(value).__name__, None
    if isinstance(value, Mapping):
        advice = f"list({name}.values())"
    elif hasattr(value, "columns") or hasattr(
        value, "column_names"
    ):  # iterated, it gives their names
        found, advice = f"a table ({found})", f"one of its columns, such as {_a_column(value)}"
    elif isinstance(value, Set):  # vectors could not be told apart
        found, advice = f"{found}, which has no order", f"sorted({name})"
    elif isinstance(value, IOBase):  # its lines hold their ends
        found, advice = f"a file ({found})", "[line.rstrip() for line in file]"
    elif isinstance(value, np.ndarray) and value.dtype.kind in "OSTU" and value.ndim != 1:
        found = f"an array of shape {list(value.shape)}"
        advice = "one column, such as array[:, 0]" if value.ndim > 1 else f"{name}.item()"
    elif isinstance(value, Iterable):
        try:
            return list(value)
        except TypeError as error:  # a NumPy scalar calls itself iterable
            raise EmbedgeValueError(f"{name}: expected {expected}: {error}") from error
    hint = f"; pass {advice}" if advice else ""
    raise EmbedgeValueError(f"{name}: expected {expected}, found {found}{hint}")


def _a_column(table: Any) -> str:
    """Python for the texts of a table."""
    names = getattr(table, "column_names", None)
    names = list(getattr(table, "columns", ()) if names is None else names)
    texts = [name for name in names if isinstance(name, str)] or ["text"]
    column = f"table[{('text' if 'text' in texts else texts[0])!r}]"
    return f"{column}.to_pylist()" if hasattr(table, "to_pylist") else f"list({column})"


def _described(item: Any) -> str:
    """The type of an item that is no text, and what to do about the usual ones."""
    kind = type(item).__name__
    if (
        item is None
        or (isinstance(item, float) and math.isnan(item))
        or kind in ("NAType", "NaTType")
    ):
        return f"{kind}, a missing value; fill or drop those"
    if isinstance(item, bytes):
        return f"{kind}; decode them, such as item.decode()"
    if type(item).__module__.startswith("pyarrow"):
        return f"{kind}; pass column.to_pylist()"
    return kind


def check_positive(name: str, value: Any) -> int:
    """The value, a whole number of at least 1."""
    try:
        number = None if isinstance(value, bool) else value.__index__()
    except (AttributeError, TypeError):
        number = None
    if not isinstance(number, int) or number < 1:
        raise EmbedgeValueError(f"{name} is {value!r}; expected a whole number of at least 1")
    return number


def check_threads(name: str, value: Any) -> int:
    """The value, a whole number from 1 to :data:`MAX_THREADS`."""
    number = check_positive(name, value)
    if number > MAX_THREADS:
        raise EmbedgeValueError(
            f"{name} is {number}; expected at most {MAX_THREADS}: the cores to use, or leave it out "
            "for those that this process has"
        )
    return number


def check_cosine(name: str, value: Any) -> float:
    """The value, a number above 0 and at most 1."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1:
        raise EmbedgeValueError(f"{name} is {value!r}; expected a number above 0 and at most 1")
    return float(value)


def parse_bytes(name: str, value: int | str) -> int:
    """A number of bytes, or one with a unit: ``"2.0GB"``, ``"900 MB"``, ``"1.5 GiB"``."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", str(value).strip())
    if isinstance(value, bool) or found is None or found[2].upper() not in units:
        raise EmbedgeValueError(
            f"{name} {value!r}: expected a number of bytes, or one with KB, MB, GB, KiB, MiB or GiB"
        )
    return int(Fraction(found[1]) * units[found[2].upper()])


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """The value, one of some strings."""
    if not isinstance(value, str) or value not in choices:
        raise EmbedgeValueError(f"{name} is {value!r}; expected one of {_listed(choices)}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """The value, ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise EmbedgeValueError(f"{name} is {value!r}; expected True or False")
    return value


def choose_precision(manifest: Manifest, precision: str | None) -> str:
    """The precision named, or the bundle's only one; unpacked ones are asked for by name."""
    known = manifest.precisions
    if precision is None:
        stored = [name for name, settings in known.items() if not settings.unpack]
        if len(stored) > 1:
            raise EmbedgeValueError(
                f"the bundle has several precisions: {_listed(known)}; choose one, such as "
                f'precision="{stored[0]}", or precision="auto"'
            )
        return next(iter(stored or known))
    if not isinstance(precision, str) or precision not in known:
        raise EmbedgeValueError(
            f"the bundle has no precision {precision!r}; it has {_listed(known)}"
        )
    return precision


def choose_task(manifest: Manifest, precision: str, task: str | None) -> str:
    """The task named, or the only one; it has a graph at the precision."""
    known = manifest.precisions[precision].graphs
    if task is None:
        if len(known) != 1:
            raise EmbedgeValueError(
                f"the bundle has several tasks: {_listed(known)}; choose one, such as "
                f'task="{next(iter(known))}"'
            )
        return next(iter(known))
    if isinstance(task, str) and task in known:
        return task
    if isinstance(task, str) and task in manifest.tasks:
        raise EmbedgeValueError(
            f"task {task!r} has no graph at precision {precision!r}, which has {_listed(known)}"
        )
    raise EmbedgeValueError(f"the bundle has no task {task!r}; it has {_listed(known)}")


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
            f"task {name!r} has no prompt {chosen!r}: it declares none; leave prompt_name out"
        )
    raise EmbedgeValueError(
        f"task {name!r} has no prompt {chosen!r}; it has {_listed(task.prompts)}"
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
    if prompts is not None and not isinstance(prompts, Mapping):
        raise EmbedgeValueError(
            f"prompts: expected texts by name, such as {{'query': 'query: '}}, found "
            f"{type(prompts).__name__}"
        )
    for name, text in (prompts or {}).items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise EmbedgeValueError(
                f"prompts[{name!r}]: expected a string under a string, found {type(text).__name__}"
            )
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
    expected = f"1 to {model.dim}" if declared is None else f"one of {_listed(map(str, declared))}"
    try:
        dim = check_positive("truncate_dim", truncate_dim)
    except EmbedgeValueError:
        dim = 0
    allowed = range(1, model.dim + 1) if declared is None else {*declared, model.dim, default}
    if dim not in allowed:
        raise EmbedgeValueError(f"truncate_dim is {truncate_dim!r}; the bundle has {expected}")
    return dim


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
