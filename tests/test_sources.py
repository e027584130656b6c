"""sources.py: files, folders and their documents."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest
from conftest import call, prose, random_text

import sources


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


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


def test_files_of_other_kinds_are_named_once(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("a.txt", "b.csv", "c.json.gz", ".gitattributes"):
        (tmp_path / "set" / name).write_text(prose(random.Random(34), 100))
    done = call("prepare.py", "set", "--out=out", "--vocab_size=300", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == (
        "set: left out 2 of 3 files (1 .csv, 1 .json.gz): only .txt .md .jsonl .jsonl.gz .parquet are read, convert the others first\n")
    done = call("prepare.py", "set", "missing.txt", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: missing.txt does not exist") and done.stderr.count("\n") == 1
