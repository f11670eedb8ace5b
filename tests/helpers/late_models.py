"""Tiny late-interaction models: sentence-transformers 6's layout, PyLate's, and PyLate's rule in torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from tests.helpers.models import load_base, make_model, make_tokenizer, save, write_json

MARKERS = {"query": "[Q] ", "document": "[D] "}
SKIPPED = (".", ",", "!", "no such token")
_LINEAR = "torch.nn.modules.linear.Identity"


def write_late(
    folder: Path,
    kind: str,
    *,
    widths: Sequence[int] = (16,),
    residual: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write a model's transformer, its tokenizer with markers and a mask token, and Dense layers of tokens.

    Args:
        folder: takes the files.
        kind: as for ``make_model``.
        widths: of the Dense layers.
        residual: whether they add their input.
        seed: of the random numbers.
        **changes: of the configuration.
    """
    model = make_model(kind, seed, vocab_size=100, **changes)
    save(model, folder)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in MARKERS.values()])
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    settings |= {"mask_token": "<mask>", "model_input_names": ["input_ids", "attention_mask"]}
    write_json(folder / "tokenizer_config.json", settings)
    generator, width = torch.Generator().manual_seed(seed + 9), model.config.hidden_size
    for number, out in enumerate(widths, 1):
        place = folder / f"{number}_Dense"
        config = {"in_features": width, "out_features": out, "bias": False}
        config |= {"activation_function": _LINEAR} | ({"use_residual": True} if residual else {})
        write_json(place / "config.json", config)
        names = ["linear.weight", *(["residual.weight"] if residual and width != out else [])]
        tensors = {n: torch.randn(out, width, generator=generator) / width**0.5 for n in names}
        save_file(tensors, place / "model.safetensors")
        width = out
    return folder


def write_pylate(folder: Path, kind: str, **options: Any) -> Path:
    """A model in PyLate's layout; upper-case options are keys of config_sentence_transformers.json."""
    settings = {k.lower(): options.pop(k) for k in list(options) if k.isupper()}
    widths = options.get("widths", (16,))
    write_late(folder, kind, **options)
    denses = [
        (f"{number}_Dense", "pylate.models.Dense.Dense") for number in range(1, len(widths) + 1)
    ]
    _write_modules(folder, [("", "sentence_transformers.models.Transformer"), *denses])
    config = {
        "__version__": {"sentence_transformers": "4.0.2", "pytorch": "2.6.0"},
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "MaxSim",
        "query_prefix": MARKERS["query"],
        "document_prefix": MARKERS["document"],
        "query_length": 12,
        "document_length": 30,
        "attend_to_expansion_tokens": False,
        "skiplist_words": list(SKIPPED),
    }
    write_json(folder / "config_sentence_transformers.json", config | settings)
    return folder


def write_native(
    folder: Path,
    kind: str,
    *,
    transformer: dict[str, Any] | None = None,
    mask: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    normalize: bool = True,
    **options: Any,
) -> Path:
    """A model as sentence-transformers 6 saves its ``MultiVectorEncoder``.

    Args:
        folder: takes the files.
        kind: as for ``make_model``.
        transformer: keys of sentence_bert_config.json.
        mask: the configuration of ``MultiVectorMask``, ``None`` for no such module.
        settings: keys of config_sentence_transformers.json.
        normalize: whether a Normalize module ends the pipeline.
        **options: of :func:`write_late`.
    """
    write_late(folder, kind, **options)
    base = "sentence_transformers.base.modules."
    modules = [("", f"{base}transformer.Transformer")]
    for number in range(1, len(options.get("widths", (16,))) + 1):
        modules.append((f"{number}_Dense", f"{base}dense.Dense"))
        file = folder / f"{number}_Dense/config.json"
        named = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
        write_json(file, json.loads(file.read_text()) | named)
    if mask is not None:
        name = (
            "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"
        )
        modules.append(("7_MultiVectorMask", name))
        write_json(folder / "7_MultiVectorMask/config.json", mask)
    if normalize:
        modules.append(("8_Normalize", f"{base}normalize.Normalize"))
        write_json(folder / "8_Normalize/config.json", {"module_input_name": "token_embeddings"})
    _write_modules(folder, modules)
    limits = {"max_seq_length": 64, "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", limits | (transformer or {}))
    config = {
        "model_type": "MultiVectorEncoder",
        "prompts": MARKERS,
        "similarity_fn_name": "maxsim",
    }
    write_json(folder / "config_sentence_transformers.json", config | (settings or {}))
    return folder


def write_stanford(folder: Path, metadata: dict[str, Any] | None, **changes: Any) -> Path:
    """A model in the layout of Stanford's ColBERT, with markers among the vocabulary.

    Args:
        folder: takes the files.
        metadata: artifact.metadata, ``None`` for no such file.
        **changes: of the configuration.
    """
    model = make_model("bert", vocab_size=100, **changes)
    save(model, folder)
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        (folder / name).unlink()
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"architectures": ["HF_ColBERT"]})
    file = folder / "model.safetensors"
    tensors = {f"bert.{name}": value for name, value in load_file(file).items()}
    width, generator = model.config.hidden_size, torch.Generator().manual_seed(4)
    tensors["linear.weight"] = torch.randn(16, width, generator=generator) / width**0.5
    save_file(tensors, file, metadata={"format": "pt"})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for number, text in enumerate(("[unused0]", "[unused1]"), 96):
        tokenizer["model"]["vocab"][text] = number
    write_json(folder / "tokenizer.json", tokenizer)
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens.add_special_tokens(["<mask>"])
    tokens.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    write_json(folder / "tokenizer_config.json", settings | {"mask_token": "<mask>"})
    if metadata is not None:
        write_json(folder / "artifact.metadata", metadata)
    return folder


def _write_modules(folder: Path, modules: Sequence[tuple[str, str]]) -> None:
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": name}
        for i, (path, name) in enumerate(modules)
    ]
    write_json(folder / "modules.json", listed)


class PyLate:
    """PyLate's ``ColBERT`` by its published rule, in torch, a text at a time.

    A marker's id is inserted behind the first token, queries are filled up with the mask token, skipped tokens
    of documents are taken out, vectors have length 1 (PyLate 1.x, ``ColBERT.tokenize`` and ``encode``).

    Args:
        folder: a model in PyLate's layout.
    """

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config_sentence_transformers.json").read_text())
        self.model = load_base(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.denses = [
            (json.loads((place / "config.json").read_text()), _tensors(place))
            for place in sorted(folder.glob("*_Dense"))
        ]

    def encode(self, text: str, *, is_query: bool) -> NDArray[np.float32]:
        """float32 ``[tokens, dim]`` of one text."""
        role = "query" if is_query else "document"
        length = self.config[f"{role}_length"]
        self.tokenizer.enable_truncation(length - 1)
        ids = self.tokenizer.encode(text).ids
        ids.insert(1, self.tokenizer.token_to_id(self.config[f"{role}_prefix"]))
        real = len(ids)
        if is_query and self.config.get("do_query_expansion", True):
            ids += [self.tokenizer.token_to_id("<mask>")] * (length - real)
        mask = torch.zeros(1, len(ids), dtype=torch.int64)
        mask[0, : len(ids) if self.config["attend_to_expansion_tokens"] else real] = 1
        with torch.no_grad():
            x = self.model(input_ids=torch.tensor([ids]), attention_mask=mask)[0][0]
            for config, tensors in self.denses:
                y = x @ tensors["linear.weight"].T
                if config.get("use_residual"):
                    y = y + (
                        x @ tensors["residual.weight"].T if "residual.weight" in tensors else x
                    )
                x = y
        x = torch.nn.functional.normalize(x, dim=-1)
        if not is_query:
            words = self.config["skiplist_words"]
            skipped = {self.tokenizer.token_to_id(word) for word in words}
            x = x[[token not in skipped for token in ids]]
        rows: NDArray[np.float32] = x.numpy()
        return rows


def _tensors(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "model.safetensors")
