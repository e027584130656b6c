"""workers.py: order, and what is left when a worker is killed as by the out-of-memory killer."""

import multiprocessing
import os
import signal

import pytest

import prepare
import workers
from scripts import InputError


def die_at_seven(n):
    if n == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def test_a_killed_worker_is_one_error_and_none_is_left():
    done = []
    with pytest.raises(InputError, match="a worker process was killed, perhaps because memory ran out") as caught:
        for n in workers.ordered_map(die_at_seven, range(100), 2):
            done.append(n)
    assert done == list(range(len(done))) and len(done) <= 7 and "\n" not in str(caught.value)
    assert not multiprocessing.active_children()
    assert list(workers.ordered_map(die_at_seven, range(8, 40), 2)) == list(range(8, 40))


def test_a_killed_worker_leaves_no_half_data(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "WORKERS", 2)
    monkeypatch.setattr(prepare, "BATCH", 1 << 10)
    monkeypatch.setattr(prepare, "encode_batch", die_encoding)
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(f"Text number {i} has no more than {i * 7} words." for i in range(400)))
    with pytest.raises(InputError, match="a worker process was killed"):
        prepare.main([str(tmp_path / "text.txt"), f"--out={tmp_path / 'data'}", "--vocab_size=300"])
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def die_encoding(_):
    os.kill(os.getpid(), signal.SIGKILL)
