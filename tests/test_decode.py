"""The Decoder against the model that it decodes for, and its 8-bit weights against rounding written out."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_model import TINY, make, tokens

import decode
from decode import Decoder, joined
from model import generate


def step_by_step(decoder, x, prompt):
    state = decoder.init_state(len(x), x.size(1))
    parts = [decoder(x[:, :prompt], state=state)[0]] + [decoder(x[:, t : t + 1], state=state)[0] for t in range(prompt, x.size(1))]
    assert state.pos == x.size(1)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("small", [0, 2**20])  # weights where they are, or copied into one matrix
@pytest.mark.parametrize("prompt", [1, 13])
@pytest.mark.parametrize("change", [{}, {"n_kv_head": 4, "global_every": 1}, {"n_kv_head": 1, "tie_embeddings": False, "norm_eps": 1e-2}])
def test_logits_equal_the_model_s(monkeypatch, change, prompt, small):
    monkeypatch.setattr(decode, "SMALL", small)
    model = make(dataclasses.replace(TINY, **change))
    for x in (tokens(3, 60), tokens(1, 60), tokens(decode.MANY, 60)):
        full = model(x)[0][:, prompt - 1 :]
        torch.testing.assert_close(step_by_step(Decoder(model), x, prompt), full, atol=1e-4, rtol=0)


def test_half_precision_stays_as_close_as_the_model_does():
    model, x = make(), tokens(2, 60)
    full = model(x)[0].softmax(-1)
    model.bfloat16()
    ours, theirs = ((logits.float().softmax(-1) - full).abs().mean() for logits in (step_by_step(Decoder(model), x, 1), model(x)[0]))
    assert 0 < ours < 1.5 * theirs


@pytest.mark.parametrize("C", [64, 33, 100, 1365])  # of any width, though the kernel reads whole registers
def test_eight_bits_are_rounding_to_a_255th_of_the_largest_weight_of_a_row(monkeypatch, C):
    monkeypatch.setattr(decode, "SMALL", 0)
    torch.manual_seed(0)
    weights, gain, x = [torch.randn(32, C), torch.randn(96, C) * 5, torch.zeros(32, C)], torch.rand(C) + 0.5, torch.randn(3, C)
    rows = torch.cat(weights) * gain
    scale = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12).bfloat16().float()
    expected = F.linear(x.bfloat16().float(), (rows / scale).round().clamp(-127, 127) * scale)
    y = joined(weights, True, gain)(x)
    torch.testing.assert_close(y, expected, atol=0.02, rtol=0.01)  # the result is in bf16
    assert not y[:, 128:].any()
    assert (y - F.linear(x, rows)).norm() < 0.02 * y.norm()


def test_eight_bits_write_nearly_what_fp32_writes(monkeypatch):
    monkeypatch.setattr(decode, "SMALL", 5000)  # of the matrices of a block only that of attention's output stays in fp32
    model, x = make(dataclasses.replace(TINY, d_model=64, d_ff=96), scale=2.0), tokens(2, 60)
    p, q = (step_by_step(Decoder(model, int8=i), x, 9).log_softmax(-1) for i in (False, True))
    assert 0 < (p.exp() * (p - q)).sum(-1).mean() < 2e-3
    monkeypatch.setattr(decode, "SMALL", 2**20)  # all of them: nothing is rounded
    assert torch.equal(step_by_step(Decoder(model, int8=True), x, 9), step_by_step(Decoder(model), x, 9))
    assert len(list(generate(Decoder(model, int8=True), [[1, 2], [3]], 5, stop_ids=[96]))) == 6


def test_a_full_state_is_refused():
    decoder = Decoder(make())
    state = decoder.init_state(2, 1)
    decoder(tokens(2, 1), state=state)
    with pytest.raises(ValueError, match="1 . 1 tokens do not fit a state of 1"):
        decoder(tokens(2, 1), state=state)
    with pytest.raises(ValueError, match="holds 2 sequences, the input 3"):
        decoder(tokens(3, 1), state=state)
