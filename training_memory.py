"""How much memory training takes, by what: weights, gradients, optimizers, activations. An estimate that needs no GPU.

    python training_memory.py                    # every preset of Flow, one sequence of 2,048 tokens, with and without --checkpointing

The figures follow from the sizes alone: train.py's fp32 weights, bf16 autocast, Muon and AdamW. What autograd keeps for the
backward pass is counted operation by operation; kept_bytes() counts what it really keeps, and a test compares the two.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from loss import LOGITS
from model import PRESETS, Flow, FlowConfig
from scripts import run

HEADINGS = {
    "weights": "weights", "gradients": "gradients", "muon": "Muon", "adamw": "AdamW", "bf16": "bf16 copies", "activations": "activations",
    "peak": "peak", "peak_accumulating": "peak with --grad_accum",
}  # fmt: skip


def block_bytes(config: FlowConfig, qk_norm: int = 4) -> int:
    """Bytes that autograd keeps per token of a block under bf16 autocast, with a GPU's flash attention.

    `qk_norm` is what QK-norm keeps per element: 4, its input turned to fp32; 2, the input itself, on a CPU.
    """
    C, H, K, F = config.d_model, config.n_head, config.n_kv_head, config.d_ff
    q, kv = H * config.head_dim, K * config.head_dim
    norms = 2 * (4 + 2) * C + qk_norm * (q + kv) + 4 * (2 + H + K)  # with their bf16 results and rms; QK-norm's results are rotated first
    attention = 2 * (q + 2 * kv) + 2 * q + 4 * H  # q, k, v, the kernel's result, logsumexp
    return norms + attention + 2 * 4 * F  # gate, silu(gate), up and their product


def training_memory(config: FlowConfig, batch_size: int, seq_len: int, checkpointing: bool, qk_norm: int = 4) -> dict[str, float]:
    """Bytes on one device, by what they hold (the keys of HEADINGS). Of several ranks each has its share of "muon", and all else whole;
    DistributedDataParallel keeps the gradients' memory, so that "peak_accumulating" holds for them with one micro-step too; with more
    the gradients of all but the last lie beside its own, once more as much.

    "activations" is what is kept between forward and backward. "peak": the gradients grow while the activations go.
    "peak_accumulating": with gradient accumulation the gradients of earlier micro-steps are there during the forward pass too.
    """
    C, V, N, tokens = config.d_model, config.vocab_size, config.num_params(), batch_size * seq_len
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    matrices = config.n_layer * C * (2 * q + 2 * kv + 3 * config.d_ff)
    block = tokens * block_bytes(config, qk_norm)
    head = tokens * (4 + 2) * C + 2 * V * C  # the last norm, and the gradients that the loss takes at once
    loss = 4 * V * C + 12 * min(LOGITS["cuda"], tokens * V)  # while it is computed: the head's gradient in fp32, a chunk of logits
    parts = {
        "weights": 4 * N,
        "gradients": 4 * N,
        "muon": 4 * matrices,
        "adamw": 8 * (N - matrices),
        "bf16": 2 * (matrices + V * C),  # autocast's copies of the matrices; with checkpointing gone when the forward pass ends
        "activations": head + (config.n_layer * 4 * C * tokens if checkpointing else config.n_layer * block),
    }
    always = parts["weights"] + parts["muon"] + parts["adamw"]
    forward = always + parts["bf16"] + parts["activations"] + loss
    backward = always + parts["gradients"] + block
    # Checkpointing: a block is computed again while the inputs of all are still there, and no gradient of this micro-step yet.
    again = always + parts["activations"] + block if checkpointing else 0
    return parts | {"peak": max(forward, backward, again), "peak_accumulating": max(max(forward, again) + parts["gradients"], backward)}


def kept_bytes(model: Flow, idx: Tensor, targets: Tensor, autocast: AbstractContextManager) -> int:
    """Bytes of all tensors that autograd keeps between forward and backward, parameters aside, each storage once."""
    storages = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that its address is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        loss = model(idx, targets)[1]
    loss.backward()
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def table(presets: Mapping[str, FlowConfig] = PRESETS, batch_size: int = 1, seq_len: int = 2048) -> str:
    """A Markdown table of the presets, in GB of 10^9 bytes."""
    lines = [f"| {batch_size} x {seq_len:,} tokens, GB | {' | '.join(HEADINGS.values())} |", "| --- " * (len(HEADINGS) + 1) + "|"]
    for name, config in presets.items():
        for checkpointing in (False, True):
            sizes = training_memory(config, batch_size, seq_len, checkpointing)
            lines.append(f"| {name}{', --checkpointing' * checkpointing} | {' | '.join(f'{sizes[what] / 1e9:.3g}' for what in HEADINGS)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(lambda: print(table()))
