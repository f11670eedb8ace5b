"""Some layers at another precision than the rest: the first pattern that matches decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from embedge.export.graph.builder import Graph, LinearGroup
from embedge.export.graph.scheme import Scheme


class MixedScheme(Scheme):
    """Delegates to ``default``, or to the scheme whose pattern matches a Linear or a table.

    Linears that share an input are stored alike: one match decides for all of them.

    Args:
        default: the precision of everything else; also names the result.
        kept: schemes by shell-style pattern of canonical names, tried in order.
    """

    def __init__(self, default: Scheme, kept: Mapping[str, Scheme]) -> None:
        self._default = default
        self._kept = kept
        self.precision = default.precision
        self.devices = (
            default.devices
        )  # float32 products run anywhere, int8 is kept on the CPU alone
        self.row_multiple = default.row_multiple
        self.rotates = default.rotates
        self.fused_attention = default.fused_attention
        self.functions = default.functions
        self.cuda = default.cuda
        self.opset = default.opset

    def linears(self, g: Graph, group: LinearGroup) -> list[str]:
        return self._form_of(group).linears(g, group)

    def scales_rows(self, group: LinearGroup) -> bool:
        return self._form_of(group).scales_rows(group)

    def _form_of(self, group: LinearGroup) -> Scheme:
        return self.form_of(*(lin.label for lin in group.lins))

    def embedding(self, g: Graph, name: str, ids: str) -> str:
        return self.form_of(name.removesuffix(".weight")).embedding(g, name, ids)

    def attention_operand(self, g: Graph, x: str) -> str:
        return self._default.attention_operand(g, x)

    def attention_mask(self, g: Graph, mask: str) -> str:
        return self._default.attention_mask(g, mask)

    def attention_result(self, g: Graph, x: str) -> str:
        return self._default.attention_result(g, x)

    def form_of(self, *names: str) -> Scheme:
        """The scheme of the first pattern that one of the names matches."""
        pattern = first_match(self._kept, *names)
        return self._default if pattern is None else self._kept[pattern]


def first_match(patterns: Iterable[str], *names: str) -> str | None:
    """The first pattern that one of the names matches, with or without .weight."""
    both = [*names, *(f"{name}.weight" for name in names)]
    matching = (p for p in patterns if any(fnmatchcase(name, p) for name in both))
    return next(matching, None)


def unmatched(patterns: Iterable[str], graphs: Sequence[Graph]) -> list[str]:
    """Patterns that are the first to match for no Linear and no table of some graphs."""
    patterns = list(patterns)
    groups = [
        [lin.label for lin in group.lins] for g in graphs for group in g.linear_groups.values()
    ]
    groups += [[table.removesuffix(".weight")] for g in graphs for table in g.tables]
    used = {first_match(patterns, *names) for names in groups}
    return [pattern for pattern in patterns if pattern not in used]
