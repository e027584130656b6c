"""Tests import the scripts of the folder above and use one thread each: the models here are too small for two. And what several of
them use."""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What a user may have set and the tests should not meet: a key that a failure would print, a proxy before this machine's own servers, a
# font cache that cannot be written, an old driver's warning.
for name in ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"
os.environ.setdefault("PYTHONWARNINGS", "ignore:CUDA initialization")
if not os.access(Path.home(), os.W_OK):
    os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp()
HERE = ("--standalone", "--local-addr=127.0.0.1")  # of torchrun: a host's name need not resolve

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
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *HERE] if ranks > 1 else []
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


SIZES = ["--n_layer=2", "--d_model=32", "--d_ff=48", "--head_dim=8", "--global_every=2", "--window=8"]
SHORT = [*SIZES, "--seq_len=32", "--batch_size=4", "--eval_tokens=512", "--log_interval=5", "--device=cpu"]


def call(script, *options, ranks=1, cwd=ROOT, **kwargs):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *HERE] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, options)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300, **kwargs)


def fails(script, *options, match, **kwargs):
    """The script ends with exit code 2 and this one line."""
    done = call(script, *options, **kwargs)
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.endswith("parameters, phase 3")]  # sample.py says first what it loaded
    assert len(errors) == 1 and errors[0].startswith("error: ") and match in errors[0], done.stderr


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Prepared data of invented words."""
    import numpy as np  # not above: it looks at the number of threads

    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), rng.integers(2, 7))) for _ in range(300)]
    lines = [" ".join(words[i] for i in rng.zipf(1.5, 12) % 300).capitalize() + "." for _ in range(1500)]
    (folder / "text.txt").write_text("\n".join(lines))
    done = call("prepare.py", folder / "text.txt", f"--out={folder / 'text'}", "--vocab_size=400")
    assert done.returncode == 0, done.stderr
    return folder / "text"


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """A Flow's run of all three phases."""
    out = tmp_path_factory.mktemp("run") / "flow"
    done = call("train.py", f"--data={data}", f"--out={out}", "--steps=20", "--eval_interval=10", *SHORT)
    assert done.returncode == 0, done.stderr
    return out


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def make(*args, out):
    """prepare.py in this process, with a small vocabulary unless one is given; what meta.json says."""
    import prepare

    prepare.main([*map(str, args), f"--out={out}", *([] if "--vocab_size" in str(args) else ["--vocab_size=300"])])
    return prepare.load_meta(out)


def tokens(folder, phase, split):
    import numpy as np  # not above: it looks at the number of threads

    import prepare

    return np.concatenate([prepare.read_shard(path)[1] for path in prepare.shard_paths(folder, phase, split)])


def documents(folder, phase, split):
    """The documents in the shards, as text."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    ids = tokens(folder, phase, split)
    assert ids[-1] == 0
    parts = np.split(ids, np.flatnonzero(ids == 0) + 1)[:-1]
    return [tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts]


@pytest.fixture
def one_process(monkeypatch, tmp_path):
    """Without worker processes unless a test asks for them, and in a folder of its own."""
    import prepare

    monkeypatch.setattr(prepare, "WORKERS", 1)
    monkeypatch.chdir(tmp_path)
