"""sources.py: files, folders and their documents."""

import gzip
import json
import random
from pathlib import Path

import pytest
from conftest import prose, random_text

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
