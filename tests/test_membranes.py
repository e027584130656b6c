"""Firing, currents and leaks of whole sequences, and the neuron made of them, against snntorch's own steps and loops over tokens."""

import dataclasses
import itertools
import math

import pytest
import snntorch
import torch

from membranes import CHUNK, Drive, Leak, scan
from snn_model import Neuron, Pulse, PulseConfig, encoder

CONFIG = PulseConfig(num_steps=3)
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


def micro_steps(U, K):
    """Spikes of K micro-steps of snntorch's neuron that gets U in the first and nothing after it."""
    neuron, total, mem = snntorch.Leaky(beta=1.0, threshold=1.0, reset_mechanism="subtract"), torch.zeros_like(U), torch.zeros_like(U)
    for step in range(K):
        spikes, mem = neuron(U if step == 0 else torch.zeros_like(U), mem)
        total += spikes
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K", [1, 2, 4, 8])
def test_fire_equals_micro_steps_of_snntorch(K, dtype):
    n = torch.arange(-12, 13, dtype=dtype)
    big = torch.tensor([-math.inf, -1e30, -1e6, -1e-30, -0.0, 0.0, 1e-30, 1e6, 1e30, math.inf], dtype=dtype)
    up, down = torch.nextafter(n, torch.full_like(n, math.inf)), torch.nextafter(n, torch.full_like(n, -math.inf))
    U = torch.cat([n, up, down, n + 0.5, big, torch.randn(5000, generator=torch.Generator().manual_seed(K), dtype=dtype) * K])
    config = dataclasses.replace(CONFIG, num_steps=K)
    for signed, rheobase in itertools.product((False, True), (0.0, 1.0, 2.5)):
        counts = Neuron(U.numel(), config, 1.0, signed=signed, rheobase=rheobase).fire(U)
        assert torch.equal(counts, micro_steps(U - rheobase, K) - (micro_steps(-U - rheobase, K) if signed else 0))
        assert counts.max() == K and counts.min() == (-K if signed else 0)


@pytest.mark.parametrize("rheobase, fine", [(0.0, 1.0), (1.0, 1.0), (5.0, 3.0)])
@pytest.mark.parametrize("K", [1, 4])
def test_surrogate_counts_every_level_once(K, rheobase, fine):
    """Its area is K, as the staircase rises by K (micro-steps backpropagated through would give more); no neuron is out of reach."""
    config, U = dataclasses.replace(CONFIG, num_steps=K), torch.linspace(-12, 12, 400_001, dtype=torch.double).sinh().requires_grad_()
    slopes = []
    for signed in (False, True):
        counts = Neuron(U.numel(), config, 1.0, signed=signed, rheobase=rheobase, fine=fine).fire(U)
        slopes.append(torch.autograd.grad(counts.sum(), U)[0])
    plain, both = slopes
    U = U.detach()
    assert torch.trapezoid(plain, U).item() == pytest.approx(K, rel=1e-3)
    assert (plain > 0).all() and plain.max() <= 1
    torch.testing.assert_close(both, torch.where(U < 0, plain.flip(0), plain))


def test_more_micro_steps_count_the_same_currents_more_finely():
    torch.manual_seed(0)
    config = PulseConfig(num_steps=48)
    coarse, fine = Neuron(128, config, 3.0, signed=True, rheobase=2.0).double(), encoder(config, fine=config.fine()).double()
    x = torch.randn(2, 40, 128, dtype=torch.double)
    few, many = coarse(x)[0], fine(x)[0]
    assert 2 * few.abs().max() < many.abs().max() <= 48
    assert torch.equal((many.abs() / 3).ceil() * many.sign(), few)
    slopes = []
    for neuron, scale in ((coarse, 1), (fine, 3)):
        U = torch.linspace(-9, 9, 1001, dtype=torch.double).mul(scale).requires_grad_()
        slopes.append(torch.autograd.grad(neuron.fire(U).sum(), U)[0])
    torch.testing.assert_close(*slopes, rtol=0, atol=0.25)  # a blur of half a fine step would be off by 0.35


def test_only_what_is_carried_over_tokens_is_counted_finely():
    for K, fine in ((8, 1), (16, 1), (48, 3)):
        model = Pulse(PulseConfig(num_steps=K))
        encoders = {name: m for name, m in model.named_modules() if isinstance(m, Neuron) and m.rheobase}
        carried = {"layers.2.memory.v", *(f"layers.{i}.encode" for i in range(4))}
        assert len(encoders) == (15 if fine > 1 else 11) and carried < encoders.keys()  # 4 of the gates
        for name, m in encoders.items():
            found = (m.fine, m.rheobase, m.gain[0].item())
            if fine > 1 and name in carried:
                assert found == (3, 8, 9)  # three times a gain of 3, a threshold of 1 and a rheobase of 2
            else:
                assert found == (1, 1, 4 if name == "out" else 3)


def make_neuron(n=12, gated=False, signed=False, normed=True, square=False):
    """With a beta for each neuron, 0.02 to 0.98."""
    torch.manual_seed(n)
    neuron = Neuron(n, CONFIG, 4.0, 1 / (1 - torch.linspace(0.02, 0.98, n)), gated, signed, normed, square).double()
    with torch.no_grad():
        for p in neuron.parameters():
            p.add_(torch.randn(n) * 0.3)
    return neuron


def token_by_token(neuron, x, mem, gate=None):
    """Neuron written out: snntorch's own forward for every token with the betas of that token, and autograd through it."""

    def rms_norm(x):
        return x / ((x**2).mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt() if neuron.normed else x

    spikes = []
    for t in range(x.size(1)):
        z = neuron.leak if gate is None else rms_norm(gate[:, t]) * neuron.gate_gain + neuron.leak
        neuron.beta = 1 / (1 + torch.exp(-z))
        current = rms_norm(x[:, t]) * neuron.gain + neuron.bias
        current = torch.where(current > 0, current**2, 0.0) if neuron.square else current
        s, mem = snntorch.Leaky.forward(neuron, (1 - neuron.beta) * current, mem)
        spikes.append(s)
    return torch.stack(spikes, 1), mem


@pytest.mark.parametrize(
    "gated, signed, normed, square",
    [(True, False, True, False), (False, False, True, True), (False, True, True, False), (True, False, False, False)],
)
@pytest.mark.parametrize("T", LENGTHS)
def test_neuron_is_snntorchs_recurrence(T, gated, signed, normed, square):
    neuron = make_neuron(gated=gated, signed=signed, normed=normed, square=square)
    assert isinstance(neuron, snntorch.Leaky)
    x, mem = torch.randn(3, T, 12, dtype=torch.double), torch.randn(3, 12, dtype=torch.double)
    inputs = {"x": x, "mem": mem} | ({"gate": torch.randn_like(x) * 2} if gated else {})
    for value in inputs.values():
        value.requires_grad_()
    parameters = dict(neuron.named_parameters())
    assert parameters.keys() == {"gain", "bias", "leak"} | ({"gate_gain"} if gated else set())
    results = []
    for form in (neuron, lambda **inputs: token_by_token(neuron, **inputs)):
        spikes, after = form(**inputs)
        torch.manual_seed(T)
        total = (spikes * torch.randn_like(spikes)).sum() + (after * torch.randn_like(after)).sum()
        names = inputs | parameters
        results.append((spikes, after, dict(zip(names, torch.autograd.grad(total, list(names.values()))))))
    (spikes, after, gradients), (spikes_, after_, gradients_) = results
    assert torch.equal(spikes, spikes_) and (T == 1 or spikes.unique().numel() > 2)
    torch.testing.assert_close(after, after_, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, gradients_, rtol=1e-10, atol=1e-10)


def test_scan_runs_forwards_and_backwards():
    for T in [*LENGTHS, CHUNK**2 + 3 * CHUNK + 5]:  # with more chunks than a chunk has tokens, the ends of chunks are in chunks too
        torch.manual_seed(T)
        x, beta, carry = (torch.randn(shape, dtype=torch.double) for shape in ((2, T, 5), (2, T, 5), (2, 5)))
        beta = beta.sigmoid()
        for reverse in (False, True):
            U, expected = carry, torch.zeros_like(x)
            for t in reversed(range(T)) if reverse else range(T):
                U = expected[:, t] = beta[:, t] * U + x[:, t]
            torch.testing.assert_close(scan(x, beta, carry, reverse), expected, rtol=1e-12, atol=1e-12)


def test_gradient_of_the_leak_is_its_derivative():
    for T in (1, CHUNK, CHUNK + 3):
        torch.manual_seed(T)
        current, z, mem = (torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in ((1, T, 2), (1, T, 2), (1, 2)))
        assert torch.autograd.gradcheck(Leak.apply, (current, z, mem))


def test_beta_is_each_neurons_own_and_is_the_decay():
    """A membrane fades by beta per token: not by another neuron's (LeakyParallel), not by exp(-(1 - beta)) (StateLeaky)."""
    for T in LENGTHS:
        neuron = make_neuron(normed=False)
        with torch.no_grad():
            neuron.bias.zero_()
        _, mem = neuron(torch.zeros(1, T, 12, dtype=torch.double), torch.ones(1, 12, dtype=torch.double))
        torch.testing.assert_close(mem[0], neuron.leak.detach().sigmoid() ** T, rtol=1e-12, atol=1e-12)


def test_a_gate_opens_and_holds_the_membrane():
    """Wide open, one token later nothing is left of the past; shut, nothing of the present comes in: for whole sequences as for tokens."""
    neuron, mem = make_neuron(gated=True, normed=False), torch.ones(1, 12, dtype=torch.double)
    with torch.no_grad():
        neuron.gate_gain.fill_(1)
    for T in LENGTHS:
        x = torch.full((1, T, 12), 0.5, dtype=torch.double)
        _, opened = neuron(x, mem, torch.full_like(x, -50))
        torch.testing.assert_close(opened[0], 0.5 * neuron.gain + neuron.bias)
        _, shut = neuron(x, mem, torch.full_like(x, 50))
        torch.testing.assert_close(shut, mem)


def test_firing_takes_nothing_from_the_membrane_and_currents_do_not_add_up():
    """In snntorch 1.0.0 reset_delay=False subtracts at the wrong time; here no token subtracts at all, however strong the spikes, and
    the membrane comes as close as it likes to a constant current but never above."""
    neuron, x = make_neuron(normed=False), torch.full((1, 40 * CHUNK, 12), 3.0, dtype=torch.double)
    assert neuron.reset_delay
    zero = torch.zeros(1, 12, dtype=torch.double)
    spikes, mem = neuron(x, zero)
    assert (spikes == CONFIG.num_steps).any()
    torch.testing.assert_close(mem[0], 3 * neuron.gain + neuron.bias)
    for t in range(40 * CHUNK):
        _, zero = neuron(x[:, t : t + 1], zero)
    torch.testing.assert_close(zero, mem)


def test_first_weights():
    """What docs/pulse_log.md found to matter: small matrices before a normalization, outputs by depth, gains by what a neuron is for."""
    config = PulseConfig(vocab_size=300, n_layer=4, d_model=128, d_hidden=192, d_ff=352)
    torch.manual_seed(0)
    model = Pulse(config)
    block = model.layers[0]
    for layer, std in (
        (block.in_proj, 0.1 * 128**-0.5), (block.gate_proj, 0.1 * 128**-0.5), (block.feed_forward.up_proj, 0.1 * 128**-0.5),
        (block.out_proj, (192 * 8) ** -0.5), (block.feed_forward.down_proj, (352 * 8) ** -0.5),
    ):  # fmt: skip
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.token_share.tolist() == [1, 2, 3, 4, 0] and torch.equal(model.input_map, torch.eye(128))
    for neuron, gain in (
        (block.encode, 9), (block.gate_encode, 3), (block.feed_forward.encode, 3), (block.hidden, 4), (block.feed_forward.hidden, 1),
        (model.layers[2].memory.encode, 3), (model.layers[2].memory.o, 4), (model.out, 4),
    ):  # fmt: skip
        assert neuron.gain.unique().tolist() == [gain]
    slow = Pulse(dataclasses.replace(config, leak="learned", tau_max=32.0)).layers[0].hidden
    beta = slow.leak.sigmoid()
    torch.testing.assert_close(slow.gain, 2 * ((1 + beta) / (1 - beta)).sqrt(), rtol=1e-4, atol=0)
    assert 1.04 < 1 / (1 - beta.min()) < 1.06 and 31.9 < 1 / (1 - beta.max()) < 32.1


def test_a_scan_is_one_operation_to_torch_compile():
    """Its loop over tokens would be unrolled; outside of torch.compile it is called plainly."""
    graphs, x = [], torch.rand(2, 70, 5)
    compiled = torch.compile(lambda x: scan(x, x, x[:, 0]), backend=lambda graph, _: graphs.append(str(graph.graph)) or graph.forward)
    assert torch.equal(compiled(x), scan(x, x, x[:, 0]))
    assert len(graphs) == 1 and graphs[0].count("slms.scan") == 1 and "addcmul" not in graphs[0]


def test_where_no_gradient_is_recorded_the_numbers_are_the_same():
    x, gain, bias = torch.randn(2, 5, 8, requires_grad=True), torch.rand(8), torch.rand(8)
    recorded = Drive.run(x, gain, bias, 1e-6)
    with torch.no_grad():
        alone = Drive.run(x, gain, bias, 1e-6)
    assert torch.equal(recorded, alone) and recorded.requires_grad and not alone.requires_grad
