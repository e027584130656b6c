"""by_hand.py against the plain form of model.py: the same numbers and gradients, in portions of any size, with less kept."""

import pytest
import torch

import by_hand
import training_memory
from model import Flow, FlowConfig, RMSNorm, causal_attention, chunks_of_queries, rope_table, rotate


@pytest.fixture
def plain(monkeypatch):
    """Call it to have model.py compute in plain PyTorch from here on."""
    return lambda: monkeypatch.setattr(by_hand, "worthwhile", lambda x: False)


def attention(q, k, v, window):
    """model.py's attention, q [B, T, H, D], k and v [B, T, K, D]"""
    return causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window).transpose(1, 2)


def heads(B, T, H, K, D=4, dtype=torch.float64):
    return [torch.randn(B, T, n, D, dtype=dtype, requires_grad=True) for n in (H, K, K)]


def attention_by_hand(q, k, v, window, size=128):
    return by_hand.AttentionByHand.apply(q, k, v, by_hand.pieces(chunks_of_queries, q.size(1), window, size, q.dtype))


@pytest.mark.parametrize("portion", [1, 700, 2**19])
@pytest.mark.parametrize("window, T", [(3, 11), (40, 100), (40, 40), (128, 300), (None, 1), (None, 130), (None, 300)])
def test_attention_equals_the_plain_form(monkeypatch, window, T, portion):
    monkeypatch.setattr(by_hand, "PORTION", portion)
    torch.manual_seed(0)
    q, k, v = heads(3, T, H=4, K=2)
    ours, theirs = attention_by_hand(q, k, v, window, 32), attention(q, k, v, window)
    assert torch.allclose(ours, theirs, atol=1e-12)
    direction = torch.randn_like(ours)
    for mine, other in zip(torch.autograd.grad(ours, (q, k, v), direction), torch.autograd.grad(theirs, (q, k, v), direction)):
        assert torch.allclose(mine, other, atol=1e-12)


@pytest.mark.parametrize("rope", [False, True])
def test_derivatives_are_those_of_differences(monkeypatch, rope):
    monkeypatch.setattr(by_hand, "PORTION", 20)
    torch.manual_seed(0)
    q, k, v = heads(2, 9, H=2, K=1)
    assert torch.autograd.gradcheck(lambda *x: attention_by_hand(*x, 4, 4), (q, k, v))
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    table = tuple(x.double() for x in rope_table(0, 9, 4, 100.0, "cpu")) if rope else None
    assert torch.autograd.gradcheck(lambda x, w: by_hand.RMSNormByHand.apply(x, w, 1e-6, torch.float64, table), (q, weight))


@pytest.mark.parametrize("portion", [1, 100, 2**19])
def test_norm_and_rotation_equal_the_plain_form(monkeypatch, plain, portion):
    monkeypatch.setattr(by_hand, "PORTION", portion)
    torch.manual_seed(0)
    norm = RMSNorm(8, 1e-6).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 7, 2, 8, dtype=torch.float64, requires_grad=True)
    table = tuple(t.double() for t in rope_table(0, 7, 8, 100.0, "cpu"))
    ours, direction = norm(x, table), torch.randn(3, 7, 2, 8, dtype=torch.float64)
    mine = torch.autograd.grad(ours, (x, norm.weight), direction)
    plain()
    theirs = rotate(norm(x), *table)
    assert torch.allclose(ours, theirs, atol=1e-12) and torch.equal(theirs, norm(x, table))
    for a, b in zip(mine, torch.autograd.grad(theirs, (x, norm.weight), direction)):
        assert torch.allclose(a, b, atol=1e-12)


def test_bf16_is_at_least_as_exact_as_the_plain_form():
    torch.manual_seed(0)
    exact = heads(2, 600, H=4, K=2, D=32)
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in half]
    direction = torch.randn(2, 600, 4, 32).bfloat16()
    truth = torch.autograd.grad(attention(*exact, None), exact, direction.double())
    errors = []
    for form in (attention_by_hand, attention):
        found = torch.autograd.grad(form(*half, None), half, direction)
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(found, truth)])
    assert all(ours < 1.05 * theirs < 0.02 for ours, theirs in zip(*errors)), errors


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_flow_in_bf16_autocast(monkeypatch, plain, checkpointing):
    monkeypatch.setattr(by_hand, "PORTION", 1000)
    torch.manual_seed(0)
    model = Flow(FlowConfig(vocab_size=64, n_layer=2, d_model=32, n_head=4, n_kv_head=2, head_dim=8, d_ff=48, window=16, global_every=2))
    model.checkpointing = checkpointing
    x, y = torch.randint(64, (2, 3, 70))

    def gradient():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(x, y)[1].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    ours = gradient()
    plain()
    theirs = gradient()
    assert 0 < (ours - theirs).norm() < 0.02 * theirs.norm()  # two roundings of one gradient


def test_norm_of_a_tensor_that_is_not_contiguous():
    norm = RMSNorm(8, 1e-6)
    x = torch.randn(8, 5, 3).permute(2, 1, 0)  # no view of it has rows
    assert torch.equal(norm(x), norm(x.contiguous()))


def test_it_keeps_less_and_all_of_it_where_checkpointing_sees_it(plain):
    torch.manual_seed(0)
    model, idx = Flow(FlowConfig(n_layer=2, global_every=1)), torch.zeros(2, 256, dtype=torch.long)

    def kept():
        return training_memory.kept_bytes(model, idx, idx, torch.autocast("cpu", torch.bfloat16))

    ours, probabilities = kept(), 2 * 2 * 2 * 4 * (128 * 128 + 128 * 256)  # bytes of two layers, two sequences, four heads
    model.checkpointing = True
    assert kept() + probabilities < ours
    model.checkpointing = False
    plain()
    assert ours < 0.9 * kept()


def test_only_where_it_is_faster():
    x = torch.zeros(1)
    assert by_hand.worthwhile(x) and not by_hand.worthwhile(x.to("meta"))
    with torch.no_grad():
        assert not by_hand.worthwhile(x)
