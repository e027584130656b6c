"""The rows of bench.py that need a GPU: training, of Pulse too, its memory, decoding, attention."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import membranes
import peers
import train
import training_memory
from device import Device
from measure import TINY, Bench, greedy, medians, micro_step, tokens, update
from model import PRESETS, Flow, attention_in_blocks, band, causal_attention
from muon import build_optimizers
from scripts import InputError
from snn_model import PRESETS as PULSE_PRESETS, Pulse


def gpu() -> Device:
    if not torch.cuda.is_available():
        raise InputError("needs a GPU")
    return Device("cuda")


def gpu_training(bench: Bench):
    """tokens/s and MFU of the presets, steps of their own size at 2,048 tokens, compiled and not; their optimizers' share."""
    device = gpu()
    peak, where = device.peak_flops()
    for name in ("small", "base", "1b"):
        recipe, config, seq_len = train.RECIPES[name], TINY if bench.quick else PRESETS[name], 64 if bench.quick else 2048
        with device.torch:
            plain, compiled = Flow(config), Flow(config)
        train.compile_parts(compiled)
        optimizers = build_optimizers(plain, 1e-4, dtype=device.dtype)
        x, y = tokens(config, recipe.micro_step_tokens[2] // 2048, seq_len, device.torch)
        jobs = {kind: micro_step(model, x, y, device) for kind, model in {"compiled": compiled, "not compiled": plain}.items()}
        times = bench.alternate(jobs | {"update": update(plain, optimizers, device)})
        *micro, last = medians(times)
        n, steps = recipe.grad_accum * x.numel(), [recipe.grad_accum * seconds + last for seconds in micro]
        figure = f"{name}, {recipe.grad_accum} x {len(x)} x {seq_len:,} tokens"
        bench.record(f"{figure}, compiled", n / steps[0], "tokens/s", "not compiled", n / steps[1], None, times)
        for kind, seconds, goal in zip(jobs, steps, (("at least", 0.45) if name == "1b" else None, None)):
            rate = config.flops_per_token(seq_len) * n / seconds
            bench.record(f"{figure}, {kind}", rate / 1e12, "TFLOP/s", f"peak, {where}", peak / 1e12, goal, times, kind)
        bench.record(f"{name}, clipping and optimizers", last * 1e3, "ms", "whole step, compiled", steps[0] * 1e3, None, times, "update")


def gpu_pulse(bench: Bench):
    """Forward and backward of Pulse small: compiled, not, and with the scan in PyTorch's operations; against Flow small, not compiled."""
    device, name = gpu(), "nano" if bench.quick else "small"
    for seq_len in (16, 64) if bench.quick else (256, 2048):
        with device.torch:
            plain, compiled, flow = Pulse(PULSE_PRESETS[name]), Pulse(PULSE_PRESETS[name]), Flow(PRESETS[name])
        train.compile_parts(compiled)
        x, y = tokens(flow.config, 2 if bench.quick else train.RECIPES[name].micro_step_tokens[0] // seq_len, seq_len, device.torch)
        jobs = {"compiled": micro_step(compiled, x, y, device), "not compiled": micro_step(plain, x, y, device)}

        def without_kernel(job: Callable = jobs["not compiled"], kernel: Callable = membranes.triton_scan):
            membranes.triton_scan = lambda: None
            job()
            membranes.triton_scan = kernel

        jobs |= {"scan in PyTorch's operations": without_kernel, "Flow": micro_step(flow, x, y, device)}
        times = bench.alternate(jobs)
        *ours, against = (seconds * 1e3 for seconds in medians(times))
        for kind, ms in zip(jobs, ours):
            bench.record(f"Pulse {name}, {len(x)} x {seq_len:,} tokens, {kind}", ms, "ms", "Flow", against, None, times, kind)


def gpu_memory(bench: Bench):
    """Peak memory of training 1b with one sequence of 2,048 tokens against training_memory.py, and the price of checkpointing."""
    device, config, seq_len = gpu(), TINY if bench.quick else PRESETS["1b"], 64 if bench.quick else 2048
    before = torch.cuda.memory_allocated()  # by other rows
    with device.torch:
        model = Flow(config)
    x, y = tokens(config, 1, seq_len, device.torch)
    forward_backward, finish = micro_step(model, x, y, device), update(model, build_optimizers(model, 1e-4, dtype=device.dtype), device)

    def peak(micro_steps: int) -> float:
        for _ in range(2):  # the optimizers have no state before the first
            torch.cuda.reset_peak_memory_stats()
            for _ in range(micro_steps):
                forward_backward()
            finish()
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    for model.checkpointing in (False, True):
        figure = f"1b, 1 x {seq_len:,} tokens{', checkpointing' * model.checkpointing}"
        estimate = training_memory.training_memory(config, 1, seq_len, model.checkpointing)
        used = peak(1)
        bench.record(figure, used, "GB", "training_memory.py", estimate["peak"] / 1e9)
        if model.checkpointing:
            bench.record(figure, used, "GB", "the goal", 16, ("at most", 1))
        bench.record(f"{figure}, accumulating", peak(2), "GB", "training_memory.py", estimate["peak_accumulating"] / 1e9)

    def run(checkpointing: bool) -> Callable:
        def job():
            model.checkpointing = checkpointing
            forward_backward()

        return job

    jobs = {"checkpointing": run(True), "without": run(False)}
    bench.rates(f"1b, 1 x {seq_len:,} tokens, forward and backward, checkpointing", jobs, x.numel(), "tokens/s")


def gpu_decoding(bench: Bench):
    """base in bf16, one sequence and 64, against transformers' generate with its KV cache."""
    device, n = gpu(), 4 if bench.quick else 64
    model = Flow(TINY if bench.quick else PRESETS["base"])
    twin = peers.twin(model).to(device.torch, torch.bfloat16).eval()
    model = model.to(device.torch, torch.bfloat16).eval()
    for batch_size in (1, 64):
        idx = tokens(model.config, batch_size, 16, device.torch)[0]
        jobs = {"Flow": greedy(model, idx, n, device), "transformers' generate": partial(twin.generate, idx, n)}
        bench.rates(f"decoding base, bf16, {batch_size} at once", jobs, batch_size * n, "tokens/s")


def gpu_attention(bench: Bench):
    """Forward and backward of a sliding layer of 1b: flash attention, flex attention, blocks of one window; against SDPA with a mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, config, T = gpu(), PRESETS["1b"], 2048
    window, heads = config.window, (config.n_head, config.n_kv_head, config.n_kv_head)
    like = dict(device=device.torch, dtype=device.dtype)
    q, k, v = (torch.randn(8, T, h, config.head_dim, **like).transpose(1, 2).requires_grad_() for h in heads)
    grad = torch.randn_like(q)
    pos, compiled = torch.arange(T, device=device.torch), torch.compile(flex_attention, dynamic=False)
    mask = band(pos, pos, window)
    sparse = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < window), None, None, T, T, device=device.torch)

    def both(attention: Callable) -> Callable:
        def job():
            for _ in range(20):
                attention().backward(grad)
            device.wait()

        return job

    ways = {
        "flash attention, as Flow": lambda: causal_attention(q, k, v, window),
        "flex attention": lambda: compiled(q, k, v, block_mask=sparse, enable_gqa=True),
        "blocks of one window": lambda: attention_in_blocks(q, k, v, window),
        "SDPA with a mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
    }
    times = bench.alternate({name: both(attention) for name, attention in ways.items()})
    *ours, against = (20 / seconds for seconds in medians(times))
    for name, rate in zip(ways, ours):
        figure = f"attention, window {window} of {T:,}, {name}"
        bench.record(figure, rate, "layers/s", "SDPA with a mask", against, None, times, name)
