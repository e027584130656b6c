"""train.py as a user runs it: curriculum, exact resume after SIGKILL, two ranks, and what bad input gets."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HERE, ROOT, SHORT, call, fails
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import device
import prepare
import train
from checkpoint import load_checkpoint, load_model, save_checkpoint
from scripts import InputError
from shards import Windows, epoch_order
from train import FINAL_LR, check_same, lr_at


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ---- pure functions ----


def test_learning_rate_warms_up_and_falls_to_its_end():
    rates = [lr_at(step, 1000, 0.01) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01 / 20) and max(rates) == rates[20] == 0.01
    assert all(a < b for a, b in zip(rates[:19], rates[1:20])) and all(a > b for a, b in zip(rates[20:], rates[21:]))
    assert rates[-1] == pytest.approx(0.01 * FINAL_LR, rel=0.01)
    assert lr_at(0, 1, 0.01) == 0.01


def write_shards(folder, sizes):
    """Shards that count 0, 1, 2, ... on, with the meta.json that lists them."""
    names, start = [], 0
    for n, size in enumerate(sizes):
        names.append(f"phase1_train_{n:05d}.bin")
        prepare.write_shard(folder / names[-1], np.arange(start, start + size, dtype=np.uint16), 60_000, size, 7)
        start += size
    meta = {"vocab_size": 60_000, "fingerprint": "x", "phases": {"1": {"train": {"shards": names}}}}
    (folder / "meta.json").write_text(json.dumps(meta))


def test_an_epoch_visits_every_window_once_and_batches_depend_on_their_number_only(tmp_path):
    write_shards(tmp_path, [105, 42, 11])
    windows = Windows(tmp_path, 1, "train", 10, 60_000, 7)
    assert windows.n_windows == 10 + 4 + 1
    epoch = windows.batch(3, 1, 0, 15)
    assert epoch.shape == (15, 11) and (np.diff(epoch, axis=1) == 1).all()  # a window never runs over the end of a shard
    order, offset = epoch_order(15, 10, 3, 1, 0)
    assert sorted(order) == list(range(15))
    ends = np.array([105, 147, 158])
    shard = np.searchsorted(ends, epoch[:, 0], side="right")
    assert np.bincount(shard).tolist() == [10, 4, 1]
    assert (epoch[:, -1] < ends[shard]).all()
    parts = np.concatenate([windows.batch(3, 1, first, 5) for first in (0, 5, 10)])
    assert (parts == epoch).all() and (windows.batch(3, 1, 15, 15) != epoch).any() and (windows.batch(4, 1, 0, 15) != epoch).any()


def test_foreign_shards_are_refused(tmp_path):
    write_shards(tmp_path, [50])
    with pytest.raises(InputError, match="holds 50 tokens, a window of phase 1 needs 65: prepare more text or lower --seq_len"):
        Windows(tmp_path, 1, "train", 64, 60_000, 7)
    with pytest.raises(InputError, match="another tokenizer"):
        Windows(tmp_path, 1, "train", 10, 1024, 7)
    with open(tmp_path / "phase1_train_00000.bin", "r+b") as file:
        file.truncate(1060)
    with pytest.raises(InputError, match="its header says 100"):
        Windows(tmp_path, 1, "train", 10, 60_000, 7)


def test_settings_that_differ_are_named():
    with pytest.raises(InputError, match=r"lr is 0.1 there, 0.2 here; steps is None there, 3 here.*--fresh"):
        check_same(Path("x.pt"), {"lr": 0.1, "seed": 1}, {"lr": 0.2, "seed": 1, "steps": 3})


# ---- a run ----


def test_a_run_leaves_checkpoints_log_and_curves(finished, data):
    assert {f.name for f in finished.iterdir()} == {
        *(f"phase{n}.pt" for n in (1, 2, 3)), *(f"phase{n}_best.pt" for n in (1, 2, 3)), "log.jsonl", "curves.png",
    }  # fmt: skip
    lines = log_of(finished)
    train, val = [x for x in lines if "loss" in x], [x for x in lines if "val_loss" in x]
    assert set(train[0]) == {"step", "phase", "tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_s", "mfu"}
    assert set(val[0]) == {"step", "phase", "tokens", "seconds", "val_loss", "val_bpb"}
    assert [(x["phase"], x["step"]) for x in train] == [(p, s) for p in (1, 2, 3) for s in (5, 10, 15, 20)]
    assert [(x["phase"], x["step"]) for x in val] == [(p, s) for p in (1, 2, 3) for s in (10, 20)]
    assert train[-1]["tokens"] == 3 * 20 * 4 * 32
    assert val[-1]["val_loss"] < val[0]["val_loss"] < np.log(400)
    checkpoint = load_checkpoint(finished / "phase3.pt")
    assert {"model", "config", "weights", "optimizer", "step", "phase", "data_fingerprint", "tokenizer"} <= checkpoint.keys()
    assert [load_checkpoint(finished / f"phase{n}.pt")["settings"]["lr"] for n in (1, 2, 3)] == [0.004, 0.0028, 0.001]
    assert checkpoint["data_fingerprint"] == prepare.load_meta(data)["fingerprint"]
    again = call("train.py", f"--data={data}", f"--out={finished}", "--steps=20", *SHORT)
    assert again.returncode == 0 and again.stdout.count("is finished") == 3 and log_of(finished) == lines


def test_bits_per_byte_are_those_of_the_text(finished, data):
    """The last evaluation against the loss of every token of the validation text, summed one window at a time."""
    model, tokenizer, _ = load_model(finished / "phase3.pt")
    tokens = np.concatenate([prepare.read_shard(path)[1] for path in prepare.shard_paths(data, 3, "val")]).astype(np.int64)
    n = min((len(tokens) - 1) // 32, 512 // 32)
    starts = np.linspace(0, (len(tokens) - 1) // 32 - 1, n).round().astype(int) * 32
    nats = sum(model(torch.tensor(tokens[None, s : s + 32]), torch.tensor(tokens[None, s + 1 : s + 33]))[1].item() * 32 for s in starts)
    text = sum(len(tokenizer.decode(tokens[s + 1 : s + 33].tolist(), skip_special_tokens=True).encode()) for s in starts)
    last = [x for x in log_of(finished) if "val_bpb" in x][-1]
    assert last["val_bpb"] == pytest.approx(nats / np.log(2) / text, rel=0.01)  # training evaluates in bf16 where there is bf16


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert call("train.py", f"--data={data}", f"--out={out}", *RESUME).returncode == 0
    return out


RESUME = ["--phase=1", "--steps=60", "--save_interval=7", "--eval_interval=20", *SHORT]


def same_weights(a, b):
    a, b = load_checkpoint(a)["weights"], load_checkpoint(b)["weights"]
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("lines", [1, 7])
def test_killed_and_started_again_ends_in_the_same_weights(uninterrupted, data, tmp_path, lines):
    command = [sys.executable, ROOT / "train.py", f"--data={data}", f"--out={tmp_path}", *RESUME]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = tmp_path / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= lines):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "phase1.pt").exists()
    saved = (tmp_path / "last.pt").exists()
    assert saved or lines == 1
    again = call("train.py", f"--data={data}", f"--out={tmp_path}", *RESUME)
    assert again.returncode == 0, again.stderr
    assert ("continuing" in again.stdout) == saved  # killed before the first checkpoint it starts anew
    assert same_weights(tmp_path / "phase1.pt", uninterrupted / "phase1.pt")
    steps = [(x["step"], "loss" in x) for x in log_of(tmp_path)]
    assert len(steps) == len(set(steps)) and steps == [(x["step"], "loss" in x) for x in log_of(uninterrupted)]
    assert not list(tmp_path.glob(".*"))


def test_ctrl_c_saves_and_the_same_command_goes_on(uninterrupted, data, tmp_path):
    command = [sys.executable, ROOT / "train.py", f"--data={data}", f"--out={tmp_path}", *RESUME]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "step    10/60" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait() == 130 and "the same command goes on" in rest and (tmp_path / "last.pt").exists()
    fails("train.py", f"--data={data}", f"--out={tmp_path}", *RESUME, "--lr=0.5", match="lr is 0.004 there, 0.5 here")
    assert call("train.py", f"--data={data}", f"--out={tmp_path}", *RESUME).returncode == 0
    assert same_weights(tmp_path / "phase1.pt", uninterrupted / "phase1.pt")


def test_two_ranks_equal_one(data, tmp_path):
    common = [f"--data={data}", "--phase=3", *SHORT]
    one = call("train.py", *common, "--steps=12", f"--out={tmp_path / 'one'}", "--batch_size=8", "--grad_accum=1")
    two = call("train.py", *common, "--steps=12", f"--out={tmp_path / 'two'}", "--batch_size=2", "--grad_accum=2", ranks=2)
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    assert "starting from new weights" in one.stdout
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two")):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-3)
        assert a.get("val_loss", 0) == pytest.approx(b.get("val_loss", 0), abs=1e-3)


TWO_RANKS = ["--phase=3", "--steps=40", "--save_interval=5", *SHORT, "--batch_size=2", "--grad_accum=2"]


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    done = call("train.py", f"--data={data}", f"--out={out}", *TWO_RANKS, ranks=2)
    assert done.returncode == 0, done.stderr
    return out


def workers_of(launcher: int) -> list[int]:
    if tasks := list(Path(f"/proc/{launcher}/task").glob("*/children")):  # small containers have no ps
        return [int(pid) for task in tasks for pid in task.read_text().split()]
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid, parent in map(str.split, table.splitlines()) if int(parent) == launcher]


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_two_ranks_stopped_in_the_middle_end_as_if_they_had_not_been(two_ranks, data, tmp_path, ending):
    """SIGTERM, the launcher passes on and both ranks stop together with everything saved. SIGKILL takes launcher and ranks at once."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *HERE, ROOT / "train.py"]
    options = [f"--data={data}", f"--out={tmp_path}", *TWO_RANKS]
    process = subprocess.Popen([*launcher, *options], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "last.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    if ending == signal.SIGKILL:
        workers = workers_of(process.pid)
        assert len(workers) == 2
        for pid in (process.pid, *workers):
            os.kill(pid, signal.SIGKILL)
    else:
        process.terminate()
    process.wait()
    assert not (tmp_path / "phase3.pt").exists() and load_checkpoint(tmp_path / "last.pt")["step"] < 40
    again = call("train.py", *options, ranks=2)
    assert again.returncode == 0 and "continuing" in again.stdout, again.stderr
    # To the bit: two ranks add two gradients, and a + b is b + a.
    assert same_weights(tmp_path / "phase3.pt", two_ranks / "phase3.pt")
    steps = [(x["step"], "loss" in x) for x in log_of(tmp_path)]
    assert len(steps) == len(set(steps)) and set(steps) >= {(x["step"], "loss" in x) for x in log_of(two_ranks)}
    assert log_of(tmp_path)[-1]["val_loss"] == log_of(two_ranks)[-1]["val_loss"]


def test_fresh_starts_over(data, tmp_path):
    command = ["train.py", f"--data={data}", f"--out={tmp_path}", "--phase=1", *SHORT]
    assert call(*command, "--steps=5").returncode == 0
    fails(*command, "--steps=6", match="steps is 5 there, 6 here")
    assert call(*command, "--steps=6", "--fresh").returncode == 0
    assert load_checkpoint(tmp_path / "phase1.pt")["step"] == 6 and [x["step"] for x in log_of(tmp_path)] == [5, 6, 6]


def test_a_phase_keeps_the_weight_decay_it_is_given(finished, data, tmp_path):
    shutil.copy(finished / "phase1.pt", tmp_path)
    command = ["train.py", f"--data={data}", f"--out={tmp_path}", "--phase=2", "--steps=2", "--weight_decay=0.5", *SHORT]
    assert call(*command).returncode == 0
    _, adamw = load_checkpoint(tmp_path / "phase2.pt")["optimizer"]
    assert [group["weight_decay"] for group in adamw["param_groups"]] == [0.5, 0.0]


@pytest.mark.parametrize("kind", ["flow", "pulse"])
def test_without_bf16_in_the_hardware_nothing_is_computed_in_it(kind, data, tmp_path, monkeypatch):
    """A CPU that only imitates it takes a hundred times as long."""
    dtypes = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            dtypes.update(x.dtype for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    command = [f"--model={kind}", f"--data={data}", f"--out={tmp_path}", "--phase=1", "--steps=2", "--n_layer=3", "--d_model=32"]
    command += ["--d_ff=48", "--seq_len=32", "--batch_size=4", "--eval_tokens=512", "--device=cpu"]
    monkeypatch.setattr(device.Device, "peak_flops", lambda self: (1e12, "made up"))  # its product is a large one
    monkeypatch.setattr(device, "has_bf16", lambda _: False)
    with Watch():
        train.main(command)
    assert torch.float32 in dtypes and torch.bfloat16 not in dtypes
    dtypes.clear()
    monkeypatch.setattr(device, "has_bf16", lambda _: True)
    with Watch():
        train.main([*command, "--fresh"])
    assert torch.bfloat16 in dtypes


@pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="torch.compile needs a C++ compiler and Python's headers",
)
def test_a_compiled_model_goes_on_from_an_uncompiled_one(data, tmp_path):
    command = ["train.py", f"--data={data}", "--steps=5", *SHORT, "--n_layer=1", "--global_every=1"]  # one layer: quick to compile
    assert call(*command, "--phase=1", f"--out={tmp_path / 'plain'}").returncode == 0
    shutil.copytree(tmp_path / "plain", tmp_path / "compiled")
    weights, losses = [], []
    for name, option in (("plain", []), ("compiled", ["--compile"])):
        done = call(*command, "--phase=2", f"--out={tmp_path / name}", *option)
        assert done.returncode == 0 and "starting from" in done.stdout, done.stderr
        weights.append(load_checkpoint(tmp_path / name / "phase2.pt")["weights"].keys())
        losses.append([x.get("loss", x.get("val_loss")) for x in log_of(tmp_path / name) if x["phase"] == 2])
    assert weights[0] == weights[1] and losses[0] == pytest.approx(losses[1], abs=0.01)  # compiled code rounds to bf16 in fewer places


# ---- what bad input gets ----


def test_compile_without_a_compiler_is_refused(data, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "CXX"}
    env |= {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = ["train.py", f"--data={data}", f"--out={tmp_path / 'run'}", "--compile", *SHORT]
    fails(*command, match="install a C++ compiler and Python's headers, or leave it out", env=env)
    assert not list((tmp_path / "run").glob("*.pt"))


def test_wandb_that_is_missing_is_said_before_anything_is_trained_or_removed(finished, data, tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError")
    before = {f.name: f.stat().st_mtime_ns for f in finished.iterdir()}
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = ["train.py", f"--data={data}", f"--out={finished}", "--fresh", "--wandb=x", *SHORT]
    fails(*command, match="--wandb needs the package wandb: pip install wandb", env=env)
    assert {f.name: f.stat().st_mtime_ns for f in finished.iterdir()} == before


def test_too_few_data_are_said_before_anything_is_trained_or_removed(finished, data, tmp_path):
    before = {f.name: f.stat().st_mtime_ns for f in finished.iterdir()}
    fails("train.py", f"--data={data}", f"--out={finished}", "--fresh", "--seq_len=1000000", match="a window of phase 1 needs 1,000,001")
    assert {f.name: f.stat().st_mtime_ns for f in finished.iterdir()} == before
    shutil.copytree(data, tmp_path / "data")
    meta = json.loads((data / "meta.json").read_text())
    for name in meta["phases"]["3"]["val"]["shards"]:
        header, tokens = prepare.read_shard(data / name)
        (tmp_path / "data" / name).unlink()  # may be a second name of phase 1's
        prepare.write_shard(tmp_path / "data" / name, tokens[:10], header["vocab_size"], 10, header["fingerprint"])
    command = ["train.py", f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'run'}", *SHORT]
    fails(*command, match="holds 10 tokens, a window of phase 3 needs 33")
    assert not (tmp_path / "run").exists()


def test_the_phases_of_a_folder_follow_each_other(finished, data, tmp_path):
    command = ["train.py", f"--data={data}", f"--out={tmp_path}", "--steps=20", "--eval_interval=10", *SHORT]
    for n in (1, 3):
        shutil.copy(finished / f"phase{n}.pt", tmp_path)
    before = [{"step": 20, "phase": n, "loss": 1.0} for n in (1, 3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before))
    fails(*command, match="phase3.pt was trained without a phase 2: remove it with --fresh --phase=2")
    assert log_of(tmp_path) == before
    save_checkpoint(tmp_path / "last.pt", load_checkpoint(finished / "phase2.pt"))
    fails(*command, "--phase=3", "--fresh", match="is an unfinished phase 2: finish it with --phase=2")
    assert load_checkpoint(tmp_path / "last.pt")["phase"] == 2 and (tmp_path / "phase3.pt").exists()
    shutil.copy(finished / "phase2.pt", tmp_path)  # a kill came after the phase was saved and before last.pt was removed
    done = call(*command, "--phase=2")
    assert done.returncode == 0 and "phase 2 is finished" in done.stdout and not (tmp_path / "last.pt").exists()
    save_checkpoint(tmp_path / "last.pt", load_checkpoint(finished / "phase2.pt") | {"phase": 4})
    (tmp_path / "phase3.pt").unlink()
    fails(*command, match="last.pt is a distillation of distill.py: name another --out")


def test_a_picture_that_cannot_be_drawn_ends_nothing(finished, data, tmp_path):
    (tmp_path / "curves.png").mkdir()
    done = call("train.py", f"--data={data}", f"--out={tmp_path}", "--phase=1", "--steps=2", *SHORT)
    assert done.returncode == 0 and "no curves.png: " in done.stdout


def test_ranks_agree_on_stopping_within_seconds(monkeypatch):
    class Ranks:
        ranks, told, meetings = 2, 0.0, 0

        def sum(self, numbers):
            self.meetings += 1
            return [self.told, 2 * numbers[1]]  # the other rank takes as long

    clock, ranks = [0.0], Ranks()
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock[0])
    stop = device.StopNotice(ranks)
    try:
        for seconds, steps, least, most in ((0.01, 1000, 2, 4), (2.0, 20, 8, 20), (60.0, 20, 20, 20)):
            ranks.meetings = 0
            stop.restart()
            for _ in range(steps):
                clock[0] += seconds
                assert not stop.given(False)
            assert least <= ranks.meetings <= most, seconds
        ranks.told = 1.0
        clock[0] += 60
        assert stop.given(False)
        clock[0] += 1e-3
        assert stop.given(True)
    finally:
        stop.close()


def test_an_unfinished_phase_is_not_overwritten_by_another(finished, data, tmp_path):
    checkpoint = load_checkpoint(finished / "phase2.pt")
    save_checkpoint(tmp_path / "last.pt", checkpoint)
    command = ["train.py", f"--data={data}", f"--out={tmp_path}", "--steps=20", *SHORT]
    fails(*command, "--phase=1", match="is an unfinished phase 2: finish it with --phase=2")
    assert load_checkpoint(tmp_path / "last.pt")["phase"] == 2


def test_a_copy_for_sampling_is_no_start_of_a_phase(finished, data, tmp_path):
    shutil.copy(finished / "phase1_best.pt", tmp_path / "phase1.pt")
    fails("train.py", f"--data={data}", f"--out={tmp_path}", "--phase=2", *SHORT, match="without the optimizers' state")


def test_a_full_disk_ends_a_run_in_one_line(data, tmp_path):
    """The whole way through train.py, with files limited to 100 kB: the log fits, the first checkpoint does not."""
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"sys.argv = ['train.py', '--data={data}', '--out={tmp_path}', '--steps=2', '--phase=1', *{SHORT}]; sys.path[0] = {str(ROOT)!r}\n"
        "runpy.run_path('train.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert "free some space" in done.stderr and [f.name for f in tmp_path.iterdir()] == ["log.jsonl"]


def test_fresh_removes_nothing_when_the_phase_cannot_start(finished, data, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "run").iterdir()}
    command = ["train.py", f"--data={data}", f"--out={tmp_path / 'run'}", "--phase=3", "--fresh", *SHORT]
    fails(*command, "--n_layer=1", match="phase2.pt was trained with other settings (n_layer is 2 there, 1 here)")
    shutil.copytree(data, tmp_path / "other")
    tokenizer = (data / "tokenizer.json").read_text() + " "
    meta = json.loads((data / "meta.json").read_text())
    (tmp_path / "other/tokenizer.json").write_text(tokenizer)
    for name in {name for parts in meta["phases"].values() for split in parts.values() for name in split["shards"]}:
        header, tokens = prepare.read_shard(data / name)
        (tmp_path / "other" / name).unlink()
        print_of = prepare.tokenizer_fingerprint(tokenizer)
        prepare.write_shard(tmp_path / "other" / name, tokens, header["vocab_size"], header["n_bytes"], print_of)
    fails(command[0], f"--data={tmp_path / 'other'}", *command[2:], match="phase2.pt was trained with another tokenizer than that of")
    fails(*command, f"--init={finished}", match="phase2.pt is there, of a run that began from new weights: leave --init out, or name")
    fails(*command[:3], "--phase=1", *command[4:], "--init=nowhere", match="nowhere holds no checkpoint yet")
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("closing", ["a terminal of its own", "a terminal of others"])
def test_a_terminal_that_closes_stops_a_run_as_ctrl_c_does(data, tmp_path, closing):
    """It sends its own processes a signal; what was left running in it finds nothing to write to."""
    command = [sys.executable, "-u", ROOT / "train.py", f"--data={data}", f"--out={tmp_path}", "--phase=1", "--steps=4000", *SHORT]
    reading, terminal = pty.openpty()
    streams = dict(stdin=subprocess.DEVNULL, stdout=terminal, stderr=subprocess.DEVNULL, start_new_session=True)
    process = subprocess.Popen(command, cwd=ROOT, **streams,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # fmt: skip
    os.close(terminal)
    said = b""
    while b"phase 1 step" not in said:
        said += os.read(reading, 1 << 12)
    if closing == "a terminal of its own":
        process.send_signal(signal.SIGHUP)
    os.close(reading)
    assert process.wait(120) == 130
    assert 0 < load_checkpoint(tmp_path / "last.pt")["step"] < 4000


def test_a_reader_who_leaves_stops_a_run_as_ctrl_c_does(data, tmp_path):
    command = [sys.executable, ROOT / "train.py", f"--data={data}", f"--out={tmp_path}", "--phase=1", "--steps=4000", *SHORT]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("phase 1 step"):
            break
    process.stdout.close()
    assert process.wait(120) == 130 and not process.stderr.read()
    assert 0 < load_checkpoint(tmp_path / "last.pt")["step"] < 4000


def test_a_damaged_log_or_data_folder_is_one_line(finished, data, tmp_path):
    fails("train.py", f"--data={data}", f"--out={data}", *SHORT, match="holds data of prepare.py: name another folder for the run")
    for line in ("garbage}", "{}", "\udcff}"):
        (tmp_path / "log.jsonl").write_text('{"phase": 1, "step": 5, "tokens": 9}\n' + line + "\n", errors="surrogateescape")
        fails("curves.py", tmp_path, match="log.jsonl:2 is no line of a log: remove it")
    shutil.copytree(data, tmp_path / "data")
    begin, foreign = '{"fingerprint": "x", "vocab_size": 400, "phases": ', "meta.json is not a meta.json of prepare.py: make the data again"
    lacking = "meta.json lists no train shards of phase 1: make the data again"
    wrong = {"[]": foreign, begin + "[]}": foreign, begin + '{"1": {"val": {}}}}': foreign, begin + '{"2": {}}}': lacking}
    for meta, match in wrong.items():
        (tmp_path / "data/meta.json").write_text(meta)
        fails("train.py", f"--data={tmp_path / 'data'}", match=match)
    shutil.copy(data / "meta.json", tmp_path / "data")
    (tmp_path / "data/tokenizer.json").write_bytes(b"\xff")
    fails("train.py", f"--data={tmp_path / 'data'}", match="tokenizer.json is not a tokenizer")


@pytest.mark.parametrize(
    "options, match",
    [
        (["--price=-4"], "--price=-4.0 must be positive and below 2**31"),
        (["--steps=99999999999999999999"], "must be positive and below 2**31"),
        pytest.param(["--device=cuda"], "cuda cannot be used here", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")),
        (["--n_head=3"], "n_head=3 is not divisible by n_kv_head=2"),
        (["--head_dim=15"], "head_dim=15 is odd"),
        (["--seq_len=1000000"], "a window of phase 1 needs 1,000,001"),
        (["--data=nowhere"], "nowhere holds no prepared data: make it with"),
        (["--lr=-1"], "--lr=-1.0 must be positive"),
        (["--seed=18446744073709551616"], "must be 0 or more, below 2**63"),
        (["--rope_theta=0"], "rope_theta=0.0 must be above 0"),
        (["--seq_len=40", "--max_seq_len=32"], "phase 1 has windows of 40 tokens, the model reads 32: add --max_seq_len=40"),
        (["--layers=3"], "--layers"),
        (["--preset=huge"], "huge"),
        (["--device=tpu"], "--device=tpu cannot be used here"),
    ],
)
def test_bad_options_of_train(data, tmp_path, options, match):
    fails("train.py", f"--data={data}", f"--out={tmp_path}", "--steps=2", "--device=cpu", *options, match=match)
    assert not list(tmp_path.glob("*.pt"))
