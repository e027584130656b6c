"""evaluate.py: its figures are those of the slow way and of the log of the run, and what cannot be compared is refused."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, fails, lines_of, make, tokens

import convert
import evaluate
from checkpoint import load_checkpoint, load_model, save_checkpoint
from scripts import InputError
from shards import read_shard, write_shard
from snn_model import Pulse, PulseConfig

ON = ["--device=cpu", "--dtype=fp32", "--seq_len=32"]


@pytest.fixture(scope="module")
def pulse(data, tmp_path_factory):
    """The run folder of a Pulse at its random start."""
    torch.manual_seed(0)
    model = Pulse(PulseConfig(vocab_size=400, n_layer=2, d_model=32, d_hidden=40, d_ff=48, n_head=2, memory_every=2, num_steps=2))
    out = tmp_path_factory.mktemp("pulse")
    content = {"model": "pulse", "config": dataclasses.asdict(model.config), "weights": model.state_dict(), "phase": 1, "step": 0}
    save_checkpoint(out / "phase1.pt", content | {"tokenizer": (data / "tokenizer.json").read_text()})
    return out


def figures(*options):
    """What evaluate.py writes with --json, called in this process."""
    evaluate.main([*map(str, options), *ON])
    return lines_of(next(option for option in options if str(option).startswith("--json=")).partition("=")[2])


@torch.no_grad()
def slowly(model, tokenizer, data, phase, seq_len):
    """(nats per token, bits per byte, tokens) one window at a time, the bytes being those of the decoded text."""
    ids, nats, n_bytes, n = tokens(data, phase, "val").astype(np.int64), 0.0, 0, 0
    for start in range(0, len(ids) - seq_len, seq_len):  # one shard
        window = torch.from_numpy(ids[start : start + seq_len + 1])
        nats += F.cross_entropy(model(window[None, :-1])[0][0], window[1:], reduction="sum").item()
        text = tokenizer.decode(window[1:].tolist(), skip_special_tokens=True)  # ASCII: no window cuts a character in two
        n_bytes, n = n_bytes + len(text.encode()), n + seq_len
    return nats / n, nats / math.log(2) / n_bytes, n


@pytest.fixture
def three_texts(data, tmp_path):
    """Data whose phases have different validation texts."""
    shutil.copytree(data, tmp_path / "three")
    for phase in (2, 3):
        header, ids = read_shard(data / f"phase{phase}_val_00000.bin")
        write_shard(tmp_path / "three" / f"phase{phase}_val_00000.bin", ids[: 500 * phase], 400, 0, header["fingerprint"])
    return tmp_path / "three"


def test_figures_are_those_of_the_slow_way(finished, pulse, three_texts, tmp_path, capsys):
    data = three_texts
    convert.main([f"--ckpt={finished}", "--to=hf", f"--out={tmp_path / 'hf'}"])
    capsys.readouterr()
    ckpts = [str(path) for path in (finished / "phase1_best.pt", pulse, tmp_path / "hf")]
    lines = figures("--ckpt", *ckpts, f"--data={data}", f"--json={tmp_path / 'f'}", "--batch_size=3")
    title, head, *rows = capsys.readouterr().out.splitlines()
    files = [finished / "phase1_best.pt", pulse / "phase1.pt", tmp_path / "hf"]
    assert [(x["checkpoint"], x["phase"]) for x in lines] == [(str(file), phase) for file in files for phase in (1, 2, 3)]
    assert head.split("  ")[0] == "checkpoint" and len(rows) == len(lines) and str(data) in title
    for line, row in zip(lines, rows):
        model, tokenizer, _ = load_model(line["checkpoint"])
        nats, bits, n = slowly(model, tokenizer, data, line["phase"], 32)
        assert line["eval_tokens"] == n and line["seq_len"] == 32 and line["data"] == str(data)
        assert line["val_loss"] == pytest.approx(nats, rel=1e-5) and line["val_bpb"] == pytest.approx(bits, rel=1e-5)
        assert row.split() == [line["checkpoint"], str(line["phase"]), "32", f"{n:,}", f"{line['val_loss']:.4f}", f"{line['val_bpb']:.4f}"]
    assert len({x["val_bpb"] for x in lines[:6]}) == 6


def test_figures_are_those_of_the_log_for_the_same_windows(data, tmp_path):
    sizes = ["--n_layer=2", "--d_model=32", "--d_ff=48", "--head_dim=8", "--global_every=2", "--window=8"]
    run = ["--phase=2", "--steps=5", "--batch_size=4", "--eval_tokens=512", f"--data={data}", f"--out={tmp_path / 'run'}"]
    done = call("train.py", *run, *sizes, *ON)
    assert done.returncode == 0, done.stderr
    (logged,) = [x for x in lines_of(tmp_path / "run" / "log.jsonl") if "val_bpb" in x]
    options = ["--ckpt", tmp_path / "run", f"--data={data}", f"--json={tmp_path / 'f'}", "--phase=2"]
    (line,) = figures(*options, "--eval_tokens=512")
    assert (round(line["val_loss"], 5), round(line["val_bpb"], 5)) == pytest.approx((logged["val_loss"], logged["val_bpb"]), abs=2e-5)
    assert line["eval_tokens"] == 512
    (whole,) = figures(*options)
    assert whole["eval_tokens"] > 512 and abs(whole["val_bpb"] - logged["val_bpb"]) > 1e-4  # else the comparison above shows nothing

    done = call("evaluate.py", *options, "--eval_tokens=512", *ON, ranks=2)
    assert done.returncode == 0, done.stderr
    (both,) = lines_of(tmp_path / "f")
    assert {**both, "val_loss": 0, "val_bpb": 0} == {**line, "val_loss": 0, "val_bpb": 0} and done.stdout.count("run/phase2.pt") == 1
    assert both["val_loss"] == pytest.approx(line["val_loss"], rel=1e-6) and both["val_bpb"] == pytest.approx(line["val_bpb"], rel=1e-6)


def test_the_newest_run_and_the_phases_that_the_data_have(finished, pulse, data, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "out" / "flow")
    shutil.copytree(data, tmp_path / "data" / "builtin")
    meta = json.loads((data / "meta.json").read_text())
    del meta["phases"]["2"], meta["phases"]["3"]["val"]
    (tmp_path / "data/builtin/meta.json").write_text(json.dumps(meta))
    monkeypatch.chdir(tmp_path)
    evaluate.main([*ON, "--eval_tokens=1"])
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:4] == ["out/flow/phase3.pt", "1", "32", "32"]  # one window at least
    evaluate.main([*ON[:2], "--eval_tokens=1"])
    assert capsys.readouterr().out.splitlines()[-1].split()[1:4] == ["1", "256", "256"]
    shutil.copytree(pulse, tmp_path / "out" / "pulse")
    evaluate.main([*ON, "--eval_tokens=1", "--model=flow"])
    assert "out/flow/phase3.pt" in capsys.readouterr().out
    with pytest.raises(InputError, match="meta.json lists no val shards of phase 2"):
        evaluate.main([*ON, "--phase=2"])
    meta["phases"] = {}
    (tmp_path / "data/builtin/meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="meta.json lists no val shards of phase 1"):
        evaluate.main(ON)


def test_a_checkpoint_of_another_tokenizer_is_refused_before_the_first_figure(finished, data, tmp_path, capsys):
    (tmp_path / "text.txt").write_text((data.parent / "text.txt").read_text()[::-1])
    make(tmp_path / "text.txt", out=tmp_path / "other")
    match = f"{finished / 'phase3.pt'} was trained with another tokenizer than that of {tmp_path / 'other'}: name the --data it was"
    fails("evaluate.py", "--ckpt", finished, f"--data={tmp_path / 'other'}", *ON, match=match)
    checkpoint = load_checkpoint(finished / "phase3.pt")
    save_checkpoint(tmp_path / "foreign.pt", checkpoint | {"tokenizer": (tmp_path / "other" / "tokenizer.json").read_text()})
    capsys.readouterr()
    with pytest.raises(InputError, match=r"foreign.pt was trained with another tokenizer than that of .*/text: "):
        evaluate.main(["--ckpt", str(finished), str(tmp_path / "foreign.pt"), f"--data={data}", *ON])
    assert not capsys.readouterr().out
    weights = checkpoint["weights"] | {name: checkpoint["weights"][name][:390] for name in ("token_embedding.weight", "lm_head.weight")}
    small = checkpoint | {"weights": weights, "config": checkpoint["config"] | {"vocab_size": 390}}
    save_checkpoint(tmp_path / "small.pt", small)
    with pytest.raises(InputError, match="small.pt: its tokenizer has 400 tokens, the model 390: they do not belong together"):
        evaluate.main(["--ckpt", str(tmp_path / "small.pt"), f"--data={data}", *ON])


def test_bad_options(finished, data, tmp_path):
    checkpoint = load_checkpoint(finished / "phase3.pt")
    save_checkpoint(tmp_path / "short.pt", checkpoint | {"config": checkpoint["config"] | {"max_seq_len": 40}})
    (tmp_path / "broken").mkdir()
    shutil.copy(data / "meta.json", tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    for options, match in (
        (["--seq_len=0"], "--seq_len=0 must be positive and below 2"),
        (["--eval_tokens=-1"], "--eval_tokens=-1 must be positive"),
        (["--batch_size=0"], "--batch_size=0 must be positive"),
        (["--seq_len=1000000"], "a window of phase 1 needs 1,000,001: prepare more text, raise its --val_fraction or lower --seq_len"),
        (["--seq_len=41", "--ckpt", str(tmp_path / "short.pt")], "windows of 41 tokens, .*short.pt reads 40: give --seq_len=40 or less"),
        (["--phase=1", "--ckpt", str(tmp_path / "short.pt")], "phase 1 has windows of 256 tokens, .*short.pt reads 40"),
        (["--ckpt", str(tmp_path / "none.pt")], "none.pt holds no checkpoint yet"),
        (["--model=pulse"], "holds a flow model, not pulse"),
        (["--data=nowhere"], "nowhere holds no prepared data: make it with"),
        ([f"--data={tmp_path / 'broken'}"], "tokenizer.json is not a tokenizer"),
        ([f"--json={tmp_path / 'none' / 'f'}"], "cannot be written: name a file in a folder that exists"),
        ([f"--json={tmp_path}"], "cannot be written: name a file"),
        (["--device=tpu"], "--device=tpu cannot be used here"),
    ):
        with pytest.raises(InputError, match=match):
            evaluate.main(["--ckpt", str(finished), f"--data={data}", "--device=cpu", *options])
    fails("evaluate.py", "--phase=4", match="--phase")
    fails("evaluate.py", "--ckpt", finished, f"--data={data}", "--seq_len=-3", match="--seq_len=-3 must be positive")


def test_memory_that_does_not_suffice_is_one_line(finished, data, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluate, "evaluate", full)
    with pytest.raises(InputError, match="does not fit into the memory: lower --batch_size or --seq_len"):
        evaluate.main(["--ckpt", str(finished), f"--data={data}", *ON])
