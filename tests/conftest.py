"""Tests import the scripts of the folder above and use one thread each: the models here are too small for two. And text to test with."""

import itertools
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe qui ro su ta ve wi xo yu za".split()
WORDS = ["".join(p) for p in itertools.product(SYLLABLES, repeat=2)]


def prose(rng, n_words):
    """Paragraphs of invented words."""
    words = rng.choices(WORDS, k=n_words)
    return "\n\n".join(" ".join(words[i : i + 60]).capitalize() + "." for i in range(0, n_words, 60)) + "\n"


def random_text(rng, n=200):
    alphabet = ["a", "B", "ß", "é", "e\u0301", "漢", "字", "😀", "ا", "ᄒ", "0", "7", "²", "½", " ", "  ", "\n", "\n\n", "\t", "\r\n",
                "\u3000", "'s", "'LL", "<|", "|>", ".", "--", "_", "\x00", "\x7f", "\ufffd", "<|im_end|>"]
    return "".join(rng.choices(alphabet, k=n))


def slow_shingles(text, size):
    """The definition: runs of `size` words, lower case, separated by white space and the marks of prose."""
    words = re.findall(r"[^\s.,;:!?'\"`()\[\]{}\x00-\x20]+", text.lower())
    return [tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))] if words else []
