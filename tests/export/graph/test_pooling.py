"""Every pooling against sentence-transformers' own, alone and concatenated, with prompts pooled and left out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

from embedge import Embedder
from embedge.export import export_bundle
from embedge.runtime.options import EncodeOptions
from tests.helpers.models import cosines, make_model, make_tokenizer, random_texts, save, write_json

pytestmark = pytest.mark.slow

ALL = ("max", "weightedmean", "cls", "mean_sqrt_len_tokens", "lasttoken", "mean")
WIDTH = 32
PROMPTS = {"plain": "find me: ", "special": "find me</s>", "unknown": "find me é", "empty": ""}
TEXTS = random_texts(20)
BOUND = 0.999999

Vectors = NDArray[np.float32]


def written(
    folder: Path, kind: str, pooling: Any, *, normalize: bool = False, **config: Any
) -> Path:
    """A model folder with a pooling and prompts."""
    save(make_model(kind), folder, normalize=normalize)
    write_json(
        folder / "1_Pooling/config.json",
        {"pooling_mode": pooling, "embedding_dimension": WIDTH, **config},
    )
    write_json(folder / "config_sentence_transformers.json", {"prompts": PROMPTS})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    write_json(folder / "tokenizer_config.json", settings)
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Embedder]]:
    """A family's model, pooled in every way, in sentence-transformers and as a bundle."""
    made: dict[tuple[str, bool], tuple[Any, Embedder]] = {}

    def get(kind: str, *, include_prompt: bool) -> tuple[Any, Embedder]:
        key = kind, include_prompt
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            source = written(folder / "source", kind, list(ALL), include_prompt=include_prompt)
            out = export_bundle(
                source, adapters={"t": None}, precisions=["fp32"], out=folder / "out"
            )
            reference = SentenceTransformer(str(source), device="cpu")
            made[key] = reference, Embedder(out, threads=1)
        return made[key]

    return get


def by_pooling(vectors: Vectors) -> dict[str, Vectors]:
    parts = np.split(vectors, len(ALL), axis=-1)
    return dict(zip(ALL, parts, strict=True))


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama"])
def test_poolings_are_those_of_sentence_transformers(
    kind: str, include_prompt: bool, both: Callable[..., tuple[Any, Embedder]]
) -> None:
    reference, model = both(kind, include_prompt=include_prompt)
    for name in (None, *PROMPTS):
        expected = reference.encode(TEXTS, prompt_name=name, batch_size=6)
        options: EncodeOptions = {"prompt_name": name, "on_truncate": "ignore"}
        batched = model.encode(TEXTS, **options)
        alone = np.stack([model.encode(text, **options) for text in TEXTS])
        assert batched.shape == expected.shape == (len(TEXTS), WIDTH * len(ALL))
        for found in (batched, alone):
            for pooling, part in by_pooling(found).items():
                worst = cosines(part, by_pooling(expected)[pooling]).min()
                assert worst >= BOUND, (pooling, name)
                np.testing.assert_allclose(
                    part, by_pooling(expected)[pooling], rtol=2e-5, atol=2e-5
                )


def test_prompts_left_out_move_every_pooling_but_the_last_token(
    both: Callable[..., tuple[Any, Embedder]],
) -> None:
    _, pooled = both("bert", include_prompt=True)
    _, left_out = both("bert", include_prompt=False)
    one, other = (
        by_pooling(m.encode(TEXTS, prompt="find: ", on_truncate="ignore"))
        for m in (pooled, left_out)
    )
    moved = {pooling: float(cosines(one[pooling], other[pooling]).mean()) for pooling in ALL}
    assert moved.pop("lasttoken") >= BOUND
    assert max(moved.values()) < 0.999, moved


def test_a_text_that_is_nothing_but_its_prompt_has_a_stated_vector(tmp_path: Path) -> None:
    source = written(tmp_path / "source", "llama", list(ALL), include_prompt=False)
    make_tokenizer(eos=False).save(str(source / "tokenizer.json"))
    out = export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "out")
    model = Embedder(out, threads=1)
    parts = by_pooling(model.encode(["", "a"], prompt_name="plain"))
    reference = SentenceTransformer(str(source), device="cpu")
    expected = by_pooling(reference.encode(["", "a"], prompt_name="plain"))
    for pooling, part in parts.items():
        if pooling == "max":
            expected[pooling][0] = 0  # minus infinity there
        np.testing.assert_allclose(part, expected[pooling], atol=2e-5, err_msg=pooling)


@pytest.mark.parametrize("pooling", ["max", "weightedmean", "mean_sqrt_len_tokens", "max+cls"])
@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama"])
def test_rotated_graphs_pool_alike(kind: str, pooling: str, tmp_path: Path) -> None:
    source = written(tmp_path / "source", kind, pooling.split("+"), normalize=True)
    out = export_bundle(
        source,
        adapters={"t": None},
        precisions=["fp32", "int8"],
        out=tmp_path / "out",
        calibration="none",
    )
    exact, rounded = (Embedder(out, precision=p, threads=1).encode(TEXTS) for p in ("fp32", "int8"))
    assert (
        cosines(exact, SentenceTransformer(str(source), device="cpu").encode(TEXTS)).min() >= BOUND
    )
    assert cosines(exact, rounded).mean() >= 0.998


def test_a_dense_layer_takes_all_concatenated_vectors(tmp_path: Path) -> None:
    source = written(tmp_path / "source", "bert", ["mean", "max"])
    modules = json.loads((source / "modules.json").read_text())
    settings = {"in_features": 2 * WIDTH, "out_features": 24, "bias": False}
    write_json(source / "2_Dense/config.json", settings)
    weight = torch.randn(24, 2 * WIDTH, generator=torch.Generator().manual_seed(1)) / 8
    save_file({"linear.weight": weight}, source / "2_Dense/model.safetensors")
    modules.append(
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    )
    write_json(source / "modules.json", modules)
    reference = SentenceTransformer(str(source), device="cpu")
    out = export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "out")
    model = Embedder(out, threads=1)
    assert model.dim == 24
    assert cosines(model.encode(TEXTS), reference.encode(TEXTS)).min() >= BOUND


def test_several_poolings_may_be_asked_for(tmp_path: Path) -> None:
    source = save(make_model("bert"), tmp_path / "source")
    with pytest.warns(UserWarning, match=r"pooling 'cls\+max' was asked for"):
        out = export_bundle(
            source,
            adapters={"t": None},
            precisions=["fp32"],
            out=tmp_path / "out",
            pooling="cls+max",
        )
    model = Embedder(out, threads=1)
    assert model.dim == 2 * WIDTH
    assert json.loads((out / "manifest.json").read_text())["model"]["pooling"] == "cls+max"


@pytest.mark.parametrize("prompt", ["", *PROMPTS.values()])
def test_code_in_the_card_leaves_prompts_out_too(
    prompt: str, both: Callable[..., tuple[Any, Embedder]]
) -> None:
    _, model = both("bert", include_prompt=False)
    root = model._bundle.root
    card = (root / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(import base64|from pathlib.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(root)), names)
    found = names["encode"](TEXTS, prompt=prompt)
    expected = model.encode(TEXTS, prompt=prompt, on_truncate="ignore")
    np.testing.assert_allclose(found, expected, atol=2e-5)
