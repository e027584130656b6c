"""sources.py: files, folders and their documents."""

import functools
import gzip
import io
import json
import random
import re
import sys
from pathlib import Path

import pytest
from conftest import call, documents, make, prose, random_text, write_jsonl

import corpus
import sources


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
def test_documents_of_a_text_are_separated_whatever_ends_a_line(end):
    """Also where a block of a file ends between the two characters of a line end."""
    separator = f"<|endoftext|> {end}"
    for shift in range(len(separator) + 2):
        first = "a" * ((1 << 20) - len(end) - len(separator) + shift)
        text = separator.join([first + end, f"b <|endoftext|> {end}c{end}", "d"]) + f"{end}<|endoftext|>"
        read = [document.strip("\r\n") for document in sources.read_text("x.txt", io.BytesIO(text.encode()))]
        assert read == [first, f"b <|endoftext|> {end}c", "d"]


def test_file_types_and_folders(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rng = random.Random(15)
    texts = [prose(rng, 40) for _ in range(6)]
    folder = tmp_path / "texts" / "deep"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text(f"{texts[0]}<|endoftext|>\r\n{texts[1]}<|endoftext|>")
    (folder / "b.md").write_text(texts[2])
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"content": texts[3], "id": 1}) + "\n\n")
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": texts[4:]}), folder / "d.parquet")
    (folder / "ignored.py").write_text("pass")
    files = sources.source_files("texts")
    assert [Path(name).name for name, _ in files] == ["a.txt", "b.md", "c.jsonl.gz", "d.parquet"]
    assert [item for _, item in sources.read_source(sources.Source("texts"), files, 0, None)] == texts
    (tmp_path / "qa.jsonl").write_text(json.dumps({"question": "Why?", "answer": "So."}) + "\n")
    read = lambda name, field: [item for _, item in sources.read_source(sources.Source(name), sources.source_files(name), 0, field)]  # noqa: E731
    assert read("qa.jsonl", None) == [[{"question": "Why?", "answer": "So."}]] and read("qa.jsonl", "answer") == ["So."]
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    parquet.write_table(pyarrow.table({"messages": [turns]}), tmp_path / "chat.parquet")
    for name in ("chat.jsonl", "chat.parquet"):
        assert read(name, None) == [[{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]]
    system = {"role": "system", "content": "s"}
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [system, *turns]}) + "\n")
    parquet.write_table(pyarrow.table({"messages": [[system, *turns]]}), tmp_path / "chat.parquet")
    for name in ("chat.jsonl", "chat.parquet"):
        assert read(name, None) == [[{"system": "s", "question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]]
    for wrong in (turns[:3], turns[1:3], [{"role": "user"}], "ab", 5, [turns[0], {"role": "assistant", "content": None}], [system],
                  [system, system, *turns], [*turns, system], [turns[0], system, turns[1]], [{"role": "system", "content": None}, *turns]):
        (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": wrong}) + "\n")
        with pytest.raises(sources.InputError, match="chat.jsonl:1: messages are not turns of user and assistant"):
            read("chat.jsonl", None)


def read(name, field=None, **options):
    reading = sources.Reading(**options)
    items = [item for _, item in sources.read_source(sources.Source(str(name)), sources.source_files(str(name)), 0, field, reading)]
    return items, reading


def test_what_a_folder_holds_besides_is_said_in_one_line(tmp_path):
    names = ["a.txt", "deep/B.MD", "c.json", "d.json", "deep/e.JSON.gz", "f.jsonl.zst", "v1.0.csv", "g.tar.gz", "h.2.gz", "LICENSE"]
    hidden = [".gitattributes", ".git/config", "deep/.cache/x.json", ".DS_Store"]
    for name in [*names, "of.two\nlines", *hidden]:
        path = tmp_path / ".mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("some text")
    said = []
    for name in (".mine", ".mine/"):
        assert len(sources.source_files(name, said.append)) == 2
    kinds = "2 .json, 2 without ending, 1 .csv, 1 .jsonl.zst, 1 .tar.gz, 1 .gz, 1 .json.gz"
    assert len(said) == 2 and set(re.search(r"\((.*)\)", said[0])[1].split(", ")) == set(kinds.split(", "))
    assert said[0].startswith(".mine: left out 9 of 11 files (2 ") and said[0].endswith(
        "): only .txt .md .jsonl .jsonl.gz .parquet are read, convert the others first") and "\n" not in said[0]
    for i in range(20):
        (tmp_path / f".mine/file.x{i}").write_text("")
    sources.source_files(".mine", said.append)
    assert ", ...): only" in said.pop() and len(said) == 2
    for name in (".mine/deep/B.MD", ".mine/a.txt"):
        sources.source_files(name, said.append)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/a.txt").write_text("some text")
    (tmp_path / "plain/.DS_Store").write_text("")
    sources.source_files("plain", said.append)
    assert len(said) == 2


def test_hidden_files_are_no_part_of_a_folder_and_linked_ones_are(tmp_path):
    for name in ("in/b.txt", "in/._b.txt", "in/.ipynb_checkpoints/a.txt", "in/deep/c.txt", "other/d.txt", ".hidden/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "in/link").symlink_to(tmp_path / "other")
    (tmp_path / "in/deep/again").symlink_to(tmp_path / "in")  # and so on for ever
    (tmp_path / "in/f.txt").symlink_to(tmp_path / "other/d.txt")
    (tmp_path / "in/gone.txt").symlink_to(tmp_path / "nowhere")
    assert [name for name, _ in sources.source_files("in")] == ["in/b.txt", "in/deep/c.txt", "in/f.txt", "in/link/d.txt"]
    assert [name for name, _ in sources.source_files(".hidden")] == [".hidden/e.txt"]


def note(opener, opened):
    opened.append(opener())
    return opened[-1]


def test_only_the_first_bytes_are_read(tmp_path):
    rng = random.Random(32)
    texts = [prose(rng, 100) + "漢字 é" for _ in range(12)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(3):
        write_jsonl(folder / f"{i}.jsonl", [{"text": text} for text in texts[4 * i : 4 * i + 4]])
    sizes = [len(text.encode()) for text in texts]
    for limit in (1, 100, sum(sizes[:4]), sum(sizes[:4]) + 1, sum(sizes[:6]) - 1, sum(sizes) - 3, sum(sizes), 10**9):
        opened = []
        files = [(name, functools.partial(note, opener, opened)) for name, opener in sources.source_files("texts")]
        reading = sources.Reading(max_bytes=limit)
        items = [item for _, item in sources.read_source(sources.Source("texts"), files, 0, None, reading)]
        assert "".join(texts).startswith("".join(items)) and items[:-1] == texts[: len(items) - 1]
        assert reading.n_bytes == len("".join(items).encode()) and reading.n_bytes <= limit
        assert limit < 100 or reading.n_bytes > min(limit, sum(sizes)) - 400, "all but the end of a paragraph"
        needed = next((i // 4 + 1 for i in range(12) if sum(sizes[: i + 1]) >= limit), 3)
        assert len(opened) == reading.n_files == needed and all(file.closed for file in opened), "no further file is opened"
    chats = [{"system": "ä", "question": f"What is {i}?", "answer": "So."} for i in range(9)]
    turns = lambda chat: [{"role": r, "content": c} for r, c in zip(("system", "user", "assistant"), chat.values())]  # noqa: E731
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": turns(chat)} for chat in chats])
    items, reading = read("chats.jsonl", max_bytes=33)
    assert items == [[chat] for chat in chats[:3]] and reading.n_bytes == 45, "chats are whole"
    (tmp_path / "book.txt").write_text("".join(texts))
    items, reading = read("book.txt", max_bytes=1000)
    assert len(items) == 1 and "".join(texts).startswith(items[0]) and items[0].endswith("\n\n") and 600 < reading.n_bytes <= 1000


BAD_LINES = [b'{"text": "\xff"}', b'{"text": "tw', b"[1]", b'{"body": "a"}', b'{"text": 5}', b"[" * 100_000, b'{"text": ["a"]}']


def test_bad_lines_are_left_out_if_asked(tmp_path):
    good = [prose(random.Random(i), 20) for i in range(8)]
    lines = [part for text, bad in zip(good, [*BAD_LINES, b""]) for part in (json.dumps({"text": text}).encode(), bad)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    for name in ("a.jsonl", "b.jsonl.gz"):
        items, reading = read(name, skip_bad=True)
        assert items == good and reading.n_bad == len(BAD_LINES) and reading.first_bad.startswith(f"{name}:2: not UTF-8 at byte 10")
    for bad in BAD_LINES:
        (tmp_path / "c.jsonl").write_bytes(lines[0] + b"\n" + bad)
        with pytest.raises(sources.InputError, match=r"^c.jsonl:2: .*, or pass --skip_bad to leave such lines out$"):
            read("c.jsonl")
    wrong = [{"role": "user", "content": "a"}]
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": wrong}, {"messages": [*wrong, {"role": "assistant", "content": "b"}]}])
    items, reading = read("chat.jsonl", skip_bad=True)
    assert items == [[{"question": "a", "answer": "b"}]] and reading.n_bad == 1
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines))[:-9])
    with pytest.raises(sources.InputError, match="cut.jsonl.gz is not a whole gzip file"):  # not a line, but who knows how much
        read("cut.jsonl.gz", skip_bad=True)


def test_bad_rows_of_parquet_are_left_out_if_asked(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"text number {i}".encode() for i in range(600)]
    texts[300], texts[599] = b"caf\xe9", b"\xff"
    parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())}), tmp_path / "a.parquet")
    items, reading = read("a.parquet", skip_bad=True)
    assert items == [text.decode() for i, text in enumerate(texts) if i not in (300, 599)]
    assert reading.n_bad == 2 and reading.first_bad.startswith("a.parquet:301: a field is not UTF-8 (")
    with pytest.raises(sources.InputError, match=r"^a.parquet:301: a field is not UTF-8 .*: convert the file first, or pass --skip_bad"):
        read("a.parquet")
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "n": [4, 5, 6]}), tmp_path / "b.parquet")
    items, reading = read("b.parquet", skip_bad=True)
    missing = "b.parquet: no field text, content, question + answer or messages, found id, n: name the field"
    assert items == [] and reading.n_bad == 3 and reading.first_bad.startswith(missing)
    with pytest.raises(sources.InputError, match=re.escape(missing) + ".*, or pass --skip_bad"):
        read("b.parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "c.parquet")
    items, reading = read("c.parquet", skip_bad=True)
    assert items == [] and reading.n_bad == 2 and "field text holds int" in reading.first_bad


def test_text_in_pieces(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "PIECE", 1000)
    rng = random.Random(17)
    text = "".join(prose(rng, 700) + random_text(rng, 3000).replace("<|im_end|>", "").replace("\r", "") for _ in range(300))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8", newline="")
    assert len(text.encode()) > 2 << 20
    pieces = [item for _, item in sources.read_source(sources.Source("long.txt"), sources.source_files("long.txt"), 0, None)]
    assert "".join(pieces) == text and max(map(len, pieces)) <= 1000
    assert sum(piece.endswith("\n\n") for piece in pieces) > len(pieces) / 4
    position = 1_500_000
    data = text.encode()[:position].decode(errors="ignore").encode()
    (tmp_path / "latin.txt").write_bytes(data + b"\xe9 " + text.encode())
    with pytest.raises(sources.InputError, match=f"latin.txt is not UTF-8 at byte {len(data)}: .*iconv"):
        list(sources.read_source(sources.Source("latin.txt"), sources.source_files("latin.txt"), 0, None))


# ---- prepare.py's options ----


@pytest.mark.usefixtures("one_process")
def test_the_first_megabytes_of_each_source(tmp_path, capsys, monkeypatch):
    rng = random.Random(33)
    texts, builtin, small = [prose(rng, 60) for _ in range(40)], [prose(rng, 60) for _ in range(30)], prose(rng, 60)
    monkeypatch.setattr(corpus, "documents", lambda phase: [("val" if i < 4 else "train", text) for i, text in enumerate(builtin)])
    monkeypatch.setattr(corpus, "problems", lambda split, count: [])
    (tmp_path / "set").mkdir()
    for i in range(4):
        write_jsonl(tmp_path / f"set/{i}.jsonl", [{"text": text} for text in texts[10 * i : 10 * i + 10]])
    (tmp_path / "set/3.jsonl").write_text("not even JSON, but nobody looks")
    (tmp_path / "small.txt").write_text(small)
    taken = sum(len(text) for text in texts[:15])
    meta = make("set", "small.txt", "--phase3", "builtin", f"--max_mb={taken / 1e6}", out="out")
    assert "".join(documents("out", 1, "train") + documents("out", 1, "val")) == "".join(texts[:15]) + small
    out = capsys.readouterr().out
    assert f"\nset: {taken / 1e6:.2f} MB of text, from 2 of 4 files (--max_mb={taken / 1e6:g})\n" in out
    assert "\nsmall.txt: 0.00 MB of text, from 1 of 1 files (--max_mb=" in out and "builtin: " not in out
    assert meta["max_mb"] == taken / 1e6 and [row["documents"] for row in meta["cleaning"]] == [15, 1, 30], "the built-in corpus is whole"


@pytest.mark.usefixtures("one_process")
def test_bad_lines_are_counted_for_each_source(tmp_path, capsys):
    texts = [prose(random.Random(i), 60) for i in range(20)]
    for name, bad in (("a", ['{"text": 5}', '{"body": 5}', "[]"]), ("b", []), ("c", ["?"])):
        lines = [json.dumps({"text": text}) for text in texts["abc".index(name) * 5 :][:5]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines[:3], *bad, *lines[3:]]))
    meta = make("a.jsonl", "b.jsonl", "--phase3", "c.jsonl", "--skip_bad", out="out")
    assert [row["bad lines"] for row in meta["cleaning"]] == [3, 0, 1] and [row["documents"] for row in meta["cleaning"]] == [5, 5, 5]
    assert "".join(documents("out", 1, "train") + documents("out", 1, "val")) == "".join(texts[:10])
    found = re.findall(r"^\S+: \d+ bad lines left out.*", capsys.readouterr().out, re.MULTILINE)
    assert found == ["a.jsonl: 3 bad lines left out, the first: a.jsonl:4: field text holds int, expected a string: "
                     "name another with --field",
                     "c.jsonl: 1 bad lines left out, the first: c.jsonl:4: malformed JSON (Expecting value: line 1 column 1 (char 0)): "
                     "expected one object per line: mend or drop the line"]


def test_files_of_other_kinds_are_named_once(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("a.txt", "b.csv", "c.json.gz", ".gitattributes"):
        (tmp_path / "set" / name).write_text(prose(random.Random(34), 100))
    done = call("prepare.py", "set", "--out=out", "--vocab_size=300", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == (
        "set: left out 2 of 3 files (1 .csv, 1 .json.gz): only .txt .md .jsonl .jsonl.gz .parquet are read, convert the others first\n")
    done = call("prepare.py", "set", "missing.txt", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: missing.txt does not exist") and done.stderr.count("\n") == 1


def test_a_source_without_a_name_is_not_the_current_folder(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(sources.InputError, match="a source without a name does not exist"):
        make("", out="out")


def test_parquet_with_text_that_is_not_utf8(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\4\0\0\0"), pyarrow.py_buffer(b"caf\xe9")])
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(sources.InputError, match="a.parquet:1: a field is not UTF-8 .*: convert the file first"):
        make("a.parquet", out="out")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_text("not parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(sources.InputError, match="x.parquet: .parquet files need pyarrow: pip install pyarrow"):
        make("x.parquet", out="out")
