"""The associative memory of Pulse equals the delta rule, row by row, and the delay is one token."""

import numpy as np
import pytest
import torch

from associate import CHUNK, associate
from snn_model import Pulse, PulseConfig, delay

LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


def random_memory(T, B=2, H=2, D=4):
    """Arguments of `associate` in fp64: unit keys, some leaks strong enough to clear the memory."""
    torch.manual_seed(T)
    q, k, v = torch.randn(3, B, H, T, D, dtype=torch.double)
    decay = -torch.exp(torch.randn(B, H, T, dtype=torch.double) * 2 - 2)
    decay[..., T // 2] = -40
    write, S = torch.rand(B, H, T, dtype=torch.double), torch.randn(B, H, D, D, dtype=torch.double)
    return [a.requires_grad_() for a in (q, k / k.norm(dim=-1, keepdim=True), v, decay, write, S)]


def delta_rule(q, k, v, decay, write, S):
    """Row by row: forget, see what the key brings up, write the difference under it, read."""
    B, H, T, _ = q.shape
    out, last = torch.zeros_like(q), torch.zeros_like(S)
    for b in range(B):
        for h in range(H):
            M = S[b, h]
            for t in range(T):
                M = M * decay[b, h, t].exp()
                found = (k[b, h, t][:, None] * M).sum(0)
                M = M + torch.outer(k[b, h, t], write[b, h, t] * (v[b, h, t] - found))
                out[b, h, t] = (q[b, h, t][:, None] * M).sum(0)
            last[b, h] = M
    return out, last


@pytest.mark.parametrize("T", LENGTHS)
def test_memory_equals_a_loop_over_tokens(T):
    arguments, results = random_memory(T), []
    for form in (associate, delta_rule):
        o, S = form(*arguments)
        torch.manual_seed(0)
        total = (o * torch.randn(o.shape)).sum() + (S * torch.randn(S.shape)).sum()
        results.append((o, S, torch.autograd.grad(total, arguments)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cut", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_memory_goes_on_from_where_it_was(cut):
    *sequences, S = [a.detach() for a in random_memory(2 * CHUNK + 7)]
    o, last = associate(*sequences, S)
    first, S = associate(*(a[:, :, :cut] for a in sequences), S)
    second, S = associate(*(a[:, :, cut:] for a in sequences), S)
    torch.testing.assert_close((torch.cat([first, second], 2), S), (o, last), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens, N", [((1,), 6), ((0, 2, 5), 6), ((0, 0, 3), 10)])
def test_delayed_spikes_arrive_as_many_tokens_late_as_they_should(tokens, N):
    longest, T = max(tokens), 7
    sent = torch.randn(2, longest + T, N)  # the tokens before, and these
    arrived, late = delay(sent[:, longest:], sent[:, :longest], tokens)
    by = [d for d, part in zip(tokens, np.array_split(range(N), len(tokens))) for _ in part]
    for t in range(T):
        for n in range(N):
            assert torch.equal(arrived[:, t, n], sent[:, longest + t - by[n], n])
    assert torch.equal(late, sent[:, T:])
    pieces = []
    on_the_way = sent[:, :longest]
    for t in range(longest, longest + T):
        piece, on_the_way = delay(sent[:, t : t + 1], on_the_way, tokens)
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces, 1), arrived) and torch.equal(on_the_way, late)
    s, before = sent[:, longest:].double().requires_grad_(), sent[:, :longest].double()
    assert torch.autograd.gradcheck(lambda s: delay(s, before, tokens)[0], s)


def test_flops_count_what_the_matrix_products_do():
    """Against PyTorch's own counter, which counts masked halves, but no triangular system."""
    from torch.utils.flop_counter import FlopCounterMode

    T, config = 2 * CHUNK, PulseConfig(vocab_size=50, n_layer=3, d_model=24, d_hidden=20, d_ff=28, memory_every=2)
    model = Pulse(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(50, (1, T)), targets=torch.randint(50, (1, T)))
    masked, system = 3 / 2 * CHUNK, CHUNK  # of the one memory, multiply-accumulates per token and fibre
    counted = counter.get_total_flops() / T - 2 * config.d_model * (masked - system)
    assert counted == pytest.approx(config.flops_per_token(T) / 3)
