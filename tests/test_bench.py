"""bench.py at tiny sizes, and that what it compares with does the same work; nothing here asserts a speed."""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import bench_gpu
import by_hand
import loss
import model as flow
import peers
import train
import training_memory
from bench import ROWS, TINY, TINY_PULSE, rounds
from device import Device
from measure import Bench, state_bytes
from model import Flow, FlowConfig
from muon import build_optimizers
from scripts import InputError
from snn_model import Pulse

TEXT = " ".join(peers.words(40_000, ("tqdm", "packaging")))


def call(*options, cwd=ROOT):
    return subprocess.run([sys.executable, ROOT / "bench.py", *options], cwd=cwd, capture_output=True, text=True, check=False)


def test_every_row(tmp_path):
    """Each row ends in finite results, in the table and in the file, or says why it cannot run."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    done = call("--quick", "--repeats=1", "--text=text.txt", "--json=out.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert report["quick"] and report["repeats"] == 1 and report["machine"]["torch"] == torch.__version__
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    skipped = {line[0][2:] for line in lines if line[1].startswith("not run: ")}
    needs_gpu = {"gpu_training", "gpu_pulse", "gpu_memory", "gpu_decoding", "gpu_attention"}
    needs_linux = set() if Path("/proc/self/smaps_rollup").exists() else {"preparation"}
    assert skipped == (set() if torch.cuda.is_available() else needs_gpu) | needs_linux, done.stdout  # says why
    assert list(dict.fromkeys(line[0][2:] for line in lines)) == list(ROWS)
    results = report["results"]
    assert len(results) == len(lines) - len(skipped) and {result["row"] for result in results} == ROWS.keys() - skipped
    for result in results:
        assert result["value"] > 0 and result["there"] > 0 and result["ratio"] == pytest.approx(result["value"] / result["there"])
        assert result["met"] is None, "tiny sizes meet or miss no goal"
        assert all(len(seconds) == 1 for seconds in (result["seconds"] or {}).values())
        if result["unit"] not in ("MB", "bytes", "bits per byte"):
            assert len(result["seconds"]) > 1, f"{result['figure']}: the times of what it is compared with"
    assert "decoding nano, --int8 (none is large enough), 8 tokens" in [result["figure"] for result in results]


@pytest.mark.parametrize(
    "options, message",
    [
        (["decode"], "decode is no row: expected flow_training, "),
        (["--repeats=0"], "--repeats=0 must be at least 1"),
        (["--text=nowhere.txt"], "--text=nowhere.txt does not exist: name a text file"),
        (["--json=nowhere/out.json"], "--json=nowhere/out.json: there is no folder nowhere: make it first"),
        (["--json=docs", "startup"], "--json=docs is a folder: name a file"),
        (["muon_training"], "muon_training: needs --text=FILE, such as tinyshakespeare.txt"),
    ],
)
def test_bad_input(options, message):
    done = call(*options)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_transformers_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="pip install transformers"):
        peers.twin(Flow(TINY))


def bench(tmp_path, **options):
    return Bench(argparse.Namespace(**{"repeats": 3, "quick": False, "text": None} | options), tmp_path)


def test_jobs_take_turns(tmp_path):
    """The first turn does not count, and a job may bring its own seconds."""
    order, own = [], iter([9.0, 1.0, 3.0, 2.0])

    def first():
        order.append("first")
        return next(own)

    times = bench(tmp_path).alternate({"first": first, "second": lambda: order.append("second")})
    assert order == ["first", "second"] * 4 and times["first"] == [1.0, 3.0, 2.0] and len(times["second"]) == 3


def test_ratios_and_goals(tmp_path, capsys):
    b = bench(tmp_path)
    b.row = "some"
    own = {"ours": [1.0, 2.0, 4.0], "theirs": [4.0, 6.0, 5.0]}
    b.alternate = lambda jobs: own
    assert b.rates("a", own, 10, "tokens/s", ("at least", 2)) == {"ours": 2.0, "theirs": 5.0}
    b.rates("b", own, (30, 10), "tokens/s", ("at most", 2))
    assert [(r["value"], r["there"], r["ratio"], r["met"]) for r in b.results] == [(5, 2, 2.5, True), (15, 2, 7.5, False)]
    out = capsys.readouterr().out
    assert "| at least 2: met | 150% |" in out and "| at most 2: MISSED | 150% |" in out


def test_gpu_rows_keep_all_times(tmp_path, monkeypatch):
    """On the CPU, not compiled: what they record, not how fast it is."""
    device = Device("cpu")
    device.peak_flops = lambda: (1e12, "invented")
    monkeypatch.setattr(bench_gpu, "gpu", lambda: device)
    monkeypatch.setattr(train, "compile_parts", lambda model: None)
    monkeypatch.setattr(bench_gpu, "PULSE_PRESETS", {"nano": TINY_PULSE})
    monkeypatch.setattr(bench_gpu, "PRESETS", dict.fromkeys(flow.PRESETS, TINY))
    monkeypatch.setattr(train, "RECIPES", {n: dataclasses.replace(r, micro_step_tokens=(2048,) * 3) for n, r in train.RECIPES.items()})
    b = bench(tmp_path, repeats=2, quick=True)
    for row in (bench_gpu.gpu_training, bench_gpu.gpu_pulse):
        b.row = row.__name__
        row(b)
    names = {"gpu_training": {"compiled", "not compiled", "update"}, "gpu_pulse": {"compiled", "not compiled", "Flow"}}
    for result in b.results:
        assert names[result["row"]] <= result["seconds"].keys() and all(len(seconds) == 2 for seconds in result["seconds"].values())
        own = next(iter(result["seconds"]))
        assert own in result["figure"] or own == "update"
    assert next(iter(b.results[3]["seconds"])) == "update" and "clipping" in b.results[3]["figure"]


def test_which_decoders_have_8_bit_weights():
    assert not rounds(Flow(TINY)) and rounds(Flow(dataclasses.replace(TINY, vocab_size=4096)))  # its head is large enough


def test_peers_do_the_same_work():
    """transformers' twin and the stepped Pulse have the losses and the gradients of what they are compared with."""
    torch.manual_seed(0)
    x, y = torch.randint(61, (2, 2, 40))
    ours, pulse = Flow(dataclasses.replace(TINY, vocab_size=61)), Pulse(dataclasses.replace(TINY_PULSE, vocab_size=61)).double()
    for network, peer, bound in ((ours, peers.twin(ours), 1e-5), (pulse, peers.Stepped(pulse), 1e-6)):
        gradients = []
        for compared in (network, peer):
            loss = compared(x, y)[1]
            loss.backward()
            weight = (peer.theirs.model.embed_tokens if compared is peer and network is ours else network.token_embedding).weight
            gradients.append((loss.detach(), weight.grad.clone()))
            weight.grad = None
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, atol=bound, rtol=bound)


def test_nanogpt_learns_and_looks_only_back():
    torch.manual_seed(0)
    network = peers.NanoGPT(11)
    x = torch.randint(11, (1, 20))
    losses = [network(x, torch.where(torch.arange(20) == 5, x, -100)) for x in (x, torch.cat([x[:, :6], (x[:, 6:] + 1) % 11], 1))]
    assert torch.equal(*losses)
    (_, before), (_, after) = (peers.train_nanogpt(TEXT[:4000], steps) for steps in (1, 30))
    assert 1 < after < before < 8
    with pytest.raises(InputError, match="its last tenth must be longer than 64"):
        peers.train_nanogpt("short", 1)


def test_words():
    documents = list(peers.words(20_000, ("tqdm",)))
    assert 20_000 <= sum(len(document.encode()) for document in documents) < 25_000
    assert documents == list(peers.words(20_000, ("tqdm",))) and len(set(documents)) == len(documents)


class FlashMemory(torch.autograd.Function):
    """Attention that keeps for the backward pass what a GPU's flash attention does.  q [B, T, H, D], k and v [B, T, K, D]"""

    @staticmethod
    def forward(ctx, q, k, v, window):
        ctx.window, out = window, flow.causal_attention(*(x.transpose(1, 2) for x in (q, k, v)), window).transpose(1, 2).contiguous()
        ctx.save_for_backward(q, k, v, out, torch.zeros(q.shape[:3]))
        return out

    @staticmethod
    def backward(ctx, grad):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors[:3]]
        with torch.enable_grad():
            out = flow.causal_attention(*(x.transpose(1, 2) for x in inputs), ctx.window).transpose(1, 2)
        return *torch.autograd.grad(out, inputs, grad), None


def test_memory_estimate(monkeypatch):
    """The formula against what autograd keeps and what the optimizers hold, with the fused attention of a GPU."""
    monkeypatch.setattr(by_hand.AttentionByHand, "apply", lambda q, k, v, chunks: FlashMemory.apply(q, k, v, 32))
    config = FlowConfig(n_layer=3, d_model=192, n_head=6, d_ff=512, global_every=3, window=32)
    network, idx = Flow(config).train(), torch.randint(config.vocab_size, (4, 128))
    for checkpointing in (False, True):
        network.checkpointing = checkpointing
        estimate = training_memory.training_memory(config, *idx.shape, checkpointing, qk_norm=2)
        copies = 0 if checkpointing else estimate["bf16"] - 2 * config.vocab_size * config.d_model  # autograd keeps none of the head's
        kept = training_memory.kept_bytes(network, idx, idx, torch.autocast("cpu", torch.bfloat16))
        assert estimate["activations"] + copies == pytest.approx(kept, rel=0.04)
    muon, adamw = build_optimizers(network, 1e-3)
    muon.step()
    adamw.step()
    held = [sum(t.nbytes for state in o.state.values() for t in state.values() if t.ndim) for o in (muon, adamw)]
    assert held == [estimate["muon"], estimate["adamw"]]
    assert estimate["weights"] == sum(p.nbytes for p in network.parameters())
    assert estimate["gradients"] == sum(p.grad.nbytes for p in network.parameters())


def test_memory_peak(monkeypatch, tmp_path):
    """With checkpointing it comes when the backward pass begins: all inputs are kept and a block is computed again."""
    monkeypatch.setitem(loss.LOGITS, "cpu", 2**18)
    monkeypatch.setitem(loss.LOGITS, "cuda", 2**18)  # what the estimate goes by
    config = FlowConfig(n_layer=8, vocab_size=256)
    network, idx = Flow(config).train(), torch.randint(config.vocab_size, (64, 32))
    for network.checkpointing in (False, True):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            with torch.autocast("cpu", torch.bfloat16):
                _, value = network(idx, idx)
            value.backward()
        network.zero_grad(set_to_none=True)
        profile.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        changes = [event["args"]["Bytes"] for event in events if event.get("name") == "[memory]" and "Total Allocated" in event["args"]]
        estimate = training_memory.training_memory(config, *idx.shape, network.checkpointing, qk_norm=2)
        held = sum(estimate[what] for what in ("weights", "muon", "adamw"))
        assert max(itertools.accumulate(changes)) == pytest.approx(estimate["peak"] - held, rel=0.12)


def test_memory_table():
    lines = training_memory.table().splitlines()
    assert len(lines) == 2 + 2 * len(flow.PRESETS) and len({line.count("|") for line in lines}) == 1


def test_state_bytes():
    state = Flow(TINY).init_state(2, 50)
    per_token = 2 * 2 * TINY.n_kv_head * TINY.head_dim * 4
    assert state_bytes(state) == per_token * (50 + TINY.window)
    pulse = Pulse(TINY_PULSE)
    with torch.no_grad():
        state = pulse.init_state(1)
        before = state_bytes(state)
        pulse(torch.zeros(1, 30, dtype=torch.long), state=state)
    assert before == state_bytes(state) > 0
