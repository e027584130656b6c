"""shards.py: what is written is read again, and what is no shard, or one of other data, is refused."""

import json

import numpy as np
import pytest

import shards
from scripts import InputError


def test_shards_are_checked_on_reading(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    shards.write_shard(path, np.arange(1000, dtype=np.uint16), 1024, 2**33 + 5, -7, 3)
    header, data = shards.read_shard(path, 1024, -7)
    assert header == {"n_tokens": 1000, "vocab_size": 1024, "n_bytes": 2**33 + 5, "n_documents": 3, "fingerprint": -7}
    assert np.array_equal(data, np.arange(1000)) and data.dtype == np.uint16 and list(tmp_path.iterdir()) == [path]
    for arguments, message in (((512,), "vocab_size 1024, expected 512"), ((1024, 8), "fingerprint -7, expected 8")):
        with pytest.raises(InputError, match=message):
            shards.read_shard(path, *arguments)
    whole = path.read_bytes()
    for content, message in ((whole[:-100], "holds 1900 bytes of tokens, its header says 2000"), (whole[:500], "not a token shard"),
                             (b"", "not a token shard"), (b"x" * 5000, "not a token shard"),
                             (whole[:4] + b"\x09" + whole[5:], "shard version 9")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            shards.read_shard(path)
    with pytest.raises(InputError, match="does not exist.*prepare.py"):
        shards.read_shard(tmp_path / "missing.bin")
    monkeypatch.chdir(tmp_path)  # where nobody has prepared data
    with pytest.raises(InputError, match="python prepare.py SOURCE --out=nowhere"):
        shards.load_meta("nowhere")
    with pytest.raises(InputError, match="with python prepare.py$"):
        shards.load_meta("data/builtin")


def test_a_token_that_the_vocabulary_does_not_have_is_refused(tmp_path):
    tokens = np.arange(100, dtype=np.uint16)
    tokens[50] = 65535  # a damaged block
    shards.write_shard(tmp_path / "a.bin", tokens, 320, 100, 7)
    phases = {"1": {"train": {"shards": ["a.bin"]}}}
    (tmp_path / "meta.json").write_text(json.dumps({"fingerprint": "x", "vocab_size": 320, "phases": phases}))
    windows = shards.Windows(tmp_path, 1, "train", 10, 320, 7)
    assert windows.read(3).tolist() == list(range(30, 41))
    with pytest.raises(InputError, match="a.bin is damaged: token 65535 of 320: make the data again"):
        windows.read(4)  # its last token, the target, is the damaged one
