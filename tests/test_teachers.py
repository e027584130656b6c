"""teachers.py: problem files, traces, and a loopback server that is slow, refuses, fails and hangs up."""

import gzip
import json
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, call_distill as call, distill_works as works, lines_of, write_problems

import distill
from exact_match import Problem, final_number, read_problems
from scripts import InputError
from teachers import ServerTeacher, chosen_traces, read_traces, retry_after

KEY = "sk-secret-of-the-test"


# ---- problem files ----


def test_problem_files_of_all_kinds_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [{"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}, {"question": "2 + 2?", "answer": "#### 4"}]
    expected = [Problem("1 + 1?", "1 + 1 = 2\n#### 2", Fraction(2)), Problem("2 + 2?", "#### 4", Fraction(4))]
    plain = write_problems(tmp_path / "a.jsonl", [*records, {"question": " 1 +  1? ", "answer": "#### 3"}])  # the first of two counts
    extra = [record | {"text": "of another kind", "answer": i} for i, record in enumerate(records)]
    parquet.write_table(pyarrow.Table.from_pylist(extra), tmp_path / "e.parquet")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(write_problems(tmp_path / "b", records).read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet")
    for path in (plain, tmp_path / "b.jsonl.gz", tmp_path / "c.parquet"):
        assert read_problems(str(path), False) == (expected, 0)
    assert [p.number for p in read_problems(str(tmp_path / "e.parquet"), False)[0]] == [0, 1]
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


# ---- servers and traces ----


class Server(ThreadingHTTPServer):
    """A loopback server that answers "#### 7" and misbehaves as `trouble` says: {question: [what to do first, second, ...]}."""

    daemon_threads = True

    def __init__(self, trouble=None, together=1, patience=10**9):
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble, self.asked, self.keys, self.seeds, self.bodies = trouble or {}, [], set(), [], []
        self.patience, self.go_on = patience, threading.Event()  # after so many questions it waits to be told to go on
        self.models = 200, {"data": [{"id": "parrot"}]}  # or a function of the key that was sent
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
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": length or len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data[: length and len(data) // 2])

    def do_GET(self):
        models = self.server.models
        self.reply(*(models(self.headers.get("Authorization")) if callable(models) else models))

    def reset(self, code):
        """A reply whose connection breaks in the middle of the text."""
        self.reply(code, b"{", length=100)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, question = self.server, body["messages"][0]["content"].split("\n")[0]
        with server.lock:
            server.asked.append(question)
            server.keys.add(self.headers.get("Authorization"))
            server.seeds.append((question, body["seed"]))
            server.bodies.append(body)
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
        elif todo == "reset":
            self.reset(400)
        elif isinstance(todo, (bytes, dict)):
            self.reply(200, todo)
        else:
            self.reply(200, good)


@pytest.fixture
def asks(tmp_path, monkeypatch):
    """distill.py --trace in this process, which does not wait: asks(server, questions, ...) gives the lines of t.jsonl so far."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("teachers.time.sleep", lambda seconds: asking.waits.append(seconds))
    write_problems(tmp_path / "v.jsonl", [{"question": "x", "answer": "#### 1"}])

    def asking(server, questions, *options, number=7):
        write_problems(tmp_path / "p.jsonl", [{"question": q, "answer": f"#### {number}"} for q in questions])
        base = ["--trace", f"--teacher={server.url}", "--problems=p.jsonl", "--eval", "v.jsonl", "--traces=t.jsonl", "--concurrency=1"]
        distill.main([*base, *options, "--device=cpu"])
        return lines_of(tmp_path / "t.jsonl")

    asking.waits = []
    return asking


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
    assert finishes[questions[2], "empty reply"] == 1
    assert sum(n for (_, finish), n in finishes.items() if finish == "stop") == 15
    assert {t["correct"] for t in traces if t["question"] == questions[5]} == {False}
    assert {(t["final"], t["reference"], t["tokens"]) for t in traces if t["correct"]} == {("7", "7", 5)}
    assert {t["teacher"] for t in traces} == {f"parrot at {server.url}"} and {t["temperature"] for t in traces} == {0.7}
    assert "13 of 16 answers right (81.2%), 1 without a final number, 1 cut off or empty" in output
    assert "13 kept (--keep=correct), 7 of them different, for 7 questions" in output
    assert len(server.asked) == 16 + 2 + 1 + 1 + 3 and len(set(server.seeds)) == 16  # a sample keeps its seed when it is asked again
    asked = len(server.asked)
    for _ in range(2):
        works(*command, "--traces=t.jsonl", cwd=tmp_path)
        assert server.asked[asked:] == [questions[2]]  # what had no text; and then nothing is missing
    lines = [t for t in lines_of(tmp_path / "t.jsonl") if t["answer"]]
    lines[0] |= {"finish": "length", "max_new_tokens": 5}  # a short try; the same at the limit of now is not asked again
    lines[1] |= {"finish": "length", "max_new_tokens": 512}
    write_problems(tmp_path / "t.jsonl", lines)
    works(*command, "--traces=t.jsonl", cwd=tmp_path)
    assert server.asked[asked + 1 :] == [lines[0]["question"]]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY not in path.read_text(errors="replace")


def test_what_a_server_cannot_do_is_one_line(tmp_path, asks, monkeypatch):
    questions, server = [f"{i}?" for i in range(5)], Server({"3?": [500] * 9})
    with pytest.raises(InputError, match=r"failed 6 times in a row \(HTTP 500\): what has come is kept"):
        asks(server, questions)
    assert [t["question"] for t in lines_of(tmp_path / "t.jsonl")] == ["0?", "1?", "2?"]
    server.trouble = {"3?": [500] * 6 + [401]}
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\r\n")
    with pytest.raises(InputError, match="HTTP 401 .*OPENAI_API_KEY") as caught:
        asks(server, questions)
    assert KEY not in str(caught.value) and server.keys == {None, f"Bearer {KEY}"}
    server.shutdown()
    server.server_close()
    options = ["--trace", "--problems=p.jsonl", "--eval", "v.jsonl", "--traces=t.jsonl", f"--teacher={server.url}"]
    done = call(*options, cwd=tmp_path, OPENAI_API_KEY=KEY + "\r\nX: 1")
    assert done.returncode == 2 and "holds characters that no key has" in done.stderr and KEY not in done.stderr
    done = call(*options, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot be reached" in done.stderr and server.url in done.stderr


def test_a_question_that_a_server_refuses_is_passed_over_and_asked_again(tmp_path, asks):
    questions, server = [f"{i}?" for i in range(12)], Server({f"{i}?": [code] * 99 for i, code in ((0, 400), (3, 413), (4, 422))})
    lines = asks(server, questions)
    assert Counter(t["finish"] for t in lines) == {"stop": 9, "HTTP 400": 1, "HTTP 413": 1, "HTTP 422": 1}
    assert [t["question"] for t in lines] == questions and len(server.asked) == 12
    assert len(asks(server, questions)) == 12 + 3 and server.asked[12:] == ["0?", "3?", "4?"]  # no end of the run either
    server.trouble = {}
    assert [(t["question"], t["finish"]) for t in asks(server, questions)[15:]] == [("0?", "stop"), ("3?", "stop"), ("4?", "stop")]
    (tmp_path / "t.jsonl").unlink()
    for n, asked in ((3, 3), (12, 8)):  # a server that refuses everything is asked for no more, and nothing is written
        server = Server({q: [400] * 99 for q in questions})
        with pytest.raises(InputError, match=r"HTTP 400 .*check --teacher, which ends in /v1, and --teacher_model"):
            asks(server, questions[:n])
        assert asked <= len(server.asked) <= asked + 1 and lines_of(tmp_path / "t.jsonl") == []
    server.trouble = {"2?": [404] * 9}
    with pytest.raises(InputError, match="HTTP 404"):
        asks(server, questions)
    assert len(lines_of(tmp_path / "t.jsonl")) == 2


def test_what_a_server_is_asked_for_can_be_added_to(tmp_path, asks):
    server = Server()
    (line,) = asks(server, ["1?"], '--teacher_body={"max_tokens": null, "max_completion_tokens": 9, "top_p": 0.5}')
    (body,) = server.bodies
    assert "max_tokens" not in body and body["max_completion_tokens"] == 9 and body["top_p"] == 0.5 and body["model"] == "parrot"
    assert line["teacher"] == f'parrot at {server.url} with {{"max_completion_tokens": 9, "max_tokens": null, "top_p": 0.5}}'
    with pytest.raises(InputError, match="t.jsonl holds answers of parrot at .* with .*, not of parrot at"):
        asks(server, ["1?"])  # other answers
    with pytest.raises(SystemExit):
        asks(server, ["1?"], "--teacher_body=[1]")


def test_a_reply_without_choices_is_asked_for_again(asks):
    overloaded = {"error": {"message": "overloaded, try again", "code": 502}}
    server = Server({"1?": [overloaded, {"choices": None}, []], "2?": [overloaded] * 6})
    lines = asks(server, ["1?", "2?", "3?"])
    assert [t["finish"] for t in lines] == ["stop", "unusable reply", "stop"]
    assert server.asked == ["1?"] * 3 + ["2?"] * 6 + ["3?"]
    assert asks(server, ["1?", "2?", "3?"])[3]["finish"] == "stop" and server.asked[10:] == ["2?"]


def test_pauses_grow_whatever_the_server_asks_for(asks):
    asks(Server({"1?": [429] * 5}), ["1?"])  # with Retry-After: 0
    assert [round(wait / 0.5 / 2**i) for i, wait in enumerate(asks.waits)] == [1] * 5
    assert [retry_after({"Retry-After": value}) for value in ("7", " 7 ", "", "soon", "\xb2", "-3")] == [7, 7, 0, 0, 0, 0]
    waits = [retry_after({"Retry-After": f"Wed, 21 Oct {year} 07:28:00 GMT"}) for year in (99999, 2015, 2500)]
    assert waits[:2] == [0, 0] and waits[2] > 1e9


def test_nothing_that_a_server_sends_is_a_bug_here(asks):
    good = b'{"choices": [{"message": {"content": "#### 7"}, "finish_reason": "%s"}], "usage": {"completion_tokens": %s}}'
    trouble = {"1?": ["reset"], "2?": [good % (b"stop", b"1e999")], "3?": [b"[" * 200_000], "4?": [good % (b"stop", b"9" * 400)],
               "5?": [good % (b"\\ud800", b"null")], "6?": [b'{"choices": [{"message": 5}]}'],
               "7?": [(good % (b"", b"5")).replace(b'""', b"null")], "8?": [good % (b"eos_token", b"5")],
               "9?": [good % (b"STOP", b"5")]}  # fmt: skip
    server = Server(trouble)
    lines = asks(server, ["0?", *trouble])
    assert [t["finish"] for t in lines] == ["stop", "HTTP 400", "stop", "stop", "stop", "finish_reason ?", *["stop"] * 4]
    assert [t["tokens"] for t in lines] == [5, 0, 0, 5, 1 << 40, 0, 5, 5, 5, 5]
    server.models = 200, {"data": [{"id": 1}, {"id": None}]}
    with pytest.raises(InputError, match=r"has 2 models \(1, None\): choose one with --teacher_model"):
        ServerTeacher(server.url, None, 1)


def test_the_key_is_never_printed(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for before in (0, 165):  # in the middle of a message and where it is cut
        server = Server()
        server.models = lambda sent, before=before: (401, {"error": "!" * before + f"Incorrect API key provided: {sent}"})
        with pytest.raises(InputError, match=r"HTTP 401 .*put the key into OPENAI_API_KEY") as caught:
            ServerTeacher(server.url, None, 1)
        assert "sk-" not in str(caught.value) and ("Bearer ***" in str(caught.value) or before)
    for url in ("http://user:sk-x\u2100@localhost:1/v1", "http://localhost:1/v1#sk-x", "http://localhost:sk-x/v1", "HTTP://me:sk-x@host/v1",
                "http://localhost:1/v1?key=sk-x"):  # fmt: skip
        with pytest.raises(InputError, match="no web address|holds more than an address: a key belongs into OPENAI_API_KEY") as caught:
            distill.teachers.open_teacher(url, "cpu", 1, None, 1)
        assert "sk-" not in str(caught.value)


def test_old_answers_are_judged_by_the_problems_of_now(asks, capsys):
    server = Server()
    old = asks(server, ["1?", "2?"], number=8)
    assert [t["correct"] for t in old] == [False, False] and "temperature than" not in capsys.readouterr().out
    assert asks(server, ["1?", "2?", "3?"], "--temperature=0.5")[:2] == old  # what is in the file stays
    said = capsys.readouterr().out
    assert "3 of 3 answers right" in said and "traces: 2 of them were made at another temperature than the 0.5 of now" in said


def test_a_full_disk_is_named_with_the_file(tmp_path):
    write_problems(tmp_path / "p.jsonl", [{"question": f"{i}?", "answer": "#### 7"} for i in range(20)])
    write_problems(tmp_path / "v.jsonl", [{"question": "x", "answer": "#### 1"}])
    command = [sys.executable, ROOT / "distill.py", "--trace", f"--teacher={Server().url}", "--problems=p.jsonl", "--eval", "v.jsonl"]
    limits = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
    done = subprocess.run([*command, "--traces=t.jsonl"], cwd=tmp_path, capture_output=True, text=True, check=False, **limits)
    assert done.returncode == 2 and done.stderr == "error: t.jsonl: File too large: free some space or write elsewhere\n"


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
    line = '{"key": "a", "sample": 0, "question": "1?", "answer": "#### 1", "final": "1", "correct": true, "finish": "stop", "tokens": 3'
    path.write_text(f'{line}, "teacher": "x"}}\n{line.replace("0", "1")}, "teacher": "x"}}\n{{"key": "b", "sam')
    assert list(read_traces(path, "x")) == [("a", 0), ("a", 1)]
    with pytest.raises(InputError, match="holds answers of x, not of y: remove it or name another --traces"):
        read_traces(path, "y")
    good = json.loads(line + ', "teacher": "x"}')
    wrong = [("tokens", None), ("answer", None), ("question", 5), ("correct", 1), ("max_new_tokens", None), ("sample", []),
             ("answer", "\ud800")]  # fmt: skip
    edited = [json.dumps(good | {name: value}) for name, value in wrong]
    for other in ("[]", "5", line + "}", '{"key": "a", "sample": 0}', "[" * 99999, *edited):
        path.write_text(other + "\n")
        with pytest.raises(InputError, match=r"t.jsonl:1: not a trace"):
            read_traces(path, None)
    with pytest.raises(InputError, match="--traces=typo.jsonl does not exist"):
        read_traces(tmp_path.relative_to(tmp_path) / "typo.jsonl", None)


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
