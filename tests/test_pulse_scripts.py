"""train.py and sample.py with --model=pulse: killed and started again, energy and raster, what bad input gets."""

import dataclasses
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

from checkpoint import load_checkpoint, save_checkpoint
from model import Flow, FlowConfig
from snn_model import Pulse, PulseConfig

TINY = PulseConfig(vocab_size=300, n_layer=2, d_model=16, d_hidden=24, d_ff=20, num_steps=3, n_head=2, memory_every=2)
SIZES = ["--n_layer=2", "--d_model=32", "--d_hidden=40", "--d_ff=48", "--n_head=2", "--memory_every=2", "--num_steps=2"]
RUN = ["--model=pulse", "--phase=1", "--steps=60", "--save_interval=7", "--eval_interval=60", "--eval_tokens=256", "--log_interval=5"]
RUN += [*SIZES, "--seq_len=40", "--batch_size=2", "--device=cpu"]


def start(script, *options):
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def fails(process, match):
    """The script ends with exit code 2 and this one line."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and len(errors.splitlines()) == 1 and errors.startswith("error: ") and match in errors, errors


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 7))) for _ in range(100)]
    (folder / "text.txt").write_text("\n".join(" ".join(rng.choice(words, 12)) + "." for _ in range(600)))
    process = start("prepare.py", folder / "text.txt", f"--out={folder / 'text'}", "--vocab_size=300")
    assert process.wait(120) == 0, process.stderr.read()
    return folder / "text"


def test_killed_and_started_again_ends_in_the_same_weights(data, tmp_path):
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    processes = [start("train.py", f"--data={data}", f"--out={out}", *RUN) for out in (killed, whole)]
    deadline = time.monotonic() + 120
    while not (killed / "last.pt").exists():
        assert processes[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    processes[0].send_signal(signal.SIGKILL)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert processes[1].returncode == 0 and not (killed / "phase1.pt").exists(), outputs
    again = start("train.py", f"--data={data}", f"--out={killed}", *RUN)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0 and "continuing" in output, errors
    a, b = (load_checkpoint(out / "phase1.pt") for out in (whole, killed))
    assert a["model"] == "pulse" and a["weights"].keys() == b["weights"].keys()
    assert all(torch.equal(weight, b["weights"][name]) for name, weight in a["weights"].items())


def test_phase_2_starts_with_short_matrices_and_phase_3_with_quiet_neurons(data, tmp_path):
    """With no learning rate a phase ends in the weights it started with, but for those that --shorten and --quieten changed."""
    run = ["train.py", f"--data={data}", f"--out={tmp_path}", *[option for option in RUN if option != "--phase=1"], "--steps=2"]
    run += ["--lr=1e-12", "--weight_decay=0"]
    process = start(*run, "--shorten=0.5", "--quieten=0.8")
    assert process.wait(120) == 0, process.stderr.read()
    checkpoints = [load_checkpoint(tmp_path / f"phase{phase}.pt") for phase in (1, 2, 3)]
    assert [checkpoint["settings"]["rate_penalty"] for checkpoint in checkpoints] == [0.1] * 3
    first, second, third = (checkpoint["weights"] for checkpoint in checkpoints)
    for name, weight in first.items():
        normalized = name.removesuffix("_proj.weight").endswith((".in", ".gate", ".up", ".q", ".k", ".v"))
        factor = 0.5 if normalized and name.endswith("_proj.weight") else 1
        torch.testing.assert_close(second[name], factor * weight, rtol=1e-5, atol=1e-9)
        quiet = name.endswith(("out.gain", "memory.q.gain", "memory.k.gain", "feed_forward.encode.gain", "gate_encode.gain"))
        factor = 0.8 if quiet else 1 / 0.8 if name in ("token_embedding.weight", "lm_head.weight") else 1
        torch.testing.assert_close(third[name], factor * second[name], rtol=1e-5, atol=1e-9)
    fails(start(*run, "--shorten=1"), "phase2.pt was trained with other settings (shorten is 0.5 there")
    fails(start(*run, "--shorten=0.5"), "phase3.pt was trained with other settings (quieten is 0.8 there, None here")


def test_bad_input_to_the_scripts(data, tmp_path):
    tokenizer = (data / "tokenizer.json").read_text()
    small = FlowConfig(vocab_size=300, n_layer=1, d_model=16, n_head=2, n_kv_head=1, head_dim=8, d_ff=16, global_every=1)
    for name, network in (("flow", Flow(small)), ("pulse", Pulse(TINY))):
        contents = dict(model=name, config=dataclasses.asdict(network.config), weights=network.state_dict(), tokenizer=tokenizer)
        save_checkpoint(tmp_path / f"{name}.pt", contents | dict(phase=1, step=1))
    train = ["train.py", "--model=pulse", f"--data={data}", f"--out={tmp_path / 'x'}"]
    expected = [
        (start(*train, "--num_steps=0"), "num_steps=0 must be at least 1"),
        (start(*train, "--tau_max=0.5"), "tau_max=0.5 must be at least 1"),
        (start(*train, "--shorten=0"), "--shorten=0.0 must be above 0"),
        (start("train.py", f"--data={data}", "--shorten=0.5"), "is for --model=pulse only"),
        (start(*train, "--quieten=1.5"), "--quieten=1.5 must be above 0"),
        (start(*train, "--leak=none"), "leak=none must be one of gated, learned, fixed"),
        (start("sample.py", "--model=pulse", f"--ckpt={tmp_path / 'flow.pt'}"), "holds a flow model, not pulse"),
        (start("sample.py", "--model=flow", f"--ckpt={tmp_path / 'pulse.pt'}"), "holds a pulse model, not flow"),
    ]
    good = start("sample.py", "--model=pulse", f"--ckpt={tmp_path / 'pulse.pt'}", "--max_new_tokens=5", "--prompt=abc")
    for process, match in expected:
        fails(process, match)
    assert good.communicate(timeout=120)[0].startswith("abc") and good.returncode == 0
    assert not (tmp_path / "x").exists()


def test_sample_shows_energy_and_spikes_of_a_pulse_only(data, tmp_path):
    tokenizer = (data / "tokenizer.json").read_text()
    network = Pulse(TINY)
    contents = dict(model="pulse", config=dataclasses.asdict(network.config), weights=network.state_dict(), tokenizer=tokenizer)
    save_checkpoint(tmp_path / "pulse.pt", contents | dict(phase=1, step=1))
    sample = ["sample.py", f"--ckpt={tmp_path / 'pulse.pt'}"]
    good = start(*sample, "--prompt=abc def", "--energy", f"--raster={tmp_path / 'spikes.png'}")
    bad = start(*sample, "--energy")
    fails(bad, "--energy and --raster look at a model that reads --prompt")
    fails(start("train.py", f"--data={data}", "--rate_penalty=0.1"), "is for --model=pulse only")
    output, errors = good.communicate(timeout=120)
    assert good.returncode == 0 and "became accumulates" in output, errors
    assert (tmp_path / "spikes.png").read_bytes().startswith(b"\x89PNG")
