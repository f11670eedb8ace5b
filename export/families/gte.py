"""GTE: gte-multilingual, gte-en v1.5, snowflake-arctic-embed v2.0, as published and as transformers 5 saves them.

Source: Zhang et al., arXiv 2407.19669; Alibaba-NLP's ``new-impl``, and transformers 5's ``GteModel``. NTK scaling:
https://kexue.fm/archives/9706, without its mixed form.
"""

from __future__ import annotations

from typing import Any, ClassVar

from embedge.export.families.rotary_encoder import NORMS, QKV, RotaryEncoder, ends
from embedge.export.graph.architecture import Mlp
from embedge.export.graph.rotary import Rope
from embedge.export.graph.values import LinearRef


class Gte(RotaryEncoder):
    """BERT with rotary positions and a gated MLP, whose last Linear alone has a bias."""

    model_types = ("gte", "new")
    examples: ClassVar = {
        "gte": "Snowflake/snowflake-arctic-embed-m-v2.0",
        "new": "Alibaba-NLP/gte-multilingual-base",
    }
    roots = (*RotaryEncoder.roots, "encoder")
    fused: ClassVar = {
        "attention.qkv_proj": QKV,
        "mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj"),
    }
    renamed: ClassVar = {
        **ends("attention.o_proj", "self_attn.o_proj"),
        **ends("attn_ln", "post_attention_layernorm"),
        **ends("mlp_ln", "post_mlp_layernorm"),
        **NORMS,
    }

    @classmethod
    def canonical(cls, key: str) -> str:
        name = super().canonical(key)
        published = name.startswith("encoder.layer.")
        return name.replace("encoder.layer.", "layers.", 1) if published else name

    def theta(self) -> float:
        # that of the class that would read it
        native = self.config["model_type"] == "gte" and not self.config.get("auto_map")
        return 160000.0 if native else 10000.0

    def read_rope(self, head_size: int) -> Rope:
        scaling = self.config.get("rope_scaling")
        scaling = scaling if isinstance(scaling, dict) else {}
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind != "ntk":
            if kind not in (None, "default") and self.config["model_type"] == "new":
                raise self.unsupported("rope_scaling type", kind, "'ntk'")
            return super().read_rope(head_size)
        return self._ntk(scaling, head_size)

    def _ntk(self, scaling: dict[str, Any], head_size: int) -> Rope:
        """NTK scaling by a number, the same for texts of all lengths."""
        if unknown := sorted(set(scaling) - {"type", "rope_type", "factor"}):
            raise self.unsupported("rope_scaling", scaling, f"no {', '.join(unknown)}")
        factor = scaling.get("factor")
        if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1:
            raise self.unsupported("rope_scaling.factor", factor, "a number of at least 1")
        theta = self.number("rope_theta", self.theta())
        said = {"rope_type": "ntk", "type": "ntk", "factor": factor, "rope_theta": theta}
        for key in ("rope_scaling", "rope_parameters"):
            given = self.config.get(key) or {}
            if not isinstance(given, dict) or any(said.get(k) != v for k, v in given.items()):
                raise self.unsupported(key, given, f"nothing beside {scaling}, of type 'ntk'")
        stretched = {"rope_type": "linear", "factor": factor ** (2 / head_size)}
        return Rope(head_size=head_size, theta=theta * factor, scaling=stretched)

    def mlp(self, p: str) -> Mlp:
        return Mlp(
            linears=[LinearRef(f"{p}mlp.{n}_proj", has_bias=False) for n in ("gate", "up")],
            out=LinearRef(f"{p}mlp.down_proj"),
            sum_norm=self.norm(f"{p}post_mlp_layernorm"),
            inner="intermediate_size",
            activation=self.activation("hidden_act", "gelu"),
        )
