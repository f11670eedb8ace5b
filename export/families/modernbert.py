"""ModernBERT: an encoder that normalizes before each block, rotary, with local attention layers.

Source: Warner et al., arXiv 2412.13663, and transformers' ``ModernBertModel``.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from onnx import TensorProto

from embedge.export.errors import CheckpointError
from embedge.export.families.base import HEADS, Family
from embedge.export.families.decoder import band
from embedge.export.graph.attention import attention
from embedge.export.graph.builder import Graph
from embedge.export.graph.long_attention import (
    FEWEST_BLOCKS,
    FLASH_TOKENS,
    Window,
    in_blocks,
    is_flash,
    window_of,
)
from embedge.export.graph.rotary import (
    checked_rope,
    position_ids,
    rotary_inputs,
    rotary_tables,
    rotate,
)
from embedge.export.graph.scheme import Target
from embedge.export.graph.values import LinearRef, ScaleSink, Value
from embedge.export.source.config import Shape, number
from embedge.export.weights.rotated import ResidualStream, TableNorm


class ModernBert(Family):
    """ModernBERT's alternating global and sliding-window attention."""

    model_types = ("modernbert",)
    token_table = "embeddings.tok_embeddings.weight"
    roots = ("embeddings", "layers", "final_norm", "head", "decoder", "classifier", "qa_outputs")
    ignored = ("head.", "decoder.", *HEADS)

    def check(self) -> None:
        self.heads = self._int("num_attention_heads")
        self._divides(self.heads, self.hidden_size, "num_attention_heads and hidden_size")
        self.head_size = self.hidden_size // self.heads
        self.intermediate = self._int("intermediate_size")
        self.epsilon = self._float("norm_eps", 1e-5)
        self.activation = self._activation("hidden_activation", "gelu")
        self.norm_bias = self.config.get("norm_bias") is True
        self.kinds = self._kinds()
        self.window = self._int("local_attention", 128) // 2
        if self.config.get("sliding_window", self.window) != self.window:
            found = self.config["sliding_window"]
            raise self._unsupported(
                "sliding_window", found, f"{self.window}, half of local_attention"
            )
        positions = self._int("max_position_embeddings", 8192)
        if self.max_length > positions:
            raise CheckpointError(
                f"max length {self.max_length} exceeds the {positions} positions the model has"
            )
        self.ropes = self._ropes()

    def _kinds(self) -> list[str]:
        """Per layer, whether it attends to all tokens or to its neighbours."""
        every = self._int("global_attn_every_n_layers", 3)
        kinds = ["local" if i % every else "global" for i in range(self.num_layers)]
        types = self.config.get("layer_types")
        if types is None:
            return kinds
        names = {"full_attention": "global", "sliding_attention": "local"}
        types = types if isinstance(types, list) else [types]
        listed = [names.get(t) if isinstance(t, str) else None for t in types]
        if len(listed) != self.num_layers or None in listed:
            raise self._unsupported(
                "layer_types", types, f"{self.num_layers} of {', '.join(names)}"
            )
        if "global_attn_every_n_layers" in self.config and listed != kinds:
            raise self._unsupported(
                "layer_types", types, f"a global layer every {every}, as it says too"
            )
        return [str(kind) for kind in listed]

    def _ropes(self) -> dict[str, dict[str, Any]]:
        """Rotary settings by kind of layer, each with a ``rope_theta``."""
        if self.config.get("rope_scaling"):
            raise self._unsupported("rope_scaling", self.config["rope_scaling"], "none")
        nested = self.config.get("rope_parameters") or {}
        names = {"global": "full_attention", "local": "sliding_attention"}
        if not isinstance(nested, dict) or set(nested) - set(names.values()):
            raise self._unsupported(
                "rope_parameters", nested, f"settings for {', '.join(names.values())}"
            )
        early = {
            k: self.config[f"{k}_rope_theta"] for k in names if f"{k}_rope_theta" in self.config
        }
        if self.config.get("rope_theta", early.get("global")) != early.get("global"):
            raise self._unsupported(
                "rope_theta", self.config["rope_theta"], "global_rope_theta's value"
            )
        theta = self._float("global_rope_theta", 160000.0)
        thetas = {"global": theta, "local": 10000.0}
        if "local" in early:  # null means the global one
            thetas["local"] = theta if early["local"] is None else self._float("local_rope_theta")
        ropes = {}
        for kind, name in names.items():
            rope = checked_rope(nested.get(name) or {}, f"rope_parameters.{name}")
            key = f"rope_parameters.{name}.rope_theta"
            if kind in early and rope.get("rope_theta", thetas[kind]) != thetas[kind]:
                raise self._unsupported(key, rope["rope_theta"], f"{kind}_rope_theta {early[kind]}")
            ropes[kind] = {"rope_theta": thetas[kind], **rope}
        return ropes

    def check_tensors(self, names: Iterable[str]) -> None:
        keys = {"attn": "attention_bias", "mlp": "mlp_bias"}
        for name in names:
            parts = name.split(".")
            key = keys.get(parts[-3]) if parts[0] == "layers" and parts[-1] == "bias" else None
            if key is not None and self.config.get(key) is not True:
                raise CheckpointError(
                    f"{name}: expected no such tensor, as config.json has {key} "
                    f"{self.config.get(key)!r} and transformers leaves it out; set {key} to true in "
                    "config.json, or delete the tensor"
                )

    def shapes(self) -> dict[str, Shape]:
        width, inner = self.hidden_size, self.intermediate
        return {
            "tok_embeddings": (None, width),
            **dict.fromkeys(("norm", "attn_norm", "mlp_norm", "final_norm"), (width,)),
            "Wqkv": (3 * width, width),
            "attn.Wo": (width, width),
            "Wi": (2 * inner, width),
            "mlp.Wo": (width, inner),
        }

    def _kind(self, index: int) -> str:
        return self.kinds[index]

    def streams(self) -> tuple[ResidualStream, ...]:
        if self.norm_bias:  # it would need a bias in every Linear behind it
            return ()
        readers: dict[str, str | None] = {}
        writers: list[str] = []
        for index in range(self.num_layers):
            p = f"layers.{index}."
            readers[f"{p}attn.Wqkv"] = f"{p}attn_norm.weight" if index else None
            readers[f"{p}mlp.Wi"] = f"{p}mlp_norm.weight"
            writers += [f"{p}attn.Wo", f"{p}mlp.Wo"]
        stream = ResidualStream(
            width=self.hidden_size,
            tables=("embeddings.tok_embeddings.weight",),
            table_norm=TableNorm(weight="embeddings.norm.weight", epsilon=self.epsilon),
            writers=writers,
            readers=readers,
            output="final_norm.weight",
            centred=True,
        )
        return (stream,)

    def context(self, g: Graph) -> dict[str, str]:
        tokens = self.tokens(g)
        lengths = self.lengths(g)
        context = {"lengths": lengths, "positions": position_ids(g, tokens)}
        if g.scheme.target is Target.CPU and self.max_length > FLASH_TOKENS:
            context["flash"] = is_flash(g, tokens=tokens, lengths=lengths)
        for kind, rope in self.ropes.items():
            theta = number(rope, "rope_theta")
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            tables = rotary_tables(self.head_size, theta, self.max_length, scaling)
            detail = f"{theta}|{self.max_length}|{scaling}"
            context[f"{kind}.cos"], context[f"{kind}.sin"] = rotary_inputs(
                g, f"rotary.{kind}", tables, detail
            )

        def mask() -> Value:
            seen = g.op("Cast", "attention_mask", to=TensorProto.FLOAT)
            padding = g.op("Mul", g.op("Sub", seen, g.const(1.0)), g.const(1e9))
            padding = g.op("Unsqueeze", padding, g.const([1, 2], "int64"))
            near = band(g, tokens, lowest=-self.window, highest=self.window)
            return g.op("Add", near, padding)

        if g.scheme.target is Target.CUDA or not 0 < FEWEST_BLOCKS * self.window < self.max_length:
            context["local.mask"] = mask()
        else:
            window = window_of(
                g, reach=self.window, tokens=tokens, lengths=lengths, short_mask=mask
            )
            context |= {"tokens": tokens, "local.long": window.is_long, "local.mask": window.mask}
        return context

    def embed(self, g: Graph, context: dict[str, str]) -> Value:
        x = g.embedding("embeddings.tok_embeddings.weight", "input_ids")
        if g.weights.absorbed("embeddings.norm.weight"):
            return x
        return self._norm(g, x, "embeddings.norm")

    def layer(self, g: Graph, context: dict[str, str], index: int, hidden: Value) -> Value:
        p, width = f"layers.{index}.", self.hidden_size
        kind = self._kind(index)
        # the first layer reads the embedding norm directly
        x = self._norm(g, hidden, f"{p}attn_norm") if index else hidden
        query, key, value = (
            LinearRef(f"{p}attn.Wqkv", i * width, (i + 1) * width) for i in range(3)
        )
        q, k, v = g.linears(x, [query, key, value])
        q = self._rotate(g, context, kind, g.add(q, g.bias(q)))
        k = self._rotate(g, context, kind, g.add(k, g.bias(k)))
        mixed = self._attend(g, context, kind, q, k, v)
        out = LinearRef(f"{p}attn.Wo")
        [y] = g.linears(mixed, [out], sink=ScaleSink(linear=value))
        norm = f"{p}mlp_norm"
        x, hidden = g.add_norm(
            y,
            hidden,
            f"{norm}.weight",
            f"{norm}.bias" if self.norm_bias else None,
            self.epsilon,
            linear_bias=g.bias(y, upstream=v),
        )
        inner = self.intermediate
        up = LinearRef(f"{p}mlp.Wi", 0, inner)
        gate = LinearRef(f"{p}mlp.Wi", inner, 2 * inner)
        y = g.gated(x, up, gate, self.activation)
        down = LinearRef(f"{p}mlp.Wo")
        [y] = g.linears(y, [down])
        return g.add(g.add(y, g.bias(y)), hidden)

    def _attend(
        self, g: Graph, context: dict[str, str], kind: str, q: str, k: str, v: str
    ) -> Value:
        run = partial(
            attention, g, heads=self.heads, kv_heads=self.heads, scale=self.head_size**-0.5
        )
        if kind == "global":
            return run(q, k, v, lengths=context["lengths"], flash=context.get("flash"))

        def attend(q: str, k: str, v: str, mask: str = context["local.mask"]) -> Value:
            return run(q, k, v, mask=mask)

        if "local.long" not in context:
            return attend(q, k, v)
        window = Window(
            reach=self.window,
            is_long=context["local.long"],
            tokens=context["tokens"],
            mask=context["local.mask"],
        )
        return g.choose(
            window.is_long,
            lambda: in_blocks(g, q, k, v, window, self.hidden_size, attend),
            lambda: attend(q, k, v),
        )

    def final(self, g: Graph, context: dict[str, str], hidden: Value) -> Value:
        return self._norm(g, hidden, "final_norm")

    def _norm(self, g: Graph, x: str, name: str) -> Value:
        bias = f"{name}.bias" if self.norm_bias else None
        return g.norm(x, f"{name}.weight", bias, self.epsilon)

    def _rotate(self, g: Graph, context: dict[str, str], kind: str, x: str) -> Value:
        cos, sin = context[f"{kind}.cos"], context[f"{kind}.sin"]
        return rotate(g, x, cos, sin, context["positions"], self.heads)
