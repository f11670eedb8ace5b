"""Heads that an adapter trains and no vector depends on: its part of them is left out."""

from __future__ import annotations

from collections.abc import Callable

from embedge.export.adapters.keys import AdapterKeys

__all__ = ["without_heads"]


def without_heads(
    keys: AdapterKeys,
    heads: tuple[str, ...],
    canonical: Callable[[str], str],
    trained: Callable[[str], bool],
) -> tuple[AdapterKeys, tuple[str, ...]]:
    """Leave out what cannot reach the vector.

    Args:
        keys: of the adapter.
        heads: starts of canonical names of modules that cannot reach the vector.
        canonical: the canonical name of a parameter path of the adapter.
        trained: whether the tensor of a key has changed since it was zero.

    Returns:
        The other keys, and the names of the heads that are not as they began, sorted.
    """
    dropped: set[str] = set()
    left_out: set[str] = set()
    parts = [(targets[0], tuple(sources)) for targets, sources in keys.full.items()]
    parts += [(f"{module}.weight", tuple(named.values())) for module, named in keys.lora.items()]
    for path, sources in parts:
        if canonical(path).startswith(heads):
            dropped.update(sources)
            factors = [key for key in sources if ".lora_A" in key or ".lora_B" in key]
            if all(map(trained, factors)):
                left_out.add(canonical(path).partition(".")[0])
    # Rows of a head's table are tied to the input's.
    copies = [*keys.originals.items(), *((f"{m}.weight", key) for m, key in keys.tokens.items())]
    dropped.update(key for path, key in copies if canonical(path).startswith(heads))
    return keys.without(dropped), tuple(sorted(left_out))
