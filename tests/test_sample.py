"""sample.py as a user runs it: text, conversations, prompts from files, and what bad input gets."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, call, fails
from tokenizers import Tokenizer

import prepare
import sample
from checkpoint import save_checkpoint
from model import Flow, FlowConfig
from sample import text_ids


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A Flow of random weights that reads 100 tokens, so its text is random bytes."""
    tokenizer = prepare.train_tokenizer(["the cat sat on the mat\n" * 3], 280)
    config = FlowConfig(vocab_size=tokenizer.get_vocab_size(), n_layer=1, n_head=2, n_kv_head=1, d_model=16, head_dim=8, d_ff=16,
                        global_every=1, max_seq_len=100)  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "phase1.pt"
    checkpoint = {"model": "flow", "config": asdict(config), "weights": Flow(config).state_dict(), "tokenizer": tokenizer.to_str()}
    save_checkpoint(path, checkpoint | {"phase": 1, "step": 1})
    return path


def sampled(ckpt, *options, text=b"", encoding="utf-8:strict"):  # as in most locales, while pytest's own may be lenient
    command = [sys.executable, ROOT / "sample.py", f"--ckpt={ckpt}", *options]
    done = subprocess.run(command, input=text, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding})
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_streamed_pieces_are_the_text():
    """Whatever the bytes, no piece ends within a character that later ones complete."""
    tokenizer = prepare.train_tokenizer(["the cat sat on the mat\n" * 3], 280)
    text = "né 漢字 😀 the cat"
    ids = prepare.plain_ids(tokenizer, text)
    pieces = list(sample.stream(tokenizer, iter(ids)))
    assert "".join(pieces) == text and "😀" in pieces and len(pieces) > 5 and "\ufffd" not in "".join(pieces)
    broken = [i for i in ids for i in (i, 4 + i * 7 % 200)]
    for part in [tokens[:n] for tokens in (ids, broken) for n in range(len(tokens))]:  # many end inside a character
        assert "".join(sample.stream(tokenizer, iter(part))) == tokenizer.decode(part)


def test_a_conversation_forgets_its_oldest_turns_only_when_it_must(ckpt):
    questions = ["a" * 10, "b" * 300, "c" * 10, "caf\udce9", "d" * 25]
    text = "\n".join(questions).encode(errors="surrogateescape")
    code, out, err = sampled(ckpt, "--chat", "--max_new_tokens=4", text=text)
    lines = [line for line in err.splitlines() if "tokens/s]" not in line][2:]  # after the model and the greeting
    assert code == 0 and len(lines) == 3
    assert lines[0].startswith("error: the prompt has 3") and lines[0].endswith("the model reads 100 in all: shorten it")
    assert lines[1].startswith("error: ") and lines[1].endswith("is not UTF-8 text: convert it first")
    assert lines[2] == "[the oldest 1 of the turns no longer fit and are forgotten]"
    assert err.count("tokens/s]") == 3, "a refused question costs nothing but its own answer"


def test_text_that_the_terminal_cannot_show_is_escaped(ckpt):
    code, out, _ = sampled(ckpt, "--prompt=caf\u00e9 \u6f22", "--max_new_tokens=2", "--temperature=0", encoding="ascii:strict")
    assert code == 0 and out.startswith(r"caf\xe9 \u6f22")


def test_prompts_from_a_file(ckpt, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffthe cat\r\n\n  \nthe\u2028mat\n".encode())
    options = [f"--prompts_file={tmp_path / 'prompts.txt'}", f"--output={tmp_path / 'out.jsonl'}", "--max_new_tokens=200", "--seed=3"]
    code, _, err = sampled(ckpt, *options)
    assert code == 0 and err.count("stopping at") == 1
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [answer["prompt"] for answer in answers] == ["the cat", "the\u2028mat"]


def test_eight_bit_weights_write_text(ckpt):
    code, out, err = sampled(ckpt, "--int8", "--device=cpu", "--prompt=the cat", "--max_new_tokens=8", "--temperature=0")
    assert code == 0 and out.startswith("the cat") and "[8 tokens, " in err


def test_streams_that_are_closed(finished):
    for closing in ("<&-", ">&-", "2>&-"):
        command = f"'{sys.executable}' sample.py --ckpt='{finished}' --max_new_tokens=3 --chat --device=cpu {closing}"
        done = subprocess.run(command, shell=True, cwd=ROOT, input="Hi\n", capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "Traceback" not in done.stderr, (closing, done.stderr)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--temperature=nan"], "--temperature=nan is out of range: expected 0 (greedy) or 0.01 to 100"),
        (["--temperature=1e-40"], "--temperature=1e-40 is out of range"),
        (["--top_p=nan"], "--top_p=nan must be above 0 and at most 1"),
        (["--seed=-1"], "--seed=-1 must be at least 0"),
        ([f"--seed={2**63}"], f"--seed={2**63} must be"),
        (["--prompt=" + "x" * 500], "the prompt has 501 tokens, the model reads 100 in all: shorten it"),
        (["--prompt=" + "x" * 500, "--num_samples=2"], "the prompt has 501 tokens"),
        (["--int8", "--prompt=the", "--energy"], "--int8 is for text from a Flow on a CPU"),
        ([b"--prompt=caf\xe9"], "'caf\\udce9' is not UTF-8 text: convert it first"),
    ],
)
def test_bad_input(ckpt, options, message):
    code, out, err = sampled(ckpt, *options)
    lines = [line for line in err.splitlines() if not line.endswith("parameters, phase 1")]
    assert code == 2 and out == "" and len(lines) == 1 and lines[0].startswith(f"error: {message}")


# ---- with a trained model ----


def test_sampling_reproduces_and_streams(finished):
    def text(*options):
        done = call("sample.py", f"--ckpt={finished}", "--max_new_tokens=40", *options)
        assert done.returncode == 0 and "tokens/s]" in done.stderr, done.stderr
        return done.stdout

    assert text("--prompt=Abc", "--seed=1") == text("--prompt=Abc", "--seed=1") != text("--prompt=Abc", "--seed=2")
    assert text("--prompt=Abc").startswith("Abc")
    several = text("--num_samples=3", "--seed=1").split("\n---\n")
    assert len(several) == 4 and len(set(several[:3])) == 3
    assert text("--temperature=0", "--top_k=5", "--top_p=0.5") == text("--temperature=0", "--seed=9")


def test_a_file_of_prompts(finished, tmp_path):
    (tmp_path / "questions.txt").write_text("Abc\n\nA much longer line of the prompts file.\nAbc\n")
    options = [
        f"--ckpt={finished}",
        f"--prompts_file={tmp_path / 'questions.txt'}",
        f"--output={tmp_path / 'answers.jsonl'}",
        "--temperature=0",
    ]
    assert call("sample.py", *options, "--max_new_tokens=20", "--batch_size=2").returncode == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [a["prompt"] for a in answers] == ["Abc", "A much longer line of the prompts file.", "Abc"]
    alone = call("sample.py", f"--ckpt={finished}", "--prompt=Abc", "--temperature=0", "--max_new_tokens=20").stdout
    assert answers[0] == answers[2] and "Abc" + answers[0]["completion"] == alone[:-1]
    fails("sample.py", *options, match="answers.jsonl exists")


def test_chat_keeps_to_the_window(finished):
    turns = "\n".join(["Abc def?"] * 30)
    done = call("sample.py", f"--ckpt={finished}", "--chat", "--max_new_tokens=100", input=turns)
    assert done.returncode == 0 and done.stderr.count("tokens/s]") == 30 and "no longer fit" in done.stderr


def test_prompts_begin_a_document_and_cannot_smuggle_special_tokens():
    tokenizer = Tokenizer.from_str(prepare.train_tokenizer(["some text <|im_end|>"], 300).to_str())
    ids = text_ids(tokenizer, "hi <|im_end|>")
    assert ids[0] == 0 and not {0, 1, 2, 3} & set(ids[1:])


@pytest.mark.parametrize(
    "options, match",
    [
        (["--temperature=-1"], "--temperature=-1.0 cannot be negative"),
        (["--top_p=2"], "--top_p=2.0 must be above 0"),
        (["--prompts_file=x"], "go together"),
        (["--ckpt=nowhere.pt"], "holds no checkpoint yet"),
        (["--prompt=" + "word " * 3000], "the prompt has"),
    ],
)
def test_bad_options_of_sample(finished, options, match):
    fails("sample.py", f"--ckpt={finished}", *options, match=match)
