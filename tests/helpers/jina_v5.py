"""jina-embeddings-v5-text of few weights in its published layout, and its vectors by torch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

from tests.helpers.bidirectional import NATIVE, states
from tests.helpers.models import (
    LINEARS,
    SPECIAL,
    make_model,
    make_tokenizer,
    save_adapter,
    write_json,
)

__all__ = ["LIMIT", "PROMPTS", "SIZES", "TASKS", "Reference", "write"]

TASKS = ("retrieval", "text-matching", "clustering", "classification")
PROMPTS = {"query": "Query: ", "document": "Document: "}
SIZES = ("nano", "small")
LIMIT = 1024
_SHARED = {
    "architectures": ["JinaEmbeddingsV5Model"],
    "task_names": list(TASKS),
    "auto_map": {
        "AutoConfig": "configuration_jina_embeddings_v5.JinaEmbeddingsV5Config",
        "AutoModel": "modeling_jina_embeddings_v5.JinaEmbeddingsV5Model",
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 56,
    "max_position_embeddings": LIMIT,
    "model_type": "jina_embeddings_v5",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rope_scaling": None,
    "vocab_size": 96,
}
CONFIGS: dict[str, dict[str, Any]] = {  # keys as published
    "nano": {
        **_SHARED,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "pad_token_id": 3,  # the tokenizer's own is another
        "mask_token": "<mask>",
        "mask_token_id": 4,
        "hidden_dropout": 0.0,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.40.0.dev0",
        "is_decoder": False,
    },
    "small": {
        **_SHARED,
        "head_dim": 16,
        "max_window_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 3500000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
    },
}
_OTHER_CODE = ("architectures", "auto_map", "model_type", "task_names", "is_decoder", "torch_dtype")


def backbone(size: str) -> Any:
    """Random weights in transformers' class: Llama for nano, which is told to see all tokens at each call."""
    kept = {key: value for key, value in CONFIGS[size].items() if key not in _OTHER_CODE}
    return make_model("llama" if size == "nano" else "qwen3", **kept)


def write(folder: Path, size: str, *, prefix: str = "", bos: bool = True) -> Path:
    """The files of the published repository but for its code.

    Args:
        folder: takes them.
        size: "nano" or "small".
        prefix: before the names of tensors.
        bos: whether the tokenizer puts a token before every text.
    """
    model = backbone(size)
    model.save_pretrained(folder)  # where adapters are made for it
    for number, task in enumerate(TASKS):
        save_adapter(
            folder, folder / "adapters" / task, target=rf".*({LINEARS['decoder']})", seed=number
        )
    tensors = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", CONFIGS[size])
    write_json(
        folder / "modules.json",
        [
            {
                "idx": 0,
                "name": "transformer",
                "path": "",
                "type": "custom_st.Transformer",
                "kwargs": ["task", "truncate_dim"],
            }
        ],
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {"sentence_transformers": "5.1.2"},
            "prompts": PROMPTS,
            "default_prompt_name": "document",
            "similarity_fn_name": "cosine",
        },
    )
    tokenizer = make_tokenizer(eos=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 2)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("unk_token", "pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    write_json(
        folder / "tokenizer_config.json",
        {**names, "model_max_length": 10**30, "tokenizer_class": "PreTrainedTokenizer"},
    )
    return folder


class Reference:
    """The published rule in torch: a prompt, the task's adapter unmerged, the last token, cut, length 1.

    Args:
        folder: as :func:`write` makes it.
        size: "nano" or "small".
        task: whose adapter, ``None`` for none.
        without: kinds of Linears whose adapter is left out, and of norms whose weights are 1.
        native: whether nano is transformers' EuroBERT, not Llama.
    """

    def __init__(
        self,
        folder: Path,
        size: str,
        task: str | None,
        without: Sequence[str] = (),
        native: bool = False,
    ) -> None:
        self.size, self.native = size, native
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        stored = load_file(folder / "model.safetensors")
        tensors = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
        self.model = _eurobert() if native else backbone(size)
        self.model.load_state_dict(tensors)
        if task is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = PeftModel.from_pretrained(self.model, folder / "adapters" / task)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name and any(kind in name for kind in without):
                parameter.data.zero_()
            if any(name.endswith(f".{kind}.weight") for kind in without):
                parameter.data.fill_(1.0)
        self.model.eval()

    def vectors(
        self, texts: Sequence[str], prompt: str = "document", dim: int | None = None
    ) -> NDArray[np.float32]:
        """float32 ``[texts, dim]``, each text alone."""
        rows = [self._last(self.tokenizer.encode(PROMPTS[prompt] + text).ids) for text in texts]
        cut = torch.stack(rows)[:, :dim]
        found: NDArray[np.float32] = torch.nn.functional.normalize(cut, dim=-1).numpy()
        return found

    def _last(self, ids: Sequence[int]) -> torch.Tensor:
        if self.size == "nano" and not self.native:
            return states(self.model, ids)[-1]
        tokens = torch.tensor([list(ids)])
        with torch.no_grad():
            output = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        last: torch.Tensor = output[0][0, -1]
        return last


def _eurobert() -> Any:
    assert NATIVE
    kept = {key: value for key, value in CONFIGS["nano"].items() if key not in _OTHER_CODE}
    config = transformers.AutoConfig.for_model("eurobert", **kept)
    config._attn_implementation = "eager"
    return transformers.AutoModel.from_config(config)


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ``...`` takes one away."""
    content = {**json.loads(file.read_text()), **changes}
    write_json(file, {key: value for key, value in content.items() if value is not ...})
