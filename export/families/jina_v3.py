"""jina-embeddings-v3: an encoder with rotary positions and an adapter for each of five tasks.

The mean of all tokens is the vector, of length 1; a task's instruction is put before its texts. transformers 5 has
the base, and PEFT's adapters in folders beside it; as it was published, the checkpoint holds them
(``adapters/stacked.py``).

Source: Sturua et al., arXiv 2409.10173; the published ``modeling_lora.py``, and transformers 5's
``JinaEmbeddingsV3Model``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from embedge.export.adapters.adapter import Adapter
from embedge.export.adapters.stacked import STACKED, stacked_adapters
from embedge.export.errors import CheckpointError
from embedge.export.families.rotary_encoder import NORMS, QKV, RotaryEncoder, ends
from embedge.export.graph.architecture import Mlp
from embedge.export.graph.values import LinearRef
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.config import number
from embedge.export.source.sentence_transformers import SentenceSettings

# The published instructions, for folders whose files name none.
_INSTRUCTIONS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
    "separation": "",
    "classification": "",
    "text-matching": "",
}


class JinaV3(RotaryEncoder):
    """jina-embeddings-v3 as transformers 5 has it, with PEFT's adapters in folders."""

    model_types = ("jina_embeddings_v3",)
    examples: ClassVar[Mapping[str, str]] = {"jina_embeddings_v3": "jinaai/jina-embeddings-v3-hf"}
    default_epsilon = 1e-5
    fused: ClassVar = {"mixer.Wqkv": QKV}
    roots = (*RotaryEncoder.roots, "emb_ln")
    renamed: ClassVar[Mapping[str, str]] = {
        **NORMS,
        **ends("emb_ln", "embeddings.LayerNorm"),
        **ends("mixer.out_proj", "self_attn.o_proj"),
    }

    def theta(self) -> float:
        return 20000.0

    def mlp(self, p: str) -> Mlp:
        return Mlp(
            linears=[LinearRef(f"{p}mlp.fc1")],
            out=LinearRef(f"{p}mlp.fc2"),
            sum_norm=self.norm(f"{p}post_mlp_layernorm"),
            inner="intermediate_size",
            activation=self.activation("hidden_act", "gelu"),
        )

    @classmethod
    def tasks_beside(cls, folder: Path) -> dict[str, str | None]:
        names = {task: task.replace(".", "_").replace("-", "_") for task in _INSTRUCTIONS}
        return {
            task: name
            for task, name in names.items()
            if os.path.lexists(folder / name / "adapter_config.json")
        }

    @classmethod
    def completed(cls, settings: SentenceSettings, config: Mapping[str, Any]) -> SentenceSettings:
        instructions = cls.instructions(config)
        for name in sorted(set(instructions) & set(settings.prompts)):
            if settings.prompts[name] != instructions[name]:
                raise CheckpointError(
                    f"config_sentence_transformers.json: the prompt {name} is {settings.prompts[name]!r}, and "
                    f"the instruction of that task {instructions[name]!r} (task_instructions in config.json); "
                    "expected one text: delete the wrong one"
                )
        if settings.pooling is None:  # no modules.json: as the published encode() does it
            settings = replace(settings, pooling="mean", normalize=True)
        return replace(
            settings,
            prompts={**instructions, **settings.prompts},
            task_defaults={task: task for task in instructions},
        )

    @classmethod
    def instructions(cls, config: Mapping[str, Any]) -> Mapping[str, str]:
        """What is put before the texts of every task."""
        return _INSTRUCTIONS


class JinaV3Published(JinaV3):
    """jina-embeddings-v3 as it was published, all adapters in the checkpoint."""

    model_types = ("jina_embeddings_v3_published",)
    examples: ClassVar = {"jina_embeddings_v3_published": "jinaai/jina-embeddings-v3"}
    aliases: ClassVar = {"rotary_emb_base": "rope_theta"}
    aside = STACKED
    renamed: ClassVar = {".parametrizations.weight.original": ".weight", **JinaV3.renamed}

    @classmethod
    def serves(cls, config: Mapping[str, Any], name: str) -> bool:
        kind = config.get("position_embedding_type")
        return config.get("model_type") == "xlm-roberta" and kind == "rotary"

    def theta(self) -> float:
        return 10000.0  # the published class's

    @classmethod
    def own_tasks(cls, config: Mapping[str, Any], name: str) -> dict[str, str | None]:
        return dict.fromkeys(cls._names(config))

    @classmethod
    def own_adapters(cls, checkpoint: Checkpoint) -> dict[str, Adapter]:
        config, names = checkpoint.config, cls._names(checkpoint.config)
        if not names:
            return {}
        return stacked_adapters(
            checkpoint,
            cls.canonical,
            names,
            rank=int(number(config, "lora_rank")),
            alpha=number(config, "lora_alpha"),
            heads=cls.ignored,
        )

    @classmethod
    def instructions(cls, config: Mapping[str, Any]) -> Mapping[str, str]:
        names, found = cls._names(config), config.get("task_instructions")
        if not names and found is None:
            return {}
        texts = found if isinstance(found, dict) else {}
        if set(texts) != set(names) or not all(isinstance(t, str) for t in texts.values()):
            raise CheckpointError(
                f"config.json: task_instructions is {found!r}, expected a text for each of lora_adaptations: "
                f"{', '.join(names) or 'none'}"
            )
        return texts

    @classmethod
    def _names(cls, config: Mapping[str, Any]) -> list[str]:
        names = config.get("lora_adaptations") or []
        if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
            raise CheckpointError(
                f"config.json: lora_adaptations is {names!r}, expected a list of names of tasks"
            )
        return names
