"""nomic-bert: nomic-embed-text v1 and v1.5, as published and as transformers 5 saves them.

Source: Nussbaum et al., arXiv 2402.01613; nomic-ai's ``modeling_hf_nomic_bert.py``, and transformers 5's
``NomicBertModel``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from embedge.export.errors import CheckpointError
from embedge.export.families.rotary_encoder import NORMS, QKV, RotaryEncoder, ends
from embedge.export.graph.architecture import Mlp
from embedge.export.graph.rotary import Rope
from embedge.export.graph.values import LinearRef
from embedge.runtime.errors import EmbedgeWarning

_GATES = {"swiglu": "silu", "geglu": "gelu"}  # the published code's gated activations
_INNER_MULTIPLE = 256  # to which it rounds n_inner up
_TRAINED_POSITIONS = 2048  # max_trained_positions where config.json has none
_PUBLISHED = frozenset({"activation_function", "n_embd", "rotary_emb_fraction"})
_PUBLISHED_DEFAULTS = {
    "activation_function": "gelu_new",
    "layer_norm_eps": 1e-5,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
    "n_positions": 1024,
    "qkv_proj_bias": True,
    "rope_theta": 10000.0,
    "rotary_emb_fraction": 0.0,
}


class NomicBert(RotaryEncoder):
    """BERT with rotary positions and a gated MLP."""

    model_types = ("nomic_bert",)
    examples: ClassVar = {"nomic_bert": "nomic-ai/nomic-embed-text-v1.5"}
    aliases: ClassVar = {
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "layer_norm_epsilon": "layer_norm_eps",
        "rotary_emb_base": "rope_theta",
    }
    fused: ClassVar = {"attn.Wqkv": QKV}
    roots = (*RotaryEncoder.roots, "emb_ln")
    renamed: ClassVar = {
        **NORMS,
        **ends("emb_ln", "embeddings.LayerNorm"),
        **ends("attn.out_proj", "self_attn.o_proj"),
        **ends("mlp.fc11", "mlp.up_proj"),
        **ends("mlp.fc12", "mlp.gate_proj"),
        **ends("mlp.fc2", "mlp.down_proj"),
    }

    @classmethod
    def settings(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """As every family's, with the published class's defaults where its keys are there.

        Positions end where the published code begins to change frequencies.

        Raises:
            CheckpointError: a setting has two values, or it is not said where that is.
        """
        found = super().settings(config)
        if not _PUBLISHED.isdisjoint(found):
            found = {**_PUBLISHED_DEFAULTS, **found}
        limits = [found.get("n_positions"), found.get("max_position_embeddings")]
        if found.get("rotary_scaling_factor"):
            trained = found.get("max_trained_positions", _TRAINED_POSITIONS)
            if type(trained) is not int or trained < 1:
                raise CheckpointError(
                    f"config.json: max_trained_positions is {trained!r}, expected a positive whole number, beyond "
                    "which rotary_scaling_factor changes frequencies; write it there"
                )
            limits.append(trained)
        if known := [n for n in limits if type(n) is int]:
            found["max_position_embeddings"] = min(known)
        return found

    def theta(self) -> float:
        return 1000.0

    def read_rope(self, head_size: int) -> Rope:
        for key, expected in (("rotary_emb_fraction", 1.0), ("head_dim", head_size)):
            if self.config.get(key) not in (None, expected):
                raise self.unsupported(key, self.config[key], str(expected))
        rope = super().read_rope(head_size)
        dynamic = rope.scaling.get("rope_type", rope.scaling.get("type")) == "dynamic"
        if dynamic or self.config.get("rotary_scaling_factor"):
            warnings.warn(
                f"config.json: texts are cut at {self.max_length} tokens: beyond "
                f"{self.integer('max_position_embeddings')}, the positions that this model was trained on, its "
                "rotary frequencies would change with the length of a text (dynamic NTK)",
                EmbedgeWarning,
                stacklevel=6,
            )
        return replace(rope, scaling={}) if dynamic else rope

    def attention_bias(self) -> bool:
        return self._flag("qkv_proj_bias")

    def mlp(self, p: str) -> Mlp:
        has_bias = self._flag("mlp_fc1_bias")
        inner = self.integer("intermediate_size")
        if self.config.get("n_inner") is not None:
            inner = -(-inner // _INNER_MULTIPLE) * _INNER_MULTIPLE
        return Mlp(
            linears=[LinearRef(f"{p}mlp.{n}_proj", has_bias=has_bias) for n in ("gate", "up")],
            out=LinearRef(f"{p}mlp.down_proj", has_bias=self._flag("mlp_fc2_bias")),
            sum_norm=self.norm(f"{p}post_mlp_layernorm"),
            inner=inner,
            activation=self._activation(),
        )

    def _activation(self) -> str:
        given = self.config.get("activation_function")
        if given is None:
            return self.activation("hidden_act", "silu")
        if given not in _GATES:
            raise self.unsupported("activation_function", given, f"one of {', '.join(_GATES)}")
        kind = _GATES[given]
        if self.activation("hidden_act", kind) != kind:
            raise self.unsupported(
                "hidden_act", self.config["hidden_act"], f"{kind}, as {given} has"
            )
        return kind

    def _flag(self, key: str) -> bool:
        """Whether a kind of Linear has biases."""
        value = self.config.get(key, False)
        if not isinstance(value, bool):
            raise self.unsupported(key, value, "true or false")
        return value
