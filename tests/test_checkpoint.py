"""checkpoint.py: what is written is whole or not there, what cannot be read is said, and the latest one is found."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fails

from checkpoint import find_checkpoint, load_checkpoint, load_model, save_checkpoint
from scripts import InputError


def test_the_latest_checkpoint_is_found_whatever_the_times(finished, tmp_path):
    assert find_checkpoint(str(finished)) == finished / "phase3.pt"
    run = tmp_path / "run"
    run.mkdir()
    for name in ("phase3.pt", "phase2.pt", "phase1.pt"):  # as copying a run may leave them
        shutil.copy(finished / name, run)
    assert find_checkpoint(str(run)) == run / "phase3.pt"
    shutil.copy(finished / "phase1.pt", run / "last.pt")
    os.utime(run / "last.pt", (0, 0))
    assert find_checkpoint(str(run)) == run / "last.pt"
    shutil.rmtree(run)
    with pytest.raises(InputError, match="holds no checkpoint yet: make one with `python train.py`"):
        find_checkpoint(str(tmp_path))
    fails("sample.py", match="make one with `python train.py`", cwd=tmp_path)


def test_a_model_is_loaded_from_whatever_names_it(finished, tmp_path, monkeypatch):
    weights = load_checkpoint(finished / "phase3.pt")["weights"]
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for name in (finished / "phase3.pt", str(finished / "phase3.pt"), finished, str(finished), "run", Path("run"), "run/phase3.pt"):
        model, _, checkpoint = load_model(name)
        assert checkpoint["phase"] == 3 and all(torch.equal(p, weights[key]) for key, p in model.state_dict().items())
    shutil.copy(finished / "phase1.pt", "run/last.pt")
    assert load_model("run")[2]["phase"] == 1
    (tmp_path / "empty").mkdir()
    for name, match in (("empty", "empty holds no checkpoint yet: make one with"), ("none.pt", "none.pt does not exist: train a model")):
        with pytest.raises(InputError, match=match):
            load_model(name)
    with pytest.raises(InputError, match="holds a flow model, not pulse"):
        load_model("run", model="pulse")


def test_unreadable_checkpoints_are_refused(finished, tmp_path):
    cut = tmp_path / "cut.pt"
    cut.write_bytes((finished / "phase3.pt").read_bytes()[:-2000])
    with pytest.raises(InputError, match="cut short or not a checkpoint"):
        load_checkpoint(cut)
    torch.save({"weights": {}}, tmp_path / "foreign.pt")
    with pytest.raises(InputError, match="not a checkpoint of this project"):
        load_checkpoint(tmp_path / "foreign.pt")
    checkpoint = load_checkpoint(finished / "phase3.pt")
    save_checkpoint(tmp_path / "other.pt", checkpoint | {"model": "other"})
    with pytest.raises(InputError, match="holds a other model, not flow"):
        load_model(tmp_path / "other.pt")
    for part, name in (("weights", "norm.weight"), ("config", "norm_eps")):
        save_checkpoint(tmp_path / "older.pt", checkpoint | {part: {key: x for key, x in checkpoint[part].items() if key != name}})
        with pytest.raises(InputError, match="has the weights of another version of this flow: train it again"):
            load_model(tmp_path / "older.pt")
    save_checkpoint(tmp_path / "newer.pt", checkpoint | {"config": checkpoint["config"] | {"speed": 9}})
    with pytest.raises(InputError, match="is of another version of this flow .*'speed'.*: train it again"):
        load_model(tmp_path / "newer.pt")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"x": 1})
    code = (
        "import resource, signal, torch; from pathlib import Path; from checkpoint import save_checkpoint; import prepare\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"prepare.run(lambda: save_checkpoint(Path({str(tmp_path / 'a.pt')!r}), {{'x': torch.zeros(100_000)}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"x": 1} and len(list(tmp_path.iterdir())) == 1
