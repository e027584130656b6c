"""What becomes of files when a run goes wrong: two at once, --fresh that comes to nothing, a file that is something else."""

import errno
import os
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import ROOT, SHORT, make, prose

import convert
import corpus
import curves
import distill
import publish
import resume
import sample
import teachers
import train
from checkpoint import DISTILLATION, load_checkpoint, load_model, save_checkpoint
from scripts import InputError, lock_folder, locked
from shards import load_meta


def state(folder):
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}


@pytest.fixture
def run(finished, tmp_path, data):
    """(a finished run's folder, a function that trains there again)"""
    out = tmp_path / "run"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train.main([f"--data={data}", f"--out={out}", *SHORT, "--dtype=fp32", "--steps=5", "--phase=1"])
    yield out, lambda *options: train.main([f"--data={data}", f"--out={out}", *SHORT, "--dtype=fp32", "--steps=6", "--phase=1", *options])
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("trouble", [RuntimeError("CUDA out of memory"), MemoryError(), KeyboardInterrupt(), ZeroDivisionError()])
def test_fresh_that_comes_to_nothing_gives_everything_back(run, monkeypatch, trouble):
    out, again = run
    before = state(out)

    def fail(*_):
        raise trouble

    with monkeypatch.context() as patch, pytest.raises((InputError, KeyboardInterrupt, ZeroDivisionError)):
        patch.setattr(train, "update", fail)
        again("--fresh")
    assert state(out) == before
    again("--fresh")
    assert load_checkpoint(out / "phase1.pt")["step"] == 6 and not list(out.glob(".before*"))


def test_fresh_that_bursts_before_it_has_saved_anything_gives_everything_back(run, monkeypatch):
    out, again = run
    before, norms = state(out), iter([1.0, 1.0, torch.inf])
    monkeypatch.setattr(train, "update", lambda *_: torch.tensor(next(norms)))
    with pytest.raises(InputError, match="the gradient is inf at step 3"):
        again("--fresh", "--log_interval=1")
    assert state(out) == before


def test_fresh_does_not_take_a_distillation_away(run):
    out, again = run
    (out / "last.pt").unlink(missing_ok=True)
    save_checkpoint(out / "last.pt", load_checkpoint(out / "phase1.pt") | {"phase": DISTILLATION})
    before = state(out)
    for fresh in ([], ["--fresh"]):
        with pytest.raises(InputError, match="last.pt is a distillation of distill.py: name another --out"):
            again(*fresh, "--phase=2")
    assert state(out) == before


def test_fresh_that_was_killed_is_undone_by_the_next_command(run):
    out, again = run
    before = state(out)
    resume.set_aside(out, [out / "phase1.pt", out / "phase1_best.pt"])
    (out / "log.jsonl").write_text("")
    with pytest.raises(InputError, match="steps is 5 there, 6 here"):
        again()
    assert state(out) == before


def test_two_runs_are_never_in_one_folder(run, finished, tmp_path):
    out, again = run
    before, lock = state(out), lock_folder(out)
    with pytest.raises(InputError, match=r"run is being written by another run: wait for it or name another folder"):
        again("--fresh")
    assert state(out) == before
    os.close(lock)
    again("--fresh")
    (tmp_path / ".made.partial").mkdir()
    lock = lock_folder(tmp_path / ".made.partial")
    options = [f"--ckpt={finished}", "--to=hf", f"--out={tmp_path / 'made'}"]
    with pytest.raises(InputError, match="made is being written by another run"):
        convert.main(options)
    assert (tmp_path / ".made.partial").is_dir()
    os.close(lock)
    convert.main(options)
    assert (tmp_path / "made").is_dir() and not (tmp_path / ".made.partial").exists()


@pytest.mark.parametrize("content", [b'{"version": "1.0"}', b"all my notes, without a line end"])
def test_a_file_of_something_else_is_not_taken_for_answers(tmp_path, content):
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(InputError, match="mine.json is not a file of answers: name another --traces"):
        args = SimpleNamespace(samples=1, temperature=None)
        teachers.make_traces(tmp_path / "mine.json", SimpleNamespace(name="x"), [], args, print)
    assert (tmp_path / "mine.json").read_bytes() == content


def test_answers_that_cannot_be_kept_are_not_asked_for(tmp_path):
    class Student:
        def answers(self, *_):
            raise AssertionError("asked")

    (tmp_path / ".e.jsonl.partial").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        args = SimpleNamespace(votes=1, temperature=None, max_new_tokens=9, seed=0)
        distill.evaluate(Student(), [], args, tmp_path / "e.jsonl")


def test_an_output_of_prompts_is_whole_or_not_there(finished, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    made = sample.batch
    calls = []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made(*arguments)

    monkeypatch.setattr(sample, "batch", stopped)
    options = [f"--ckpt={finished}", f"--prompts_file={tmp_path / 'p.txt'}", f"--output={tmp_path / 'o.jsonl'}"]
    options += ["--batch_size=1", "--max_new_tokens=2"]
    with pytest.raises(KeyboardInterrupt):
        sample.main(options)
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]
    sample.main(options)
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 3


def test_a_full_disk_under_safetensors_is_an_error_of_the_disk(finished, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    model, _, checkpoint = load_model(finished)
    with pytest.raises(OSError, match="No space left") as caught:
        publish.write_folder(tmp_path, model, checkpoint, finished)
    assert caught.value.filename.endswith("model.safetensors")


def test_a_picture_that_fails_does_not_end_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "read_logs", lambda *_: 1 / 0)
    curves.draw_curves(tmp_path)
    assert "no curves.png: division by zero" in capsys.readouterr().out


def test_odd_entries_of_a_package_are_passed_over(tmp_path, monkeypatch):
    package = tmp_path / "strange"
    package.mkdir()
    (package / "__init__.py").write_text('"""A package of one sentence that is long enough to be kept as prose."""')
    (package / ".#lock.py").symlink_to("nobody@nowhere")
    (package / "folder.py").mkdir()
    (package / "deep.py").write_text("x = " + "-" * 100_000 + "1")
    monkeypatch.syspath_prepend(tmp_path)
    assert [path.name for _, path in corpus.source_files(("strange",))] == ["__init__.py", "deep.py"]
    assert [len(module.units) for module in corpus.modules(("strange",))] == [1, 0]


@pytest.mark.parametrize("text", ['{"fingerprint": "a", "vocab_size": "1024", "phases": {}}', "[" * 100_000])
def test_a_strange_meta_json_is_one_error(tmp_path, text):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(InputError, match="is not a meta.json of prepare.py"):
        load_meta(tmp_path)


@pytest.mark.parametrize("text", ['{"phase": "1", "step": 1, "tokens": 1}', '{"phase": 1, "step": 1}', "[" * 100_000 + "}"])
def test_a_strange_log_is_one_error(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text + "\n")
    with pytest.raises(InputError, match="log.jsonl:1 is no line of a log"):
        curves.read_log(tmp_path / "log.jsonl")


def test_weights_of_another_shape_are_refused(finished, tmp_path):
    checkpoint = load_checkpoint(finished / "phase3.pt")
    checkpoint["weights"]["norm.weight"] = torch.zeros(3)
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    with pytest.raises(InputError, match="a.pt has the weights of another version of this flow"):
        load_model(tmp_path / "a.pt")


def test_a_checkpoint_is_found_under_any_name_in_any_locale(finished, tmp_path):
    folder = tmp_path / "lör"
    folder.mkdir()
    (folder / "a.pt").write_bytes((finished / "phase3.pt").read_bytes())
    code = "import sys; from checkpoint import load_model; print(load_model(sys.argv[1])[2]['phase'])"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, folder / "a.pt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.stdout == "3\n", done.stderr


@pytest.mark.usefixtures("one_process")
def test_what_the_finder_leaves_does_not_keep_a_folder_from_being_made_again(tmp_path):
    (tmp_path / "a.txt").write_text(prose(random.Random(33), 300))
    make("a.txt", out="out")
    (tmp_path / "out/.DS_Store").write_bytes(b"\0")
    make("a.txt", out="out")
    assert not (tmp_path / "out/.DS_Store").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_without(tmp_path, monkeypatch, number):
    """Some of clusters and network drives have none."""

    def failing(why):
        def lock(file, how):
            raise OSError(why, "no locks here")

        return lock

    assert locked(failing(number), None)
    monkeypatch.setattr("scripts.fcntl.flock", failing(number))
    os.close(lock_folder(tmp_path))
    with teachers.appending(tmp_path / "t.jsonl") as file:
        file.write(b"{}\n")
    assert not locked(failing(errno.EAGAIN), None)  # another's
    with pytest.raises(PermissionError):
        locked(failing(errno.EACCES), None)
