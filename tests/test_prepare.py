"""From raw text to shards: reading, cleaning, copies, splits, tokenizer, shards, and what happens when something goes wrong."""

import gzip
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, documents, make, prose, random_text, tokens, write_jsonl
from tokenizers import Tokenizer

import clean
import corpus
import prepare
import sources

pytestmark = pytest.mark.usefixtures("one_process")


def script(*args, cwd, prefix=(), env=None):
    command = [sys.executable, *prefix, str(ROOT / "prepare.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=env)


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    return prepare.train_tokenizer([prose(rng, 2000), "Der Bär fraß 12 Äpfel.\n漢字かな\n"], 400)


# ---- tokenizer and chat ----


def test_tokenizer_round_trip(tokenizer):
    rng = random.Random(1)
    for _ in range(200):
        raw = bytes(rng.randrange(256) for _ in range(60)).decode(errors="replace")
        for text in (raw, random_text(rng)):
            ids = prepare.plain_ids(tokenizer, text)
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
            assert prepare.token_bytes(tokenizer)[ids].sum() == len(text.encode())
    assert [tokenizer.token_to_id(token) for token in prepare.SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert prepare.token_bytes(tokenizer)[:4].tolist() == [0] * 4
    assert len(prepare.plain_ids(tokenizer, "2026")) == 4, "digits are single tokens"


def words(tokenizer, text):
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_a_tokenizer_that_is_there_is_taken_over(tmp_path, capsys):
    rng = random.Random(30)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(prose(rng, 3000))
    make("a.txt", out="first")
    for given in ("first", "first/tokenizer.json"):
        prepare.main(["b.txt", f"--tokenizer={given}", "--out=second"])
        assert Path("second/tokenizer.json").read_bytes() == Path("first/tokenizer.json").read_bytes()
        assert prepare.load_meta("second")["vocab_size"] == 300 and documents("second", 1, "train")[0] in Path("b.txt").read_text()
    foreign = json.loads(Path("first/tokenizer.json").read_text())
    Path("other.json").write_text(json.dumps(foreign | {"pre_tokenizer": None}))
    Path("no.json").write_text("{}")
    for options, message in (
        (["--tokenizer=nowhere"], "--tokenizer=nowhere does not exist: name a tokenizer.json"),
        (["--tokenizer=other.json"], "--tokenizer=other.json is not one of prepare.py (pre_tokenizer): leave it out"),
        (["--tokenizer=no.json"], "--tokenizer=no.json is not a tokenizer ("),
        (["--tokenizer=first", "--vocab_size=300"], "argument --vocab_size: not allowed with argument --tokenizer"),
    ):
        with pytest.raises(SystemExit):
            prepare.run(lambda options=options: prepare.main(["b.txt", "--out=third", *options]))
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not Path("third").exists()


def test_a_word_without_end_costs_no_more_than_others(tokenizer):
    """Learning from it would take the square of its length: these 200,000 letters over three minutes."""
    rng = random.Random(31)
    text = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(200_000))
    parts = list(prepare.sample_texts([text], len(text), 300))
    assert "".join(parts).replace("\n", "") == text and max(len(part) for word in parts for part in word.split()) <= 1024


def test_text_in_segments_gives_the_same_tokens(tokenizer, monkeypatch):
    rng = random.Random(2)
    for segment in (1, 7, 50):
        monkeypatch.setattr(prepare, "SEGMENT", segment)
        for i in range(40):
            text = random_text(rng).replace("<|im_end|>", "") if i % 2 else prose(rng, 50)
            segments = list(prepare.segments(text))
            assert "".join(segments) == text and (len(segments) > 1 or i % 2)
            assert [i for part in segments for i in tokenizer.encode(part).ids] == tokenizer.encode(text).ids
            assert [word for part in segments for word in words(tokenizer, part)] == words(tokenizer, text)


@pytest.mark.parametrize("most", [0, 50, 10**6], ids=["forgets_at_once", "forgets", "remembers"])
def test_words_encoded_one_by_one_give_the_tokens_of_the_whole(tokenizer, monkeypatch, most):
    monkeypatch.setattr(prepare.Encoder, "MOST", most)
    rng, encoder, split = random.Random(3), prepare.Encoder(tokenizer.to_str()), 0
    signs = [*"  \n\n\t\r\x1c\x85\xa0\u2028.-aé漢7²\u0301", "'s", "<|im_end|>"]
    for i in range(2000):
        texts = [prose(rng, 20) if i % 10 == 0 else "".join(rng.choices(signs, k=rng.randrange(20))) for _ in range(4)]
        pieces = [encoder.PIECE.findall(text) for text in texts]
        assert ["".join(parts) for parts in pieces] == texts
        for text, parts in zip(texts, pieces):  # the words, not only the tokens: whether words merge depends on the tokenizer
            if "<|im_end|>" not in text:
                assert [word for part in parts for word in words(tokenizer, part)] == words(tokenizer, text)
        split += sum(map(len, pieces))
        assert encoder(texts).tolist() == [i for text in texts for i in [*tokenizer.encode(text).ids, 0]]
        assert sum(len(piece) for piece in encoder.known if piece) == encoder.size < most + 2000
    assert split > 4 * 2000 and (len(encoder.known) > 1000) == (most == 10**6)


@pytest.mark.parametrize("batch", [100, 10**9], ids=["in_processes", "in_this_one"])
def test_encoding_keeps_the_order_of_the_texts(tokenizer, monkeypatch, batch):
    monkeypatch.setattr(prepare, "BATCH", batch)
    rng = random.Random(2)
    texts = [random_text(rng) if i % 2 else prose(rng, 50) for i in range(40)] + [""]
    arrays = list(prepare.encode(texts, tokenizer.to_str()))
    assert (len(arrays) > 10) == (batch == 100)
    assert np.concatenate(arrays).tolist() == [i for text in texts for i in [*tokenizer.encode(text).ids, 0]]


def test_chat_ids(tokenizer):
    messages = [{"role": "user", "content": "What is\n 7 + 12?"}, {"role": "assistant", "content": "\n19\n"}]
    for open_turn in (False, True):
        text = prepare.render_chat(messages, open_turn)
        assert prepare.chat_ids(tokenizer, messages, open_turn) == tokenizer.encode(text).ids
    assert text == "<|im_start|>user\nWhat is\n 7 + 12?<|im_end|>\n<|im_start|>assistant\n\n19\n<|im_end|>\n<|im_start|>assistant\n"
    ids = prepare.chat_ids(tokenizer, [{"role": "user", "content": "<|im_end|><|endoftext|>"}])
    assert [i for i in ids if i < 4] == [1, 2], "markup inside a content is text"
    assert "<|im_end|><|endoftext|>" in tokenizer.decode(ids)
    with pytest.raises(prepare.InputError, match=r"'caf\\udce9' is not UTF-8 text"):
        prepare.plain_ids(tokenizer, "caf\udce9")
    assert not tokenizer.encode_special_tokens


# ---- cleaning ----


def test_what_is_dropped(tmp_path, capsys):
    rng = random.Random(7)
    good = [prose(rng, 80) for _ in range(60)]
    near = good[0].replace(good[0].split()[40], "otherwise")
    bad = {"empty": ["", " \n", "\ufeff"], "broken": ["f\ufffdr", "\x01\x02\x03 a", "=-=-" * 50, "a8F" * 40, "half \ud83d pair"],
           "repetitive": ["the same line again\n" * 9, "ha " * 50], "exact copy": [good[5] + "\n\n"], "near copy": [near, good[1].upper()]}
    texts = good + [text for group in bad.values() for text in group]
    write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts] + [{"text": None}])
    row = make("in.jsonl", out="out")["cleaning"][0]
    counts = {fate: row[fate] for fate in clean.FATES}
    assert counts == {**{fate: len(group) for fate, group in bad.items()}, "empty": 4, "kept": 60}
    assert row["documents"] == sum(counts.values()) and "near copy" in capsys.readouterr().out
    kept = documents("out", 1, "train") + documents("out", 1, "val")
    assert sorted(kept) == sorted(good)


# ---- splits ----


def test_tokenizer_never_sees_validation_text(tmp_path):
    (tmp_path / "book.txt").write_text("the cat sat on a mat and was glad of it\n" * 3 + prose(random.Random(12), 2000) + "qzqzqz " * 200)
    vocabulary = Tokenizer.from_str((make("book.txt", out="out"), Path("out/tokenizer.json").read_text())[1]).get_vocab()
    assert not any("zq" in token for token in vocabulary)


def builtin_stub(monkeypatch):
    rng = random.Random(13)
    texts = [prose(rng, 80) for _ in range(50)]

    def pairs(split, count, seed=0):
        names = {"train": "Ann", "val": "Bob", "test": "Cleo"}
        for i in range(count):
            yield {"question": f"{names[split]} has {i} apples and buys 1. How many?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"}

    def stub(phase):
        for i, text in enumerate(texts):
            yield ("val" if i < 4 else "train"), text
        yield "train", texts[0]  # a copy on the wrong side: validation wins
        if phase > 1:
            for split in ("train", "val"):
                yield from ((split, [pair] * (1 if phase == 2 else 3)) for pair in pairs(split, 20 if split == "train" else 4))

    monkeypatch.setattr(corpus, "documents", stub)
    monkeypatch.setattr(corpus, "problems", pairs)
    monkeypatch.setattr(corpus, "TRAIN_PROBLEMS", 20)
    monkeypatch.setattr(corpus, "VAL_PROBLEMS", 5)
    return texts


def test_builtin_corpus_is_the_default(monkeypatch, capsys):
    texts = builtin_stub(monkeypatch)
    prepare.main([])
    assert prepare.load_meta("data/builtin")["sources"] == {"1": ["builtin"], "2": ["builtin"], "3": ["builtin"]}
    assert documents("data/builtin", 1, "val") == texts[:4] and documents("data/builtin", 1, "train") == texts[4:]
    problem = "<|im_start|>user\nBob has 3 apples and buys 1. How many?<|im_end|>\n<|im_start|>assistant\n3 + 1 = 4\n#### 4<|im_end|>\n"
    assert problem in documents("data/builtin", 2, "val") and problem * 3 in documents("data/builtin", 3, "val")
    assert (tokens("data/builtin", 2, "train") == 1).sum() == 40, "chat markup is special tokens"
    assert json.loads(Path("data/builtin/problems_test.jsonl").read_text().splitlines()[4])["question"].startswith("Cleo has 4")
    out = capsys.readouterr().out
    assert "next: python train.py\n" in out and "warning: phase 3 val has" in out and "needs 2049" in out


def test_builtin_mixes_with_own_text(monkeypatch):
    texts = builtin_stub(monkeypatch)
    book = prose(random.Random(14), 1000)
    Path("book.txt").write_text(book)
    prepare.main(["--phase1", "book.txt", "builtin", "--vocab_size=300"])
    train, val = documents("data/book", 1, "train"), documents("data/book", 1, "val")
    assert set(val) == {*texts[:4], book[int(0.9 * len(book)) :]} and book[: int(0.9 * len(book))] in train
    assert set(texts[4:]) <= set(documents("data/book", 2, "train")), "phases without sources take the built-in corpus"
    prepare.main(["builtin", "--val", "book.txt", "--vocab_size=300"])
    assert documents("data/builtin", 3, "val") == [book]
    assert set(documents("data/builtin", 1, "train")) == {texts[0], *texts[4:]}, "its own validation documents stay out"


# ---- sources and shards ----


def test_hub_addresses(monkeypatch, tmp_path):
    from fsspec.implementations.dirfs import DirFileSystem

    class Hub(DirFileSystem):  # the part of HfFileSystem that is used, over a local folder
        def _join(self, path):
            return super()._join(path.removeprefix("hf://"))

        def find(self, path):
            return [str(found) for found in super().find(path)]

    data = tmp_path / "hub/datasets/me/set"
    data.mkdir(parents=True)
    text = prose(random.Random(16), 200)
    (data / "a.txt").write_text(text)
    write_jsonl(data / "b.jsonl", [{"text": text[::-1]}])
    monkeypatch.setattr(sources, "hub_filesystem", lambda: Hub(str(tmp_path / "hub")))
    (data / ".gitattributes").write_text("")
    (data / "c.json.gz").write_bytes(b"")
    said, files = [], ["hf://datasets/me/set/a.txt", "hf://datasets/me/set/b.jsonl"]
    assert [name for name, _ in sources.source_files("hf://datasets/me/set", said.append)] == files
    assert len(said) == 1 and said[0].startswith("hf://datasets/me/set: left out 1 of 3 files (1 .json.gz): only .txt")
    make("hf://datasets/me/set", out="all")
    assert "".join(documents("all", 1, "train") + documents("all", 1, "val")) == text + text[::-1]
    prepare.main(["hf://datasets/me/set/a.txt", "--vocab_size=300"])
    assert "".join(documents("data/a", 1, "train") + documents("data/a", 1, "val")) == text


def test_shards_that_are_too_short_are_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(prose(random.Random(34), 20_000))
    make("a.txt", "--shard_tokens=1500", out="out")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert said[0] == ("warning: phase 3 train has 1500 tokens in a shard, a window of phase 3 needs 2049: "
                       "raise --shard_tokens or lower --seq_len in training")


def test_shards_roll_over(tmp_path):
    rng = random.Random(18)
    (tmp_path / "a.txt").write_text("<|endoftext|>\n".join(prose(rng, 100) for _ in range(60)))
    make("a.txt", out="one")
    meta = make("a.txt", "--shard_tokens=1500", out="many")
    for split in ("train", "val"):
        assert np.array_equal(tokens("one", 1, split), tokens("many", 1, split))
        total = meta["phases"]["1"][split]
        headers = [prepare.read_shard(path, meta["vocab_size"])[0] for path in prepare.shard_paths("many", 1, split)]
        assert [h["n_tokens"] for h in headers[:-1]] == [1500] * (len(headers) - 1)
        for name, key in (("tokens", "n_tokens"), ("bytes", "n_bytes"), ("documents", "n_documents")):
            assert sum(h[key] for h in headers) == total[name]
        assert total["documents"] == len(documents("many", 1, split))
        assert total["bytes"] == sum(len(text.encode()) for text in documents("many", 1, split))
    assert len(meta["phases"]["1"]["train"]["shards"]) > 5
    fingerprint = prepare.tokenizer_fingerprint((tmp_path / "many/tokenizer.json").read_text())
    assert prepare.read_shard("many/phase1_val_00000.bin", fingerprint=fingerprint)[0]["fingerprint"] == fingerprint


# ---- the run as a whole ----


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_deterministic_for_any_number_of_processes(tmp_path, monkeypatch):
    rng = random.Random(19)
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(rng, 60)} for _ in range(500)])
    make("a.jsonl", out="first")
    monkeypatch.setattr(clean, "CHUNK", 10_000)
    monkeypatch.setattr(prepare, "WORKERS", 2)
    monkeypatch.setattr(prepare, "BATCH", 20_000)
    make("a.jsonl", out="second")
    result = script("a.jsonl", "--out=third", "--vocab_size=300", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == "" and result.stdout.endswith("next: python train.py --data=third\n")
    assert contents("first") == contents("second") == contents("third")


@pytest.mark.parametrize("moment, number", [("*", signal.SIGKILL), ("phase1_train_*", signal.SIGKILL), ("phase1_train_*", signal.SIGINT)])
def test_interrupted_run_changes_nothing(tmp_path, moment, number):
    rng = random.Random(20)
    (tmp_path / "a.txt").write_text(prose(rng, 1000))
    big = write_jsonl(tmp_path / "big.jsonl", [{"text": prose(rng, 2000)} for _ in range(250)])
    make("a.txt", out="out")
    before = contents("out")
    process = subprocess.Popen(
        [sys.executable, ROOT / "prepare.py", big, "--out=out"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs, so these tests, may ignore it
    )  # fmt: skip
    while not list(tmp_path.glob(f".out.new/{moment}")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)  # so that it does not end meanwhile
    with pytest.raises(prepare.InputError, match="out is being written by another prepare.py"):
        make("a.txt", out="out")
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    error = process.communicate(timeout=30)[1].decode()
    assert process.returncode == (130 if number == signal.SIGINT else -number) and contents("out") == before
    assert number == signal.SIGKILL or error == "interrupted\n"
    assert (tmp_path / ".out.new").exists() == (number == signal.SIGKILL)
    (tmp_path / "out").rename(tmp_path / ".out.old")  # killed between the two renames: the next run finds the old data again
    make("a.txt", out="out")
    assert contents("out") == before and {p.name for p in tmp_path.iterdir()} == {"a.txt", "big.jsonl", "out"}


LIMITED = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2); sys.argv = sys.argv[1:]; " \
          "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"


def test_full_disk(tmp_path):
    rng = random.Random(21)
    (tmp_path / "a.txt").write_text(prose(rng, 1000))
    (tmp_path / "big.txt").write_text(prose(rng, 50_000))
    make("a.txt", out="out")
    before = contents("out")
    result = script("big.txt", "--out=out", cwd=tmp_path, prefix=("-c", LIMITED))
    message = r"error: \.out\.new[^\n]*: File too large: free some space or write elsewhere\n"
    assert result.returncode == 2 and re.fullmatch(message, result.stderr)
    assert contents("out") == before and not (tmp_path / ".out.new").exists()


def bad_inputs(folder):
    (folder / "empty").mkdir()
    (folder / "mine").mkdir()
    (folder / "mine/notes.txt").write_text("do not delete")
    for name, data in {"empty.txt": b"", "blank.txt": b" \n\n", "x.docx": b"PK", "latin.txt": b"caf\xe9 au lait", "text.txt": b"some text",
                       "builtin.txt": b"some text",
                       "utf16.txt": "some text".encode("utf-16"),
                       "cut.jsonl": b'{"text": "one"}\n{"text": "tw', "list.jsonl": b"[1]\n", "fields.jsonl": b'{"body": "a", "n": 1}\n',
                       "number.jsonl": b'{"text": 5}\n', "names.jsonl": b'{"two\\nlines": 5}\n',
                       "utf8.jsonl": b'{"text": "\xff"}\n', "plain.jsonl.gz": b"not gzip",
                       "cut.jsonl.gz": gzip.compress(b'{"text": "one"}\n' * 99)[:-9], "x.parquet": b"PAR1 but not really"}.items():
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("arguments, message", [
    ("missing.txt", "missing.txt does not exist: expected .txt .md .jsonl .jsonl.gz .parquet, a folder"),
    ("empty", "empty holds no file that can be read: expected .txt"),
    ("x.docx", "x.docx is no file that can be read: expected .txt"),
    ("empty.txt", "empty.txt is empty: expected text in it"),
    ("blank.txt", "phase 1: blank.txt leaves no training text (1 empty, 0 broken"),
    ("latin.txt", "latin.txt is not UTF-8 at byte 3: convert it first, for example with iconv -f LATIN1 -t UTF-8"),
    ("utf16.txt", "utf16.txt is not UTF-8 at byte 0: convert it first, for example with iconv -f UTF-16 -t UTF-8"),
    ("hf://datasets/nobody", "hf://datasets/nobody: "),
    ("hf://", "hf://: "),
    ("cut.jsonl", "cut.jsonl:2: malformed JSON (Unterminated string"),
    ("list.jsonl", "list.jsonl:1: holds list, expected one JSON object per line"),
    ("utf8.jsonl", "utf8.jsonl:1: not UTF-8 at byte 10 of the line"),
    ("fields.jsonl", "fields.jsonl:1: no field text, content, question + answer or messages, found body, n: name the field"),
    ("fields.jsonl --field=title", "fields.jsonl:1: no field title, found body, n: name the field"),
    ("number.jsonl", "number.jsonl:1: field text holds int, expected a string"),
    ("plain.jsonl.gz", "plain.jsonl.gz is not a whole gzip file"),
    ("cut.jsonl.gz", "cut.jsonl.gz is not a whole gzip file"),
    ("x.parquet", "x.parquet is not a whole parquet file"),
    ("names.jsonl", "names.jsonl:1: no field text, content, question + answer or messages, found two lines: name the field"),
    ("text.txt --phase1 text.txt --phase2 text.txt --phase3 text.txt", "text.txt would not be read, every phase has sources of its own"),
    ("text.txt --vocab_size=259", "--vocab_size=259 is out of range: expected 260 to 65536"),
    ("text.txt --vocab_size=65537", "--vocab_size=65537 is out of range"),
    ("text.txt --val_fraction=0", "--val_fraction=0.0 is out of range"),
    ("text.txt --max_mb=0", "--max_mb=0 is out of range: expected a positive number of megabytes"),
    ("text.txt --max_mb=-2", "--max_mb=-2 is out of range: expected a positive"),
    ("text.txt --max_mb=nan", "--max_mb=nan is out of range: expected a positive"),
    ("text.txt --max_mb=inf", "--max_mb=inf is out of range: expected a positive"),
    ("text.txt --max_mb=all", "argument --max_mb: invalid float value: 'all'"),
    ("--max_mb=5", "--max_mb=5 would limit nothing, the built-in corpus is always whole: leave it out or name sources"),
    ("builtin --phase2 builtin --max_mb=5", "--max_mb=5 would limit nothing, the built-in corpus"),
    ("number.jsonl --skip_bad", "number.jsonl: all 1 lines are bad, the first: number.jsonl:1: field text holds int, expected a string"),
    ("text.txt fields.jsonl --skip_bad", "fields.jsonl: all 1 lines are bad, the first: fields.jsonl:1: no field text"),
    ("latin.txt --skip_bad", "latin.txt is not UTF-8 at byte 3"),
    ("text.txt --out=mine", "mine holds notes.txt, which prepare.py did not make: choose another --out"),
    ("text.txt --out=text.txt", "text.txt holds text.txt, which prepare.py did not make"),
    ("text.txt --out=text.txt/deeper", "text.txt: File exists"),
    ("text.txt --out=.", "--out=. names no folder of its own"),
    ("builtin.txt", "builtin.txt would go to data/builtin, where the built-in corpus has its place: name another folder with --out"),
    ("text.txt --val=builtin", "--val=builtin: the built-in corpus brings its own validation text"),
    ("text.txt --vocab=300", "unrecognized arguments: --vocab=300 (python prepare.py --help lists the options)"),
    ("text.txt --vocab_size=big", "argument --vocab_size: invalid int value: 'big'"),
])
def test_bad_input(tmp_path, capsys, arguments, message):
    bad_inputs(tmp_path)
    with pytest.raises(SystemExit) as end:
        prepare.run(lambda: prepare.main(arguments.split()))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not list(tmp_path.glob("data/*")) and not list(tmp_path.glob(".*"))
    assert (tmp_path / "mine/notes.txt").read_text() == "do not delete"


def test_a_file_name_that_is_not_utf8(tmp_path):
    try:
        (tmp_path / "caf\udce9.txt").write_text(prose(random.Random(27), 300))
    except OSError:
        pytest.skip("this file system has no such names")
    result = script("caf\udce9.txt", "--out=out", cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
    assert result.returncode == 0 and r"caf\udce9.txt" in result.stdout, result.stderr


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the moments are told apart by forks")
@pytest.mark.parametrize("moment", ["while a worker is started", "while the workers work"])
def test_ctrl_c_while_the_builtin_corpus_is_read(tmp_path, moment):
    (tmp_path / "run.py").write_text(f"""
import os, signal, sys, threading
sys.path.insert(0, {str(ROOT)!r})
import corpus, prepare, scripts
corpus.WORKERS = prepare.WORKERS = 2  # however few cores there are
press = lambda: os.killpg(0, signal.SIGINT)  # as a terminal does, to the workers too
forks = []
def after_fork():
    forks.append(True)
    if len(forks) == 2:
        threading.Timer(2, press).start() if {moment.endswith("work")} else press()
os.register_at_fork(after_in_parent=after_fork)
scripts.run(prepare.main)
""")
    process = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100, start_new_session=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    assert process.stderr == "interrupted\n" and process.returncode == 130
    assert not list(tmp_path.glob("data/*"))


def test_a_folder_on_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/mine").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/mine")
    (tmp_path / "a.txt").write_text(prose(random.Random(28), 300))
    for _ in range(2):
        make("a.txt", out="out")
        assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/mine/meta.json").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "disk", "out"} and [p.name for p in (tmp_path / "disk").iterdir()] == ["mine"]


def test_bad_input_on_the_command_line(tmp_path):
    result = script("missing.txt", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and result.stderr.startswith("error: missing.txt does not exist")


def test_a_few_bytes_are_enough(tmp_path):
    (tmp_path / "tiny.txt").write_text("To be, or not to be.")
    meta = make("tiny.txt", "--vocab_size=1024", out="out")
    assert meta["vocab_size"] < 280 and documents("out", 1, "val") == ["e."]


MEASURE = """
import pathlib, resource, sys
sys.path.insert(0, sys.argv[1])
import prepare
prepare.main(sys.argv[2:])
status = pathlib.Path("/proc/self/status")  # getrusage's peak begins, on Linux, at that of the process that started this one
lines = status.read_text().splitlines() if status.exists() else []
peak = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10))
"""


def test_memory_does_not_grow_with_the_input(tmp_path):
    peaks = []
    for megabytes in (11, 28):
        rng = random.Random(22)
        with open(tmp_path / "a.jsonl", "w") as file:
            for _ in range(megabytes * 50):
                file.write(json.dumps({"text": prose(rng, 4000)}) + "\n")
        result = subprocess.run([sys.executable, "-c", MEASURE, ROOT, "a.jsonl"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        peaks.append(float(result.stdout.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 15, f"{peaks} MB"
