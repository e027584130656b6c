"""Who answers a word problem: teachers, and files of their answers.

A teacher is a Qwen3 folder or hub id of Hugging Face, any server that speaks OpenAI's chat completions (vLLM, Ollama, llama.cpp),
or a checkpoint of this project; distill.py asks it and evaluates students with the same code.

    teacher = open_teacher("http://localhost:8000/v1", "cpu", 1, None, concurrency=16)
    for job, answer in teacher.answers([Job("first", 0, "What is 6 * 7?")], 0.0, 512, 0): print(job.question, answer.text)
"""

import contextlib
import datetime
import email.utils
import fcntl
import http.client
import json
import math
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from checkpoint import find_checkpoint, for_writing, load_model
from exact_match import Problem, final_number, problem_key
from huggingface import read_json
from model import Flow, generate
from prepare import chat_ids, conversation_ids
from scripts import InputError, locked
from sources import hub_errors

# What an instruct model is asked to do; a checkpoint of this project gets the question alone, as it was trained.
INSTRUCTION = "Solve the problem step by step, one short sentence per step. End with a line of #### and the final number, without unit."
KEY = "OPENAI_API_KEY"  # the environment variable a server's key is taken from, the only place
FINISHED = ("stop", None, "eos", "eos_token", "end_turn", "stop_sequence")  # how servers say that an answer has come to its end
ATTEMPTS, BACKOFF, LONGEST_WAIT, TIMEOUT = 6, 0.5, 60.0, 600.0  # tries; seconds: first wait (doubles), longest, reply


class Job(NamedTuple):
    """One answer to ask for."""

    key: str  # problem_key(question)
    sample: int
    question: str


class Answer(NamedTuple):
    text: str
    tokens: int  # made for it; 0 if a server does not say
    finish: str  # "stop", "length" (cut off), or why there is no text


# --------------------------------------------------------------------------------------------------------------- teachers


def check_tokenizer(where, tokenizer: Tokenizer, vocab_size: int):
    """InputError unless this tokenizer can be the model's: it makes no token the model does not know, and can write a chat."""
    size = tokenizer.get_vocab_size()
    if size > vocab_size:
        raise InputError(f"{where}: its tokenizer has {size:,} tokens, the model {vocab_size:,}: they do not belong together")
    missing = [token for token in ("<|im_start|>", "<|im_end|>") if tokenizer.token_to_id(token) is None]
    if missing:
        raise InputError(f"{where}: its tokenizer has no {missing[0]}: expected a chat model in ChatML, such as Qwen3's")


def question_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    """The tokens of a question up to where the answer begins, as a new document: the same for training, evaluation and teaching."""
    return conversation_ids(tokenizer, [{"role": "user", "content": question}])


def instruct_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    """The same for an instruct model of others, which has to be told how to answer."""
    return chat_ids(tokenizer, [{"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}], open_turn=True)


class LocalTeacher:
    """A Flow or Pulse in this process, which answers batch_size questions at a time."""

    def __init__(self, model, tokenizer: Tokenizer, stop_ids: Sequence[int], name: str, batch_size: int, encode: Callable = question_ids):
        self.model, self.tokenizer, self.stop_ids, self.name = model, tokenizer, set(stop_ids), name
        self.encode, self.batch_size = encode, batch_size

    def answers(self, jobs: list[Job], temperature: float, max_new_tokens: int, seed: int) -> Iterator[tuple[Job, Answer]]:
        """The answers to all jobs, each as soon as it ends, at the latest where the model's context does. Greedy ones are those each
        question would get alone."""
        prompts = {job.key: self.encode(self.tokenizer, job.question) for job in jobs}
        limit = getattr(self.model.config, "max_seq_len", math.inf)  # Pulse has none
        room = {key: min(max_new_tokens, limit - len(prompt)) for key, prompt in prompts.items()}
        yield from ((job, Answer("", 0, "length")) for job in jobs if room[job.key] <= 0)
        jobs = [job for job in jobs if room[job.key] > 0]
        jobs.sort(key=lambda job: len(prompts[job.key]))  # rows of a batch wait for the longest prompt
        for i in range(0, len(jobs), self.batch_size):
            batch = jobs[i : i + self.batch_size]
            torch.manual_seed(zlib.crc32(f"{seed} {batch[0].key} {batch[0].sample}".encode()))  # other samples after a restart
            made: list[list[int]] = [[] for _ in batch]
            options = dict(temperature=temperature, stop_ids=list(self.stop_ids))
            longest = max(room[job.key] for job in batch)
            for step in generate(self.model, [prompts[job.key] for job in batch], longest, **options):
                for job, ids, token in zip(batch, made, step.tolist()):
                    if token < 0 or len(ids) == room[job.key]:
                        continue
                    ids.append(token)
                    ended = token in self.stop_ids
                    if ended or len(ids) == room[job.key]:
                        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
                        yield job, Answer(text, len(ids), "stop" if ended else "length")


def checkpoint_teacher(path: Path, device, batch_size: int) -> LocalTeacher:
    """A checkpoint of this project; its name holds a checksum of the weights, so that a model trained further is another teacher."""
    model, tokenizer, _ = load_model(path, device)
    check_tokenizer(path, tokenizer, model.config.vocab_size)
    name = f"{path}@{weights_checksum(model):08x}"  # of the file, whatever the precision it writes in here
    model = for_writing(model)
    stop_ids = [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")]
    return LocalTeacher(model, tokenizer, stop_ids, name, batch_size)


def files_checksum(folder: Path) -> int:
    """Of the weights of a Hugging Face folder, whatever the precision they are computed with here."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                total = zlib.crc32(block, total)
    return total


def weights_checksum(model) -> int:
    total = 0
    for tensor in model.state_dict().values():
        total = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), total)
    return total


def pretrained_teacher(folder: Path, name: str, device, batch_size: int) -> LocalTeacher:
    """A Qwen3 folder of Hugging Face with its own tokenizer; bf16, except on a CPU."""
    try:
        model = Flow.from_pretrained(folder, torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
        if not (folder / "tokenizer.json").exists():
            raise FileNotFoundError(f"{folder / 'tokenizer.json'} is missing: download the folder again")
        generation, main = (read_json(path) if (path := folder / file).exists() else {}
                            for file in ("generation_config.json", "config.json"))  # fmt: skip
    except (ValueError, KeyError, TypeError, FileNotFoundError) as problem:
        why = f"{folder}/config.json lacks {problem}" if isinstance(problem, KeyError) else " ".join(str(problem).split())
        raise InputError(f"{why}: --teacher takes Qwen3 folders, servers and checkpoints") from problem
    try:
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except Exception as problem:  # tokenizers raises bare Exceptions for a file that is not its own
        raise InputError(f"{folder}/tokenizer.json is no tokenizer ({problem}): download the folder again") from problem
    check_tokenizer(folder, tokenizer, model.config.vocab_size)
    ends = generation.get("eos_token_id", main.get("eos_token_id")) or tokenizer.token_to_id("<|im_end|>")
    stop_ids = ends if isinstance(ends, list) else [ends]
    if not all(type(token) is int for token in stop_ids):
        raise InputError(f"{folder}/generation_config.json: eos_token_id is {ends}, expected a number or a list: download it again")
    return LocalTeacher(model.to(device).eval(), tokenizer, stop_ids, name, batch_size, instruct_ids)


def made_here(folder: Path) -> bool:
    """Whether a Hugging Face folder is one of convert.py: its model is asked as the checkpoint was that it was made of."""
    try:
        return read_json(folder / "config.json").get("made_by") == "SLMS"
    except ValueError:
        return False  # the reader of other folders says what is wrong


def hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download

    with hub_errors(f"{name} is no file or folder here, and from the hub", ValueError):
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))


def open_teacher(teacher: str, device, batch_size: int, server_model: str | None, concurrency: int, more: dict | None = None):
    """What --teacher means, ready to answer: http(s)://.../v1, a Hugging Face folder, a checkpoint or run folder, or a hub id."""
    if teacher.lower().startswith(("http://", "https://")):
        return ServerTeacher(teacher, server_model, concurrency, more)
    path = Path(teacher)
    if (path / "config.json").exists() and not made_here(path):
        return pretrained_teacher(path, f"{path}@{files_checksum(path):08x}", device, batch_size)
    if path.exists() or teacher.count("/") != 1:
        if not path.exists():
            raise InputError(f"--teacher={teacher} does not exist: name a folder, a checkpoint, a hub id or http://host:port/v1")
        return checkpoint_teacher(find_checkpoint(teacher), device, batch_size)
    return pretrained_teacher(hub_folder(teacher), teacher, device, batch_size)


# ----------------------------------------------------------------------------------------------------------------- server


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_):
        return None


class Retry(Exception):
    """A request that may succeed later; holds the seconds the server asks to wait."""

    def __init__(self, why: str, wait: float = 0.0):
        super().__init__(why)
        self.wait = wait


class Refused(InputError):
    """A question the server will not answer, while it may answer others; holds the HTTP status."""

    def __init__(self, why: str, code: int):
        super().__init__(why)
        self.code = code


def retry_after(headers) -> float:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; 0 if it says nothing that can be read."""
    value = headers.get("Retry-After", "").strip()
    try:
        return float(value) if value.isdecimal() else max(0.0, email.utils.mktime_tz(email.utils.parsedate_tz(value)) - time.time())
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0


def quoted(text: str, key: str) -> str:
    """What a server said, for an error message: one short line without the key, which some servers repeat when they refuse it."""
    return " ".join((text.replace(key, "***") if key else text).split())[:200]


class ServerTeacher:
    """An OpenAI-compatible server, asked `concurrency` questions at a time. `more` joins what is asked for; None takes a field out."""

    def __init__(self, url: str, model: str | None, concurrency: int, more: dict | None = None):
        try:
            parts = urllib.parse.urlsplit(url)
            host, _ = parts.hostname, parts.port  # a port is first looked at when it is asked for
        except ValueError:  # whose text repeats what may be a key
            raise InputError("--teacher is no web address: expected one such as http://host:port/v1") from None
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InputError(f"--teacher={parts.scheme}://{host}... holds more than an address: a key belongs into {KEY}")
        self.url, self.concurrency, self.failed = url.rstrip("/"), concurrency, threading.Event()
        self.opener = urllib.request.build_opener(NoRedirect)
        try:
            models = self.request("models")
        except Retry as problem:
            raise InputError(f"{self.url} cannot be reached ({problem}): start the server or mend the address") from None
        try:
            names = [str(entry["id"]) for entry in models["data"]]
        except (KeyError, TypeError):
            raise InputError(f"{self.url}/models is no list of models: expected an OpenAI-compatible address that ends in /v1") from None
        if model is None and len(names) != 1:
            raise InputError(f"{self.url} has {len(names)} models ({', '.join(names[:8])}): choose one with --teacher_model")
        self.model = model or names[0]
        self.more = more or {}
        self.name = f"{self.model} at {self.url}" + (f" with {json.dumps(self.more, sort_keys=True)}" if self.more else "")

    def request(self, path: str, body: dict | None = None):
        """The JSON that the server answers. Raises Retry for what may pass, Refused for this body, InputError for what will not."""
        headers, key = {"Content-Type": "application/json"}, os.environ.get(KEY, "").strip()
        if key:
            if not (key.isascii() and key.isprintable()):  # http.client would print it with its complaint
                raise InputError(f"{KEY} holds characters that no key has: set it again")
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode() if body else None, headers)
        try:
            with self.opener.open(request, timeout=TIMEOUT) as response:
                return json.load(response)
        except urllib.error.HTTPError as problem:
            if problem.code in (408, 409, 425, 429) or problem.code >= 500:
                raise Retry(f"HTTP {problem.code}", retry_after(problem.headers)) from None
            said = b""
            with contextlib.suppress(OSError, http.client.HTTPException):  # a reply cut short: the status says enough
                said = problem.read(1 << 16)
            hint = f"put the key into {KEY}" if problem.code in (401, 403) else "check --teacher, which ends in /v1, and --teacher_model"
            why = f"{self.url}/{path}: HTTP {problem.code} ({quoted(said.decode(errors='replace'), key)}): {hint}"
            raise (Refused(why, problem.code) if problem.code in (400, 413, 422) else InputError(why)) from None
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as problem:  # refused, cut, timed out, no JSON
            raise Retry(quoted(str(getattr(problem, "reason", problem)), key) or type(problem).__name__) from None

    def ask(self, job: Job, temperature: float, max_new_tokens: int, seed: int) -> Answer:
        content = f"{job.question}\n\n{INSTRUCTION}"
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": temperature,
                "max_tokens": max_new_tokens, "seed": zlib.crc32(f"{seed} {job.key} {job.sample}".encode()) >> 1}  # fmt: skip
        body = {name: value for name, value in (body | self.more).items() if value is not None}
        for attempt in range(1, ATTEMPTS + 1):
            last, wait = attempt == ATTEMPTS or self.failed.is_set(), 0.0
            try:
                reply = self.request("chat/completions", body)
                choice = reply["choices"][0]
                text, finish = choice["message"]["content"], choice.get("finish_reason")
                break
            except Refused as problem:
                self.refusal = problem
                return Answer("", 0, f"HTTP {problem.code}")
            except Retry as problem:
                if last:
                    remedy = "what has come is kept: give the same command again when the server is well"
                    raise InputError(f"{self.url} failed {attempt} times in a row ({problem}): {remedy}") from None
                wait = problem.wait
            except (KeyError, IndexError, TypeError, AttributeError):  # such as {"error": ...} in a reply that calls itself good
                if last:
                    return Answer("", 0, "unusable reply")
            # Jitter, so that the requests refused together do not come back together.
            time.sleep(min(max(wait, BACKOFF * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)), LONGEST_WAIT))
        try:
            tokens = max(0, min(int(reply["usage"]["completion_tokens"]), 1 << 40))  # a server can say any number
        except (KeyError, TypeError, ValueError, OverflowError):
            tokens = 0
        if not isinstance(text, str) or not text.strip():
            return Answer("", tokens, "empty reply")
        text = text.encode(errors="replace").decode()  # half a surrogate pair, which JSON can spell, is no text
        finish = finish.lower() if isinstance(finish, str) else finish  # "STOP" is said too
        finish = "stop" if finish in FINISHED else finish
        return Answer(text, tokens, finish if finish in ("stop", "length") else f"finish_reason {finish}")

    def answers(self, jobs: list[Job], temperature: float, max_new_tokens: int, seed: int) -> Iterator[tuple[Job, Answer]]:
        """The answers to all jobs in the order they come. Raises InputError when the server refuses or stays away."""
        todo, done = queue.SimpleQueue(), queue.SimpleQueue()
        self.failed.clear()
        for job in jobs:
            todo.put(job)

        def work():
            try:
                while not self.failed.is_set():
                    job = todo.get_nowait()
                    done.put((job, self.ask(job, temperature, max_new_tokens, seed)))
            except queue.Empty:
                return
            except Exception as problem:  # raised again by the reader below; the others finish what they are asking
                self.failed.set()
                done.put(problem)
            finally:
                done.put(None)

        working, failure = min(self.concurrency, len(jobs)), None
        for _ in range(working):
            threading.Thread(target=work, daemon=True).start()  # daemon: Ctrl-C does not wait for a slow server
        try:
            while working:
                item = done.get()
                if item is None:
                    working -= 1
                elif isinstance(item, Exception):
                    failure = failure or item
                else:
                    yield item
        finally:
            self.failed.set()  # nothing more is asked when no more is wanted
        if failure is not None:
            raise failure


# ----------------------------------------------------------------------------------------------------------------- traces


TRACE = {"key": str, "sample": int, "question": str, "answer": str, "final": str | None, "correct": bool, "finish": str, "tokens": int,
         "teacher": str}  # what a line is read for
REFUSALS = 8  # HTTP 400, 413 or 422 for so many questions and no answer to any: the command is at fault, not the questions


def read_traces(path: Path, teacher: str | None) -> dict[tuple[str, int], dict]:
    """(problem key, sample) -> line of a traces file; a last line that a kill cut short is left out.

    Raises InputError for a malformed line, and when another teacher made the file than the one named.
    """
    traces = {}
    if teacher is None and not path.exists():
        raise InputError(f"--traces={path} does not exist: name a file of answers, or a --teacher to ask")
    text = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
        try:
            trace = json.loads(line)
            whole = all(isinstance(trace[name], kind) for name, kind in TRACE.items())
            if not whole or not isinstance(trace.get("max_new_tokens", 0), int):
                raise TypeError
            (trace["question"] + trace["answer"]).encode()  # raises: JSON can spell half a character
            traces[trace["key"], trace["sample"]] = trace
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise InputError(f"{path}:{number}: not a trace of distill.py: remove the line or name another --traces") from None
        if teacher is not None and trace["teacher"] != teacher:
            raise InputError(f"{path} holds answers of {trace['teacher']}, not of {teacher}: remove it or name another --traces")
    return traces


def cut_short(trace: dict | None, max_new_tokens: int) -> bool:
    """Is there no answer, one that a server left out or refused, or one that ended at a lower limit than max_new_tokens?"""
    if trace is None or trace["finish"] not in ("stop", "length") and not trace["answer"].strip():
        return True
    return trace["finish"] == "length" and trace.get("max_new_tokens", max_new_tokens) < max_new_tokens


@contextlib.contextmanager
def appending(path: Path):
    """A file to append to, for one process at a time. An OSError names it: a failed write does not say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "ab") as file:
            if not locked(fcntl.flock, file):  # not lockf, whose lock ends when any handle of the file is closed
                raise InputError(f"{path} is being written by another distill.py: wait for it or name another --traces")
            yield file
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def make_traces(path: Path, teacher, problems: list[Problem], args, say) -> dict[tuple[str, int], dict]:
    """Ask the teacher for every answer that is not in the file yet and append it there. Returns all, as read_traces does, judged by
    the problems of now."""
    numbers = {problem_key(problem.question): problem.number for problem in problems}
    temperature = (0.0 if args.samples == 1 else 0.7) if args.temperature is None else args.temperature
    with appending(path) as file:
        traces = read_traces(path, teacher.name)
        whole = path.read_bytes()
        if whole and not traces and not whole.startswith(b'{"key": "'):  # not a first line that was cut short either
            raise InputError(f"{path} is not a file of answers: name another --traces")
        file.truncate(whole.rfind(b"\n") + 1)  # half a line of a run that was killed
        jobs = [Job(problem_key(p.question), k, p.question) for p in problems for k in range(args.samples)]
        missing = [job for job in jobs if cut_short(traces.get((job.key, job.sample)), args.max_new_tokens)]
        say(f"traces: {len(jobs) - len(missing):,} of {len(jobs):,} answers are in {path}; teacher {teacher.name}")
        old = [traces[job.key, job.sample].get("temperature", temperature) for job in set(jobs).difference(missing)]
        if others := sum(t != temperature for t in old):
            say(f"traces: {others:,} of them were made at another temperature than the {temperature:g} of now")
        refused_before = {place for place, trace in traces.items() if trace["finish"].startswith("HTTP ")}
        waiting, answered = [], False  # refusals wait for an answer: without any nothing is written
        began, tokens, told = time.perf_counter(), 0, time.perf_counter()
        for n, (job, answer) in enumerate(teacher.answers(missing, temperature, args.max_new_tokens, args.seed), 1):
            made = {"teacher": teacher.name, "temperature": temperature, "max_new_tokens": args.max_new_tokens}
            waiting.append(trace_of(job, answer, numbers[job.key]) | made)
            answered = answered or not answer.finish.startswith("HTTP ")
            if not answered and sum((t["key"], t["sample"]) not in refused_before for t in waiting) >= REFUSALS:
                raise teacher.refusal
            if answered or n == len(missing) and any(trace["answer"] for trace in traces.values()):
                file.write(b"".join(json.dumps(trace, ensure_ascii=False).encode(errors="replace") + b"\n" for trace in waiting))
                file.flush()
                traces |= {(trace["key"], trace["sample"]): trace for trace in waiting}
                waiting = []
            tokens += answer.tokens
            if time.perf_counter() - told > 10 or n == len(missing):
                told = time.perf_counter()
                rate = n / (told - began)
                eta = datetime.timedelta(seconds=round((len(missing) - n) / rate))
                say(f"traces: {n:,}/{len(missing):,}  {tokens / (told - began):,.0f} tokens/s  eta {eta}", flush=True)
        if waiting:
            raise teacher.refusal
    judged = {}
    for job in jobs:
        trace = traces[job.key, job.sample]
        judged[job.key, job.sample] = trace | trace_of(job, Answer(trace["answer"], trace["tokens"], trace["finish"]), numbers[job.key])
    return judged


def trace_of(job: Job, answer: Answer, number: Fraction) -> dict:
    """One line of a traces file; `question` and `answer` are the fields of a problem file."""
    final = final_number(answer.text)
    return {
        "key": job.key, "sample": job.sample, "question": job.question, "answer": answer.text, "reference": str(number),
        "final": None if final is None else str(final), "correct": final == number, "finish": answer.finish, "tokens": answer.tokens,
    }  # fmt: skip


def chosen_traces(traces: dict, keep: str, say) -> list[tuple[str, str]]:
    """(question, answer) of the traces to train on, each once: those that are right, or all; never one that was cut off, because its
    end would be learned as an end. Says what the teacher yielded."""
    lines = list(traces.values())
    ended = [t for t in lines if t["finish"] == "stop" and t["answer"].strip()]
    kept = [t for t in ended if t["correct"] or keep == "all"]
    pairs = list(dict.fromkeys((t["question"], t["answer"].strip()) for t in kept))
    n, tokens = max(1, len(lines)), sum(t["tokens"] for t in lines)
    right, silent = sum(t["correct"] for t in lines), sum(t["final"] is None for t in lines)
    say(f"traces: {right:,} of {len(lines):,} answers right ({right / n:.1%}), {silent:,} without a final number, "
        f"{len(lines) - len(ended):,} cut off or empty; {tokens:,} tokens, {tokens / n:.0f} per answer")  # fmt: skip
    questions = len({t["key"] for t in kept})
    say(f"traces: {len(kept):,} kept (--keep={keep}), {len(pairs):,} of them different, for {questions:,} questions")
    return pairs
