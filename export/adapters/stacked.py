"""Adapters that a checkpoint holds beside its weights, all tasks' in one tensor: jina-embeddings-v3's.

torch's parametrizations name them ``X.parametrizations.weight.original``, the base's weight, and
``X.parametrizations.weight.0.lora_A`` and ``lora_B``, a task each along the first axis. A Linear's weight is
``W + s · B·A``, with A ``[rank, in]`` and B ``[out, rank]``, as PEFT's; a table's is ``W + s · A·B``, with A
``[rows, rank]`` and B ``[rank, width]``, which are PEFT's transposed.

Source: Sturua et al., arXiv 2409.10173; the published ``modeling_lora.py``, after cccntu/minLoRA.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedge.export.adapters.adapter import Adapter
from embedge.export.adapters.config import LoraSettings, Targets
from embedge.export.adapters.keys import PREFIX
from embedge.export.errors import CheckpointError
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.safetensors_file import SafetensorsFile

__all__ = ["STACKED", "stacked_adapters"]

STACKED = r"\.parametrizations\.weight\.0\.lora_[AB]"
_STACKED = re.compile(r"(?P<module>.+)\.parametrizations\.weight\.0\.lora_(?P<factor>[AB])")
_ORIGINAL = ".parametrizations.weight.original"
_TABLES = ("word_embeddings", "token_type_embeddings", "position_embeddings")


class _Stack(NamedTuple):
    """Where a factor lies: a tensor of all tasks, and whether it is stored transposed."""

    file: SafetensorsFile
    key: str
    transposed: bool


@dataclass(frozen=True)
class _OneTask:
    """One task's factors under PEFT's names, read as :class:`SafetensorsFile` reads.

    Attributes:
        path: the file that is named in messages.
        stacks: by PEFT's names.
        number: of the task.
    """

    path: Path
    stacks: Mapping[str, _Stack]
    number: int

    def keys(self) -> tuple[str, ...]:
        return tuple(sorted(self.stacks))

    def dtype(self, key: str) -> str:
        stack = self.stacks[key]
        return stack.file.dtype(stack.key)

    def shape(self, key: str) -> tuple[int, ...]:
        stack = self.stacks[key]
        shape = stack.file.shape(stack.key)[1:]
        return shape[::-1] if stack.transposed else shape

    def read(self, key: str, rows: slice | None = None) -> NDArray[np.float32]:
        stack = self.stacks[key]
        [value] = stack.file.read(stack.key, slice(self.number, self.number + 1))
        value = np.ascontiguousarray(value.T) if stack.transposed else value
        return value if rows is None else value[rows]

    def chunks(self, key: str) -> Iterator[bytes]:
        yield self.read(key).tobytes()


def stacked_adapters(
    checkpoint: Checkpoint,
    canonical: Callable[[str], str],
    names: Sequence[str],
    *,
    rank: int,
    alpha: float,
    heads: tuple[str, ...],
) -> dict[str, Adapter]:
    """Return the adapters that a checkpoint holds, by their tasks.

    Args:
        checkpoint: the model.
        canonical: gives a key's canonical name.
        names: of the tasks, in the order of the tensors' first axis.
        rank: of all factors.
        alpha: divided by the rank, the factor of their product.
        heads: starts of canonical names of modules that cannot reach the vector; they are left out.

    Raises:
        CheckpointError: there are none, or of another number of tasks, or a module that has them lacks its own.
    """
    stacks: dict[str, _Stack] = {}
    adapted: set[str] = set()
    for key, file in checkpoint.stored.items():
        match = _STACKED.fullmatch(key)
        if match is None or canonical(f"{match['module']}.weight").startswith(heads):
            continue
        shape = file.shape(key)
        if len(shape) != 3 or shape[0] != len(names):
            raise CheckpointError(
                f"{file.path}: {key} has the shape {list(shape)}, expected {len(names)} matrices, one for each "
                f"of {', '.join(names)}, as lora_adaptations in config.json has them"
            )
        adapted.add(match["module"])
        table = match["module"].endswith(_TABLES)
        part = "lora_embedding_" if table else "lora_"
        name = f"{PREFIX}{match['module']}.{part}{match['factor']}{'' if table else '.weight'}"
        stacks[name] = _Stack(file, key, table)
    if not stacks:
        raise CheckpointError(
            f"{checkpoint.path}: expected the adapters of {', '.join(names)} among the weights, as "
            "lora_adaptations in config.json says, found none; is config.json of the same model as the weights?"
        )
    for key, file in checkpoint.stored.items():
        module = key.removesuffix(_ORIGINAL)
        is_head = canonical(f"{module}.weight").startswith(heads)
        if module != key and module not in adapted and not is_head:
            raise CheckpointError(
                f"{file.path}: {key} is a weight beside adapters, and there is no {module}"
                ".parametrizations.weight.0.lora_A and lora_B; expected both: without them the tasks' vectors "
                "are others. Fetch the weights again"
            )
    settings = LoraSettings(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        use_dora=False,
        lora_bias=False,
        modules_to_save=(),
        base_model=checkpoint.name,
        base_sha256=None,
        trainable_tokens={},
        model_class="",
        targets=Targets(modules=None, excluded=None, layers=None, containers=()),
    )
    path = next(iter(stacks.values())).file.path
    return {
        name: Adapter(
            name,
            checkpoint.transformer_path,
            settings,
            _OneTask(path, stacks, number),
            sha256=hashlib.sha256(
                f"{checkpoint.sha256()} {number} {alpha} {rank}".encode()
            ).hexdigest(),
        )
        for number, name in enumerate(names)
    }
