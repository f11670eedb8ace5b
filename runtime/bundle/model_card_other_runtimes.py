"""The part of a bundle's README.md that says how its graphs run with other runtimes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from embedge.runtime.bundle.contract import (
    EXACT_OPTION,
    INTEGER_PRECISIONS,
    ONNXRUNTIME,
    UNPACKED_PRECISION,
    VISION,
)
from embedge.runtime.bundle.manifest import Manifest, Model, Precision, Task

__all__ = ["other_runtimes"]

_LEAST = ONNXRUNTIME.removeprefix(">=").partition(",")[0]
# embedge.runtime.host.saturation.probe_model(), compressed by zlib
_PROBE = (
    "eNrj4LB6IsAlxcWYyMVYLsRYqcTrm1jiW5rjmVeSmp5aZMUgxFpQlJ+UqtUjwOHAoSDA7MRY7tUgUD8KRsEoGAWjYBSMghEH"
    "osSBLQYhIS4BDiYhHi42IZai/PJiLiYOhySgRCVYgg1FQsGJhYtBgBcA9WcNLQ=="
)


def other_runtimes(manifest: Manifest) -> Iterator[str]:
    """The parts of the section, none where embedge alone opens the graphs."""
    openable = {n: p for n, p in manifest.precisions.items() if n != UNPACKED_PRECISION}
    if not openable:
        return
    saturating = [name for name, p in openable.items() if p.saturates]
    exact = [n for n, p in openable.items() if p.activation_constants and p.portable]
    yield "## With other runtimes"
    yield _facts(manifest, openable)
    if manifest.model.late_interaction is not None:
        yield (
            "How queries are filled up, and whose vectors are left out, is in `manifest.json` under "
            "`model.late_interaction`."
        )
        return
    if saturating:
        yield (
            f"**8-bit products of {' and '.join(saturating)} on x86-64.** On processors without VNNI they "
            f"saturate. A graph then ends its run with an error, unless the session option `{EXACT_OPTION}` is "
            "`1`; embedge sets it by itself. `saturates()` below tells. Elsewhere the option changes no vector, "
            "but weights are held twice. A tool that sets no session option takes a bundle that was exported "
            "with `--portable`."
        )
    if exact:
        yield (
            f"**8-bit products of {' and '.join(exact)}** are exact on every processor, in any session: no two "
            "of them exceed 16 bits together."
        )
    if any(name in INTEGER_PRECISIONS for name in openable):
        yield "Where embedge runs kernels of its own, its vectors differ in the last digits from these."
    shared = any(p.task_tensors for p in openable.values())
    packages = f"`onnxruntime>={_LEAST}`, `tokenizers`{', `safetensors`' * shared} and `numpy`"
    yield f"Python with {packages}:"
    yield _python(manifest, openable, probe=bool(saturating))
    openable = {name: p for name, p in openable.items() if not p.task_tensors}
    if openable and "pool_mask" not in manifest.model.inputs:
        yield f"Node.js with `onnxruntime-node` ({_LEAST} or later) and `@huggingface/transformers`:"
        yield _javascript(manifest, openable)
    yield _others(manifest)


def _facts(manifest: Manifest, openable: dict[str, Precision]) -> str:
    model, tokenizer = manifest.model, manifest.tokenizer
    length = ", of length 1 already" if model.normalize else ""
    outputs = f"float32 `embedding` `[batch, {model.dim}]`: pooled{length}"
    if model.multi_vector_dim is not None:
        outputs += f"; float32 `token_embeddings` `[batch, tokens, {model.multi_vector_dim}]`"
    late = model.late_interaction
    if late is not None:
        outputs = (
            f"float32 `token_embeddings` `[batch, tokens, {model.dim}]`: a vector a token{length}"
        )
    cut = "leave off the end" + (" and divide by the norm" if model.normalize else "")
    gpu = [name for name, p in openable.items() if "cpu" not in p.devices]
    names = [*_token_inputs(model), *([] if model.include_prompt else ["pool_mask"])]
    inputs = ", ".join(f"`{name}`" for name in names)
    rows = {
        "graph": "`PRECISION/TASK.onnx`, its weights beside it; its metadata (`embedge.…`) say what follows",
        "ONNX Runtime": f"{_LEAST} or later; 1.24 gives wrong vectors without an error",
        "inputs": f"int64 {inputs}, each `[batch, tokens]`, padded on the right",
        "outputs": outputs,
        "tokens": f"by `{tokenizer.file}`, special tokens included, cut at {model.max_length} on the "
        f"{tokenizer.truncation_side}; fill rows with {tokenizer.pad_token_id}",
        "prompts": _prompts(manifest),
        "fewer dimensions": cut,
    }
    if late is not None:
        del rows["fewer dimensions"]
    shared = [name for name, p in openable.items() if p.task_tensors]
    if shared:
        rows[f"one graph, {', '.join(shared)}"] = (
            "`PRECISION/shared.onnx` for all tasks; it takes the tensors of `PRECISION/TASK.safetensors` too, each as "
            "the input of its name"
        )
    if gpu:
        rows["on GPUs alone"] = f"{', '.join(gpu)}: `onnxruntime-gpu` with `CUDAExecutionProvider`"
    if UNPACKED_PRECISION in manifest.precisions:
        rows["with embedge alone"] = f"{UNPACKED_PRECISION}; `int4` holds the same weights"
    if manifest.model.image is not None:
        rows["images"] = f"with embedge alone: `{VISION}.onnx` takes patches"
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _token_inputs(model: Model) -> list[str]:
    return [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in model.inputs]


def _prompts(manifest: Manifest) -> str:
    """Every prompt with the tasks that have it, for a cell of a table."""
    by_prompt: dict[tuple[str, str], list[str]] = {}
    for name, task in manifest.tasks.items():
        for key, text in task.prompts.items():
            by_prompt.setdefault((key, text), []).append(name)
    if not by_prompt:
        return "none"
    everywhere = len(manifest.tasks)
    shown = [
        f"{key}: {_code(text)}" + ("" if len(tasks) == everywhere else f" ({', '.join(tasks)})")
        for (key, text), tasks in by_prompt.items()
    ]
    default = next(iter(manifest.tasks.values())).default_prompt
    return "before the text. " + "; ".join(shown) + (f"; by default {default}" if default else "")


def _code(text: str) -> str:
    """A prompt as a literal in a cell of a table."""
    literal = json.dumps(text, ensure_ascii=False).replace("|", "\\|")
    marks = "`" * (max(map(len, re.findall("`+", literal)), default=0) + 1)
    return f"{marks}{literal}{marks}" if len(marks) == 1 else f"{marks} {literal} {marks}"


def _default_prompt(task: Task) -> str:
    """What goes before a task's texts where a call names no prompt."""
    return task.prompts[task.default_prompt] if task.default_prompt is not None else ""


def _first(manifest: Manifest, openable: dict[str, Precision]) -> tuple[str, str, str]:
    """A precision, preferably of the CPU, a task of it, and the folder of its graphs."""
    name = next((n for n, p in openable.items() if "cpu" in p.devices), next(iter(openable)))
    task, graph = next(iter(openable[name].graphs.items()))
    return name, task, graph


def _python(manifest: Manifest, openable: dict[str, Precision], *, probe: bool) -> str:
    model, tokenizer = manifest.model, manifest.tokenizer
    precision, task, _ = _first(manifest, openable)
    multiple = max(p.row_multiple for p in openable.values())
    pad = f"pad_id={tokenizer.pad_token_id}"
    if multiple > 1:
        pad += f", pad_to_multiple_of={multiple}"
    shared = any(p.task_tensors for p in openable.values())
    graph = 'graph = str(folder / precision / f"{task}.onnx")'
    if shared:
        graph = 'graph = str(folder / precision / "shared.onnx")'
        if not all(p.task_tensors for p in openable.values()):
            graph = (
                'graph = folder / precision / "shared.onnx"\n'
                'graph = str(graph if graph.exists() else folder / precision / f"{task}.onnx")'
            )
        graph += (
            '\nown = folder / precision / f"{task}.safetensors"'
            "\ngiven = load_file(own) if own.exists() else {}"
        )
    lines = [
        *(["import base64", "import zlib"] if probe else []),
        "from pathlib import Path",
        "",
        "import numpy as np",
        "import onnxruntime as ort",
        *(["from safetensors.numpy import load_file"] if shared else []),
        "from tokenizers import Tokenizer",
        "",
        'folder = Path("path/to/this/folder")',
        f'precision, task = "{precision}", "{task}"',
        "",
        "",
    ]
    defaults = {name: _default_prompt(entry) for name, entry in manifest.tasks.items()}
    empty = '""'
    defaults = defaults if any(defaults.values()) else {}
    if defaults:
        literal = json.dumps(defaults, indent=4, ensure_ascii=False)
        lines[-2:-2] = [f"default_prompts = {literal}"]
    if probe:
        lines += _SATURATES.format(first=_PROBE[:80], second=_PROBE[80:]).splitlines()
    lines += ["options = ort.SessionOptions()"]
    if probe:
        lines += [
            "if saturates():",
            f'    options.add_session_config_entry("{EXACT_OPTION}", "1")',
        ]
    provider = "CPU" if "cpu" in openable[precision].devices else "CUDA"
    lines += [
        *graph.split("\n"),
        f'session = ort.InferenceSession(graph, options, providers=["{provider}ExecutionProvider"])',
        f'tokenizer = Tokenizer.from_file(str(folder / "{tokenizer.file}"))',
        f'tokenizer.enable_truncation({model.max_length}, direction="{tokenizer.truncation_side}")',
        f"tokenizer.enable_padding({pad})",
        "",
        "",
        f"def encode(texts, prompt={None if defaults else empty}, dim=None):",
        *(["    prompt = default_prompts[task] if prompt is None else prompt"] if defaults else []),
        "    rows = tokenizer.encode_batch([prompt + text for text in texts])",
        "    ids = np.array([row.ids for row in rows], np.int64)",
        "    mask = np.array([row.attention_mask for row in rows], np.int64)",
        '    assert mask.any(axis=1).all(), "a text without a token has no vector"',
        '    inputs = {"input_ids": ids, "attention_mask": mask}',
    ]
    if "token_type_ids" in model.inputs:
        lines.append(
            '    inputs["token_type_ids"] = np.array([row.type_ids for row in rows], np.int64)'
        )
    if model.image is not None:
        lines += [
            "    position = np.arange(ids.shape[1])",
            '    inputs["position_ids"] = np.broadcast_to(position, (3, *ids.shape)).copy()',
            '    inputs["pool_mask"] = mask',
            f'    inputs["image_features"] = np.zeros((0, {model.image.hidden_size}), np.float32)',
            '    inputs["image_positions"] = np.zeros((0, 2), np.int64)',
        ]
    elif "pool_mask" in model.inputs:
        special = ", ".join(map(str, tokenizer.special_token_ids))
        lines += [
            "    of_prompt = tokenizer.encode(prompt).ids[: sum(tokenizer.encode(prompt).attention_mask)]",
            f"    if of_prompt and of_prompt[-1] in {{{special}}}:  # it is the text's",
            "        of_prompt = of_prompt[:-1]",
            '    inputs["pool_mask"] = mask * (np.arange(ids.shape[1]) >= len(of_prompt) * bool(prompt))',
        ]
    inputs = "{**inputs, **given}" if shared else "inputs"
    lines += [f'    (vectors,) = session.run(["embedding"], {inputs})']
    if model.truncate_dim:
        lines.append(f"    dim = dim or {model.truncate_dim}")
    lines += ["    if dim:", "        vectors = vectors[:, :dim]"]
    if model.normalize:
        lines.append("        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)")
    lines += ["    return vectors", "", "", 'vectors = encode(["a text", "another text"])']
    return "\n".join(["```python", *lines, "```"])


_SATURATES = '''def saturates():
    """Whether 8-bit products saturate here: one of 64 times 255 * 127 is tried."""
    model = zlib.decompress(base64.b64decode(
        "{first}"
        "{second}"
    ))
    probe = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (product,) = probe.run(None, {{"a": np.full((5, 64), 255, np.uint8)}})
    return bool((product != 64 * 255 * 127).any())


'''


def _javascript(manifest: Manifest, openable: dict[str, Precision]) -> str:
    model, tokenizer = manifest.model, manifest.tokenizer
    precision, task, graph = _first(manifest, openable)
    prompt = json.dumps(_default_prompt(manifest.tasks[task]), ensure_ascii=False)
    options = "{}"
    if openable[precision].saturates:
        options = '{ extra: { session: { x64quantprecision: "1" } } }'
    types = (
        "\n  const token_type_ids = row(input_ids.map(() => 0));"
        if "token_type_ids" in model.inputs
        else ""
    )
    feeds = ", ".join(
        {"input_ids": "input_ids: row(input_ids)"}.get(n, n) for n in _token_inputs(model)
    )
    return f"""```js
import fs from "node:fs";
import * as ort from "onnxruntime-node";
import {{ PreTrainedTokenizer }} from "@huggingface/transformers";

const folder = "path/to/this/folder";
const options = {options};
const session = await ort.InferenceSession.create(`${{folder}}/{graph}`, options);
const file = fs.readFileSync(`${{folder}}/{tokenizer.file}`, "utf8");
const tokenizer = new PreTrainedTokenizer(JSON.parse(file), {{}});

async function encode(text, prompt = {prompt}) {{
  const {{ input_ids }} = tokenizer(prompt + text, {{ return_tensor: false }});
  if (input_ids.length > {model.max_length}) throw new Error("more than {model.max_length} tokens");
  const row = (ids) => new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
  const attention_mask = row(input_ids.map(() => 1));{types}
  const {{ embedding }} = await session.run({{ {feeds} }});
  return embedding.data;
}}

const vector = await encode("a text");
```"""


def _others(manifest: Manifest) -> str:
    model = manifest.model
    pooled = "the graph pools" + (" and normalizes" if model.normalize else "")
    lines = [
        "Others, with the same versions of ONNX Runtime inside:",
        "",
        "- onnxruntime-web (wasm): graphs open as they are, int8 as near to the source as elsewhere; give the files "
        "of weights as `externalData`.",
        "- transformers.js: put the source's `config.json` and `tokenizer_config.json` beside "
        "`tokenizer.json`, and the graph with its weights under `onnx/` as `model.onnx`; `AutoModel` gives "
        '`embedding`. `pipeline("feature-extraction")` wants token states, which there are none of. It cuts '
        "texts after special tokens were added and loses the last one: give it shorter ones.",
        "- sentence-transformers, optimum, fastembed: embedge's guide *Without embedge* has a script that writes "
        f"the folder that they open, and a call of each; {pooled}. fastembed sets no session option, so it "
        "wants graphs that need none.",
    ]
    return "\n".join(lines)
