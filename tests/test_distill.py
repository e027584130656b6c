"""distill.py and teachers.py: final numbers, problem files, teachers against transformers and a loopback server, what a student is
trained on, exact resume after SIGKILL, evaluation, and what bad input gets."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer

import distill
import prepare
import teachers
from checkpoint import find_checkpoint, load_checkpoint, load_model, save_checkpoint
from distill import Examples, distillation_loss, majority, wilson
from model import Flow, FlowConfig, generate
from prepare import InputError, render_chat
from snn_model import Pulse, PulseConfig
from teachers import INSTRUCTION, Answer, Job, Problem, chosen_traces, final_number, problem_key, prompt_ids, read_problems, read_traces
from word_problems import problems as word_problems

KEY = "sk-secret-of-the-test"
SHORT = ["--batch_size=4", "--log_interval=2", "--max_new_tokens=12", "--device=cpu"]
SIZES = dict(n_layer=2, d_model=32, n_head=2)


def call(*options, ranks=1, cwd=None, **environment):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "distill.py"), *map(str, options)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300, env=os.environ | environment)


def works(*options, **kwargs):
    done = call(*options, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_problems(path, problems):
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with problems, a tokenizer of 300 tokens, and untrained checkpoints of a tiny Flow and a tiny Pulse."""
    folder = tmp_path_factory.mktemp("distill")
    write_problems(folder / "train.jsonl", word_problems("train", 40))
    write_problems(folder / "val.jsonl", word_problems("val", 6))
    write_problems(folder / "new.jsonl", word_problems("test", 4))
    tokenizer = prepare.train_tokenizer((p["question"] + p["answer"] for p in word_problems("train", 200)), 300).to_str()
    torch.manual_seed(0)
    flow = Flow(FlowConfig(vocab_size=300, **SIZES, n_kv_head=1, head_dim=16, d_ff=48, window=8, global_every=2))
    pulse = Pulse(PulseConfig(vocab_size=300, **SIZES, d_hidden=64, d_ff=64, memory_every=2))
    for name, model in (("flow", flow), ("pulse", pulse)):
        (folder / "out" / name).mkdir(parents=True)
        state = {"model": name, "config": vars(model.config), "weights": model.state_dict(), "tokenizer": tokenizer, "phase": 3, "step": 0}
        save_checkpoint(folder / "out" / name / "phase3.pt", state)
    return folder


@pytest.fixture
def here(room, monkeypatch):
    monkeypatch.chdir(room)
    return room


def tokenizer_of(room):
    return Tokenizer.from_str(load_checkpoint(room / "out/flow/phase3.pt")["tokenizer"])


# ---- final numbers, problem files ----


@pytest.mark.parametrize(
    "text, number",
    [
        ("48 / 2 = <<48/2=24>>24\n#### 24", 24), ("#### 1,234,567", 1234567), ("#### $12.50", "12.5"), ("#### 42 apples", 42),
        ("#### -7", -7), ("#### \u22127", -7), ("#### -$7", -7), ("#### $-7", -7), ("####\n42", 42), ("#### **42**.", 42),
        ("#### 18%", 18), ("#### .5", "1/2"), ("#### 2.0", 2), ("#### 6 * 7 = 42", 42), ("#### 3/4", "3/4"), ("#### 5\nand #### 6", 6),
        (r"so \boxed{42}", 42), (r"\boxed{1{,}234}", 1234), (r"\boxed{\$1\,234.5}", "1234.5"), (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{\text{42 apples}}", 42), (r"\boxed{x = -3}", -3), ("#### Step 2: add 5\n" + r"\boxed{12}", 12),
        ("The answer is $\\boxed{9}$.", 9), ("**Answer:** 3 eggs", 3), ("The final answer is $18.", 18),
        ("there are 5 of them", None), ("####", None), ("the answer is unknown, 5", None), ("#### 1/0", None), ("", None),
    ],
)  # fmt: skip
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Fraction(number))


def test_the_reference_of_every_word_problem_is_found():
    for problem in word_problems("val", 200):
        assert final_number(problem["answer"]) == int(problem["answer"].rpartition("####")[2])


def test_problem_files_of_all_kinds_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [{"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}, {"question": "2 + 2?", "answer": "#### 4"}]
    expected = [Problem("1 + 1?", "1 + 1 = 2\n#### 2", Fraction(2)), Problem("2 + 2?", "#### 4", Fraction(4))]
    plain = write_problems(tmp_path / "a.jsonl", [*records, {"question": " 1 +  1? ", "answer": "#### 3"}])  # the first of two counts
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(write_problems(tmp_path / "b", records).read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet")
    for path in (plain, tmp_path / "b.jsonl.gz", tmp_path / "c.parquet"):
        assert read_problems(str(path), False) == (expected, 0)
    numbers = write_problems(tmp_path / "d.jsonl", [{"question": "3?", "answer": 3}, {"question": "4?", "answer": "-4.5"}])
    assert [p.number for p in read_problems(str(numbers), False)[0]] == [3, Fraction(-9, 2)]


@pytest.mark.parametrize(
    "line, match",
    [
        ("{broken", "malformed JSON"), ("[1]", "expected an object with question and answer"), ('{"question": "x"}', "question and answer"),
        ('{"question": "x", "answer": "no result"}', "'no result' ends in no number: expected #### and the result"),
        ('{"question": 5, "answer": "#### 5"}', "must be text"), ('{"question": "\\udcff", "answer": "#### 5"}', "not UTF-8 text"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_its_number_or_left_out(tmp_path, line, match):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"question": "1 + 1?", "answer": "#### 2"}}\n\n{line}\n{{"question": "2 + 2?", "answer": "#### 4"}}\n')
    with pytest.raises(InputError, match=match) as caught:
        read_problems(str(path), False)
    assert "p.jsonl:3" in str(caught.value) and "--skip_bad" in str(caught.value)
    kept, skipped = read_problems(str(path), True)
    assert [p.number for p in kept] == [2, 4] and skipped == 1


# ---- teachers ----


def test_a_checkpoint_answers_in_a_batch_what_it_answers_alone(room):
    for name in ("flow", "pulse"):
        path = room / "out" / name / "phase3.pt"
        jobs = [Job(problem_key(p["question"]), 0, p["question"]) for p in lines_of(room / "train.jsonl")[:7]]
        together = dict(teachers.checkpoint_teacher(path, "cpu", 4).answers(jobs, 0, 9, 0))
        model, tokenizer, _ = load_model(path)
        for job in jobs:
            ids = torch.cat(list(generate(model, [prompt_ids(tokenizer, job.question)], 9, 0, stop_ids=[0, 2]))).tolist()
            cut = ids[-1] not in (0, 2)
            assert together[job] == Answer(tokenizer.decode(ids if cut else ids[:-1]), len(ids), "length" if cut else "stop")


@pytest.fixture(scope="module")
def qwen(room, tmp_path_factory):
    """A tiny random Qwen3 folder as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("qwen")
    config = transformers.Qwen3Config(
        vocab_size=310, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=512, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_of(room).to_str(), encoding="utf-8")
    return folder


def test_a_hugging_face_folder_answers_as_transformers_does(room, qwen):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(qwen)
    ends = [2, *range(4, 300, 11)]  # so that some answers stop
    (qwen / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    questions = [p["question"][: 20 + 9 * i] for i, p in enumerate(lines_of(room / "train.jsonl")[:6])]  # unequal lengths
    jobs = [Job(str(i), 0, question) for i, question in enumerate(questions)]
    finishes = set()
    for size in (1, 6):
        teacher = teachers.open_teacher(str(qwen), "cpu", size, None, 1)
        answers = dict(teacher.answers(jobs, 0, 24, 0))
        for job in jobs:
            text = render_chat([{"role": "user", "content": f"{job.question}\n\n{INSTRUCTION}"}], open_turn=True)
            ids = torch.tensor([teacher.tokenizer.encode(text).ids])
            made = theirs.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=ends, pad_token_id=3)[0, ids.size(1) :].tolist()
            stopped = made[-1] in ends
            expected = Answer(teacher.tokenizer.decode(made[:-1] if stopped else made), len(made), "stop" if stopped else "length")
            assert answers[job] == expected
            finishes.add(expected.finish)
    assert finishes == {"stop", "length"}


class Server(ThreadingHTTPServer):
    """A loopback server that answers "#### 7" and misbehaves as `trouble` says: {question: [what to do first, second, ...]}."""

    daemon_threads = True

    def __init__(self, trouble=None, together=1, patience=10**9):
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble, self.asked, self.keys, self.seeds = trouble or {}, [], set(), []
        self.patience, self.go_on = patience, threading.Event()  # after so many questions it waits to be told to go on
        self.meet, self.lock = threading.Barrier(together), threading.Lock()
        self.gathered = together == 1
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_):
        pass  # a client that was killed


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, code, body, length=None, **headers):
        data = json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": length or len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data[: length and len(data) // 2])

    def do_GET(self):
        self.reply(200, {"data": [{"id": "parrot"}]} if self.path == "/v1/models" else {"error": "?"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, question = self.server, body["messages"][0]["content"].split("\n")[0]
        with server.lock:
            server.asked.append(question)
            server.keys.add(self.headers.get("Authorization"))
            server.seeds.append((question, body["seed"]))
            times, waits = server.asked.count(question), len(server.asked) > server.patience
        if not server.gathered:
            server.meet.wait(30)  # a client that asks one by one never gets an answer
            server.gathered = True
        if waits:
            server.go_on.wait(60)
        todo = dict(enumerate(server.trouble.get(question, []), 1)).get(times, "answer")
        message = {"role": "assistant", "content": "1 + 6 = 7\n#### 7"}
        good = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 5}}
        if isinstance(todo, int):
            self.reply(todo, {"error": "no"}, Retry_After=0)
        elif todo == "cut":
            self.reply(200, good, length=10_000)
        elif todo == "null":
            self.reply(200, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]})
        elif todo == "strange":
            self.reply(200, {"choices": []})
        else:
            self.reply(200, good)


def test_a_server_is_asked_together_and_again_and_its_key_is_in_no_file(tmp_path):
    questions = [f"{i} + {7 - i}?" for i in range(8)]
    problems = write_problems(tmp_path / "p.jsonl", [{"question": q, "answer": f"#### {7 + (i == 5)}"} for i, q in enumerate(questions)])
    val = write_problems(tmp_path / "v.jsonl", [{"question": "x", "answer": "#### 1"}])
    trouble = dict(zip(questions, ([429, 500], ["cut"], ["null"], ["strange"], [503, "cut", 429])))
    server = Server(trouble, together=4)
    command = ["--trace", f"--teacher={server.url}", f"--problems={problems}", "--eval", val, "--samples=2", "--concurrency=4"]
    output = works(*command, "--traces=t.jsonl", cwd=tmp_path, OPENAI_API_KEY=KEY)
    assert server.keys == {f"Bearer {KEY}"}
    traces = lines_of(tmp_path / "t.jsonl")
    assert sorted((t["question"], t["sample"]) for t in traces) == sorted((q, k) for q in questions for k in (0, 1))
    # Of two samples the one that met the trouble was asked again, or recorded as what came.
    finishes = Counter((t["question"], t["finish"]) for t in traces)
    assert finishes[questions[2], "empty reply"] == finishes[questions[3], "unusable reply"] == 1
    assert sum(n for (_, finish), n in finishes.items() if finish == "stop") == 14
    assert {t["correct"] for t in traces if t["question"] == questions[5]} == {False}
    assert {(t["final"], t["reference"], t["tokens"]) for t in traces if t["correct"]} == {("7", "7", 5)}
    assert {t["teacher"] for t in traces} == {f"parrot at {server.url}"} and {t["temperature"] for t in traces} == {0.7}
    assert "12 of 16 answers right (75.0%), 2 without a final number, 2 cut off or empty" in output
    assert "12 kept (--keep=correct), 7 of them different, for 7 questions" in output
    assert len(server.asked) == 16 + 2 + 1 + 3 and len(set(server.seeds)) == 16  # a sample keeps its seed when it is asked again
    asked = len(server.asked)
    works(*command, "--traces=t.jsonl", cwd=tmp_path)
    assert len(server.asked) == asked  # nothing was missing
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY not in path.read_text(errors="replace")


def test_what_a_server_cannot_do_is_one_line(tmp_path):
    problems = write_problems(tmp_path / "p.jsonl", [{"question": f"{i}?", "answer": "#### 7"} for i in range(5)])
    val = write_problems(tmp_path / "v.jsonl", [{"question": "x", "answer": "#### 1"}])
    server = Server({"3?": [500] * 9})
    options = ["--trace", f"--problems={problems}", "--eval", val, "--traces=t.jsonl", "--concurrency=1"]
    done = call(*options, f"--teacher={server.url}", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "failed 6 times in a row (HTTP 500): what has come is kept" in done.stderr
    assert [t["question"] for t in lines_of(tmp_path / "t.jsonl")] == ["0?", "1?", "2?"]
    server.trouble = {"3?": [500] * 6 + [401]}
    done = call(*options, f"--teacher={server.url}", cwd=tmp_path, OPENAI_API_KEY=KEY)
    assert done.returncode == 2 and "HTTP 401" in done.stderr and "OPENAI_API_KEY" in done.stderr and KEY not in done.stderr
    server.shutdown()
    server.server_close()
    done = call(*options, f"--teacher={server.url}", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot be reached" in done.stderr and server.url in done.stderr


def test_killed_while_asking_nothing_is_lost_or_doubled(tmp_path):
    questions = [f"{i}?" for i in range(30)]
    problems = write_problems(tmp_path / "p.jsonl", [{"question": q, "answer": "#### 7"} for q in questions])
    val = write_problems(tmp_path / "v.jsonl", [{"question": "x", "answer": "#### 1"}])
    server, path = Server(patience=10), tmp_path / "t.jsonl"
    command = [sys.executable, ROOT / "distill.py", "--trace", f"--teacher={server.url}", f"--problems={problems}", "--eval", val]
    command += [f"--traces={path}", "--concurrency=2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(path.read_bytes().splitlines() if path.exists() else []) < 10:
        time.sleep(0.01)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "is being written by another distill.py" in again.stderr
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_text().splitlines()
    assert len(before) == 10
    server.go_on.set()
    with open(path, "a") as file:
        file.write(before[0][:25])  # as if the kill had come in the middle of a line
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert path.read_text().splitlines()[: len(before)] == before
    assert sorted(t["question"] for t in lines_of(path)) == sorted(questions)
    assert len(server.asked) == 30 + 2  # asked twice: what was under way


def test_traces_of_another_teacher_and_broken_ones_are_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"key": "a", "sample": 0, "teacher": "x"}\n{"key": "a", "sample": 1, "teacher": "x"}\n{"key": "b", "sam')
    assert list(read_traces(path, "x")) == [("a", 0), ("a", 1)]
    with pytest.raises(InputError, match="holds answers of x, not of y: remove it or name another --traces"):
        read_traces(path, "y")
    path.write_text("[]\n")
    with pytest.raises(InputError, match=r"t.jsonl:1: not a trace"):
        read_traces(path, None)


def test_only_whole_right_different_answers_are_kept():
    def trace(key, sample, answer, correct=True, finish="stop"):
        line = {"key": key, "sample": sample, "question": key, "answer": answer, "final": final_number(answer)}
        return line | {"correct": correct, "finish": finish, "tokens": 3}

    lines = [trace("a", 0, "#### 1"), trace("a", 1, "#### 1 "), trace("a", 2, "so #### 1"), trace("b", 0, "#### 2", False),
             trace("c", 0, "#### 3", True, "length"), trace("d", 0, "", False, "empty reply")]  # fmt: skip
    traces, said = {(t["key"], t["sample"]): t for t in lines}, []
    assert chosen_traces(traces, "correct", said.append) == [("a", "#### 1"), ("a", "so #### 1")]
    assert chosen_traces(traces, "all", said.append) == [("a", "#### 1"), ("a", "so #### 1"), ("b", "#### 2")]
    assert said[0] == ("traces: 4 of 6 answers right (66.7%), 1 without a final number, 2 cut off or empty; 18 tokens, 3 per answer")


# ---- what a student is trained on ----


def test_targets_are_the_answer_and_its_end_behind_the_prompt_of_generation(room):
    tokenizer = tokenizer_of(room)
    pairs = [(p["question"], p["answer"]) for p in lines_of(room / "train.jsonl")]
    examples = Examples(pairs, tokenizer, 1000)
    x, y = examples.tensors(np.array([3, 0, 5]), "cpu")
    for row, n in enumerate((3, 0, 5)):
        question, answer = pairs[n]
        text = "<|endoftext|>" + render_chat([{"role": "user", "content": question}], open_turn=True)
        prompt = tokenizer.encode(text).ids
        assert prompt == prompt_ids(tokenizer, question)
        whole = prompt + tokenizer.encode(answer).ids + [tokenizer.token_to_id("<|im_end|>")]
        T = len(whole) - 1
        assert x[row, :T].tolist() == whole[:-1] and set(x[row, T:].tolist()) <= {tokenizer.token_to_id("<|pad|>")}
        assert y[row].tolist() == [-1] * (len(prompt) - 1) + whole[len(prompt) :] + [-1] * (x.size(1) - T)
    few = Examples(pairs, tokenizer, int(np.median(examples.lengths)))
    assert len(few.rows) + few.too_long == 40 and few.too_long > 5 and few.lengths.max() <= np.median(examples.lengths)


def test_nothing_leaks_from_one_example_into_another(room):
    examples = Examples([(p["question"], p["answer"]) for p in lines_of(room / "train.jsonl")[:6]], tokenizer_of(room), 1000)
    for name in ("flow", "pulse"):
        model, _, _ = load_model(room / "out" / name / "phase3.pt")
        with torch.no_grad():
            together = model(*examples.tensors(np.arange(6), "cpu"))[1]
            alone = torch.stack([model(*examples.tensors(np.array([n]), "cpu"))[1] for n in range(6)])
        torch.testing.assert_close(together, (alone * torch.from_numpy(examples.answer_lengths)).sum() / examples.answer_lengths.sum())


def test_an_epoch_sees_every_example_once_in_batches_of_like_length(room):
    examples = Examples([(p["question"], p["answer"]) for p in lines_of(room / "train.jsonl")], tokenizer_of(room), 1000)
    steps = [examples.batch(5, step, 4) for step in range(20)]
    assert sorted(np.concatenate(steps[:10])) == sorted(np.concatenate(steps[10:])) == list(range(40))
    assert not all((a == b).all() for a, b in zip(steps[:10], steps[10:]))
    assert (examples.batch(5, 13, 4) == steps[13]).all() and len(set(np.concatenate([examples.batch(5, s, 7) for s in range(5)]))) == 35
    ordered = np.sort(examples.lengths).reshape(10, 4)
    padding = 1 - ordered.sum() / (ordered.max(1) * 4).sum()
    assert examples.padding(5, 4) == pytest.approx(padding)


def test_distillation_loss_against_loops():
    torch.manual_seed(0)
    logits, teacher, targets = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5), torch.tensor([[1, -1, 4], [-1, 0, 2]])
    expected = []
    for b in range(2):
        for t in range(3):
            if targets[b, t] >= 0:
                p, q = ((x[b, t] / 3).softmax(-1) for x in (logits, teacher))
                kl = sum(q[v] * (q[v] / p[v]).log() for v in range(5))
                expected.append(0.7 * -logits[b, t].log_softmax(-1)[targets[b, t]].item() + 0.3 * 9 * kl.item())
    loss = distillation_loss(logits, teacher, targets, 0.3, 3.0)
    assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-5)
    loss.backward()
    assert (logits.grad[targets < 0] == 0).all() and (logits.grad[targets >= 0] != 0).all()


# ---- evaluation ----


def test_wilson_is_where_the_score_test_rejects():
    for right, n in ((0, 7), (3, 10), (90, 100), (600, 600)):
        low, high = wilson(right, n)
        for bound, start in ((low, 0.0), (high, 1.0)):
            a, b = start, right / n  # |right/n - p| = 1.96 sqrt(p (1 - p) / n) between these, by bisection
            for _ in range(60):
                p = (a + b) / 2
                a, b = (p, b) if abs(right / n - p) > 1.96 * math.sqrt(p * (1 - p) / n) else (a, p)
            assert bound == pytest.approx(b, abs=1e-9)
    assert wilson(0, 7)[0] == 0 and wilson(600, 600)[1] == 1


def test_majority():
    assert majority([Fraction(2), None, Fraction(3), Fraction(3)]) == 3
    assert majority([Fraction(2), Fraction(3)]) == 2 and majority([None, None]) is None and majority([None, None, Fraction(5)]) == 5


# ---- the script ----


def test_a_student_learns_solutions_and_is_measured_before_and_after(room):
    options = ["--student=out/flow", "--problems=train.jsonl", "--eval", "val.jsonl", "new.jsonl", "--epochs=4", "--out=out/a", *SHORT]
    output = works(*options, cwd=room)
    out = room / "out/a"
    names = {f"eval_{when}_{split}.jsonl" for when in ("before", "after") for split in ("val", "new")}
    assert {f.name for f in out.iterdir()} == {"last.pt", "log.jsonl", "curves.png", *names}
    assert output.count("/6 = ") == output.count("/4 = ") == 2 and "40 steps of 4 examples" in output and "of a batch is padding" in output
    log = lines_of(out / "log.jsonl")
    train, val = [x for x in log if "loss" in x], [x for x in log if "val_loss" in x]
    assert set(train[0]) == {"step", "phase", "tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_s", "mfu"}
    assert set(val[0]) == {"step", "phase", "tokens", "seconds", "val_loss", "val_bpb"}
    assert [x["step"] for x in train] == list(range(2, 41, 2)) and [x["step"] for x in val] == [0, 40]
    assert val[1]["val_loss"] < val[0]["val_loss"] - 1
    transcript = lines_of(out / "eval_after_val.jsonl")
    assert [t["question"] for t in transcript] == [p["question"] for p in lines_of(room / "val.jsonl")]
    assert set(transcript[0]) == {"question", "reference", "answers", "final", "correct"} and len(transcript[0]["answers"]) == 1
    checkpoint = load_checkpoint(find_checkpoint(str(out)))  # what sample.py will load
    assert checkpoint["step"] == 40 and checkpoint["model"] == "flow" and "optimizer" in checkpoint
    assert "training is finished" in works(*options, cwd=room) and lines_of(out / "log.jsonl") == log
    done = call(*options, "--lr=0.1", cwd=room)
    assert done.returncode == 2 and "lr is " in done.stderr and "0.1 here" in done.stderr and "--fresh" in done.stderr
    output = works("--evaluate", "--student=out/a", "--eval", "val.jsonl", "--votes=3", *SHORT, cwd=room)
    assert "majority of 3 at temperature 0.7" in output
    assert len(lines_of(out / "eval_last_val.jsonl")[0]["answers"]) == 3


def test_flow_teaches_pulse_by_answers_and_logits(room):
    options = ["--student=out/pulse", "--teacher=out/flow", "--problems=train.jsonl", "--eval", "val.jsonl", "--epochs=1", *SHORT]
    output = works(*options, "--samples=0", "--out=out/kl", cwd=room)
    assert "KL weight 0.5" in output and not list(room.glob("out/traces*"))
    settings = load_checkpoint(room / "out/kl/last.pt")["settings"]
    assert settings["kl_weight"] == 0.5 and settings["teacher"].startswith("out/flow/phase3.pt@")
    output = works(*options, "--keep=all", "--samples=2", "--trace", "--traces=many.jsonl", cwd=room)
    assert len(lines_of(room / "many.jsonl")) == 80 and "0 of 80 answers are in many.jsonl" in output
    assert "80 of 80 answers are in" in works(*options, "--keep=all", "--samples=2", "--trace", "--traces=many.jsonl", cwd=room)
    done = call(*options, "--samples=0", "--out=out/no", "--teacher=out/pulse", "--kl_weight=0", cwd=room)
    assert done.returncode == 0 and load_checkpoint(room / "out/no/last.pt")["settings"]["teacher"] is None


def test_a_traces_file_alone_trains_a_student(room):
    traces = []
    for n, problem in enumerate(lines_of(room / "train.jsonl")):
        job, answer = Job(problem_key(problem["question"]), 0, problem["question"]), Answer(problem["answer"], 9, "stop")
        traces.append(teachers.trace_of(job, answer, final_number(problem["answer"]) + (n % 2)) | {"teacher": "x", "temperature": 0})
    write_problems(room / "half.jsonl", traces)
    output = works("--student=out/flow", "--traces=half.jsonl", "--eval", "val.jsonl", "--epochs=1", "--out=out/half", *SHORT, cwd=room)
    assert "20 of 40 answers right (50.0%)" in output and "20 examples of" in output


def test_killed_in_training_the_same_command_ends_in_the_same_weights(room):
    base = ["--problems=train.jsonl", "--eval", "val.jsonl", "--num_eval=2", *SHORT]
    base += ["--epochs=5", "--save_interval=10", "--eval_interval=20"]
    for student in ("flow", "pulse"):
        options = [f"--student=out/{student}", *base]
        works(*options, f"--out=out/{student}_whole", cwd=room)
        out = room / f"out/{student}_cut"
        command = [sys.executable, ROOT / "distill.py", *options, f"--out={out}"]
        process = subprocess.Popen(command, cwd=room, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out / "last.pt").exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert load_checkpoint(out / "last.pt")["step"] < 50
        assert "continuing" in works(*options, f"--out={out}", cwd=room)
        one, two = (load_checkpoint(room / f"out/{student}_{kind}/last.pt") for kind in ("whole", "cut"))
        assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])
        logs = (lines_of(room / f"out/{student}_{kind}/log.jsonl") for kind in ("whole", "cut"))
        one, two = ([(x["step"], x.get("loss"), x.get("val_loss")) for x in log] for log in logs)
        assert one == two


def test_two_processes_train_as_one(room):
    options = ["--student=out/flow", "--problems=train.jsonl", "--eval", "val.jsonl", "--epochs=1", "--num_eval=2", *SHORT]
    works(*options, "--batch_size=8", "--out=out/one", cwd=room)
    works(*options, "--batch_size=4", "--out=out/two", ranks=2, cwd=room)
    works(*options, "--batch_size=2", "--grad_accum=4", "--out=out/accum", cwd=room)
    one, *others = ([x["loss"] for x in lines_of(room / f"out/{name}/log.jsonl") if "loss" in x] for name in ("one", "two", "accum"))
    assert len(one) == 3
    for other in others:
        assert other == pytest.approx(one, abs=2e-3)
    assert (room / "out/two/eval_after_val.jsonl").exists()


def test_ctrl_c_saves_and_the_newest_run_goes_on(room, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path)
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow/phase3.pt").write_bytes((room / "out/flow/phase3.pt").read_bytes())
    options = [f"--problems={room / 'train.jsonl'}", "--eval", room / "val.jsonl", "--epochs=60", "--num_eval=1", *SHORT]
    process = subprocess.Popen([sys.executable, ROOT / "distill.py", *options], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step") and "loss" in line and "validation" not in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait() == 130 and "the same command goes on from there" in rest
    assert "continuing out/flow_distilled/last.pt" in works(*options, cwd=tmp_path)


# ---- bad input ----


def refused(match, *options):
    with pytest.raises(InputError, match=match) as caught:
        distill.main([*options, "--device=cpu"])
    assert "\n" not in str(caught.value)


def test_training_on_what_is_evaluated_is_refused(here):
    write_problems(here / "both.jsonl", lines_of(here / "train.jsonl") + lines_of(here / "val.jsonl")[:3])
    for name in ("test.jsonl", "gsm8k_test.jsonl", "test-00000-of-00001.jsonl"):
        (here / name).write_bytes((here / "train.jsonl").read_bytes())
        refused("is a test split: it may measure a model", "--student=out/flow", f"--problems={name}", "--eval", "val.jsonl")
    done = call("--student=out/flow", "--problems=both.jsonl", "--eval", "val.jsonl", cwd=here)
    assert done.returncode == 2 and done.stderr == (
        "error: 3 of the 6 questions of val.jsonl are in both.jsonl too: train on other problems\n"
    )


def test_impossible_commands(here):
    base = ["--student=out/flow", "--problems=train.jsonl", "--eval", "val.jsonl"]
    refused("--problems needs --eval", "--problems=train.jsonl")
    refused("--traces needs --eval", "--traces=t.jsonl")
    refused("--trace asks a --teacher", "--trace")
    refused("--epochs=0.0 must be positive and finite", *base, "--epochs=0")
    refused("--temperature=0.0 must be", *base, "--temperature=0", "--samples=2")
    refused("--kl_weight=2.0 must be between 0 and 1", *base, "--kl_weight=2")
    refused("--kl_weight=0.5 compares logits", *base, "--kl_weight=0.5")
    refused("40 examples of at most 1,024 tokens, a step takes 64", *base, "--batch_size=64")
    refused("0 examples of at most 8 tokens", *base, "--seq_len=8")
    refused("data/builtin/problems_val.jsonl does not exist", "--student=out/flow")
    refused("out/none holds no checkpoint yet", "--evaluate", "--student=out/none", "--eval", "val.jsonl")
    refused("--teacher=nowhere does not exist", *base, "--teacher=nowhere")
    refused("holds more than an address: a key belongs into OPENAI_API_KEY", *base, "--teacher=http://me:secret@localhost/v1")


def test_teachers_that_do_not_fit(here, qwen, tmp_path):
    base = ["--student=out/flow", "--problems=train.jsonl", "--eval", "val.jsonl"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    refused("is a 'llama' model, Flow reads model_type 'qwen3' only", *base, f"--teacher={other}")
    for path in qwen.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "tokenizer.json").write_text("{}")
    refused("tokenizer.json is no tokenizer", *base, f"--teacher={other}")
    (other / "tokenizer.json").write_text(prepare.train_tokenizer([p["question"] for p in word_problems("train", 400)], 340).to_str())
    refused("its tokenizer has 340 tokens, the model 310: they do not belong together", *base, f"--teacher={other}")
    (other / "tokenizer.json").unlink()
    refused("tokenizer.json is missing", *base, f"--teacher={other}")
    state = load_checkpoint(here / "out/flow/phase3.pt")
    state["tokenizer"] = prepare.train_tokenizer([p["question"] for p in word_problems("train", 400)], 320).to_str()
    save_checkpoint(tmp_path / "wrong.pt", state)
    refused("its tokenizer has 320 tokens, the model 300", f"--student={tmp_path / 'wrong.pt'}", *base[1:])
    refused("needs a local --teacher with the tokenizer of", *base, f"--teacher={qwen}", "--samples=0", "--kl_weight=1")
