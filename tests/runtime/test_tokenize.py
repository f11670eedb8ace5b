from __future__ import annotations

import pytest

from embedge.runtime._tokenize import without_surrogates


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
