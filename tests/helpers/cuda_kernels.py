"""What ONNX Runtime's CUDA provider implements, and whether a graph keeps to it.

``cuda_kernels.tsv`` has the rows of the operators that graphs for GPUs use, one kernel a line. It is
renewed from the page that ONNX Runtime publishes with each release (docs/OperatorKernels.md)::

    python tests/export/_cuda_kernels.py OperatorKernels.md SOURCE > tests/export/cuda_kernels.tsv

Two rules of ONNX Runtime decide whether a node gets a kernel. Its types must be among those of the
row. And a kernel without an end version serves the operator version it names alone: a "13+" in the
page is a kernel for a node whose newest definition is of 13, and none for one that ONNX redefined
later (``VerifyVersion`` in onnxruntime/core/framework/kernel_registry.cc).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import TensorProto, helper

FILE = Path(__file__).with_name("cuda_kernels.tsv")
CONTRIB = "com.microsoft"
OLDEST = 13  # rows that end before this version are left out
_TYPE = re.compile(r"tensor\((\w+)\)")
_PARAMETER = re.compile(r"\*(in|out)\* (\w+)[.]*:\*\*([^*]+)\*\*")


@dataclass(frozen=True)
class Kernel:
    """One row.

    Attributes:
        domain: "" or "com.microsoft".
        op: the operator.
        since: the version from which it serves.
        until: the last version; ``None``: ``since`` alone.
        types: by type parameter, or name of an input, the element types it takes.
        inputs: type parameter of each input, for operators that ONNX itself does not define.
        outputs: likewise.
    """

    domain: str
    op: str
    since: int
    until: int | None
    types: Mapping[str, tuple[str, ...]]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def serves(self, version: int) -> bool:
        """Whether it is a kernel of the operator as defined in ``version``."""
        return self.since == version or (
            self.until is not None and self.since <= version <= self.until
        )

    def line(self) -> str:
        """The row as it is written."""
        versions = f"{self.since}+" if self.until is None else f"{self.since}-{self.until}"
        types = " ".join(f"{name}={','.join(kinds)}" for name, kinds in sorted(self.types.items()))
        signature = f"{','.join(self.inputs)}>{','.join(self.outputs)}" if self.inputs else ""
        return "\t".join([self.domain, self.op, versions, types, signature]).rstrip("\t")


def read(text: str) -> list[Kernel]:
    """The rows of ``cuda_kernels.tsv``."""
    kernels = []
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        domain, op, versions, types, signature = [*line.split("\t"), ""][:5]
        since, _, until = versions.removesuffix("+").partition("-")
        pairs = (part.partition("=") for part in types.split())
        inputs, _, outputs = signature.partition(">")
        kernels.append(
            Kernel(
                domain=domain,
                op=op,
                since=int(since),
                until=int(until) if until else None,
                types={name: tuple(kinds.split(",")) for name, _, kinds in pairs},
                inputs=tuple(filter(None, inputs.split(","))),
                outputs=tuple(filter(None, outputs.split(","))),
            )
        )
    return kernels


def from_markdown(text: str, operators: Iterable[tuple[str, str]]) -> list[Kernel]:
    """The rows of some ``(domain, operator)`` in ONNX Runtime's docs/OperatorKernels.md."""
    wanted = set(operators)
    start = text.index("## Operators implemented by CUDAExecutionProvider")
    end = text.find("## Operators implemented by", start + 1)
    domain = op = parameters = ""
    kernels = []
    for line in text[start : end if end > 0 else None].splitlines():
        if found := re.search(r"Operator Domain:\*\* \*([\w.]+)\*", line):
            domain = "" if found[1] == "ai.onnx" else found[1]
            continue
        cells = line[1:].split("|")[:4] if line.startswith("|") else []
        if len(cells) < 4 or not cells[2].strip() or cells[0].startswith(("Op ", "--")):
            continue
        if cells[0].strip():
            op, parameters = cells[0].strip(), cells[1]
        if (domain, op) not in wanted:
            continue
        numbers = [int(n) for n in re.findall(r"\d+", cells[2])]
        until = None if "+" in cells[2] else numbers[-1]
        if until is not None and until < OLDEST:
            continue
        types = {}
        for name, kinds in re.findall(r"\*\*(\w+)\*\* = ([^*]+)", cells[3]):
            plain = re.sub(r"seq\(tensor\(\w+\)\)", "", kinds)
            types[name] = tuple(_TYPE.findall(plain))
        inputs: tuple[str, ...] = ()
        outputs: tuple[str, ...] = ()
        if schema(domain, op, 99) is None:
            first = _PARAMETER.findall(parameters.partition("or<br>")[0])
            inputs = tuple(kind for way, _, kind in first if way == "in")
            outputs = tuple(kind for way, _, kind in first if way == "out")
        kernels.append(Kernel(domain, op, numbers[0], until, types, inputs, outputs))
    return kernels


def schema(domain: str, op: str, version: int) -> onnx.defs.OpSchema | None:
    """ONNX's own definition of an operator at a version of the operator set, where it has one."""
    try:
        return onnx.defs.get_schema(op, version, domain)
    except onnx.defs.SchemaError:
        return None


# -- a graph against the rows ------------------------------------------------------------------------


@dataclass
class Problems:
    """Why nodes of a graph would run on the CPU.

    Args:
        model: the graph, without external data.
        kernels: the rows.
    """

    model: onnx.ModelProto
    kernels: Sequence[Kernel]
    types: dict[str, str] = field(default_factory=dict)
    constants: dict[str, TensorProto] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.versions = {o.domain: o.version for o in self.model.opset_import}
        for value in graph.input:
            self.types[value.name] = _type_name(value.type.tensor_type.elem_type)
        for tensor in graph.initializer:
            self.types[tensor.name] = _type_name(tensor.data_type)
            self.constants[tensor.name] = tensor

    def __iter__(self) -> Iterator[str]:
        for node in self.model.graph.node:
            yield from (f"{node.name} ({node.op_type}): {why}" for why in self._of(node))
        for value in self.model.graph.output:
            declared = _type_name(value.type.tensor_type.elem_type)
            if self.types[value.name] != declared:
                yield f"{value.name}: is {self.types[value.name]}, declared {declared}"

    def _of(self, node: onnx.NodeProto) -> Iterator[str]:
        """Problems of a node, whose output types are known afterwards."""
        definition = schema(node.domain, node.op_type, self.versions[node.domain])
        rows = [k for k in self.kernels if (k.domain, k.op) == (node.domain, node.op_type)]
        if definition is None:
            version = 1  # ONNX Runtime's own operators
            if not rows:
                yield "no kernel, and no definition to infer types by"
                self.types.update(dict.fromkeys(node.output, "unknown"))
                return
            kinds = list(rows[0].inputs), list(rows[0].outputs)
            names = list(rows[0].inputs)
        else:
            version = definition.since_version
            kinds = (
                _repeated([p.type_str for p in definition.inputs], len(node.input)),
                [p.type_str for p in definition.outputs],
            )
            names = _repeated([p.name for p in definition.inputs], len(node.input))
        bound: dict[str, str] = {}
        for position, value in enumerate(node.input):
            if value:
                kind = kinds[0][position]
                if bound.setdefault(kind, self.types[value]) != self.types[value]:
                    yield f"{kind} is {bound[kind]} and {self.types[value]}"
                bound[names[position]] = self.types[value]
        for position, value in enumerate(node.output):
            kind = kinds[1][position]
            if kind not in bound:
                bound[kind] = self._made(node, kind, definition, bound)
            self.types[value] = bound[kind]
        serving = [k for k in rows if k.serves(version)]
        if not serving:
            have = ", ".join(f"{k.since}{'+' if k.until is None else f'-{k.until}'}" for k in rows)
            yield f"no kernel of version {version}; there are {have or 'none'}"
        elif not any(_takes(kernel, bound) for kernel in serving):
            yield f"no kernel for {bound}; there is {serving[0].line()}"
        yield from self._refused(node)

    def _made(
        self,
        node: onnx.NodeProto,
        kind: str,
        definition: onnx.defs.OpSchema | None,
        bound: Mapping[str, str],
    ) -> str:
        """Type of an output that is not an input's."""
        if node.op_type == "Cast":
            return _type_name(next(a.i for a in node.attribute if a.name == "to"))
        if found := _TYPE.fullmatch(kind):
            return found[1]
        if kind == "T_CACHE":  # keys and values as they came in
            return bound["T"]
        if definition is not None:
            allowed = next(
                c.allowed_type_strs for c in definition.type_constraints if c.type_param_str == kind
            )
            if len(allowed) == 1 and (found := _TYPE.fullmatch(next(iter(allowed)))):
                return found[1]
        raise AssertionError(f"{node.op_type}: what type has an output {kind}?")

    def _refused(self, node: onnx.NodeProto) -> Iterator[str]:
        """What the kernel's own code refuses or gets wrong, by ONNX Runtime's sources (1.25)."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        given = [bool(name) for name in node.input]
        if node.op_type == "MatMulNBits":  # contrib_ops/cuda/quantization/matmul_nbits.cc
            if any(given[4:]):
                yield "the kernel has no bias, and group indices are of no use here"
            if attributes["bits"] not in (4, 8) or attributes["block_size"] not in _BLOCK_SIZES:
                yield f"{attributes['bits']} bits in blocks of {attributes['block_size']}"
        if node.op_type == "GatherBlockQuantized":  # gather_block_quantized.cc and .cu beside it
            table, scales = self.constants[node.input[0]], self.constants[node.input[2]]
            if attributes["quantize_axis"] != len(table.dims) - 1:
                yield "the kernel quantizes along the last axis alone"
            if attributes["block_size"] not in _BLOCK_SIZES:
                yield f"blocks of {attributes['block_size']}"
            if attributes["bits"] * scales.dims[1] % 8:
                yield "zero points of a row end within a byte; the kernel counts them without gaps"
        if node.op_type == "GroupQueryAttention":  # contrib_ops/cuda/bert/group_query_attention.cc
            if attributes["num_heads"] % attributes["kv_num_heads"]:
                yield "key heads do not divide the query heads"
            if any(given[3:5]) or any(given[7:]):
                yield "more than a prompt's queries, keys, values and lengths"
        if node.domain == CONTRIB and node.op_type == "RotaryEmbedding":  # bert/rotary_embedding.cc
            extra = attributes.keys() - {"num_heads", "interleaved"}
            if extra:
                yield f"{', '.join(sorted(extra))}: expected nothing of the kind"


_BLOCK_SIZES = (16, 32, 64, 128, 256)


def _takes(kernel: Kernel, bound: Mapping[str, str]) -> bool:
    return all(name not in bound or bound[name] in kinds for name, kinds in kernel.types.items())


def _repeated(values: Sequence[str], count: int) -> list[str]:
    """A definition's parameters for ``count`` inputs: the last may be given several times."""
    return [*values, *[values[-1]] * (count - len(values))]


def _type_name(elem_type: int) -> str:
    name: str = TensorProto.DataType.Name(elem_type).lower()
    return name


if __name__ == "__main__":
    known = read(FILE.read_text("utf-8"))
    rows = from_markdown(Path(sys.argv[1]).read_text("utf-8"), {(k.domain, k.op) for k in known})
    header = [line for line in FILE.read_text("utf-8").splitlines() if line.startswith("#")]
    print("\n".join([f"# Source: {sys.argv[2]}", *header[1:], *(k.line() for k in rows)]))
