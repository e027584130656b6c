"""spikes.py: firing rates, energy and raster against counts made with plain loops; the model is left as it was."""

import dataclasses
import re
import sys

import pytest
import snntorch
import torch
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import snn_model
import spikes
from model import PRESETS, Flow, FlowConfig
from scripts import InputError
from snn_model import Neuron, Pulse, PulseConfig

TINY = dict(vocab_size=260, n_layer=3, d_model=16, d_hidden=20, d_ff=12, n_head=2, num_steps=3, memory_every=2)


def tiny(**changes) -> tuple[Pulse, torch.Tensor]:
    torch.manual_seed(0)
    config = PulseConfig(**{**TINY, **changes})
    return Pulse(config).eval(), torch.randint(config.vocab_size, (2, 11))


def test_the_neuron_of_the_documentation_writes_as_it_was_trained(monkeypatch):
    """Token by token the same logits as whole; and it is another neuron."""
    plain, idx = tiny()
    monkeypatch.setattr(snn_model, "Neuron", snn_model.Neuron)  # put back afterwards
    code = re.search(r"## A neuron of your own.*?```python\n(.*?)```", (ROOT / "docs/pulse.md").read_text(), re.DOTALL)[1]
    exec(compile(code.replace("PulseConfig()", "PulseConfig(**sizes)"), "docs/pulse.md", "exec"), given := {"sizes": TINY})
    model = given["model"].eval()
    model.load_state_dict(plain.state_dict())
    plain, model = plain.double(), model.double()
    with torch.no_grad():
        whole, state = model(idx)[0], model.init_state(2)
        steps = torch.cat([model(idx[:, t : t + 1], state=state)[0] for t in range(idx.size(1))], 1)
        assert torch.equal(whole, steps) and (whole - plain(idx)[0]).abs().max() > 1e-3


def tokenizer() -> Tokenizer:
    letters = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tok = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tok.add_special_tokens(letters[:1])
    tok.add_tokens(["$$"])  # an error if it were taken for a formula
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    return tok


def inputs_of_matrices(model, idx, monkeypatch) -> dict[str, list[list[float]]]:
    """What each nn.Linear is fed and what q and k of a memory fire, [B * T][n], caught without hooks."""
    names, fed = {module: name for name, module in model.named_modules()}, {}
    forward, answer = nn.Linear.forward, Neuron.forward

    def caught(self, x):
        fed[names[self]] = x.flatten(0, -2).tolist()
        return forward(self, x)

    def heard(self, *args):
        counts, mem = answer(self, *args)
        if names[self].endswith((".memory.q", ".memory.k")):
            fed[names[self]] = counts.flatten(0, -2).tolist()
        return counts, mem

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(nn.Linear, "forward", caught)
        patch.setattr(Neuron, "forward", heard)
        model(idx)
    return fed


@pytest.mark.parametrize("bf16", [False, True])
def test_rates_are_those_counted_one_by_one(bf16, monkeypatch):
    model, idx = tiny()
    with torch.no_grad():
        model.layers[0].hidden.bias[:3] = -1e3  # three neurons that never fire
        model.layers[0].hidden.bias[3:5] = 1e3  # and two that always do
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        rates = spikes.firing_rates(model, idx)
        fed = inputs_of_matrices(model, idx, monkeypatch)
    assert list(rates) == list(fed) and "lm_head" in rates
    for name, rows in fed.items():
        n, fired, total, ones, silent, saturated = len(rows[0]), 0, 0, 0, 0, 0
        for neuron in range(n):
            column = [abs(row[neuron]) for row in rows]
            assert all(count in (0, 1, 2, 3) for count in column)
            fired += sum(count > 0 for count in column)
            total += sum(column)
            ones += sum(f"{int(count):b}".count("1") for count in column)
            silent += all(count == 0 for count in column)
            saturated += all(count == 3 for count in column)
        pairs = n * len(rows)
        expected = {"nonzero": fired / pairs, "spikes": total / pairs, "phased": ones / pairs}
        expected |= {"silent": silent / n, "saturated": saturated / n}
        assert rates[name] == pytest.approx({"neurons": n, **expected}), name
    out = rates["layers.0.out_proj"]
    assert out["silent"] >= 3 / 20 and out["saturated"] >= 2 / 20


@pytest.mark.parametrize("K", [1, 3, 8, 15, 16])
def test_phases_are_micro_steps_of_snntorch_with_halving_thresholds(K):
    U = torch.cat([torch.arange(-2, 40) / 2, torch.randn(5000, generator=torch.Generator().manual_seed(K)) * K, torch.tensor([1e6])])
    counts = Neuron(U.numel(), PulseConfig(num_steps=K), 1.0).fire(U)
    left, sent, fired = U.clamp(max=K + 1), torch.zeros_like(U), torch.zeros_like(U)
    for digit in reversed(range(K.bit_length())):
        worth = 2.0**digit
        neuron = snntorch.Leaky(beta=1.0, threshold=worth, reset_mechanism="subtract", graded_spikes_factor=worth)
        spike, mem = neuron(left, torch.zeros_like(left))
        _, left = neuron(torch.zeros_like(left), mem)  # snntorch resets one micro-step after firing
        sent, fired = sent + spike, fired + (spike > 0)
    assert torch.equal(sent, counts) and counts.max() == K
    assert torch.equal(fired, spikes.in_phases(counts, K).float()) and torch.equal(fired, spikes.in_phases(-counts, K).float())


@pytest.mark.parametrize("K", [3, 48])
def test_summary_counts_a_neuron_once(K, monkeypatch):
    model, idx = tiny(num_steps=K)
    fed, short = inputs_of_matrices(model, idx, monkeypatch), spikes.summary(spikes.firing_rates(model, idx))
    again = ("k_proj", "v_proj", "decay", "write", *(["gate_proj"] if K == 3 else []))  # read the neurons that q_proj or in_proj reads
    columns = [(name, column) for name, rows in fed.items() if not name.endswith(again) for column in zip(*rows)]
    for block in range(3):
        counts = [abs(count) for name, column in columns if name.startswith(f"layers.{block}.") for count in column]
        assert short["spikes"][block] == pytest.approx(sum(counts) / len(counts), abs=1e-4)
    assert short["silent"] == pytest.approx(sum(not any(column) for _, column in columns) / len(columns), abs=1e-4)


@pytest.mark.parametrize("look", [spikes.firing_rates, spikes.energy, lambda model, idx: spikes.listen(model, idx[0].tolist())])
def test_the_model_is_left_as_it_was(look):
    model, idx = tiny()
    model.train()
    model.checkpointing = True

    def hooks():
        return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())

    weights, logits = {name: value.clone() for name, value in model.state_dict().items()}, model(idx)[0]
    look(model, idx)
    with pytest.raises(IndexError):
        look(model, idx + 10_000)  # fails in the middle
    assert hooks() == 0 and model.training and torch.is_grad_enabled()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(idx)[0], logits)
    assert all(p.grad is None for p in model.parameters())


def test_energy_of_pulse(monkeypatch):
    model, idx = tiny()
    fed = inputs_of_matrices(model, idx, monkeypatch)
    report = spikes.energy(model, idx)
    rows, synops, matrices = {row["name"]: row for row in report["rows"]}, 0, 0
    phased, doubled = 0, 0
    H, D = 2, 8
    fan_outs = {"layers.1.memory.q": D, "layers.1.memory.k": 2 * D}  # q reads S, k is recalled from it and written to it
    for name, counts in fed.items():
        fan_out, n = (fan_outs[name], 16) if name in fan_outs else model.get_submodule(name).weight.shape
        here = sum(abs(count) * fan_out for row in counts for count in row) / len(counts)
        assert rows[name]["synops"] == pytest.approx(here) and rows[name]["macs"] == fan_out * n
        assert rows[name]["nj"] == pytest.approx(here * 0.9 / 1000)
        synops, matrices = synops + here, matrices + fan_out * n
        phased += sum(f"{abs(int(count)):b}".count("1") * fan_out for row in counts for count in row) / len(counts)
        doubled += H * fan_out if name in fan_outs else fan_out  # K = 3 takes two micro-steps: each sum is doubled once
    # One token through the associative memory of the one block that has it, counted by torch and by hand.
    q, k, v = torch.randn(3, 1, H, 1, D)
    with FlopCounterMode(display=False) as counter:
        snn_model.associate(q, k, v, torch.zeros(1, H, 1), torch.ones(1, H, 1), torch.zeros(1, H, D, D))
    assert sum(rows[name]["macs"] for name in fan_outs) == counter.get_total_flops() // 2
    # S times its leak; |q|², |k|², the recalled, the written and what was read times a number.
    assert rows["memories"]["macs"] == H * (D * D + 5 * D)
    leaky = 2 * (3 * 20 + 2 * 16)  # hidden neurons, and q and k of the memory: beta U and (1 - beta) I
    assert rows["membranes"]["macs"] == leaky
    pulse = report["pulse"]
    assert pulse["macs"] == matrices + rows["memories"]["macs"] + leaky and pulse["parameters"] == model.config.num_params()
    assert pulse["nj"] == pytest.approx((synops * 0.9 + (pulse["macs"] - matrices) * 4.6) / 1000)
    assert pulse["spikes_per_synapse"] == pytest.approx(synops / matrices)
    assert pulse["accumulates"] == pytest.approx(matrices / pulse["macs"])
    in_phases = report["phased"]
    assert phased < synops and in_phases["synops"] == pytest.approx(phased + doubled)
    assert in_phases["nj"] == pytest.approx(((phased + doubled) * 0.9 + (pulse["macs"] - matrices) * 4.6) / 1000)
    assert in_phases["spikes_per_synapse"] == pytest.approx(phased / matrices)


def test_quiet_neurons_fire_less_and_the_others_as_before():
    model, idx = tiny(num_steps=48)
    neurons = {name: module for name, module in model.named_modules() if isinstance(module, Neuron)}
    with torch.no_grad():
        for neuron in neurons.values():
            neuron.bias.normal_(std=0.1)
        old = {name: (neuron.gain.clone(), neuron.bias.clone()) for name, neuron in neurons.items()}
        before, logits, read = spikes.firing_rates(model, idx), model(idx)[0], model.input_table()
        model.quieten(0.8)
        after, quiet_logits = spikes.firing_rates(model, idx), model(idx)[0]
    for name in ("layers.0.gate_proj", "layers.0.feed_forward.up_proj", "layers.1.memory.q", "layers.1.memory.k", "lm_head"):
        assert 0 < after[name]["spikes"] < before[name]["spikes"], name
    assert after["layers.0.in_proj"] == before["layers.0.in_proj"]  # the first that reads, and it counts exactly
    for name, neuron in neurons.items():
        factor = 0.8 if name.endswith(("out", "feed_forward.encode", "gate_encode", "memory.q", "memory.k")) else 1
        torch.testing.assert_close((neuron.gain, neuron.bias), tuple(factor * value for value in old[name]))
    torch.testing.assert_close(model.input_table(), read / 0.8)
    together = torch.corrcoef(torch.stack([logits.flatten(), quiet_logits.flatten()]))[0, 1].item()
    assert together > 0.8 and quiet_logits.std().item() == pytest.approx(logits.std().item(), rel=0.3)


def test_no_membranes_and_no_memories_cost_nothing():
    model, idx = tiny(tau_max=1.0, memory_every=9)
    rows = {row["name"]: row for row in spikes.energy(model, idx)["rows"]}
    assert rows["memories"]["macs"] == rows["membranes"]["macs"] == 0


@pytest.mark.parametrize("T", [3, 40])
def test_energy_of_flow(T, monkeypatch):
    model, _ = tiny()
    config = FlowConfig(vocab_size=64, n_layer=3, n_head=4, n_kv_head=2, d_model=16, head_dim=8, d_ff=24, window=5, global_every=3)
    flow = Flow(config).eval()
    idx = torch.zeros(1, T, dtype=torch.int64)
    fed = inputs_of_matrices(flow, idx, monkeypatch)
    macs = sum(flow.get_submodule(name).weight.numel() for name in fed)
    for layer in range(3):
        for t in range(T):
            for j in range(t + 1):
                if config.is_global(layer) or t - j < 5:
                    macs += 2 * 4 * 8 / T  # a key and a value of 8 numbers, in 4 heads
    report = spikes.energy(model, idx, config)
    assert report["tokens"] == T and report["flow"]["macs"] == pytest.approx(macs)
    assert report["flow"]["nj"] == pytest.approx(macs * 4.6 / 1000)
    assert report["flow"]["parameters"] == sum(p.numel() for p in flow.parameters())


def test_the_flow_beside_it_has_the_same_preset():
    for name, config in snn_model.PRESETS.items():
        assert spikes.nearest_flow(config) == PRESETS[name]
    other = dataclasses.replace(snn_model.PRESETS["small"], n_layer=7, vocab_size=2048)
    assert spikes.nearest_flow(other) == dataclasses.replace(PRESETS["small"], n_layer=7, vocab_size=2048)


def test_nearly_all_multiplications_become_accumulates():
    for name in ("nano", "small"):
        report = spikes.energy(Pulse(snn_model.PRESETS[name]).eval(), torch.randint(1024, (1, 16)))
        assert report["pulse"]["accumulates"] >= 0.95
        assert report["pulse"]["nj"] < report["flow"]["nj"]


def test_the_table_is_aligned_and_says_what_is_missing():
    model, idx = tiny()
    text = spikes.energy_table(spikes.energy(model, idx))
    rows, (comparison, phases, last) = text.split("\n\n")[:2], text.split("\n")[-3:]
    lines = "\n".join(rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and not any(line.endswith(" ") for line in lines) and max(map(len, lines)) <= 100
    for name in (*spikes.firing_rates(model, idx), "memories", "membranes", "Pulse", "Flow"):
        assert sum(line.startswith((f"{name} ", f"{name},")) for line in lines) == 1, name
    flow, pulse = spikes.nearest_flow(model.config).num_params(), model.config.num_params()
    assert f" times the energy, {flow / pulse:.2f} times the parameters; " in comparison
    assert "spikes per synapse and token" in comparison and "became accumulates" in comparison
    assert phases.startswith("In phases") and "spikes per synapse and token" in phases
    for left_out in ("data movement", "norms", "residual additions", "embedding lookup", "softmax"):
        assert left_out in last


def test_listening_token_by_token_hears_the_whole_sequence(monkeypatch):
    model, idx = tiny()
    model.double()
    fed = inputs_of_matrices(model, idx[:1], monkeypatch)
    counts, membranes = spikes.listen(model, idx[0].tolist())
    for i, block in enumerate(model.layers):
        assert counts[block.hidden].tolist() == fed[f"layers.{i}.out_proj"]
        steps = (membranes[block.hidden] - 1).ceil().clamp(0, 3)  # what snntorch's neuron would fire from these membranes
        assert torch.equal(counts[block.hidden], steps)
    assert all(isinstance(neuron, snntorch.Leaky) for neuron in counts)


@pytest.mark.parametrize(
    "changes", [{}, {"num_steps": 1}, {"tau_max": 1.0}, {"memory_every": 9}, {"d_hidden": 200, "n_layer": 1}, {"d_hidden": 3}]
)
@pytest.mark.filterwarnings("error")
def test_raster_of_any_model(changes, tmp_path):
    model, _ = tiny(**changes)
    tok = tokenizer()
    ids = [0, *tok.encode("One $ and two $$ \\frac{1} é\n\t").ids]
    spikes.raster(model, tok, ids, tmp_path / "spikes.png")
    assert (tmp_path / "spikes.png").read_bytes().startswith(b"\x89PNG")
    spikes.raster(model, tok, ids[:1], tmp_path / "one.svg")
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()


def test_raster_shows_every_token_and_layer(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text stays text
    model, _ = tiny()
    spikes.raster(model, tokenizer(), [0, *tokenizer().encode("a b$\n\x01").ids], tmp_path / "spikes.SVG")
    text = (tmp_path / "spikes.SVG").read_text()
    for label in ("&lt;|endoftext|&gt;", "a", "·", "b", "$", "↵", "\ufffd"):
        assert f">{label}</text>" in text, label
    for label in ("block 1", "block 2, memory q", "block 2, memory k", "block 2, memory v", "block 2", "block 3"):
        assert f">{label}</" in text, label
    assert "threshold" in text and all(f"{pace}, tau " in text for pace in ("fast", "medium", "slow"))


def test_bad_input(tmp_path, monkeypatch):
    model, idx = tiny()
    flow = Flow(FlowConfig(vocab_size=64, n_layer=1, global_every=1))
    for look in (spikes.firing_rates, spikes.energy, spikes.listen):
        with pytest.raises(InputError, match="Flow does not spike: choose a Pulse"):
            look(flow, idx)
    with pytest.raises(InputError, match="101 tokens, a readable raster at most 100"):
        spikes.raster(model, tokenizer(), [1] * 101, tmp_path / "a.png")
    for name in ("a", "a.doc", "a.pgf"):
        with pytest.raises(InputError, match="end its name in .png"):
            spikes.raster(model, tokenizer(), [1], tmp_path / name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        spikes.raster(model, tokenizer(), [1], tmp_path / "a.png")
    assert not any(tmp_path.iterdir())
