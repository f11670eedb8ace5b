"""The modules of a pipeline are read, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from embedge.export.errors import CheckpointError
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.sentence_transformers import read_modules
from tests.helpers.sentence_files import CONFIG, PREFIX, write_dense, write_json, write_model


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
        ({"use_residual": True}, r"expected the tensors .*residual.weight"),
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


@pytest.mark.parametrize("kind", ["Router", "StaticEmbedding", "CLIPModel", "MLMTransformer"])
def test_models_of_other_kinds_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    write_json(tmp_path / "modules.json", [{"path": "", "type": PREFIX + kind}])
    with pytest.raises(CheckpointError, match=f"the first module is {PREFIX}{kind}"):
        Checkpoint(tmp_path)
