"""Tests import the scripts of the folder above and use one thread each: the models here are too small for two. And what several of
them use."""

import itertools
import json
import os
import re
import subprocess
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


def call_distill(*options, ranks=1, cwd=None, **environment):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "distill.py"), *map(str, options)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300, env=os.environ | environment)


def distill_works(*options, **kwargs):
    done = call_distill(*options, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_problems(path, problems):
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path
