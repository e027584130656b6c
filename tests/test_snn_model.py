"""Pulse keeps its promises: spikes feed the matrices, snntorch is the neuron, linear time and constant state, causal, alive.

The slow references are loops over tokens, with snntorch's own forward where a neuron is concerned.
"""

import dataclasses
import gc
import math
import weakref

import numpy as np
import pytest
import snntorch
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import model as flow
import snn_model
from model import generate
from muon import build_optimizers
from snn_model import CHUNK, KEY_EPS, LEAKS, PRESETS, Neuron, Pulse, PulseConfig, associate

TINY = PulseConfig(vocab_size=61, n_layer=2, d_model=16, d_hidden=24, d_ff=20, num_steps=3, n_head=2, memory_every=2)


def make(config=TINY, seed=0, dtype=torch.float32):
    """A Pulse whose every parameter matters: logits of size 1, biases, and a memory that leaks and writes as its input tells it."""
    torch.manual_seed(seed)
    model = Pulse(config).eval()
    with torch.no_grad():
        model.token_embedding.weight.mul_(10)
        for name, p in model.named_parameters():
            if name.endswith(("decay.weight", "write.weight")):
                p.normal_(std=0.2)
            elif name.endswith((".bias", ".gain", "input_map", "token_share")):
                p.add_(torch.randn_like(p) * 0.1)
    return model.to(dtype)


def tokens(B, T, seed=1, vocab_size=TINY.vocab_size):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def pieces(model, x, sizes):
    """The logits [B, 1, V] after each piece of x, the pieces read one after the other with one state."""
    state, start, logits = model.init_state(x.size(0)), 0, []
    for size in sizes:
        logits.append(model(x[:, start : start + size], state=state)[0])
        start += size
    assert start == x.size(1)
    return logits


class Listener:
    """What goes into every nn.Linear of a model while it is open: {name: [B, T, features]}, pieces of a sequence joined."""

    def __init__(self, model):
        self.model, self.heard = model, {}

    def __enter__(self):
        linears = {name: m for name, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        self.hooks = [
            m.register_forward_pre_hook(lambda _, args, name=name: self.heard.setdefault(name, []).append(args[0].detach()))
            for name, m in linears.items()
        ]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()
        self.heard = {name: torch.cat(parts, 1) for name, parts in self.heard.items()}


class Operations(TorchDispatchMode):
    """Every tensor that an operation returns is shown to `look(operation, arguments, result)`."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(out, torch.Tensor):
                self.look(operation.overloadpacket, args, out)
        return result


# ---- promise 1: spikes feed the matrices ----


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("K", [1, 4])
def test_the_input_of_every_matrix_is_spike_counts(K, bf16, train):
    model, x = make(dataclasses.replace(TINY, num_steps=K)).train(train), tokens(2, 50)
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert len(linears) == 17 and "lm_head" in linears
    for sizes in (None, [1] * 50):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), Listener(model) as listener:
            model(x) if sizes is None else pieces(model, x, sizes)
        assert listener.heard.keys() == linears
        for name, s in listener.heard.items():
            assert s.dtype == (torch.bfloat16 if bf16 else torch.float32) and s.shape[:2] == (2, 50), name
            assert torch.equal(s, s.round()) and s.abs().max() == K, name


def test_no_other_product_has_a_weight_in_it():
    """Looking at the operations themselves, the head inside the loss included: a matrix is multiplied with spike counts or not at all.

    The exception is no product with an activation: the rows of the input's table follow from two weights.
    """
    model, x, seen = make().train(), tokens(2, 50), set()
    weights = {p.data_ptr(): name for name, p in model.named_parameters() if p.ndim == 2}

    def look(operation, args, out):
        if operation in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            factors = args[-2:]
            for weight, other in (factors, factors[::-1]):
                if weight.data_ptr() in weights:
                    seen.add(weights[weight.data_ptr()])
                    if weight.data_ptr() == model.input_map.data_ptr():
                        assert torch.equal(other.view(2, 50, -1), model.token_embedding(x))
                        continue
                    assert torch.equal(other, other.round()) and 0 < other.abs().max() <= TINY.num_steps

    with torch.no_grad(), Operations(look):
        model(x, x)
    assert seen == set(weights.values())


def products(config):
    """Multiply-accumulates of a token in (matrices, memories): (synapses, reading, finding, writing and leaking S)."""
    n_memory = config.n_layer // config.memory_every
    blocks = config.n_layer * config.d_model * (3 * config.d_hidden + 2 * config.d_ff) + n_memory * 4 * config.d_model**2
    matrices = config.vocab_size * config.d_model + blocks + n_memory * 2 * config.n_head * config.d_model
    return matrices, n_memory * 4 * config.d_model**2 // config.n_head


def test_nearly_all_products_of_a_token_are_accumulates():
    counted, config = {torch.ops.aten.mm: 0, torch.ops.aten.bmm: 0}, PRESETS["nano"]

    def look(operation, args, out):
        operation = torch.ops.aten.mm if operation == torch.ops.aten.addmm else operation  # a bias is an addition
        if operation in counted:
            counted[operation] += out.numel() * args[-2].size(-1)

    model = Pulse(config)
    state = model.init_state(1)  # makes the table that tokens are looked up in
    with torch.no_grad(), Operations(look):
        model(tokens(1, 1), state=state)
    leaking = config.n_layer // config.memory_every * config.d_model**2 // config.n_head  # the one that is not a matrix product
    assert (counted[torch.ops.aten.mm], counted[torch.ops.aten.bmm] + leaking) == products(config)
    for config in PRESETS.values():
        matrices, memories = products(config)
        assert 0 < memories < 0.05 * (matrices + memories)


# ---- promise 2: snntorch is the neuron ----


def test_sequences_do_not_meet_in_a_neuron():
    """snntorch keeps the last membrane and takes it up when none is passed: nothing of it may be seen."""
    model, x, y = make(dtype=torch.float64), tokens(2, 40), tokens(2, 40, seed=2)
    alone = torch.cat(pieces(model, x, [1] * 40), 1)
    states, together = (model.init_state(2), model.init_state(2)), []
    for t in range(40):
        together.append(model(x[:, t : t + 1], state=states[0])[0])
        model(y[:, t : t + 1], state=states[1])
    assert torch.equal(alone, torch.cat(together, 1)) and torch.equal(alone[:, :1], model(x[:, :1])[0])
    assert not torch.equal(pieces(model, y, [40])[0], alone[:, -1:])


def test_snntorch_keeps_no_model_alive():
    others = [snntorch.Leaky(beta=0.5), snntorch.Leaky(beta=0.5)]
    model = make()
    model(tokens(1, 3))
    assert all(any(a is b for b in snntorch.SpikingNeuron.instances) for a in others)  # what others rely on is left alone
    assert not any(isinstance(neuron, Neuron) for neuron in snntorch.SpikingNeuron.instances)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_ten_thousand_tokens_one_by_one_in_fp32():
    """Logits to 1e-4. A membrane may differ in its last bit on the other side of a threshold: one such flip is allowed, counted as
    all the deviations within four of the slowest time constants of the first one, in which what it disturbed is forgotten.
    """
    T, forget = 10_000, 4 * 256
    model, x = make(dataclasses.replace(TINY, n_layer=1, memory_every=1, vocab_size=31)), tokens(1, T, vocab_size=31)
    with torch.inference_mode():
        whole, state = model(x)[0], model.init_state(1)
        stepwise = torch.cat([model(x[:, t : t + 1], state=state)[0] for t in range(T)], 1)
    assert whole.std() > 0.5
    off = ((whole - stepwise).abs().amax(-1)[0] > 1e-4).nonzero().flatten()
    assert len(off) == 0 or off[-1] - off[0] < forget, off


# ---- what a block reads ----


@pytest.mark.parametrize("K", [3, 48])
def test_a_blocks_fibres_are_up_to_five_tokens_slow_and_the_keys_one(K):
    """The leaky neurons of the first eighth of the stream's neurons hear of a token at once, those of the last five tokens later."""
    model, x = make(dataclasses.replace(TINY, num_steps=K), dtype=torch.float64), tokens(2, 9)
    block = model.layers[1]
    with Listener(model) as listener:
        heard = {}
        sources = {"in_proj": block.encode, "gate_proj": block.gate_encode or block.encode}
        neurons = {*sources.values(), block.memory.k}
        hooks = [n.register_forward_hook(lambda _, a, out, n=n: heard.update({n: out[0]})) for n in neurons]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snn_model, "associate", lambda q, k, v, *rest: (heard.update(written=k), associate(q, k, v, *rest))[1])
            model(x)
    [hook.remove() for hook in hooks]
    assert len(neurons) == (3 if K == 48 else 2)
    for name, neuron in sources.items():
        sent, arrived = heard[neuron], listener.heard[f"layers.1.{name}"]
        for n, d in enumerate(np.repeat([0, 0, 1, 1, 2, 3, 4, 5], TINY.d_model // 8)):
            assert torch.equal(arrived[:, d:, n], sent[:, : 9 - d, n]) and not arrived[:, :d, n].any()
    keys = heard[block.memory.k].view(2, 9, TINY.n_head, -1).transpose(1, 2)
    length = (keys.square().sum(-1, keepdim=True) + KEY_EPS).sqrt()
    torch.testing.assert_close(heard["written"][:, :, 1:], (keys / length)[:, :, :-1])
    assert not heard["written"][:, :, 0].any()


def test_each_block_and_the_head_read_their_share_of_the_token():
    """In a network whose blocks add nothing the stream is the token alone, normalized, as much of it as each of them asks for."""
    model, x, heard = make(dtype=torch.float64), tokens(2, 9), []
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                p.zero_()
        model.token_share.copy_(torch.tensor([1.5, -0.7, 0.3]))
        for part in (*model.layers, model.out):
            part.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
        model(x)
        token = nn.functional.rms_norm(model.input_table()[x], (TINY.d_model,), eps=TINY.norm_eps)
    for stream, share in zip(heard, (1.5, -0.7, 0.3), strict=True):
        torch.testing.assert_close(stream, share * token)


def test_an_untrained_memory_is_an_induction_head():
    """In the second copy of random tokens what the memory sends back is most often the embedding of the token that comes next."""
    torch.manual_seed(0)
    model, heard, copy = Pulse(PulseConfig()).eval(), {}, 24
    x = torch.randint(1024, (8, copy)).repeat(1, 2)
    with model.layers[2].memory.register_forward_hook(lambda _, args, out: heard.update(sent=out[0])), torch.no_grad():
        model(x)
    sent, tokens = nn.functional.normalize(heard["sent"], dim=-1), nn.functional.normalize(model.token_embedding.weight, dim=-1)
    right = (sent @ tokens.T)[:, :-1].argmax(-1) == x[:, 1:]
    assert right[:, : copy - 1].float().mean() < 0.02  # nothing to find in the first
    assert right[:, copy:].float().mean() > 0.4


def test_a_token_is_read_as_its_row_of_the_input_table():
    """One network reads through its map, the other has the mapped rows as its embedding, as the packages of convert.py have."""
    model, mapped, x = make(dtype=torch.float64), make(dtype=torch.float64), tokens(2, 40)
    with torch.no_grad():
        mapped.lm_head.weight = nn.Parameter(model.token_embedding.weight.clone())
        mapped.token_embedding.weight = nn.Parameter(model.input_table())
        mapped.input_map.copy_(torch.eye(TINY.d_model))
        torch.testing.assert_close(mapped(x)[0], model(x)[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(pieces(mapped, x, [40])[0], model(x)[0][:, -1:], rtol=1e-10, atol=1e-10)
        mapped.input_map.mul_(-1)
        assert not torch.allclose(mapped(x)[0], model(x)[0], atol=0.1)
        torch.testing.assert_close(pieces(mapped, x, [40])[0], mapped(x)[0][:, -1:], rtol=1e-10, atol=1e-10)  # a new table


# ---- promises 3 and 4: linear time, constant state, causal ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_causal_bitwise(dtype):
    T = 2 * CHUNK + 7
    model, x = make(dtype=dtype), tokens(1, T)
    with torch.no_grad():
        before = model(x)[0]
        for t in range(T):
            changed = x.clone()
            changed[0, t] = (changed[0, t] + 1) % TINY.vocab_size
            after = model(changed)[0]
            assert torch.equal(after[:, :t], before[:, :t]) and not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tau_max": 1.0},
        {"rheobase": 0.0},
        {"leak": "learned"},
        {"memory_every": 9},
        {"n_layer": 3, "memory_every": 1, "num_steps": 8},
        {"num_steps": 48},  # the gates have neurons of their own
    ],
)
def test_whole_chunked_and_single_tokens_agree(changes):
    model, x = make(dataclasses.replace(TINY, **changes), dtype=torch.float64), tokens(2, 4 * CHUNK + 3)
    T = x.size(1)
    with torch.no_grad():
        with Listener(model) as whole:
            logits, _ = model(x)
        for sizes in ([1] * T, [CHUNK, 1, CHUNK - 1, 2, CHUNK + 1, T - 3 * CHUNK - 3]):
            with Listener(model) as pieced:
                parts = pieces(model, x, sizes)
            ends = np.cumsum(sizes) - 1
            torch.testing.assert_close(torch.cat(parts, 1), logits[:, ends], rtol=0, atol=1e-12)
            for name, spikes in whole.heard.items():  # the head sees the last token of a piece only
                assert torch.equal(pieced.heard[name], spikes[:, ends] if name == "lm_head" else spikes), name


def held(state):
    """(numbers, bytes) that a state holds, in whatever nesting; a view holds all of what it is a view of."""
    if isinstance(state, torch.Tensor):
        return np.array([state.numel(), state.untyped_storage().nbytes()])
    return sum(map(held, state), np.zeros(2, dtype=int)) if state is not None else np.zeros(2, dtype=int)


@torch.inference_mode()
def test_state_does_not_grow():
    model, x = make(), tokens(2, 2000)
    state, start = model.init_state(2), 0
    sizes = [tuple(held(state.layers))]
    for size in (1, 9, 190, 1799, 1):
        model(x[:, start : start + size], state=state)
        start += size
        sizes.append(tuple(held(state.layers)))
    assert start == 2000 and set(sizes) == {sizes[0]} and sizes[0][0] > 0


def test_no_tensor_grows_with_the_square_of_the_length():
    totals = []
    for T in (512, 1024):
        model, x, elements = make().train(), tokens(1, T), []

        def look(operation, args, out, T=T, elements=elements):
            assert sum(size >= T for size in out.shape) < 2, (operation, out.shape)
            elements.append(out.numel())

        with Operations(look):
            model(x)
            model(x, x)[1].backward()
        totals.append(sum(elements))
    assert 1.8 < totals[1] / totals[0] < 2.1


def test_generation_equals_recomputing_everything():
    """Unequal prompts, in fp64 so that a batch and a row of it round alike."""
    model = make(dtype=torch.float64)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, CHUNK + 2, 1, 3)]
    table = torch.stack(list(generate(model, prompts, 12, temperature=0)), 1)
    for prompt, row in zip(prompts, table.tolist()):
        text = list(prompt)
        for _ in range(12):
            text.append(int(model(torch.tensor([text]))[0][0, -1].argmax()))
        assert [t for t in row if t >= 0] == text[len(prompt) :]
    model(tokens(2, 5), tokens(2, 5))[1].backward()  # what generation left in the neurons is not in the way of training


# ---- training ----


def test_targets_give_the_mean_loss_of_the_logits():
    model, x, y = make(), tokens(2, 40), tokens(2, 40, seed=2)
    y[0, :5] = -1
    nothing, loss = model(x, y)
    logits, none = model(x)
    assert nothing is None and none is None and logits.shape == (2, 40, TINY.vocab_size)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1))


def test_checkpointing_changes_memory_not_results():
    model, x, y = make().train(), tokens(2, 40), tokens(2, 40, seed=2)
    losses, gradients, calls = [], [], []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for model.checkpointing in (False, True):
        model.zero_grad()
        losses.append(model(x, y)[1])
        losses[-1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert torch.equal(*losses) and len(calls) == 3  # forward, and with checkpointing once more in the backward pass
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("checkpointing, K", [(False, 3), (True, 3), (False, 48)])
def test_rate_penalty_is_the_derivative_of_a_price_per_spike(checkpointing, K):
    """Against autograd through the mean number of spikes per synapse and token, written out and added to the loss."""
    model = make(dataclasses.replace(TINY, num_steps=K), dtype=torch.float64).train()
    x, y, fired, fan_outs = tokens(2, 40), tokens(2, 40, seed=2), [], dict(model.fan_outs())
    hooks = [
        neuron.register_forward_hook(lambda n, args, out, fan_out=fan_out: fired.append(out[0].abs().sum() * fan_out / n.fine))
        for neuron, fan_out in fan_outs.items()
    ]
    loss = model(x, y)[1]
    for hook in hooks:
        hook.remove()
    assert len(fired) == len(fan_outs)
    synapses = sum(neuron.gain.numel() * fan_out for neuron, fan_out in fan_outs.items())
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert synapses == matrices + 3 * TINY.d_model**2 // TINY.n_head  # and the memory, read once, recalled and written
    expected = torch.autograd.grad(loss + 0.3 * sum(fired) / (synapses * x.numel()), list(model.parameters()))
    model.rate_penalty, model.checkpointing = 0.3, checkpointing
    penalised = model(x, y)[1]
    assert torch.equal(penalised, loss)
    penalised.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected), rtol=1e-6, atol=1e-7)


def test_shortened_matrices_compute_the_same():
    """All matrices of which only the direction matters: shortening any other changes the logits."""
    model, x = make(dataclasses.replace(TINY, norm_eps=1e-30), dtype=torch.float64).eval(), tokens(2, 40)
    with torch.no_grad():
        before, old = model(x)[0], {name: p.clone() for name, p in model.named_parameters()}
        model.shorten(0.25)
        torch.testing.assert_close(model(x)[0], before)
        short = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
        assert all(torch.equal(p, (0.25 if name in short else 1) * old[name]) for name, p in model.named_parameters())
        matrices = {f"{name}.weight" for name, module in model.layers.named_modules(prefix="layers") if isinstance(module, torch.nn.Linear)}
        for name in matrices - short:
            model.get_parameter(name).mul_(0.25)
            assert (model(x)[0] - before).std() > 0.01 * before.std(), name
            model.get_parameter(name).mul_(4)


@pytest.mark.parametrize("seed", range(5))
def test_parameter_count(seed):
    rng = np.random.default_rng(seed)
    n_head = int(rng.integers(1, 4))
    config = PulseConfig(
        vocab_size=int(rng.integers(10, 99)), n_layer=int(rng.integers(1, 6)), d_model=2 * n_head * int(rng.integers(1, 9)),
        d_hidden=int(rng.integers(1, 99)), d_ff=int(rng.integers(1, 99)), n_head=n_head, memory_every=int(rng.integers(1, 5)),
        leak=str(rng.choice(LEAKS)), tau_max=float(rng.choice([1.0, 9.0])),
    )  # fmt: skip
    assert config.num_params() == sum(p.numel() for p in Pulse(config).parameters())


def test_presets_are_as_large_as_flows():
    assert PRESETS.keys() == flow.PRESETS.keys()
    for name, config in PRESETS.items():
        theirs = flow.PRESETS[name]
        assert (config.n_layer, config.d_model, config.vocab_size) == (theirs.n_layer, theirs.d_model, theirs.vocab_size)
        assert config.num_params() == pytest.approx(theirs.num_params(), rel=0.02)


@pytest.mark.parametrize("leak", LEAKS)
def test_betas_start_at_their_time_constants(leak):
    model = Pulse(dataclasses.replace(TINY, leak=leak, tau_max=20.0))
    for block in model.layers:
        tau = 1 / (1 - block.hidden.leak.detach().sigmoid())
        torch.testing.assert_close(tau.sort().values, torch.logspace(math.log10(1.05), math.log10(20), TINY.d_hidden), rtol=1e-4, atol=0)
        assert block.hidden.leak.requires_grad == (leak != "fixed") and (block.gate_proj is not None) == (leak == "gated")
    before = [block.hidden.leak.clone() for block in model.layers]
    model(tokens(2, 40), tokens(2, 40, seed=2))[1].backward()
    for optimizer in build_optimizers(model, 0.01):
        optimizer.step()
    assert [torch.equal(old, block.hidden.leak) for old, block in zip(before, model.layers)] == [leak == "fixed"] * 2


def test_every_parameter_of_a_fresh_model_learns():
    torch.manual_seed(0)
    model, x = Pulse(PRESETS["nano"]), tokens(2, 100, vocab_size=1024)
    _, loss = model(x, tokens(2, 100, seed=2, vocab_size=1024))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1024), rel=0.05)
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert 0 < torch.stack([p.grad.norm() for p in model.parameters()]).norm() < 100


# ---- what bad input gets ----


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(num_steps=0), "num_steps=0 must be at least 1"),
        (dict(num_steps=257), "num_steps=257 must be at most 256"),
        (dict(norm_eps=0.0), "norm_eps=0.0 must be above 0"),
        (dict(n_layer=0), "n_layer=0 must be at least 1"),
        (dict(tau_max=0.5), "tau_max=0.5 must be at least 1 token"),
        (dict(rheobase=-1.0), "rheobase=-1.0 must be at least 0"),
        (dict(rheobase=-1), "rheobase=-1 must be at least 0"),
        (dict(leak="none"), "leak=none must be one of gated, learned, fixed"),
        (dict(d_model=18), r"d_model=18 must be a multiple of 2 \* n_head=4"),
    ],
)
def test_impossible_sizes(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)


def test_a_state_of_another_batch_size():
    model = make()
    with pytest.raises(ValueError, match="holds 2 sequences, the input 3: make one with init_state"):
        model(tokens(3, 4), state=model.init_state(2))
