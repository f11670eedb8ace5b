"""What to say of a model that no family serves: the supported architecture that is closest, and what differs.

Ways in order:

1. a table of published architectures, by ``model_type``, or by what tells a model that goes by another's;
2. the names of its tensors, beside those that each family would read of its config.json;
3. its ``model_type``, beside the supported ones;
4. the keys of its config.json, beside those that each family reads.

Nothing here decides what is exported.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from embedge.export.errors import CheckpointError
from embedge.export.families.base import Family, flat_config
from embedge.export.families.known_keys import KEYS

__all__ = ["HOW_TO_ADD", "Kin", "check_no_variant", "not_supported"]

HOW_TO_ADD = (
    "`embedge families` lists what is supported (docs/reference/supported-models.md), and how an "
    "architecture is added is in CONTRIBUTING.md#where-do-i-add-a-family"
)
_ALIKE = 0.5  # least share of tensor names or keys that two architectures have in common
_NAMES_ALIKE = 0.75  # least likeness of two model types


class Kin(NamedTuple):
    """What a published architecture is closest to.

    Attributes:
        closest: a supported architecture; empty where none is near.
        differs: what that one does not compute.
    """

    closest: str
    differs: str


_MOE = "its MLPs are experts that a router chooses from"
_SSM = "it has state spaces where the supported ones have attention"
_T5 = "it is an encoder beside a decoder, with RMSNorm, scores without a scale and a position bias of its own buckets"
_GPT = "it has learned positions, LayerNorm and an MLP without a gate"
_PICTURES = "it embeds images by a tower of its own beside the texts'"
KIN: Mapping[str, Kin] = {
    "albert": Kin("bert", "all its layers share one layer's weights"),
    "big_bird": Kin("bert", "its attention leaves out blocks"),
    "bloom": Kin("llama", "its positions are ALiBi, with LayerNorm and an MLP without a gate"),
    "canine": Kin("bert", "it reads characters by hashes, not tokens"),
    "clip": Kin("", _PICTURES),
    "convbert": Kin("bert", "half of its heads are convolutions"),
    "deberta": Kin("bert", "its attention scores contents and relative positions apart"),
    "deberta-v2": Kin("bert", "its attention scores contents and relative positions apart"),
    "electra": Kin(
        "bert", "its embeddings have a width of their own, and a projection behind them"
    ),
    "ernie": Kin("bert", "it adds embeddings of task types"),
    "falcon": Kin("llama", "attention and MLP stand side by side, and its Linears are fused"),
    "falcon_mamba": Kin("", _SSM),
    "fnet": Kin("bert", "it has Fourier transforms where the supported ones have attention"),
    "funnel": Kin("bert", "its layers shorten the text"),
    "gemma": Kin("gemma3_text", "it has no norms of heads, nor of what a block adds"),
    "gemma2": Kin("gemma3_text", "it caps scores, and has no norms of heads"),
    "gemma3": Kin("gemma3_text", "it embeds images by a tower beside that"),
    "gpt2": Kin(
        "llama", f"{_GPT}, and query, key and value are one Linear that is stored transposed"
    ),
    "gpt_neo": Kin("llama", _GPT),
    "gpt_neox": Kin(
        "llama", "attention and MLP stand side by side, with LayerNorm and fused Linears"
    ),
    "gptj": Kin("llama", "attention and MLP stand side by side, with LayerNorm"),
    "longformer": Kin("roberta", "its attention is a window with global tokens"),
    "mamba": Kin("", _SSM),
    "mamba2": Kin("", _SSM),
    "mixtral": Kin("mistral", _MOE),
    "mobilebert": Kin("bert", "its layers are bottlenecks with norms without a mean"),
    "modernbert-decoder": Kin("modernbert", "its attention is causal"),
    "mt5": Kin("mpnet", _T5),
    "olmo2": Kin("llama", "it norms what a block adds, not what it reads"),
    "opt": Kin("llama", _GPT),
    "phi": Kin("llama", "attention and MLP stand side by side, with LayerNorm"),
    "phi3": Kin("llama", "its Linears are fused, and positions may follow LongRoPE"),
    "qwen2_moe": Kin("qwen2", _MOE),
    "qwen2_vl": Kin("qwen2_5_vl", "its vision tower has LayerNorm and sees whole images"),
    "qwen3_moe": Kin("qwen3", _MOE),
    "qwen3_vl": Kin(
        "qwen2_5_vl",
        "its three axes of positions are interleaved, and features of its tower are added to early layers",
    ),
    "rembert": Kin(
        "bert", "its embeddings have a width of their own, and a projection behind them"
    ),
    "roberta-prelayernorm": Kin("roberta", "it normalizes before each block"),
    "roformer": Kin("bert", "its positions are rotary"),
    "rwkv": Kin("", _SSM),
    "siglip": Kin("", _PICTURES),
    "squeezebert": Kin("bert", "its Linears are grouped convolutions"),
    "t5": Kin("mpnet", _T5),
    "umt5": Kin("mpnet", _T5),
    "xlnet": Kin("bert", "its positions are relative, and its attention has two streams"),
    "xmod": Kin("roberta", "its layers have an adapter for each language"),
}


class _Variant(NamedTuple):
    """A model whose ``model_type`` is a supported one, and which is another all the same."""

    name: str
    is_it: Callable[[Mapping[str, Any]], bool]
    kin: Kin


def _has_code(pattern: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a class in ``architectures``, or code in ``auto_map``, has a name of some form."""

    def found(config: Mapping[str, Any]) -> bool:
        code = config.get("auto_map")
        named = [
            *(config.get("architectures") or ()),
            *(code.values() if isinstance(code, dict) else ()),
        ]
        return any(re.search(pattern, str(name)) for name in named)

    return found


def _has_experts(config: Mapping[str, Any]) -> bool:
    every = config.get("moe_every_n_layers")
    return str(config.get("model_type")) == "nomic_bert" and isinstance(every, int) and every > 0


_VARIANTS = (
    _Variant(
        "jina-bert v2",
        _has_code(r"^JinaBert|jina-bert"),
        Kin("bert", "its positions are ALiBi, and its MLP has a gate"),
    ),
    _Variant(
        "nomic-embed v2 (moe)", _has_experts, Kin("nomic_bert", f"in every other layer {_MOE}")
    ),
)


def check_no_variant(config: Mapping[str, Any], file: Path) -> None:
    """Refuse a model that goes by the ``model_type`` of another.

    Args:
        config: its config.json.
        file: where that lies, for the message.

    Raises:
        CheckpointError: naming it, and what differs.
    """
    for variant in _VARIANTS:
        if variant.is_it(config):
            raise CheckpointError(
                f"{file}: this is {variant.name} (model_type {config.get('model_type')!r}), which is not "
                f"supported; {_told(variant.kin)}. {HOW_TO_ADD}"
            )


def not_supported(
    config: Mapping[str, Any],
    families: Sequence[type[Family]],
    tensors: Callable[[], Iterable[str]],
    file: Path,
) -> CheckpointError:
    """What to raise for a model that no family serves.

    Args:
        config: its config.json.
        families: those there are.
        tensors: gives the names of its tensors, none where they cannot be read.
        file: where its config.json lies, for the message.
    """
    kind = config.get("model_type")
    known = {one: family for family in families for one in family.model_types}
    listed = KIN.get(str(kind))
    closest = (
        (_told(listed) if listed else None)
        or _by_tensors(config, known, tensors())
        or _by_name(str(kind), known)
        or _by_keys(config, known)
        or f"no supported one is near: there are {', '.join(sorted(known))}"
    )
    found = (
        "expected a model_type, found none"
        if kind is None
        else f"model_type {kind!r} is not supported"
    )
    return CheckpointError(f"{file}: {found}; {closest}. {HOW_TO_ADD}")


def _told(kin: Kin) -> str:
    if not kin.closest:
        return f"no supported one is near: {kin.differs}"
    return (
        f"the closest supported one is {kin.closest}, from which this model differs: {kin.differs}"
    )


def _by_tensors(
    config: Mapping[str, Any], known: Mapping[str, type[Family]], tensors: Iterable[str]
) -> str | None:
    """The architecture with the most names in common, of those that it or the model has."""
    names, shared = list(tensors), dict[str, tuple[float, int, int]]()
    for kind, family in known.items():
        expected = _modules_of(family, kind, config)
        here = {
            _numberless(family.canonical(n).rpartition(".")[0])
            for n in _without_heads(names, family)
        }
        common = len(expected & here)
        shared[kind] = (common / max(len(expected | here), 1), common, len(here))
    kind = max(shared, key=lambda one: shared[one][0])
    share, common, count = shared[kind]
    if share < _ALIKE:
        return None
    return (
        f"the closest supported one by the names of its tensors is {kind}, of which it has {common}, beside "
        f"{count - common} others"
    )


def _modules_of(family: type[Family], kind: str, config: Mapping[str, Any]) -> set[str]:
    """Modules whose weights a family would read, numbers left out; none where its keys are not there."""
    try:
        return {
            _numberless(n) for n in family({**config, "model_type": kind}, max_length=1).shapes()
        }
    except Exception:  # another architecture's settings may be anything
        return set()


def _without_heads(names: Iterable[str], family: type[Family]) -> list[str]:
    return [n for n in names if not family.canonical(n).startswith(family.ignored)]


def _numberless(name: str) -> str:
    return re.sub(r"\b\d+\b", "N", name)


def _by_name(kind: str, known: Mapping[str, type[Family]]) -> str | None:
    plain = {one.replace("-", "_"): one for one in known}
    alike = difflib.get_close_matches(
        kind.lower().replace("-", "_"), plain, n=1, cutoff=_NAMES_ALIKE
    )
    return f"the closest supported one by its name is {plain[alike[0]]}" if alike else None


def _by_keys(config: Mapping[str, Any], known: Mapping[str, type[Family]]) -> str | None:
    """The architecture of whose keys the config.json has the most."""
    used = {kind: KEYS[kind].used for kind in known}
    given = flat_config(config).keys() & frozenset().union(*used.values())
    kind = max(used, key=lambda one: len(used[one] & given) / len(used[one] | given))
    common = len(used[kind] & given)
    if common < _ALIKE * len(used[kind] | given):
        return None
    return f"the closest supported one by the keys of config.json is {kind}, of whose {len(used[kind])} it has {common}"
