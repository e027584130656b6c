"""Flow against Hugging Face's Qwen3, its cache against full evaluation, its parts against slow references."""

import dataclasses
import json
import math

import pytest
import test_snn_model as pulse
import torch
import torch.nn as nn
import torch.nn.functional as F

import snn_model
from loss import LinearCrossEntropy
from model import PRESETS, Flow, FlowConfig, RMSNorm, band, causal_attention, generate, penalized, rope_table, rotate, sample_token

TINY = FlowConfig(vocab_size=97, n_layer=3, n_head=4, n_kv_head=2, d_model=32, head_dim=16, d_ff=48, window=8, global_every=3)


def make(config=TINY, seed=0, scale=5.0):
    """A Flow whose weights are large enough for its predictions to be far from uniform."""
    torch.manual_seed(seed)
    model = Flow(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(scale)
            else:
                p.add_(torch.randn_like(p) * 0.2)
    return model


def tokens(B, T, config=TINY, seed=1):
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


# ---- parts ----


@pytest.mark.parametrize("shape", [(3, 5, 2, 16), (1, 1), (7, 200_000), (0, 8)])  # 200,000: two rows are one portion
def test_norm_by_hand_equals_torchs(shape):
    torch.manual_seed(0)
    x, grad = torch.randn(shape, dtype=torch.double, requires_grad=True), torch.randn(shape, dtype=torch.double)
    norm = RMSNorm(shape[-1], 1e-3).double()
    nn.init.normal_(norm.weight)
    results = []
    for y in (norm(x), F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)):
        results.append((y, *torch.autograd.grad(y, (x, norm.weight), grad)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_norm_computes_in_fp32_and_gives_what_the_products_take():
    torch.manual_seed(0)
    norm = RMSNorm(64, 1e-6)
    for x in (torch.randn(9, 64), torch.randn(9, 64).bfloat16(), torch.randn(9, 64).T.contiguous().T):
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(x.requires_grad_())
        expected = F.rms_norm(x.float(), (64,), norm.weight, norm.eps)
        torch.testing.assert_close(y, expected.bfloat16(), rtol=2**-7, atol=0)
        y.sum().backward()
        assert x.grad.dtype == x.dtype and norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "T, window", [(1, None), (7, None), (300, None), (5, 8), (9, 8), (16, 8), (17, 8), (40, 8), (300, 100), (300, 32), (7, 1)]
)
def test_attention_equals_explicit_loops(T, window):
    torch.manual_seed(T)
    B, H, K, D = 2, 4, 2, 6
    q, k, v = (
        torch.randn(B, H, T, D, dtype=torch.double),
        torch.randn(B, K, T, D, dtype=torch.double),
        torch.randn(B, K, T, D, dtype=torch.double),
    )
    expected = torch.zeros_like(q)
    for h in range(H):
        for t in range(T):
            seen = range(0 if window is None else max(0, t - window + 1), t + 1)
            scores = torch.stack([(q[:, h, t] * k[:, h // (H // K), j]).sum(-1) / math.sqrt(D) for j in seen], -1).softmax(-1)
            expected[:, h, t] = sum(scores[:, [n]] * v[:, h // (H // K), j] for n, j in enumerate(seen))
    torch.testing.assert_close(causal_attention(q, k, v, window), expected)


def test_attention_gradient_equals_the_fused_kernel():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 50, 8, dtype=torch.double, requires_grad=True) for h in (4, 2, 2))
    for window in (None, 7, 30):
        out, pos = causal_attention(q, k, v, window), torch.arange(50)
        reference = F.scaled_dot_product_attention(q, k, v, attn_mask=band(pos, pos, window), enable_gqa=True)
        weights = torch.randn_like(out)
        torch.testing.assert_close(torch.autograd.grad(out, (q, k, v), weights), torch.autograd.grad(reference, (q, k, v), weights))


def test_rope_depends_on_distance_only():
    x, y = torch.randn(2, 1, 1, 1, 16, dtype=torch.double)

    def score(i, j):
        (a, b), (c, d) = (rope_table(p, p + 1, 16, 10_000.0, "cpu") for p in (i, j))
        return (rotate(x, a, b) * rotate(y, c, d)).sum().item()

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-5)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)


@pytest.mark.parametrize("ignored", [0, 3, 40])
def test_loss_and_gradient_equal_cross_entropy(ignored):
    torch.manual_seed(0)
    x = torch.randn(40, 8, dtype=torch.double, requires_grad=True)
    weight = torch.randn(2**20, 8, dtype=torch.double, requires_grad=True)  # so many classes that the rows go in several chunks
    targets = torch.randint(2**20, (40,))
    targets[:ignored] = -1
    loss = LinearCrossEntropy.apply(x, weight, targets)
    if ignored == 40:
        assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()
        return
    reference = F.cross_entropy(x @ weight.T, targets, ignore_index=-1)
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(torch.autograd.grad(loss * 3, (x, weight)), torch.autograd.grad(reference * 3, (x, weight)))


def test_evaluation_computes_no_gradient(monkeypatch):
    model, x = make(), tokens(2, 30)
    _, loss = model(x, x)

    def refuse(*_, **__):
        raise AssertionError("the gradient of the loss was computed")

    monkeypatch.setattr(torch, "mm", refuse)
    with torch.no_grad():
        assert torch.equal(model(x, x)[1], loss)
    with pytest.raises(AssertionError, match="was computed"):
        model(x, x)


def test_targets_give_the_mean_loss_of_the_logits():
    model, x, y = make(), tokens(2, 30), tokens(2, 30, seed=2)
    y[0, :5] = -1
    logits, none = model(x)
    nothing, loss = model(x, y)
    assert none is None and nothing is None and logits.shape == (2, 30, 97)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1))


# ---- the whole model ----


@pytest.mark.parametrize("global_every", [1, 3, 99])
@pytest.mark.parametrize("window", [4, 8, 64])
def test_cached_chunked_and_full_evaluation_agree_far_beyond_the_window(global_every, window):
    model = make(dataclasses.replace(TINY, global_every=global_every, window=window))
    x = tokens(2, 200)
    full, _ = model(x)
    state = model.init_state(2, 200)
    one_by_one = torch.cat([model(x[:, t : t + 1], state=state)[0] for t in range(200)], 1)
    torch.testing.assert_close(one_by_one, full, atol=1e-4, rtol=0)
    state, start = model.init_state(2, 200), 0
    for size in (1, 3, 50, 1, 2, 8, 9, 100, 26):
        last, _ = model(x[:, start : start + size], state=state)
        start += size
        torch.testing.assert_close(last[:, 0], full[:, start - 1], atol=1e-4, rtol=0)
    assert start == 200


def test_sliding_layers_keep_a_rolling_cache():
    state = make().init_state(2, 1000)
    assert [kv.size(2) for kv in state.kv] == [8, 8, 1000]


def test_state_errors():
    model = make()
    with pytest.raises(ValueError, match="holds 2 sequences, the input 3"):
        model(tokens(3, 4), state=model.init_state(2, 10))
    with pytest.raises(ValueError, match="0 . 11 tokens do not fit a state of 10"):
        model(tokens(2, 11), state=model.init_state(2, 10))


@pytest.mark.parametrize("global_every", [1, 2, 99])
def test_causal(global_every):
    """Changing token t moves no logit before t, and moves those from t on; bitwise, in training mode too."""
    model = make(dataclasses.replace(TINY, global_every=global_every))
    x = tokens(1, 40)
    before, _ = model(x)
    for t in (0, 1, 7, 8, 20, 39):
        changed = x.clone()
        changed[0, t] = (changed[0, t] + 1) % 97
        after, _ = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


def test_sliding_layers_forget():
    """With every layer sliding, a token reaches at most n_layer * (window - 1) positions ahead."""
    model, x = make(dataclasses.replace(TINY, global_every=99)), tokens(1, 60)
    changed = x.clone()
    changed[0, 0] += 1
    difference = (model(x)[0] - model(changed)[0]).abs().amax(-1)[0]
    assert difference[: 3 * 7 + 1].all() and not difference[3 * 7 + 1 :].any()


def test_checkpointing_changes_memory_not_results():
    model, x, y = make().train(), tokens(2, 20), tokens(2, 20, seed=2)
    _, loss = model(x, y)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.checkpointing = True
    calls = []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    _, again = model(x, y)
    again.backward()
    assert torch.equal(loss, again) and len(calls) == 2  # forward, and once more in the backward pass
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters()))


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count(tied):
    config = dataclasses.replace(TINY, tie_embeddings=tied)
    assert config.num_params() == sum(p.numel() for p in Flow(config).parameters())
    with torch.device("meta"):
        for preset in PRESETS.values():
            assert preset.num_params() == sum(p.numel() for p in Flow(preset).parameters())
            assert any(preset.is_global(i) for i in range(preset.n_layer))


def test_flops_count_what_the_matrix_products_do():
    """Against PyTorch's own counter, with sequences short enough for every layer to be one plain masked product."""
    from torch.utils.flop_counter import FlopCounterMode

    T, config = 8, dataclasses.replace(TINY, window=64)
    model = make(config).train()
    with FlopCounterMode(display=False) as counter:
        _, loss = model(tokens(1, T), tokens(1, T))
        loss.backward()
    computed_keys, seen_keys = T, (T + 1) / 2  # the products compute the masked half too, which the formula leaves out
    masked = 12 * config.n_layer * config.n_head * config.head_dim * (computed_keys - seen_keys)
    assert counter.get_total_flops() / T == pytest.approx(config.flops_per_token(T) + masked)
    long = dataclasses.replace(TINY, window=10)  # 2 sliding layers and a global one
    q = long.n_head * long.head_dim
    mean = sum(min(t + 1, 10) for t in range(50)) / 50
    assert long.flops_per_token(50) - long.flops_per_token(1) == pytest.approx(12 * q * (2 * (mean - 1) + 25.5 - 1))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(n_head=3), "n_head=3 is not divisible by n_kv_head=2"),
        (dict(head_dim=15), "head_dim=15 is odd"),
        (dict(n_layer=0), "n_layer=0"),
        (dict(norm_eps=0), "norm_eps=0 must be above 0"),
        (dict(global_layers=(0, 9)), "global_layers names layer 9, there are layers 0 to "),
    ],
)
def test_impossible_sizes(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)


# ---- Hugging Face ----

QWEN = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=512, rms_norm_eps=1e-6,
)  # fmt: skip
LAYERS = {
    "global": {},
    "sliding": dict(
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
    "first": dict(
        use_sliding_window=True, sliding_window=8, layer_types=["full_attention", "sliding_attention", "full_attention", "full_attention"]
    ),
    "none": dict(use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention"] * 4),
}


def save_qwen(folder, tied=True, layers="global", shard_size="5GB"):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**QWEN, **LAYERS[layers], tie_word_embeddings=tied, attn_implementation="eager")
    model = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(tmp_path, layers, tied):
    theirs = save_qwen(tmp_path, tied, layers, shard_size="20KB" if layers == "sliding" else "5GB")
    assert (layers == "sliding") == (tmp_path / "model.safetensors.index.json").exists()
    ours = Flow.from_pretrained(tmp_path).eval()
    x = tokens(2, 100)
    with torch.no_grad():
        expected = theirs(x).logits
        assert expected.std() > 1
        torch.testing.assert_close(ours(x)[0], expected, atol=1e-4, rtol=0)
        state = ours.init_state(2, 100)
        cached = [ours(x[:, :30], state=state)[0]] + [ours(x[:, t : t + 1], state=state)[0] for t in range(30, 100)]
        torch.testing.assert_close(torch.cat(cached, 1), expected[:, 29:], atol=1e-4, rtol=0)


def test_both_config_notations(tmp_path):
    save_qwen(tmp_path)
    path = tmp_path / "config.json"
    new = json.loads(path.read_text())
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types")}
    old |= dict(rope_theta=5000.0, rope_scaling=None, use_sliding_window=True, sliding_window=8, max_window_layers=3)
    path.write_text(json.dumps(old))
    config = Flow.from_pretrained(tmp_path).config
    assert config.rope_theta == 5000.0 and [config.is_global(i) for i in range(4)] == [True, True, True, False]
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 7000.0}
    path.write_text(json.dumps(new))
    assert Flow.from_pretrained(tmp_path).config.rope_theta == 7000.0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="llama"), "is a 'llama' model"),
        (dict(attention_bias=True), "attention biases"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "scaled RoPE"),
        (dict(num_hidden_layers=3, layer_types=["full_attention"] * 3), "holds other weights than its config.json says: model.layers.3"),
        (dict(vocab_size=96), "holds other weights than its config.json says: lm_head.weight, model.embed_tokens.weight"),
        (dict(layer_types=["linear_attention"] * 4), "layer_types"),
    ],
)
def test_foreign_folders_are_refused(tmp_path, change, message):
    save_qwen(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Flow.from_pretrained(tmp_path)


def test_incomplete_folders_are_refused(tmp_path):
    save_qwen(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        Flow.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing: download the folder again"):
        Flow.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        Flow.from_pretrained(tmp_path)


# ---- generation ----


def greedy_by_hand(model, prompt, n):
    x = torch.tensor([prompt])
    for _ in range(n):
        x = torch.cat([x, model(x)[0][:, -1:].argmax(-1)], 1)
    return x[0, len(prompt) :].tolist()


def test_greedy_generation_equals_recomputing_everything():
    model, prompt = make(), tokens(1, 5)[0].tolist()
    steps = list(generate(model, [prompt], 40, temperature=0))
    assert all(step.shape == (1,) for step in steps)
    assert torch.cat(steps).tolist() == greedy_by_hand(model, prompt, 40)


def test_a_model_in_training_with_checkpointing_generates_the_same():
    model, prompt = make(), tokens(1, 5)[0].tolist()
    expected = greedy_by_hand(model, prompt, 20)
    model.train().checkpointing = True
    assert torch.cat(list(generate(model, [prompt], 20, temperature=0))).tolist() == expected


def test_a_batch_of_unequal_prompts_equals_each_alone():
    model = make()
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, 11, 1, 20, 3)]
    table = torch.stack(list(generate(model, prompts, 15, temperature=0)), 1)
    for prompt, row in zip(prompts, table.tolist()):
        assert [t for t in row if t >= 0] == greedy_by_hand(model, prompt, 15)


def test_stop_ids_end_a_row_and_then_the_generator():
    model, prompts = make(), [tokens(1, 4, seed=s)[0].tolist() for s in (1, 2)]
    alone = [greedy_by_hand(model, p, 20) for p in prompts]
    stop = alone[0][6]
    table = torch.stack(list(generate(model, prompts, 20, temperature=0, stop_ids=[stop])), 1).tolist()
    for row, free in zip(table, alone):
        expected = free[: free.index(stop) + 1] if stop in free else free
        assert [t for t in row if t >= 0] == expected
    assert max(map(len, table)) == max(len([t for t in row if t >= 0]) for row in table)


def penalized_by_hand(model, prompt, n, penalty):
    """Greedy, with the penalty of CTRL (arXiv:1909.05858, section 4.1) as it is written there: token by token."""
    text = list(prompt)
    for _ in range(n):
        logits = model(torch.tensor([text]))[0][0, -1].tolist()
        for token in set(text):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        text.append(max(range(len(logits)), key=logits.__getitem__))
    return text[len(prompt) :]


@pytest.mark.parametrize("kind", ["flow", "pulse"])
def test_the_repetition_penalty_counts_what_each_row_has_seen_and_nothing_else(kind):
    model, config = (make().double(), TINY) if kind == "flow" else (pulse.make(dtype=torch.float64), pulse.TINY)
    prompts = [tokens(1, n, config, seed=n)[0].tolist() for n in (3, 11, 20, 3)]
    first = penalized_by_hand(model, prompts[0], 1, 1.3)[0]
    with torch.no_grad():  # a short prompt is to be followed by token 0, which stands in the table where that prompt has ended
        for weight in {model.token_embedding.weight, model.lm_head.weight}:  # a set: they may be one
            weight[[0, first]] = weight[[first, 0]]
    prompts = [[{0: first, first: 0}.get(token, token) for token in prompt] for prompt in prompts]
    for penalty in (1.3, 100):
        table = torch.stack(list(generate(model, prompts, 10, temperature=0, repetition_penalty=penalty)), 1)
        rows = [[token for token in row if token >= 0] for row in table.tolist()]
        assert rows == [penalized_by_hand(model, prompt, 10, penalty) for prompt in prompts] and rows[0][0] == 0
    assert all(len({*prompt, *row}) == len(set(prompt)) + len(row) for prompt, row in zip(prompts, rows)), "at 100 nothing comes twice"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_repetition_penalty_of_one_changes_no_token(preset):
    """In the presets' layers and heads, with small widths: text drawn with a seed is that of a loop that knows of no penalty."""
    flow = make(dataclasses.replace(PRESETS[preset], vocab_size=97, d_model=32, head_dim=8, d_ff=48))
    sizes = dict(vocab_size=97, d_model=32, d_hidden=48, d_ff=64, n_head=2)
    for model in (flow, pulse.make(dataclasses.replace(snn_model.PRESETS[preset], **sizes))):
        torch.manual_seed(1)
        state, x, expected = model.init_state(2, 30), tokens(2, 6), []
        for _ in range(12):
            expected.append(sample_token(model(x, state=state)[0][:, -1], 0.8, 40, 0.95))
            x = expected[-1][:, None]
        torch.manual_seed(1)
        written = generate(model, tokens(2, 6), 12, 0.8, 40, 0.95, repetition_penalty=1.0)
        assert torch.equal(torch.stack(list(written)), torch.stack(expected))


def test_the_repetition_penalty_is_not_lost_in_half_precision():
    logits = torch.tensor([[10.0, -10.0, 10.0]])
    seen = torch.tensor([[True, True, False]])
    torch.testing.assert_close(penalized(logits.bfloat16(), seen, 1.001), torch.tensor([[10 / 1.001, -10.01, 10.0]]))


@pytest.mark.parametrize("penalty", [0.99, 0, -1, 101, math.inf, math.nan])
def test_repetition_penalties_out_of_range_are_refused(penalty):
    with pytest.raises(ValueError, match=rf"repetition_penalty={penalty} must be 1 \(off\) to 100"):
        next(generate(make(), [[1]], 3, repetition_penalty=penalty))


@pytest.mark.parametrize("options", [{"temperature": -0.1}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_values_that_no_distribution_has_are_refused(options):
    with pytest.raises(ValueError, match="temperature=.* must be 0 or more, top_k=.* 1 or more, top_p=.* above 0 to 1"):
        next(generate(make(), [[1]], 3, **options))


def test_sampling_follows_the_distribution_it_is_told():
    torch.manual_seed(0)
    probs = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    logits = probs.log().repeat(20_000, 1)

    def share(**options):
        return torch.bincount(sample_token(logits, **({"temperature": 1.0, "top_k": None, "top_p": None} | options)), minlength=5) / 20_000

    torch.testing.assert_close(share(), probs, atol=0.015, rtol=0)
    torch.testing.assert_close(share(temperature=0.5), probs**2 / (probs**2).sum(), atol=0.015, rtol=0)
    torch.testing.assert_close(share(top_k=2), torch.tensor([5, 2, 0, 0, 0]) / 7, atol=0.015, rtol=0)
    torch.testing.assert_close(share(top_p=0.8), torch.tensor([0.5, 0.2, 0.15, 0, 0]) / 0.85, atol=0.015, rtol=0)
    assert share(top_p=1e-9)[0] == 1 and share(temperature=0)[0] == 1
    logits = torch.tensor([[3.0, 1.0, 3.0, 3.0]]).repeat(1000, 1)  # as bf16 makes them
    assert (torch.bincount(sample_token(logits, 1.0, 2, None), minlength=4) > 100).sum() == 2
    assert len(sample_token(logits, 1.0, 1, None).unique()) == 1


def test_empty_prompts_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(make(), [[1], []], 3))
