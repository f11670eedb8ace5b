"""sentence-transformers' files are honoured as sentence-transformers does, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.export.errors import CheckpointError
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.sentence_transformers import read_modules
from tests.helpers.sentence_files import CONFIG, write_dense, write_model


def test_a_bare_transformer_says_nothing_about_pooling(tmp_path: Path) -> None:
    settings = read_modules(tmp_path, CONFIG)

    assert settings.pooling is None
    assert not settings.normalize
    assert settings.dense == ()
    assert settings.prompts == {}
    assert settings.default_prompt_name is None
    assert settings.max_length == 64
    assert settings.similarity == "cosine"


def test_the_whole_pipeline_is_read(tmp_path: Path) -> None:
    write_model(
        tmp_path,
        "Transformer",
        "Pooling",
        "Dense",
        "Normalize",
        settings={
            "prompts": {"query": "query: ", "document": None},
            "default_prompt_name": "query",
            "similarity_fn_name": "dot",
        },
        transformer={"max_seq_length": 32, "do_lower_case": False},
    )
    tensors = write_dense(tmp_path / "2_Dense")

    settings = read_modules(tmp_path, CONFIG)

    assert settings.pooling == "mean"
    assert settings.normalize
    assert settings.include_prompt
    assert settings.prompts == {"query": "query: ", "document": ""}
    assert settings.default_prompt_name == "query"
    assert settings.similarity == "dot"
    assert settings.max_length == 32
    (dense,) = settings.dense
    assert (dense.in_features, dense.out_features, dense.activation) == (4, 3, "tanh")
    assert np.array_equal(dense.weight, tensors["linear.weight"])
    assert dense.bias is not None and np.array_equal(dense.bias, tensors["linear.bias"])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, "cls"),
        ({"pooling_mode": ["lasttoken"]}, "lasttoken"),
        ({"pooling_mode": ["weightedmean", "cls"]}, "weightedmean+cls"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, "cls+max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"),
        ({"word_embedding_dimension": 4}, "mean"),
        ({"pooling_mode": "mean", "include_prompt": False}, "mean"),
    ],
)
def test_the_pooling_is_read_in_its_old_and_new_spelling(
    pooling: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    assert read_modules(write_model(tmp_path, pooling=pooling), CONFIG).pooling == expected


_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown pooling": (
        {"pooling": {"pooling_mode": "median"}},
        "the pooling median is not supported; expected one of mean, cls",
    ),
    "a pooling twice": (
        {"pooling": {"pooling_mode": ["mean", "mean"]}},
        r"the pooling mean\+mean is not supported; expected .* each once",
    ),
    "no pooling": ({"pooling": {"pooling_mode": []}}, r"the pooling \[\] is not supported"),
    "euclidean similarity": (
        {"settings": {"similarity_fn_name": "euclidean"}},
        "similarity 'euclidean' is not supported",
    ),
    "a sparse encoder": (
        {"settings": {"model_type": "SparseEncoder"}},
        "a SparseEncoder model is not supported",
    ),
    "an unknown default prompt": (
        {"settings": {"prompts": {"query": "q"}, "default_prompt_name": "doc"}},
        "default_prompt_name is 'doc', the prompts are: query",
    ),
    "prompts that are a list": (
        {"settings": {"prompts": ["q"]}},
        "prompts should map names to texts, found",
    ),
    "prompts that are numbers": (
        {"settings": {"prompts": {"q": 1}}},
        "prompts should map names to texts, found",
    ),
    "another task": (
        {"transformer": {"transformer_task": "fill-mask"}},
        "transformer_task='fill-mask' is not supported",
    ),
    "no text": (
        {"transformer": {"modality_config": {"image": {}}}},
        "modality_config reads no text",
    ),
    "texts in a chat template": (
        {
            "transformer": {
                "modality_config": {"text": _FORWARD, "message": _FORWARD},
                "module_output_name": "token_embeddings",
            }
        },
        "modality_config has 'message'",
    ),
    "a dimension of none": (
        {"settings": {"truncate_dim": 0}},
        "truncate_dim is 0, expected a positive whole number",
    ),
    "tokens under another name": (
        {"transformer": {"modality_config": {"text": _FORWARD}, "module_output_name": "scores"}},
        "module_output_name is 'scores', expected 'token_embeddings'",
    ),
    "a pooling's setting that is not known": (
        {"pooling": {"pooling_mode": "mean", "layer_index": -2}},
        "Pooling has settings that sentence-transformers does not know: layer_index",
    ),
    "a pooling of null": (
        {"pooling": {"pooling_mode": None, "pooling_mode_cls_token": True}},
        "the pooling None is not supported",
    ),
    "a length of queries": (
        {"transformer": {"query_length": 8}},
        "query_length=8 is not supported",
    ),
    "a length of no tokens": (
        {"transformer": {"max_seq_length": 0}},
        "max_seq_length is 0, expected a positive whole",
    ),
    "a length of text": (
        {"transformer": {"max_seq_length": "9"}},
        "max_seq_length is '9', expected a positive whole",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_graph_would_not_reproduce_is_refused_by_name(case: str, tmp_path: Path) -> None:
    files, expected = REFUSED[case]

    with pytest.raises(CheckpointError, match=expected):
        read_modules(write_model(tmp_path, **files), CONFIG)


def test_what_sentence_transformers_itself_saves_is_read(tmp_path: Path) -> None:
    """The file names, keys and class names above are its own."""
    library = pytest.importorskip("sentence_transformers")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    config = transformers.BertConfig(
        vocab_size=9,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=64,
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcd"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    dense = modules.Dense(4, 3, activation_function=torch.nn.GELU())
    pipeline = [
        modules.Transformer(str(tmp_path / "bert"), max_seq_length=24),
        modules.Pooling(4, "lasttoken"),
        dense,
    ]
    model = library.SentenceTransformer(
        modules=[*pipeline, modules.Normalize()],
        device="cpu",
        similarity_fn_name="dot",
        prompts={"query": "query: "},
        default_prompt_name="query",
    )
    model.save(str(tmp_path / "saved"), create_model_card=False)
    checkpoint = Checkpoint(tmp_path / "saved")

    settings = read_modules(checkpoint.path, checkpoint.config)

    assert (settings.pooling, settings.normalize, settings.max_length) == ("lasttoken", True, 24)
    assert (settings.similarity, settings.default_prompt_name) == ("dot", "query")
    assert settings.prompts == model.prompts
    assert settings.dense[0].activation == "gelu"
    assert np.array_equal(settings.dense[0].weight, dense.linear.weight.detach().numpy())


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_prompts_that_pooling_leaves_out(pooling: str, tmp_path: Path) -> None:
    config = {"pooling_mode": pooling, "include_prompt": False}
    write_model(tmp_path, pooling=config, settings={"prompts": {"query": "find: "}})
    settings = read_modules(tmp_path, CONFIG)
    assert not settings.include_prompt
    assert settings.prompts == {"query": "find: "}
