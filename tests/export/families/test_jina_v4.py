"""jina-embeddings-v4 from its published layout to vectors, against transformers with LoRA by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch as st
import torch
import transformers
from jina_v4_layout import SHORT
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from embedge.export import export_bundle
from embedge.export.errors import AdapterError, CheckpointError
from embedge.runtime import Embedder, EmbedgeValueError, EmbedgeWarning
from tests.helpers.jina_v4 import TASKS, Reference, adapter_folder, write_checkpoint

Floats = NDArray[np.float32]

# checkpoints lie under other names here than the adapters' base
pytestmark = [pytest.mark.filterwarnings("ignore:adapter .* was trained on"), pytest.mark.slow]

TEXTS = [
    "How do I sort a dictionary by its values?",
    "x",
    "Ein Satz auf Deutsch, mit Umlauten: äöüß. 数据 😀",
    "def f(x):\n    return x + 1\n" * 6,
]
# width × height: smaller than a window, multiples of it and not, tall, wide, square
SIZES = [
    (28, 28), (56, 28), (112, 112), (113, 111), (224, 112), (300, 40), (40, 300),
    (200, 170), (168, 56), (90, 250), (9, 4), (260, 200), (112, 56), (56, 112),
]  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def image(number: int) -> Image.Image:
    width, height = SIZES[number]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


IMAGES = [image(number) for number in range(len(SIZES))]


def cosines(a: Floats, b: Floats) -> Floats:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.asarray((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("v4") / "tiny")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return export_bundle(
        checkpoint, precisions=["fp32"], out=checkpoint.parent / "bundle", calibration="none"
    )


@pytest.fixture(scope="module")
def model(bundle: Path) -> Embedder:
    return Embedder(bundle, precision="fp32", threads=2)


@pytest.fixture(scope="module", params=TASKS)
def reference(request: pytest.FixtureRequest, checkpoint: Path) -> Reference:
    return Reference(checkpoint, request.param)


# -- parity -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prompt", ["query", "passage"])
def test_texts_equal_the_reference(model: Embedder, reference: Reference, prompt: str) -> None:
    prefix = "Passage: " if prompt == "passage" and reference.task != "text-matching" else "Query: "
    single, multi = reference.texts(TEXTS, prefix)
    options: dict[str, Any] = {"task": reference.task, "prompt_name": prompt}
    assert cosines(model.encode(TEXTS, **options), single).min() >= 0.99999
    rows = model.encode(TEXTS, **options, multi_vector=True)
    for found, expected in zip(rows, multi, strict=True):
        assert found.shape == expected.shape
        assert cosines(found, expected).min() >= 0.9999


def test_images_equal_the_reference_alone_and_batched(
    model: Embedder, reference: Reference
) -> None:
    single, multi = reference.images(IMAGES)
    batched = model.encode_image(IMAGES, task=reference.task)
    alone = np.stack([model.encode_image(picture, task=reference.task) for picture in IMAGES])
    assert cosines(batched, single).min() >= 0.99999
    assert cosines(alone, single).min() >= 0.99999
    assert cosines(alone, batched).min() >= 0.999999
    for found, expected in zip(
        model.encode_image(IMAGES, task=reference.task, multi_vector=True), multi, strict=True
    ):
        assert found.shape == expected.shape
        assert cosines(found, expected).min() >= 0.9999


def test_one_pixel_is_an_image_of_one_colour(model: Embedder, reference: Reference) -> None:
    """transformers' processor takes the 3 of [1, 1, 3] for the height, so the reference is scaled first."""
    pixel = Image.new("RGB", (1, 1), (200, 30, 90))
    single, _ = reference.images([pixel.resize((56, 56))])
    assert cosines(model.encode_image(pixel, task=reference.task), single[0]) >= 0.99999


def test_a_list_of_texts_and_images_comes_back_in_order(model: Embedder) -> None:
    mixed: list[Any] = [IMAGES[3], TEXTS[0], IMAGES[5], TEXTS[2], TEXTS[1], IMAGES[0]]
    together = model.encode(mixed, task="code")
    for item, vector in zip(mixed, together, strict=True):
        if isinstance(item, str):
            alone = model.encode(item, task="code")
        else:
            alone = model.encode_image(item, task="code")
        assert cosines(vector, alone) >= 0.999999


def test_more_pixels_are_more_tokens_and_still_the_reference(
    model: Embedder, checkpoint: Path
) -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (600, 420, 3), np.uint8))
    reference = Reference(checkpoint, "retrieval")
    few, many = 28 * 28 * 16, 28 * 28 * 200
    for pixels in (few, many):
        single, multi = reference.images([picture], max_pixels=pixels)
        options: dict[str, Any] = {"task": "retrieval", "max_pixels": pixels}
        assert cosines(model.encode_image([picture], **options), single).min() >= 0.99999
        rows = model.encode_image([picture], **options, multi_vector=True)
        assert rows[0].shape == multi[0].shape


# -- every adapter tensor counts ----------------------------------------------------------------------
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_leaving_out_one_kind_of_adapter_breaks_parity(
    model: Embedder, checkpoint: Path, kind: str
) -> None:
    reference = Reference(checkpoint, "retrieval", without=(kind,))
    texts = cosines(model.encode(TEXTS, task="retrieval"), reference.texts(TEXTS, "Query: ")[0])
    pictures = model.encode_image(IMAGES[:4], task="retrieval")
    assert texts.max() < 0.9999
    assert cosines(pictures, reference.images(IMAGES[:4])[0]).max() < 0.9999


def test_leaving_out_the_projectors_adapter_breaks_multi_vectors(
    model: Embedder, checkpoint: Path
) -> None:
    reference = Reference(checkpoint, "retrieval", without=("multi_vector_projector",))
    single, multi = reference.texts(TEXTS, "Query: ")
    assert cosines(model.encode(TEXTS, task="retrieval"), single).min() >= 0.99999
    rows = model.encode(TEXTS, task="retrieval", multi_vector=True)
    assert all(
        cosines(found, other).max() < 0.9999 for found, other in zip(rows, multi, strict=True)
    )


def test_tasks_differ(model: Embedder) -> None:
    vectors = [model.encode(TEXTS, task=task) for task in TASKS]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert cosines(vectors[first], vectors[second]).max() < 0.999


# -- layouts ------------------------------------------------------------------------------------------
def test_the_new_key_prefix_gives_the_same_vectors(model: Embedder, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "new", layout="new")
    out = export_bundle(source, precisions=["fp32"], out=tmp_path / "bundle", calibration="none")
    other = Embedder(out, precision="fp32")
    for task in TASKS:
        assert np.array_equal(other.encode(TEXTS, task=task), model.encode(TEXTS, task=task))


def test_a_merged_model_for_vllm_is_one_task_without_multi_vectors(
    model: Embedder, tmp_path: Path
) -> None:
    name = "jina-embeddings-v4-vllm-code"
    source = write_checkpoint(tmp_path / name, layout="premerged", task="code")
    out = export_bundle(source, precisions=["fp32"], out=tmp_path / "bundle", calibration="none")
    other = Embedder(out, precision="fp32")
    assert other.tasks == ("code",)
    # merged in float32 and stored in bfloat16, so equal only to bfloat16's rounding
    vectors = other.encode(TEXTS, prompt_name="passage")
    assert cosines(vectors, Reference(source).texts(TEXTS, "Passage: ")[0]).min() >= 0.99999
    assert cosines(vectors, model.encode(TEXTS, task="code", prompt_name="passage")).min() > 0.99
    pictures = other.encode_image(IMAGES[:3])
    assert cosines(pictures, Reference(source).images(IMAGES[:3])[0]).min() >= 0.99999
    with pytest.raises(EmbedgeValueError, match="multi-vector"):
        other.encode(TEXTS, multi_vector=True)


@pytest.mark.slow
@pytest.mark.parametrize("headed", [True, False], ids=["with a head", "without"])
def test_plain_qwen_as_the_running_transformers_saves_it(headed: bool, tmp_path: Path) -> None:
    """Without a head transformers 5 begins names with ``language_model`` and 4 with ``model``."""
    source = write_checkpoint(tmp_path / "qwen", layout="plain")
    names = ("Model", "ForConditionalGeneration")
    kind = getattr(transformers, f"Qwen2_5_VL{names[headed]}")
    folder = tmp_path / "saved"
    kind.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
    for file in [*source.glob("*token*"), *source.glob("*processor*"), *source.glob("vocab*")]:
        shutil.copy(file, folder)
    out = tmp_path / "bundle"
    export_bundle(
        folder,
        adapters={"t": None},
        pooling="mean",
        precisions=["fp32"],
        out=out,
        calibration="none",
    )
    found, reference = Embedder(out, precision="fp32", threads=1), Reference(source)
    assert cosines(found.encode(TEXTS), reference.texts(TEXTS)[0]).min() >= 0.999999
    vectors = found.encode_image(IMAGES[:4])
    assert cosines(vectors, reference.images(IMAGES[:4])[0]).min() >= 0.99999


def test_plain_qwen_with_an_adapter_of_ones_own(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "qwen", layout="plain")
    adapters = {task: adapter_folder(source, task) for task in ("retrieval", "code")}
    out = export_bundle(
        source,
        adapters=adapters,
        precisions=["fp32"],
        out=tmp_path / "bundle",
        calibration="none",
        pooling="mean",
    )
    model = Embedder(out, precision="fp32")
    for task, folder in adapters.items():
        reference = Reference(source, adapter=folder)
        single = reference.texts(TEXTS)[0]
        assert cosines(model.encode(TEXTS, task=task), single).min() >= 0.99999
        pictures = model.encode_image(IMAGES[:4], task=task)
        assert cosines(pictures, reference.images(IMAGES[:4])[0]).min() >= 0.99999


def test_one_task_of_the_published_adapter_file(checkpoint: Path, tmp_path: Path) -> None:
    out = export_bundle(
        checkpoint,
        adapters={"code": checkpoint / "adapters"},
        precisions=["fp32"],
        out=tmp_path / "bundle",
        modality="text",
        calibration="none",
    )
    assert not list(out.rglob("vision*"))
    only = Embedder(out, precision="fp32")
    single, multi = Reference(checkpoint, "code").texts(TEXTS, "Query: ")
    assert cosines(only.encode(TEXTS), single).min() >= 0.99999
    rows = only.encode(TEXTS, multi_vector=True)
    assert all(cosines(a, b).min() >= 0.9999 for a, b in zip(rows, multi, strict=True))
    with pytest.raises(EmbedgeValueError, match="no vision tower"):
        only.encode_image(IMAGES[0])


def test_tasks_share_the_vision_tower_and_the_token_table(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["precisions"]["fp32"]["vision"] == "fp32/vision.onnx"
    assert [p.name for p in bundle.rglob("vision*.bin")] == ["vision.bin"]
    table = SHORT.vocabulary * SHORT.hidden * 4
    sizes = {p.name: p.stat().st_size for p in (bundle / "fp32").glob("*.bin")}
    assert sizes["shared.bin"] >= table
    for task in TASKS:
        graph = onnx.load(bundle / "fp32" / f"{task}.onnx", load_external_data=False).graph
        [found] = [t for t in graph.initializer if list(t.dims) == [SHORT.vocabulary, SHORT.hidden]]
        assert {e.key: e.value for e in found.external_data}["location"] == "shared.bin"
    assert manifest["model"]["matryoshka_dims"] == [16, 32, 64]


# -- precisions ---------------------------------------------------------------------------------------


FLOORS = {
    "int8": (0.97, 0.93, 0.9),
    "int4": (0.7, 0.7, 0.5),
}  # texts, images, rows of multi-vectors


@pytest.mark.parametrize("precision", FLOORS)
def test_small_precisions_stay_near(
    precision: str, checkpoint: Path, model: Embedder, tmp_path: Path
) -> None:
    """Random weights with outlier channels at a width of 64: a floor, not what real models lose."""
    texts, images, rows = FLOORS[precision]
    out = export_bundle(
        checkpoint,
        adapters={"code": checkpoint / "adapters"},
        precisions=[precision],
        out=tmp_path / "bundle",
    )
    small = Embedder(out, precision=precision)
    assert cosines(small.encode(TEXTS), model.encode(TEXTS, task="code")).mean() >= texts
    pictures = small.encode_image(IMAGES)
    assert cosines(pictures, model.encode_image(IMAGES, task="code")).mean() >= images
    alone = np.stack([small.encode_image(picture) for picture in IMAGES])
    assert cosines(alone, pictures).min() >= 0.999999
    pairs = zip(
        small.encode(TEXTS, multi_vector=True),
        model.encode(TEXTS, task="code", multi_vector=True),
        strict=True,
    )
    assert np.mean([cosines(a, b).mean() for a, b in pairs]) >= rows


# -- what does not fit --------------------------------------------------------------------------------


def broken(checkpoint: Path, tmp_path: Path) -> tuple[Path, dict[str, Floats]]:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    import torch
    from safetensors.torch import load_file as load

    tensors = load(copy / "adapters/adapter_model.safetensors")
    return copy, {k: v.to(torch.float32).numpy() for k, v in tensors.items()}


def test_an_adapter_tensor_that_one_task_lacks_is_listed(checkpoint: Path, tmp_path: Path) -> None:
    copy, tensors = broken(checkpoint, tmp_path)
    key = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.code.weight"
    del tensors[key]
    save_file(tensors, copy / "adapters/adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj\.lora_B.* code has none"):
        export_bundle(copy, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_tensor_without_a_place_is_listed(checkpoint: Path, tmp_path: Path) -> None:
    copy, tensors = broken(checkpoint, tmp_path)
    for task in TASKS:
        for factor in "AB":
            name = f"lora_{factor}.{task}.weight"
            inside = f"base_model.model.model.language_model.layers.0.mlp.up_proj.{name}"
            tensors[f"base_model.model.model.language_model.layers.9.mlp.up_proj.{name}"] = tensors[
                inside
            ]
    save_file(tensors, copy / "adapters/adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"layers\.9\.mlp\.up_proj.*finds no tensor"):
        export_bundle(copy, out=tmp_path / "out")


def test_an_adapter_that_changes_the_vision_tower_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "qwen", layout="plain")
    folder = adapter_folder(source, "code")
    import torch
    from safetensors.torch import load_file as load

    tensors = {
        k: v.to(torch.float32).numpy()
        for k, v in load(folder / "adapter_model.safetensors").items()
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = [*PROJECTIONS, "attn.proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    rank = config["r"]
    path = "base_model.model.model.visual.blocks.0.attn.proj"
    tensors[f"{path}.lora_A.weight"] = np.ones((rank, 64), np.float32)
    tensors[f"{path}.lora_B.weight"] = np.ones((64, rank), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"vision tower.*visual\.blocks\.0\.attn\.proj"):
        export_bundle(source, adapters={"code": folder}, out=tmp_path / "out", pooling="mean")
    with pytest.warns(UserWarning, match="left out what no vector depends on: visual"):
        export_bundle(
            source,
            adapters={"code": folder},
            modality="text",
            pooling="mean",
            precisions=["fp32"],
            calibration="none",
            out=tmp_path / "texts",
        )


def test_without_its_preprocessor_only_texts_can_be_exported(
    checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json.*modality"):
        export_bundle(copy, out=tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    ["visual.blocks.0.attn.qkv.bias", "visual.merger.mlp.2.bias", "multi_vector_projector.bias"],
)
def test_a_missing_bias_is_refused_by_name(name: str, checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    for file in copy.glob("*.safetensors"):
        kept = {key: value for key, value in st.load_file(file).items() if key != name}
        st.save_file(kept, file, metadata={"format": "pt"})
    for index in copy.glob("*.index.json"):
        content = json.loads(index.read_text())
        content["weight_map"].pop(name, None)
        index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{name}: expected this tensor"):
        export_bundle(copy, precisions=["fp32"], out=tmp_path / "out", calibration="none")


def test_remote_code_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    for file in copy.glob("*.py"):
        file.write_text("raise SystemExit('remote code ran')\n")
    assert list(copy.glob("*.py"))
    out = export_bundle(copy, precisions=["fp32"], out=tmp_path / "out", calibration="none")
    assert not list(out.rglob("*.py"))


def test_what_no_file_says_is_named(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "qwen", layout="plain")
    with pytest.warns(EmbedgeWarning, match="name its folder as it is published"):
        export_bundle(
            source,
            adapters={"t": None},
            precisions=["fp32"],
            out=tmp_path / "bundle",
            modality="text",
        )


def test_a_merged_model_is_known_by_its_cards_name(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", layout="premerged")
    (source / "README.md").write_text("# jina-embeddings-v4-vllm-retrieval\n")
    out = export_bundle(source, precisions=["fp32"], out=tmp_path / "bundle", modality="text")
    assert Embedder(out, precision="fp32").tasks == ("retrieval",)


def test_image_settings_may_lie_in_processor_config(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", layout="plain")
    file = source / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    options: dict[str, Any] = {"adapters": {"t": None}, "precisions": ["fp32"], "pooling": "mean"}
    before = export_bundle(source, out=tmp_path / "before", **options)
    file.unlink()
    (source / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    after = export_bundle(source, out=tmp_path / "after", **options)
    images = [
        json.loads((b / "manifest.json").read_text())["model"]["image"] for b in (before, after)
    ]
    assert images[0] == images[1]
