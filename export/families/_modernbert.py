"""ModernBERT: an encoder that normalizes before each block, rotary, with local attention layers.

Source: Warner et al., arXiv 2412.13663, and transformers' ``ModernBertModel``.
"""

from __future__ import annotations

from functools import partial

from onnx import TensorProto

from embedge.export._attention import attention
from embedge.export._errors import CheckpointError
from embedge.export._graph import Fold, Graph, Lin
from embedge.export._long_attention import (
    FEWEST_BLOCKS,
    FLASH_TOKENS,
    Window,
    in_blocks,
    is_flash,
    window_of,
)
from embedge.export._rotated import Stream, TableNorm
from embedge.export.families._base import Family
from embedge.export.families._decoder import band
from embedge.export.families._rotary import position_ids, rotary_inputs, rotary_tables


class ModernBert(Family):
    """ModernBERT's alternating global and sliding-window attention."""

    model_types = ("modernbert",)
    roots = ("embeddings", "layers", "final_norm", "head", "decoder", "classifier")
    ignored = ("head.", "decoder.", "classifier.")

    def check(self) -> None:
        self.heads = self._int("num_attention_heads")
        self._divides(self.heads, self.hidden_size, "num_attention_heads and hidden_size")
        self.head_size = self.hidden_size // self.heads
        self.intermediate = self._int("intermediate_size")
        self.epsilon = self._float("norm_eps", 1e-5)
        self.activation = self._activation("hidden_activation", "gelu")
        self.norm_bias = self.config.get("norm_bias") is True
        self.every = self._int("global_attn_every_n_layers", 3)
        self.window = self._int("local_attention", 128) // 2
        if "rope_parameters" in self.config:  # transformers 5; the thetas would be overlooked
            found = self.config["rope_parameters"]
            raise self._unsupported(
                "rope_parameters", found, "global_rope_theta and local_rope_theta"
            )
        positions = self._int("max_position_embeddings", 8192)
        if self.max_length > positions:
            raise CheckpointError(
                f"max length {self.max_length} exceeds the {positions} positions the model has"
            )
        self.thetas = {
            "global": self._float("global_rope_theta", 160000.0),
            "local": self._float("local_rope_theta", 10000.0)
            if self.config.get("local_rope_theta") is not None
            else self._float("global_rope_theta", 160000.0),
        }

    def _kind(self, index: int) -> str:
        return "local" if index % self.every else "global"

    def streams(self) -> tuple[Stream, ...]:
        if self.norm_bias:  # it would need a bias in every Linear behind it
            return ()
        readers: dict[str, str | None] = {}
        writers: list[str] = []
        for index in range(self.num_layers):
            p = f"layers.{index}."
            readers[f"{p}attn.Wqkv"] = f"{p}attn_norm.weight" if index else None
            readers[f"{p}mlp.Wi"] = f"{p}mlp_norm.weight"
            writers += [f"{p}attn.Wo", f"{p}mlp.Wo"]
        stream = Stream(
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
        if g.form.fused_attention and not g.form.cuda and self.max_length > FLASH_TOKENS:
            context["flash"] = is_flash(g, tokens=tokens, lengths=lengths)
        for kind, theta in self.thetas.items():
            tables = rotary_tables(self.head_size, theta, self.max_length, None)
            detail = f"{theta}|{self.max_length}"
            context[f"{kind}.cos"], context[f"{kind}.sin"] = rotary_inputs(
                g, f"rotary.{kind}", tables, detail
            )

        def mask() -> str:
            seen = g.op("Cast", "attention_mask", to=TensorProto.FLOAT)
            padding = g.op("Mul", g.op("Sub", seen, g.const(1.0)), g.const(1e9))
            padding = g.op("Unsqueeze", padding, g.const([1, 2], "int64"))
            near = band(g, tokens, lowest=-self.window, highest=self.window)
            return g.op("Add", near, padding)

        if g.form.cuda or not 0 < FEWEST_BLOCKS * self.window < self.max_length:
            context["local.mask"] = mask()
        else:
            window = window_of(
                g, reach=self.window, tokens=tokens, lengths=lengths, short_mask=mask
            )
            context |= {"tokens": tokens, "local.long": window.is_long, "local.mask": window.mask}
        return context

    def embed(self, g: Graph, context: dict[str, str]) -> str:
        x = g.embedding("embeddings.tok_embeddings.weight", "input_ids")
        if g.weights.absorbed("embeddings.norm.weight"):
            return x
        return self._norm(g, x, "embeddings.norm")

    def layer(self, g: Graph, context: dict[str, str], index: int, hidden: str) -> str:
        p, width = f"layers.{index}.", self.hidden_size
        kind = self._kind(index)
        # the first layer reads the embedding norm directly
        x = self._norm(g, hidden, f"{p}attn_norm") if index else hidden
        self.expect_shape(g, f"{p}attn.Wqkv.weight", (3 * width, width))
        self.expect_shape(g, f"{p}mlp.Wi.weight", (2 * self.intermediate, width))
        query, key, value = (Lin(f"{p}attn.Wqkv", i * width, (i + 1) * width) for i in range(3))
        q, k, v = g.linears(x, [query, key, value])
        q = self._rotate(g, context, kind, g.add(q, g.bias(query)))
        k = self._rotate(g, context, kind, g.add(k, g.bias(key)))
        mixed = self._attend(g, context, kind, q, k, v)
        out = Lin(f"{p}attn.Wo")
        [y] = g.linears(mixed, [out], fold=Fold(lin=value))
        norm = f"{p}mlp_norm"
        x, hidden = g.add_norm(
            y,
            hidden,
            f"{norm}.weight",
            f"{norm}.bias" if self.norm_bias else None,
            self.epsilon,
            linear_bias=g.bias(out, carried=value),
        )
        inner = self.intermediate
        up = Lin(f"{p}mlp.Wi", 0, inner)
        gate = Lin(f"{p}mlp.Wi", inner, 2 * inner)
        y = g.gated(x, up, gate, self.activation)
        down = Lin(f"{p}mlp.Wo")
        [y] = g.linears(y, [down], fold=Fold(lin=gate, gated=True))
        return g.add(g.add(y, g.bias(down)), hidden)

    def _attend(self, g: Graph, context: dict[str, str], kind: str, q: str, k: str, v: str) -> str:
        run = partial(
            attention, g, heads=self.heads, kv_heads=self.heads, scale=self.head_size**-0.5
        )
        if kind == "global":
            return run(q, k, v, lengths=context["lengths"], flash=context.get("flash"))

        def attend(q: str, k: str, v: str, mask: str = context["local.mask"]) -> str:
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

    def final(self, g: Graph, context: dict[str, str], hidden: str) -> str:
        return self._norm(g, hidden, "final_norm")

    def _norm(self, g: Graph, x: str, name: str) -> str:
        bias = f"{name}.bias" if self.norm_bias else None
        return g.norm(x, f"{name}.weight", bias, self.epsilon)

    def _rotate(self, g: Graph, context: dict[str, str], kind: str, x: str) -> str:
        cos, sin = context[f"{kind}.cos"], context[f"{kind}.sin"]
        return g.rotary(x, cos, sin, context["positions"], self.heads)
