"""Tiny random models, tokenizers and adapters, saved to folders, and their vectors by torch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

VOCAB = 96
SPECIAL = ["<unk>", "<pad>", "<s>", "</s>"]  # RoBERTa and MPNet count positions from pad = 1
WORDS = [chr(33 + i) for i in range(VOCAB - len(SPECIAL))]  # characters, so that any text has ids

SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WINDOW = 6  # tokens, shorter than most of the texts
GEMMA: dict[str, Any] = {
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 2 * (WINDOW + 1),
    "sliding_window_pattern": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"hidden_act": "gelu_new", "type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "mpnet": {},
    "distilbert": {"hidden_dim": 56},
    "modernbert": {
        "num_hidden_layers": 4,
        "local_attention": WINDOW,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
    "modernbert-with-biases": {
        "num_hidden_layers": 4,
        "local_attention": WINDOW,
        "attention_bias": True,
        "mlp_bias": True,
        "norm_bias": True,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
    "llama": {"num_key_value_heads": 2, "rope_scaling": LLAMA3_ROPE},
    "llama-with-biases": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "mistral": {"num_key_value_heads": 2, "sliding_window": WINDOW},
    "qwen2": {"num_key_value_heads": 2},
    "qwen2-sliding": {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma3_text": {**GEMMA, "use_bidirectional_attention": True},
    "gemma3_text-causal": GEMMA,
}
# Encoders whose classes transformers has since version 5.
SINCE_5: dict[str, dict[str, Any]] = {
    "embedding_gemma2_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "hidden_size_per_layer_input": 24,
        "embedding_dim": 32,
    },
    "eurobert": {"num_key_value_heads": 2, "rope_theta": 5000.0},
    "nomic_bert": {},
    "gte": {},
    "jina_embeddings_v3": {},
}
CONFIGS |= {k: v for k, v in SINCE_5.items() if k in transformers.CONFIG_MAPPING}
ENCODERS = (
    *("bert", "roberta", "xlm-roberta", "mpnet", "modernbert", "modernbert-with-biases"),
    "gemma3_text",
    "distilbert",
    *SINCE_5,
)
DECODERS = tuple(name for name in CONFIGS if name not in ENCODERS)

torch.set_num_threads(1)  # tiny models: more threads only wait for each other

LINEARS = {
    "bert": "query|key|value|dense",
    "mpnet": r"attn\.[qkvo]|dense",
    "jina_embeddings_v3": "[qkvo]_proj|fc[12]",
    "distilbert": "(q|k|v|out)_lin|lin[12]",
    "modernbert": "Wqkv|Wo|Wi",
    "decoder": "[qkvo]_proj|(gate|up|down)_proj",
}


def model_type(name: str) -> str:
    """transformers' name of the architecture of a configuration here."""
    for kind in ("xlm-roberta", "modernbert", "roberta", "bert", "mpnet"):
        if name.startswith(kind):
            return kind
    return name.split("-", maxsplit=1)[0]


def linears(name: str) -> str:
    """A regular expression for all Linears that reach the vector."""
    kind = model_type(name)
    names = LINEARS.get({"roberta": "bert", "xlm-roberta": "bert"}.get(kind, kind))
    return rf"(encoder\.|layers\.|transformer\.).*\.({names or LINEARS['decoder']})"


def make_model(name: str, seed: int = 0, gain: float = 1.6, **changes: Any) -> Any:
    """A model whose every parameter is random, norms and biases included.

    Args:
        name: a key of ``CONFIGS``, or a model type.
        seed: of the random numbers.
        gain: size of a Linear's output for an input of size 1.
        **changes: of the configuration.
    """
    kind = model_type(name)
    settings = {**SHARED, **CONFIGS.get(name, {}), **changes}
    config = transformers.AutoConfig.for_model(kind, **settings)
    options: dict[str, Any] = {"attn_implementation": "eager"}
    if kind in POOLED:
        options["add_pooling_layer"] = False
    torch.manual_seed(seed)
    model_class = transformers.MODEL_MAPPING[type(config)]
    if "add_pooling_layer" in options:
        config._attn_implementation = "eager"
        model = model_class(config, add_pooling_layer=False)
    else:
        model = model_class._from_config(config, attn_implementation="eager")
    randomize(model, seed, gain)
    return model.eval()


def randomize(model: Any, seed: int, gain: float) -> None:
    """Random values for every parameter: sensible sizes, nothing zero, no norm at 1."""
    generator = torch.Generator().manual_seed(seed + 1)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            is_norm = bool((parameter == 1).all())
            parameter.data = 1 + 0.3 * noise if is_norm else 0.3 * noise
        else:
            parameter.data = noise * (gain / parameter.shape[-1] ** 0.5)


def make_tokenizer(*, eos: bool = True) -> Tokenizer:
    """Characters, wrapped in <s> and </s>."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    if eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B </s>",
            special_tokens=[("<s>", 2), ("</s>", 3)],
        )
    return tokenizer


def save(
    model: Any,
    folder: Path,
    *,
    pooling: str = "mean",
    normalize: bool = True,
    dense: Sequence[tuple[int, str]] = (),
    max_length: int = 64,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Save a model in sentence-transformers' layout.

    Args:
        model: the transformer.
        folder: takes the files.
        pooling: "mean", "cls" or "lasttoken".
        normalize: whether a Normalize module ends the pipeline.
        dense: width and torch.nn activation class of Dense layers.
        max_length: the most tokens of a text.
        extra: further tensors for the weight file.
    """
    model.save_pretrained(folder)
    if extra:
        file = folder / "model.safetensors"
        save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(eos=pooling != "lasttoken"),
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=max_length,
    )
    tokenizer.save_pretrained(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length})
    write_json(folder / "1_Pooling/config.json", {"pooling_mode": pooling})
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(7)
    for number, (out, activation) in enumerate(dense, 2):
        place = folder / f"{number}_Dense"
        modules.append((place.name, "Dense"))
        settings = {"in_features": width, "out_features": out, "bias": True}
        settings["activation_function"] = f"torch.nn.modules.activation.{activation}"
        if activation == "Identity":
            settings["activation_function"] = "torch.nn.modules.linear.Identity"
        write_json(place / "config.json", settings)
        tensors = {
            "linear.weight": torch.randn(out, width, generator=generator) / width**0.5,
            "linear.bias": torch.randn(out, generator=generator) * 0.3,
        }
        save_file(tensors, place / "model.safetensors")
        width = out
    if normalize:
        modules.append(("9_Normalize", "Normalize"))
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    write_json(folder / "modules.json", listed)
    return folder


def write_json(path: Path, value: Any) -> None:
    """Write JSON, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def save_adapter(
    source: Path,
    folder: Path,
    *,
    target: str | list[str],
    seed: int = 3,
    size: float = 0.7,
    **options: Any,
) -> Path:
    """Save a LoRA adapter with random A, B, magnitudes and saved modules for the model in ``source``.

    Args:
        source: the base model's folder.
        folder: takes the adapter.
        target: PEFT's ``target_modules``.
        seed: of the random numbers.
        size: of A and B.
        **options: of ``LoraConfig``.
    """
    settings = {"r": 3, "lora_alpha": 8, "lora_dropout": 0.1, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = load_base(source)
        model = get_peft_model(base, LoraConfig(target_modules=target, **settings))
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.data = noise * (size / parameter.shape[-1] ** 0.5)
            else:
                parameter.data = parameter.data * (1 + 0.2 * noise) + 0.02 * noise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.create_or_update_model_card = lambda _: None  # a quarter of the time
        model.save_pretrained(folder)
    return folder


def load_base(source: Path) -> Any:
    """The transformer in a folder, as transformers loads it, in float32."""
    config = transformers.AutoConfig.from_pretrained(source)
    config._attn_implementation = "eager"
    options = {"add_pooling_layer": False} if config.model_type in POOLED else {}
    return transformers.AutoModel.from_pretrained(source, config=config, **options).eval()


POOLED = ("bert", "roberta", "xlm-roberta", "mpnet", "jina_embeddings_v3")


@dataclass
class Reference:
    """The model in torch, with the adapter unmerged, pooled by hand.

    Args:
        source: the model's folder.
        adapter: the adapter's folder, or ``None``.
    """

    source: Path
    adapter: Path | None = None
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        model = load_base(self.source)
        if self.adapter is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = PeftModel.from_pretrained(model, self.adapter)
        self.model = model.eval()
        self.tokenizer = Tokenizer.from_file(str(self.source / "tokenizer.json"))
        self.settings = json.loads((self.source / "sentence_bert_config.json").read_text())
        self.modules = [
            (m["type"].rpartition(".")[2], self.source / m["path"])
            for m in json.loads((self.source / "modules.json").read_text())
        ]

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """float32 ``[texts, dim]``, each text alone."""
        return np.stack([self._vector(text) for text in texts])

    def _vector(self, text: str) -> NDArray[np.float32]:
        ids = self.tokenizer.encode(text).ids
        length = self.settings["max_seq_length"]
        if len(ids) > length:
            self.tokenizer.enable_truncation(length)
            ids = self.tokenizer.encode(text).ids
            self.tokenizer.no_truncation()
        with torch.no_grad():
            tokens = torch.tensor([ids])
            states = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens))[0][0]
            x = states
            for kind, folder in self.modules[1:]:
                x = self._apply(kind, folder, x)
        vector: NDArray[np.float32] = x.numpy()
        return vector

    @staticmethod
    def _apply(kind: str, folder: Path, x: torch.Tensor) -> torch.Tensor:
        if kind == "Normalize":
            return x / x.norm()
        settings = json.loads((folder / "config.json").read_text())
        if kind == "Pooling":
            old = settings.get("pooling_mode_mean_tokens")
            mode = "mean" if old else settings["pooling_mode"]
            return {"mean": x.mean(0), "cls": x[0], "lasttoken": x[-1]}[mode]
        tensors = load_file(folder / "model.safetensors")
        x = tensors["linear.weight"] @ x + tensors.get("linear.bias", 0)
        name = settings["activation_function"].rpartition(".")[2]
        return getattr(torch.nn, name)()(x)


def texts_of_lengths(lengths: Sequence[int], seed: int = 5) -> list[str]:
    """Texts of so many tokens each, the two of :func:`make_tokenizer` around them among those."""
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(WORDS, length - 2)) for length in lengths]


def random_texts(count: int = 40, longest: int = 60, seed: int = 5) -> list[str]:
    """Texts of mixed lengths in random order, the shortest of one word."""
    generator = np.random.default_rng(seed)
    lengths = [1, 2, longest, *generator.integers(1, longest, count - 3)]
    generator.shuffle(lengths)
    return ["".join(generator.choice(WORDS, n)) for n in lengths]


def cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine of each row of ``a`` with that of ``b``, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    dots = np.einsum("ij,ij->i", a, b)
    result: NDArray[np.float64] = dots / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return result
