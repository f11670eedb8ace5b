"""Texts on which tokenizers come apart: many scripts, marks, spaces, specials, all lengths."""

from __future__ import annotations

import numpy as np

__all__ = ["hard_texts"]

_FIXED = [
    "",
    " ",
    "  \t\n\r ",
    "a",
    "Hello world",
    "Don't we'll I'M you'RE",
    "naïve café Ångström Ünïcödé e\u0301 o\u0308\u0323",
    "ΣΑΣ ΟΔΟΣ Σ ΑΣ, İstanbul DİYARBAKIR ıI ẞß ŉ ǰ ﬁ",
    "日本語のテキスト、混在 with English。漢字𠀀𠀋㐀㊀ｶﾀｶﾅ ｆｕｌｌ",
    "中文分词：我爱北京天安门！",
    "한국어 텍스트 한",
    "हिन्दी क्षत्रिय ภาษาไทย မြန်မာ தமிழ் తెలుగు",
    "العربية النَّصّ עברית נִקּוּד",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 👍🏽 ❤️ ☃︎",
    "½ ² ³ ① Ⅷ ٣ ३ 𝟛 ௧ 12345 1,234.5 0x1F 1e-9",
    "\u00a0\u2003\u3000\u200b\u200d\ufeff\u2028\u2029\u0085x\u00ady\u202az",
    "a\u0000b\u0001c\u007fd\u009fe\ufffdf\ue000g",
    "[CLS] text [SEP] [MASK] [PAD] [UNK] <s> </s> <mask> <pad> <unk>  <mask> x<mask>y",
    "<|endoftext|> <|im_start|>user\nhi<|im_end|> |||IP_ADDRESS|||",
    "snake_case camelCase kebab-case path/to/file.py http://a.b/c?d=e&f=%20#g @user #tag",
    "def f(x):\n    return {'a': [x ** 2 for x in range(10)]}  # comment\n\n\n\tend",
    "“quotes” ‘single’ «guillemets» — – - … ‽ ¿¡ § † ‰ € £ ¥ ₿ © ™",
    "$1 $$ $& \\1 \\n ^x$ (a|b)* ~`+=<>^|",
    "▁ ▁▁ a▁b ▁start",
    "trailing space ",
    "   leading",
    "new\r\nline\rtwo\u2029three",
    "x" * 300,
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "word " * 1000,
    "long " * 255 + "tail",
    "\U0001d54f\U0001d550 \U00010348 \U0001f9ff \U000e0041",
    "A\u030a ﷺ ㎏ ℌ ﬀ Ǆ ſ K Å",
    "query: what is this? passage: that",
]
# first, last: scripts, marks, punctuation, spaces, emoji and ideographs above U+FFFF
_RANGES = [
    (0x20, 0x7E),
    (0x20, 0x7E),
    (0xA0, 0x24F),
    (0x300, 0x36F),
    (0x370, 0x3FF),
    (0x400, 0x4FF),
    (0x5D0, 0x5EA),
    (0x621, 0x652),
    (0x905, 0x94D),
    (0xE01, 0xE4E),
    (0x1100, 0x11FF),
    (0x1E00, 0x1FFC),
    (0x2000, 0x206F),
    (0x20A0, 0x20BF),
    (0x2100, 0x218B),
    (0x2460, 0x24FF),
    (0x3000, 0x30FF),
    (0x3200, 0x32FE),
    (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3),
    (0xF900, 0xFAFF),
    (0xFB00, 0xFB4F),
    (0xFE00, 0xFE0F),
    (0xFF01, 0xFFEE),
    (0x1D400, 0x1D7FF),
    (0x1F300, 0x1F64F),
    (0x20000, 0x2A6DF),
    (0x2F800, 0x2FA1D),
]


def hard_texts(count: int, seed: int = 3) -> list[str]:
    """The fixed ones, and as many random ones as make ``count``, of words of one script each."""
    generator = np.random.default_rng(seed)
    texts = list(_FIXED)
    while len(texts) < count:
        words = []
        for _ in range(int(generator.integers(1, 12))):
            ranges = [_RANGES[i] for i in generator.integers(0, len(_RANGES), 2)]
            first, last = ranges[0]
            points = generator.integers(first, last + 1, int(generator.integers(1, 9)))
            mark = generator.integers(ranges[1][0], ranges[1][1] + 1)
            words.append(
                "".join(map(chr, [*points, *([int(mark)] if generator.random() < 0.3 else [])]))
            )
        texts.append([" ", "", "  ", "\n"][int(generator.integers(0, 4))].join(words))
    return texts
