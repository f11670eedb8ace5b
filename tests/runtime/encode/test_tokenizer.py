from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embedge.runtime import BundleError
from embedge.runtime.bundle.manifest import TokenizerSettings
from embedge.runtime.encode.tokenizer import TextTokenizer, without_surrogates


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("plain", "plain"),
        ("naïve 🙂", "naïve 🙂"),
        ("a\ud800b", "a\ufffdb"),
        ("\udc00a", "\ufffda"),
        ("a\ud800", "a\ufffd"),
        ("\ud83d\ude42", "🙂"),
        ("\ud800\ud83d\ude42", "\ufffd🙂"),
        ("\x00", "\x00"),
        ("", ""),
    ],
    ids=ascii,
)
def test_lone_surrogates_become_replacement_characters_and_pairs_are_joined(
    text: str, clean: str
) -> None:
    assert without_surrogates(text) == clean


def load(file: Path, content: Any) -> TextTokenizer:
    file.write_text(json.dumps(content))
    settings = TokenizerSettings(file="t.json", pad_token_id=0, append_eos_token_id=None)
    return TextTokenizer(file, settings, 16)


@pytest.mark.slow
def test_a_panic_of_the_tokenizer_is_a_bundle_error(bundle: Any, tmp_path: Path) -> None:
    content = json.loads((bundle.path / "tokenizer.json").read_text())
    del content["post_processor"]["special_tokens"]["[CLS]"]
    with pytest.raises(
        BundleError, match=r"t\.json: not a tokenizer that cuts at 16 tokens"
    ) as caught:
        load(tmp_path / "t.json", content)
    assert not isinstance(caught.value.__cause__, Exception)


def test_a_tokenizer_that_fails_on_a_text_is_a_bundle_error(bundle: Any, tmp_path: Path) -> None:
    content = json.loads((bundle.path / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = content["model"]["vocab"].pop("[UNK]")
    tokenizer = load(tmp_path / "t.json", content)
    assert len(tokenizer(["w1"])) == 1
    with pytest.raises(BundleError, match=r"t\.json: the tokenizer failed on 'strange': .*UNK"):
        tokenizer(["strange"])
    with pytest.raises(BundleError, match=r"t\.json: the tokenizer failed on one of 2 texts"):
        tokenizer(["w1", "strange"])


def test_interrupts_go_through(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def encode_batch_fast(self, texts: list[str]) -> None:
            raise KeyboardInterrupt

    tokenizer = load(
        bundle.path / "t.json", json.loads((bundle.path / "tokenizer.json").read_text())
    )
    monkeypatch.setattr(tokenizer, "_tokenizer", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer(["w1"])
