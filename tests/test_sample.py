"""sample.py as a user runs it: text, conversations, prompts from files, and what bad input gets."""

import contextlib
import io
import json
import os
import pty
import random
import signal
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
from model import Flow, FlowConfig, generate
from sample import text_ids
from scripts import InputError


def random_weights(path, max_seq_len, only_ascii=False):
    tokenizer = prepare.train_tokenizer(["the cat sat on the mat\n" * 3], 280)
    config = FlowConfig(vocab_size=tokenizer.get_vocab_size(), n_layer=1, n_head=2, n_kv_head=1, d_model=16, head_dim=8, d_ff=16,
                        global_every=1, max_seq_len=max_seq_len)  # fmt: skip
    torch.manual_seed(0)
    weights = Flow(config).state_dict()
    if only_ascii:  # a logit of 0 is never the largest, so that at temperature 0 no answer ends and all of it is there to be read at once
        rest = [i for i in range(config.vocab_size) if not tokenizer.decode([i]) or not tokenizer.decode([i]).isascii()]
        weights["token_embedding.weight"][rest] = weights["lm_head.weight"][rest] = 0
    checkpoint = {"model": "flow", "config": asdict(config), "weights": weights, "tokenizer": tokenizer.to_str()}
    save_checkpoint(path, checkpoint | {"phase": 1, "step": 1})
    return path


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A Flow of random weights that reads 100 tokens, so its text is random bytes."""
    return random_weights(tmp_path_factory.mktemp("run") / "phase1.pt", 100)


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


def up_to_a_stop(text, stops):
    """The definition, a character at a time: what stands before the first stop string that is there in full, the longest of equals."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


def test_text_ends_before_a_stop_string_of_which_nothing_was_printed():
    tokenizer, rng, stopped = prepare.train_tokenizer(["abab caca baba\n" * 3], 270), random.Random(0), 0
    for _ in range(400):
        text = "".join(rng.choices("aabbc é漢", k=12))
        stops = ["".join(rng.choices("aabbc é漢", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        ids, expected, printed = prepare.plain_ids(tokenizer, text), up_to_a_stop(text, stops), ""
        writing = sample.Writing(tokenizer, stops)
        for n, token in enumerate(ids, 1):
            printed += writing.add(token)
            if writing.ended:
                break
            held = tokenizer.decode(ids[:n]).rstrip("\ufffd")[len(printed) :]
            assert any(stop.startswith(held) and stop != held for stop in stops), "only what may be the beginning of one waits"
        assert printed + writing.rest() == expected == "".join(sample.stream(tokenizer, iter(ids), stops))
        assert writing.ended == (expected != text) and expected.startswith(printed)
        stopped += writing.ended
    assert 100 < stopped < 300
    half = prepare.plain_ids(tokenizer, "é")[:1]  # a character without its end is text too when no more tokens come
    assert list(sample.stream(tokenizer, iter(half), ["x"])) == ["\ufffd"] and not list(sample.stream(tokenizer, iter(half), ["\ufffd"]))


def written(capsys, ckpt, *options):
    """stdout and stderr of sample.py in this process, at temperature 0."""
    sample.main([f"--ckpt={ckpt}", "--device=cpu", "--temperature=0", "--max_new_tokens=60", *options])
    return capsys.readouterr()


def spy(monkeypatch):
    """[(prompts, options, tokens of each step)] of every call of generate()."""
    calls = []

    def watched(model, prompts, new, **options):
        calls.append((prompts, options, []))
        for step in generate(model, prompts, new, **options):
            calls[-1][2].append(step.tolist())
            yield step

    monkeypatch.setattr(sample, "generate", watched)
    return calls


def conversation(monkeypatch, text, terminal=False):
    stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)


def test_stop_strings_in_all_ways_of_writing(ckpt, capsys, monkeypatch, tmp_path):
    calls, prompts, varied = spy(monkeypatch), ["the cat", "mat", "sat on"], "--repetition_penalty=100"
    free = {prompt: written(capsys, ckpt, varied, f"--prompt={prompt}").out[len(prompt) : -1] for prompt in prompts}

    def pair(text):
        return next(text[i : i + 2] for i in range(5, len(text)) if text[i : i + 2].isascii())

    stops = [pair(free["the cat"]), pair(free["mat"]), "never"]
    expected = {prompt: up_to_a_stop(text, stops) for prompt, text in free.items()}
    assert all(0 < len(expected[prompt]) < len(free[prompt]) for prompt in prompts[:2])
    calls.clear()
    for prompt in prompts:
        assert written(capsys, ckpt, varied, f"--prompt={prompt}", "--stop", *stops).out == f"{prompt}{expected[prompt]}\n"
    assert len(calls[0][2]) < 60, "it does not go on in silence"
    out = written(capsys, ckpt, varied, "--prompt=mat", "--num_samples=2", "--stop", *stops).out
    assert out == f"mat{expected['mat']}\n---\n" * 2 and len(calls[-1][2]) < 60
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    written(capsys, ckpt, varied, f"--prompts_file={tmp_path / 'prompts.txt'}", f"--output={tmp_path / 'out.jsonl'}", "--stop", *stops)
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert answers == [{"prompt": prompt, "completion": expected[prompt]} for prompt in prompts]
    answer = written(capsys, ckpt, varied, "--chat", "--prompt=cat").out[:-1]
    kept = up_to_a_stop(answer, [pair(answer)])
    assert written(capsys, ckpt, varied, "--chat", "--prompt=cat", f"--stop={pair(answer)}").out == kept + "\n" != answer + "\n"
    conversation(monkeypatch, "cat\nmat\n")
    out = written(capsys, ckpt, varied, "--chat", f"--stop={pair(answer)}", "--max_new_tokens=15").out
    tokenizer = Tokenizer.from_str(torch.load(ckpt)["tokenizer"])
    turns = [("user", "cat"), ("assistant", kept), ("user", "mat")]
    ids = prepare.conversation_ids(tokenizer, [{"role": role, "content": content} for role, content in turns])
    assert out.startswith(kept + "\n") and calls[-1][0] == [ids], "a stop string is not part of the conversation either"


def test_the_repetition_penalty_reaches_the_model(ckpt, capsys, monkeypatch, tmp_path):
    calls = spy(monkeypatch)
    texts = [written(capsys, ckpt, "--prompt=the cat", f"--repetition_penalty={penalty}").out for penalty in (1, 100)]
    assert texts[0] == written(capsys, ckpt, "--prompt=the cat").out != texts[1]
    written(capsys, ckpt, "--prompt=the cat", "--num_samples=2", "--repetition_penalty=100")
    assert [options["repetition_penalty"] for _, options, _ in calls] == [1, 100, 1, 100]
    assert len({step[0] for step in calls[1][2]}) == len(calls[1][2]), "nothing comes twice"


def test_a_system_turn_stays_at_the_beginning(ckpt, capsys, monkeypatch, tmp_path):
    calls, tokenizer = spy(monkeypatch), Tokenizer.from_str(torch.load(ckpt)["tokenizer"])

    def ids(*contents):
        return prepare.conversation_ids(tokenizer, [{"role": role, "content": text} for role, text in contents])

    system, options = ("system", "be kind"), ["--chat", "--system=be kind", "--max_new_tokens=4"]
    conversation(monkeypatch, "\n".join(f"{n} the cat sat" for n in range(6)))
    err = written(capsys, ckpt, *options).err
    assert "no longer fit and are forgotten" in err and len(calls) == 6
    for n, (prompts, _, _) in enumerate(calls):
        begins, ends = ids(system)[: -len(ids()) + 1], ids(("user", f"{n} the cat sat"))[1:]
        assert prompts[0][: len(begins)] == begins and prompts[0][-len(ends) :] == ends and len(prompts[0]) <= 96
    calls.clear()
    (tmp_path / "prompts.txt").write_text("the cat\nmat")
    written(capsys, ckpt, *options, "--prompt=mat")
    written(capsys, ckpt, *options, f"--prompts_file={tmp_path / 'prompts.txt'}", f"--output={tmp_path / 'out.jsonl'}")
    assert calls[0][0] == [ids(system, ("user", "mat"))]
    assert calls[1][0] == [ids(system, ("user", "the cat")), ids(system, ("user", "mat"))]


def test_an_interrupted_answer_stays_in_the_conversation_as_far_as_it_went(ckpt, capsys, monkeypatch):
    calls = spy(monkeypatch)
    watched, tokenizer = sample.generate, Tokenizer.from_str(torch.load(ckpt)["tokenizer"])

    def interrupted(model, prompts, new, **options):
        for n, step in enumerate(watched(model, prompts, new, **options)):
            if n == 5 and len(calls) == 1:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(sample, "generate", interrupted)
    conversation(monkeypatch, "cat\nmat\n", terminal=True)
    done = written(capsys, ckpt, "--chat", "--max_new_tokens=10")
    said = "".join(list(sample.stream(tokenizer, iter([step[0] for step in calls[0][2][:5]]))))
    kept = prepare.conversation_ids(tokenizer, [{"role": "user", "content": "cat"}])[:-1]
    assert len(calls) == 2 and calls[1][0][0][: len(kept)] == kept and done.err.count("tokens/s]") == 2 and "[5 tokens" in done.err
    second = tokenizer.decode(calls[1][0][0])
    assert second.startswith("user\ncat\nassistant\n") and second.endswith("\nuser\nmat\nassistant\n")
    assert said.startswith(second[len("user\ncat\nassistant\n") : -len("\nuser\nmat\nassistant\n")]) and said
    calls.clear()
    conversation(monkeypatch, "cat\nmat\n")  # from a pipe: nobody is there to go on
    with pytest.raises(KeyboardInterrupt):
        written(capsys, ckpt, "--chat", "--max_new_tokens=10")


def test_ctrl_c_in_a_terminal(tmp_path):
    """In an answer of minutes it ends the answer, at the prompt the program; Ctrl-D there ends it too."""
    path = random_weights(tmp_path / "phase1.pt", 200_000, only_ascii=True)
    command = [sys.executable, ROOT / "sample.py", f"--ckpt={path}", "--chat", "--temperature=0", "--max_new_tokens=100000", "--device=cpu"]
    for end, code in ((None, 130), (b"\x04", 0)):
        terminal, end_of_it = pty.openpty()
        with subprocess.Popen(command, stdin=end_of_it, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:  # fmt: skip
            os.close(end_of_it)
            os.write(terminal, b"the cat\n")
            assert process.stdout.read(2) == b"> "
            out = process.stdout.read(40)
            process.send_signal(signal.SIGINT)
            while not out.endswith(b"\n> "):  # the next question
                out += (piece := process.stdout.read(1 << 16))
                assert piece, process.stderr.read()
            while process.poll() is None:  # again, should it have come between the prompt and the wait for what is typed
                process.send_signal(signal.SIGINT) if end is None else os.write(terminal, end)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
            err = process.stderr.read().decode()
            assert process.wait() == code and err.count("tokens/s]") == 1 and "Traceback" not in err, err
            assert err.endswith("interrupted\n") == (end is None) and "Ctrl-C ends an answer, Ctrl-D the conversation." in err
        os.close(terminal)


def test_prompts_from_json_lines(ckpt, capsys, monkeypatch, tmp_path):
    calls, tokenizer = spy(monkeypatch), Tokenizer.from_str(torch.load(ckpt)["tokenizer"])
    records = [{"question": "the cat", "answer": "no"}, {"prompt": "two\nlines", "question": "no"}, {"id": 3, "prompt": "caf\u00e9 "}]
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(map(json.dumps, records)).encode() + b"\n")
    written(capsys, ckpt, "--chat", f"--prompts_file={tmp_path / 'p.jsonl'}", f"--output={tmp_path / 'out.jsonl'}", "--max_new_tokens=4")
    prompts = ["the cat", "two\nlines", "caf\u00e9 "]
    assert [json.loads(line)["prompt"] for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]] == prompts
    assert calls[0][0] == [prepare.conversation_ids(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]


@pytest.mark.parametrize(
    "line, message",
    [
        ("the cat", "malformed JSON (Expecting value: line 1 column 1 (char 0)), expected"),
        ("[" * 100_000, "malformed JSON ("),
        ('["the cat"]', "holds list, expected"),
        ('{"text": "the cat", "id": 1}', "holds 'text', 'id', expected"),
        ("{}", "holds nothing, expected"),
        ('{"prompt": 5, "question": "the cat"}', "prompt is int, which is no text, expected"),
        ('{"question": " "}', "question is ' ', which is no text, expected"),
        ('{"prompt": "\\ud83d"}', "prompt is '\\ud83d', which is no text, expected"),
    ],
)
def test_bad_json_lines(ckpt, tmp_path, line, message):
    (tmp_path / "p.JSONL").write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(InputError) as raised:
        sample.main([f"--ckpt={ckpt}", "--device=cpu", f"--prompts_file={tmp_path / 'p.JSONL'}", f"--output={tmp_path / 'out.jsonl'}"])
    error = str(raised.value)
    assert error.startswith(f"{tmp_path / 'p.JSONL'}:3: {message}") and "\n" not in error and not (tmp_path / "out.jsonl").exists()
    assert error.endswith("mend or drop the line, or name a file of plain lines otherwise than .jsonl")


def test_a_bad_json_line_ends_the_program_with_one_line(ckpt, tmp_path):
    (tmp_path / "p.jsonl").write_text("the cat\n")
    code, out, err = sampled(ckpt, f"--prompts_file={tmp_path / 'p.jsonl'}", f"--output={tmp_path / 'out.jsonl'}")
    assert code == 2 and out == "" and err.splitlines()[1:] == [line for line in err.splitlines() if line.startswith(f"error: {tmp_path}")]
    assert not (tmp_path / "out.jsonl").exists()


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


def test_a_long_prompt_does_not_cut_the_others_short(ckpt, tmp_path):
    """At temperature 0 each prompt of a file gets what it gets alone."""
    prompts, options = ["the cat", "x" * 90, "mat"], [f"--ckpt={ckpt}", "--device=cpu", "--temperature=0", "--max_new_tokens=40"]
    alone, together = [], tmp_path / "all.jsonl"
    for prompt in prompts:
        (tmp_path / "p.txt").write_text(prompt)
        sample.main([*options, f"--prompts_file={tmp_path / 'p.txt'}", f"--output={tmp_path / f'{len(alone)}.jsonl'}"])
        alone.append((tmp_path / f"{len(alone)}.jsonl").read_text(encoding="utf-8"))
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    sample.main([*options, f"--prompts_file={tmp_path / 'p.txt'}", f"--output={together}"])
    assert together.read_text(encoding="utf-8") == "".join(alone)
    with pytest.raises(InputError, match="none/o.jsonl cannot be written, .*none is no folder: make it, or name another file"):
        sample.main([*options, f"--prompts_file={tmp_path / 'p.txt'}", f"--output={tmp_path / 'none/o.jsonl'}"])


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
        (["--repetition_penalty=0.9"], "--repetition_penalty=0.9 is out of range: expected 1 (off) to 100"),
        (["--repetition_penalty=inf"], "--repetition_penalty=inf is out of range"),
        (["--repetition_penalty=nan"], "--repetition_penalty=nan is out of range"),
        (["--stop", "a", ""], "--stop='' is no text: leave it out"),
        ([b"--stop=caf\xe9"], "--stop='caf\\udce9' is not UTF-8 text: convert it first"),
        (["--system=Be kind."], "--system='Be kind.' is a turn of a conversation: add --chat or leave it out"),
        (["--chat", "--system="], "--system='' is no text: leave it out"),
        ([b"--chat", b"--system=caf\xe9"], "--system='caf\\udce9' is not UTF-8 text: convert it first"),
        (["--chat", "--system=" + "x" * 200], "--system='xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'... takes 2"),
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
        (["--chat", "--num_samples=2"], "--num_samples=2: a conversation has one answer at a time"),
        (["--prompt=a", "--raster=none/a.png"], "--raster=none/a.png: there is no folder none: make it first"),
        (["--device="], "nothing stands behind --device"),
        (["--model", ""], "nothing stands behind --model"),
        (["--system="], "--system='' is no text"),
        (["--ckpt=nowhere.pt"], "holds no checkpoint yet"),
        (["--prompt=" + "word " * 3000], "the prompt has"),
    ],
)
def test_bad_options_of_sample(finished, options, match):
    fails("sample.py", f"--ckpt={finished}", *options, match=match)
