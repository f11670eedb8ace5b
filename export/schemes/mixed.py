"""Some layers at another precision than the rest: the first pattern that matches decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from embedge.export.graph.builder import Graph
from embedge.export.graph.ops import OpBuilder
from embedge.export.graph.scheme import BranchedScheme, RoundingScheme, Scheme
from embedge.export.graph.values import LinearGroup, Value


class MixedScheme(Scheme):
    """Delegates to ``default``, or to the scheme whose pattern matches a Linear or a table.

    Linears that share an input are stored alike: one match decides for all of them.

    Args:
        default: the scheme of everything else; its graphs are the result's.
        kept: schemes by shell-style pattern of canonical names, tried in order.
    """

    def __init__(self, default: Scheme, kept: Mapping[str, Scheme]) -> None:
        self._default = default
        self._kept = kept
        self.precision, self.target = default.precision, default.target
        self.row_multiple, self.rotates = default.row_multiple, default.rotates
        self.saturates = any(scheme.saturates for scheme in (default, *kept.values()))

    def linears(self, g: OpBuilder, group: LinearGroup) -> list[Value]:
        return self._scheme_of(*group.labels).linears(g, group)

    def scales_rows(self, group: LinearGroup) -> bool:
        return self._scheme_of(*group.labels).scales_rows(group)

    def embedding(self, g: OpBuilder, name: str, ids: str) -> Value:
        return self._scheme_of(name.removesuffix(".weight")).embedding(g, name, ids)

    def gptq(self, group: LinearGroup) -> RoundingScheme | None:
        return self._scheme_of(*group.labels).gptq(group)

    def branched(self, group: LinearGroup) -> BranchedScheme | None:
        return self._scheme_of(*group.labels).branched(group)

    def _scheme_of(self, *names: str) -> Scheme:
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
    groups = [group.labels for g in graphs for group in g.linear_groups.values()]
    groups += [(table.removesuffix(".weight"),) for g in graphs for table in g.tables]
    used = {first_match(patterns, *names) for names in groups}
    return [pattern for pattern in patterns if pattern not in used]
