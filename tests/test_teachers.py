"""teachers.py: problem files, traces, and a loopback server that is slow, refuses, fails and hangs up."""

import gzip
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, call_distill as call, distill_works as works, lines_of, write_problems

from exact_match import final_number
from prepare import InputError
from teachers import Problem, chosen_traces, read_problems, read_traces

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
    lines = lines_of(tmp_path / "t.jsonl")
    lines[0] |= {"finish": "length", "max_new_tokens": 5}  # a short try; the same at the limit of now is not asked again
    lines[1] |= {"finish": "length", "max_new_tokens": 512}
    write_problems(tmp_path / "t.jsonl", lines)
    works(*command, "--traces=t.jsonl", cwd=tmp_path)
    assert server.asked[asked:] == [lines[0]["question"]]
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
    done = call(*options, f"--teacher={server.url}", cwd=tmp_path, OPENAI_API_KEY=KEY + "\r\n")
    assert done.returncode == 2 and "HTTP 401" in done.stderr and "OPENAI_API_KEY" in done.stderr and KEY not in done.stderr
    done = call(*options, f"--teacher={server.url}", cwd=tmp_path, OPENAI_API_KEY=KEY + "\r\nX: 1")
    assert done.returncode == 2 and "holds characters that no key has" in done.stderr and KEY not in done.stderr
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
    line = '{"key": "a", "sample": 0, "question": "1?", "answer": "#### 1", "final": "1", "correct": true, "finish": "stop", "tokens": 3'
    path.write_text(f'{line}, "teacher": "x"}}\n{line.replace("0", "1")}, "teacher": "x"}}\n{{"key": "b", "sam')
    assert list(read_traces(path, "x")) == [("a", 0), ("a", 1)]
    with pytest.raises(InputError, match="holds answers of x, not of y: remove it or name another --traces"):
        read_traces(path, "y")
    for other in ("[]", "5", line + "}", '{"key": "a", "sample": 0}'):
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
