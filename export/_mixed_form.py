"""Some layers at another precision than the rest: the first pattern that matches decides."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from embedge.export._forms import Form
from embedge.export._graph import Graph, Tap


class MixedForm(Form):
    """Delegates to ``default``, or to the form whose pattern matches a Linear or a table.

    Linears that share an input are stored alike: one match decides for all of them.

    Args:
        default: the precision of everything else; also names the result.
        kept: forms by shell-style pattern of canonical names, tried in order.
    """

    def __init__(self, default: Form, kept: Mapping[str, Form]) -> None:
        self._default = default
        self._kept = kept
        self.used: set[str] = set()
        self.precision = default.precision
        self.devices = (
            default.devices
        )  # float32 products run anywhere, int8 is kept on the CPU alone
        self.row_multiple = default.row_multiple
        self.rotates = default.rotates
        self.fused_attention = default.fused_attention
        self.cuda = default.cuda
        self.opset = default.opset

    def linears(self, g: Graph, tap: Tap) -> list[str]:
        return self._form_of(tap).linears(g, tap)

    def scales_rows(self, tap: Tap) -> bool:
        return self._form_of(tap).scales_rows(tap)

    def _form_of(self, tap: Tap) -> Form:
        return self.form_of(*(lin.label for lin in tap.lins))

    def embedding(self, g: Graph, name: str, ids: str) -> str:
        return self.form_of(name.removesuffix(".weight")).embedding(g, name, ids)

    def attention_operand(self, g: Graph, x: str) -> str:
        return self._default.attention_operand(g, x)

    def attention_mask(self, g: Graph, mask: str) -> str:
        return self._default.attention_mask(g, mask)

    def attention_result(self, g: Graph, x: str) -> str:
        return self._default.attention_result(g, x)

    def unused(self) -> list[str]:
        """Patterns that no Linear and no table has matched."""
        return [pattern for pattern in self._kept if pattern not in self.used]

    def form_of(self, *names: str) -> Form:
        """The form of the first pattern that one of the names matches, with or without .weight."""
        both = [*names, *(f"{name}.weight" for name in names)]
        for pattern, form in self._kept.items():
            if any(fnmatchcase(name, pattern) for name in both):
                self.used.add(pattern)
                return form
        return self._default
