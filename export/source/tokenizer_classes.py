"""What transformers' tokenizer classes, as of version 4, do beyond reading their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = ["BY_MODEL_TYPE", "CLASSES", "GENERIC", "NAMED", "TokenizerClass"]

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LOWERS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
GENERIC = ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True, kw_only=True)
class TokenizerClass:
    """What a tokenizer class of transformers 4 does beyond reading its files.

    Attributes:
        tokens: special tokens where the files name none, in the order of ``NAMED``, "-" for none.
        more: further special tokens.
        remade: special tokens that it matches in its own way where the files do not say how, the mask with
            the space before it.
        lowers: which of ``do_lower_case`` and its kin replace the normalizer's.
        ends: whether ``add_bos_token`` and ``add_eos_token`` replace the post-processor, and their defaults.
        prefix: whether ``add_prefix_space`` makes it convert the slow tokenizer.
        types: whether the model is given token types.
        left: whether it pads on the left where the files do not say.
    """

    tokens: str = ""
    more: tuple[str, ...] = ()
    remade: tuple[str, ...] = ()
    lowers: tuple[str, ...] = ()
    ends: tuple[bool, bool] | None = None
    prefix: bool = False
    types: bool = True
    left: bool = False


_BERT = TokenizerClass(tokens="- - [UNK] [SEP] [PAD] [CLS] [MASK]", lowers=_LOWERS)
_MASK = ("mask_token",)
_ROBERTA = TokenizerClass(tokens="<s> </s> <unk> </s> <pad> <s> <mask>", remade=_MASK, types=False)
_GPT2 = TokenizerClass(tokens="<|endoftext|> <|endoftext|> <|endoftext|>", types=False)
# By the name without "Tokenizer" and "Fast".
CLASSES: Mapping[str, TokenizerClass] = {
    **dict.fromkeys(("Bert", "Electra", "MobileBert", "ConvBert"), _BERT),
    "DistilBert": replace(_BERT, types=False),
    "MPNet": TokenizerClass(
        tokens="<s> </s> [UNK] </s> <pad> <s> <mask>",
        remade=NAMED,
        lowers=_LOWERS[:2],
        types=False,
    ),
    **dict.fromkeys(("Roberta", "XLMRoberta", "Bart", "Barthez", "Longformer"), _ROBERTA),
    "Camembert": replace(_ROBERTA, more=("<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED")),
    "Herbert": TokenizerClass(tokens="- - <unk> </s> <pad> <s> <mask>"),
    "DebertaV2": TokenizerClass(tokens="[CLS] [SEP] [UNK] [SEP] [PAD] [CLS] [MASK]"),
    "Albert": TokenizerClass(tokens="[CLS] [SEP] <unk> [SEP] <pad> [CLS] [MASK]", remade=_MASK),
    "GPT2": _GPT2,
    "GPTNeoX": replace(_GPT2, ends=(False, False)),
    "Llama": TokenizerClass(
        tokens="<s> </s> <unk>", ends=(True, False), prefix=True, types=False, left=True
    ),
    "Gemma": TokenizerClass(
        tokens="<bos> <eos> <unk> - <pad>", ends=(True, False), types=False, left=True
    ),
    "Qwen2": TokenizerClass(
        tokens="- <|endoftext|> <|endoftext|> - <|endoftext|>",
        remade=("bos_token", "eos_token", "unk_token", "pad_token"),
        types=False,
    ),
}
# tokenizer_class where tokenizer_config.json names none
BY_MODEL_TYPE = {
    "bert": "Bert",
    "distilbert": "DistilBert",
    "gte": "XLMRoberta",
    "nomic_bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "mpnet": "MPNet",
    "jina_embeddings_v3": "XLMRoberta",
    "llama": "Llama",
    "mistral": "Llama",
    "gemma3_text": "Gemma",
    "qwen2": "Qwen2",
    "qwen3": "Qwen2",
    "qwen2_5_vl": "Qwen2",
}
