"""Texts of many scripts, code, spaces, emoji, marks and digits, the same ones in every run."""

import random
from collections.abc import Callable, Sequence
from functools import partial

WORDS = """\
the don't I'LL WE'RE naïve Ünïcödé ŠKODA straße Überraschung œuvre camelCase HTTPServer snake_case __init__ Привет мир
ЁЛКА Ελληνικά ΩΜΕΓΑ Հայերեն ქართული עברית שָׁלוֹם العربية مرحبًا हिन्दी नमस्ते தமிழ் বাংলা ไทย ภาษาไทย ລາວ ខ្មែរ 中文 漢字かな
カタカナ 日本語 한국어 대한민국 ᄒᆞᆫ 𝔘𝔫𝔦 𓀀𓂀 አማርኛ ᏣᎳᎩ монгол Tiếng Việt"""
SYMBOLS = """\
... !? (x) [y] {z} <a> </b> a+b==c != <= => -> // /* */ # $ % & @ ~ ` ^ | \\ «q» “q” ‘q’ … — – • © ® ™ € £ ¥ ° ± × ÷ √ ∑
∫ ≈ ≠ ∞ ← → ⇒ ✓ ★ ½ ² ³ ₁ Ⅳ ٣ ४ ５ ① ㊗"""
EMOJI = "😀 👍🏽 👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇩🇪 ❤️ 🤷🏿\u200d♂️ 1️⃣ ☎️ 🫠"
MARKS = "e\u0301 n\u0303 a\u0308\u0304 o\u0302\u0323 \u0301 Z̸̡͝ क्षि \u1112\u1161\u11ab"
SPACES = [*" \t\n\u00a0\u3000\u200b\u2003", "  ", "   ", "\n\n", " \n", "\r\n", "\n    ", "    \t"]
ODD = [*"\x00\x07\x7f\u0085\u2028\ufeff\ufffd\ue000\U0010fffd\u00ad", "▁", "▁▁", "Ġ", "<0x0A>"]
CODE = [
    "def f(x: int) -> str:\n    return f'{x!r}'  # two\n",
    'for (int i = 0; i < 10; ++i) {\n\tputs("ok");\n}\n',
    "SELECT * FROM t WHERE a >= 1.5e-3 AND b <> 'it''s';",
    '<div class="x">&nbsp;</div>\n',
    "x = {'a': [1, 2, 3], \"b\": None}\n\n\n",
    "https://example.org/a_b?c=d&e=%20#f",
]


def many_texts(num: int, special: Sequence[str] = (), seed: int = 0) -> list[str]:
    """``num`` texts of up to a dozen parts; some of the parts are ``special``."""
    rng = random.Random(seed)
    words, symbols, emoji, marks = WORDS.split(), SYMBOLS.split(), EMOJI.split(), MARKS.split()
    kinds: list[Callable[[], str]] = [
        *(
            partial(rng.choice, parts)
            for parts in (words, words, words, symbols, emoji, SPACES, SPACES, marks, ODD, CODE)
        ),
        lambda: "".join(rng.choices("0123456789", k=rng.randint(1, 12))),
        lambda: rng.choice(SPACES) * rng.randint(1, 9),
        lambda: "'" + rng.choice(["s", "T", "re", "VE", "m", "LL", "d", "x"]),
        lambda: "".join(chr(rng.randint(0x20, 0x7E)) for _ in range(rng.randint(1, 8))),
    ]
    if special:
        kinds += [partial(rng.choice, special)] * 2
    return ["".join(rng.choice(kinds)() + rng.choice(["", " "]) for _ in range(rng.randint(1, 12))) for _ in range(num)]
