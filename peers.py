"""What bench.py compares with: the same network in other people's code, or another way to the same end.

    twin(flow)              the Flow as a Qwen3ForCausalLM of transformers, with the same weights and checked logits
    NanoGPT, train_nanogpt  the model and the recipe that nanoGPT recommends for training on a CPU
    Stepped(pulse)          the same Pulse token by token, through snntorch's own recurrence
    words(...)              documents of as many bytes as wanted, which no deduplication takes for copies
"""

import math
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import corpus
from huggingface import hf_name
from model import Flow
from publish import qwen3_config
from scripts import InputError
from snn_model import Pulse


class Twin(nn.Module):
    """A Qwen3ForCausalLM of transformers, called as a Flow is for training: (idx, targets) -> (None, loss)."""

    def __init__(self, theirs):
        super().__init__()
        self.theirs = theirs

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        return None, self.theirs(input_ids=idx, labels=targets, shift_labels=targets, use_cache=False).loss

    def generate(self, idx: Tensor, n: int):
        """n greedy tokens after idx [B, T], with transformers' KV cache."""
        return self.theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, min_new_tokens=n, do_sample=False)


def twin(model: Flow) -> Twin:
    """The same network with the same weights in transformers. Raises InputError when transformers is missing, RuntimeError when
    its logits are others: then the two would not do the same work."""
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError as problem:
        raise InputError("this row compares with transformers: pip install transformers") from problem
    # No end, which would end generation; no padding token, whose embedding would not be trained.
    config = qwen3_config(model.config, ends=[], start=0, pad=0) | {"eos_token_id": None, "pad_token_id": None}
    theirs = Qwen3ForCausalLM(Qwen3Config(**config))
    names = {hf_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    theirs.load_state_dict(names)
    idx = torch.arange(40)[None] % model.config.vocab_size
    with torch.no_grad():
        difference = (model(idx)[0] - theirs(idx).logits).abs().max().item()
    if difference > 1e-3:
        raise RuntimeError(f"transformers' logits differ by {difference:.1e}")
    return Twin(theirs)


# ---- nanoGPT ----


class NanoGPT(nn.Module):
    """GPT-2 (Radford et al. 2019) in the size of nanoGPT's CPU recipe: 4 layers, 4 heads, width 128, 64 characters, no dropout."""

    block_size, n_layer, n_head, d_model = 64, 4, 4, 128

    def __init__(self, vocab_size: int):
        super().__init__()
        C = self.d_model
        self.tokens, self.positions = nn.Embedding(vocab_size, C), nn.Embedding(self.block_size, C)
        self.norms = nn.ModuleList(nn.LayerNorm(C, bias=False) for _ in range(2 * self.n_layer + 1))
        self.qkv = nn.ModuleList(nn.Linear(C, 3 * C, bias=False) for _ in range(self.n_layer))
        self.proj = nn.ModuleList(nn.Linear(C, C, bias=False) for _ in range(self.n_layer))
        self.up = nn.ModuleList(nn.Linear(C, 4 * C, bias=False) for _ in range(self.n_layer))
        self.down = nn.ModuleList(nn.Linear(4 * C, C, bias=False) for _ in range(self.n_layer))
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.n_layer) if name.startswith(("proj", "down")) else 0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """idx and targets [B, T] -> mean nats per character."""
        B, T = idx.shape
        x = self.tokens(idx) + self.positions.weight[:T]
        for i in range(self.n_layer):
            q, k, v = self.qkv[i](self.norms[2 * i](x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # [B, H, T, D]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj[i](y.transpose(1, 2).reshape(B, T, -1))
            x = x + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return F.cross_entropy((self.norms[-1](x) @ self.tokens.weight.T).flatten(0, 1), targets.flatten())


def train_nanogpt(text: str, steps: int) -> tuple[float, float]:
    """(seconds of training, bits per byte of the text's last tenth) of nanoGPT's CPU recipe: characters, batches of 12, fp32, AdamW
    with betas 0.9 and 0.99, 100 steps of warm-up to 0.001 and a cosine to 0.0001. nanoGPT plans 2,000 steps."""
    characters = sorted(set(text))
    ids = torch.from_numpy(np.searchsorted(characters, list(text)))
    cut = len(ids) - len(ids) // 10
    train, val, T = ids[:cut], ids[cut:], NanoGPT.block_size
    if len(val) <= T:
        raise InputError(f"--text has {len(text):,} characters, its last tenth must be longer than {T}: give more text")
    torch.manual_seed(0)
    model, warmup = NanoGPT(len(characters)), 100
    decay, rest = ([p for p in model.parameters() if (p.ndim >= 2) == big] for big in (True, False))
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    start = time.perf_counter()
    for step in range(steps):
        progress = (step - warmup) / max(1, steps - warmup)
        lr = 1e-3 * (step + 1) / (warmup + 1) if step < warmup else 1e-4 + 0.5 * (1 + math.cos(math.pi * progress)) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = torch.randint(len(train) - T, (12,))[:, None] + torch.arange(T + 1)
        x, y = train[rows[:, :-1]], train[rows[:, 1:]]
        optimizer.zero_grad(set_to_none=True)
        model(x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - start
    n = (len(val) - 1) // T
    with torch.no_grad():
        nats = model(val[: n * T].view(n, T), val[1 : n * T + 1].view(n, T)).item()
    return seconds, nats / math.log(2) * len(val) / len("".join(characters[i] for i in val.tolist()).encode())


# ---- Pulse, the slow way ----


class Stepped(nn.Module):
    """A Pulse trained as spiking networks usually are, one call of the whole network and of snntorch.Leaky per token."""

    def __init__(self, pulse: Pulse):
        super().__init__()
        self.pulse = pulse

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        state, losses = self.pulse.init_state(idx.size(0)), []
        for t in range(idx.size(1)):
            losses.append(self.pulse(idx[:, t : t + 1], targets[:, t : t + 1], state)[1])
        return None, torch.stack(losses).mean()


# ---- text ----


def words(n_bytes: int, packages: tuple[str, ...], seed: int = 0) -> Iterator[str]:
    """Documents of 200 words, n_bytes in all (UTF-8), the words drawn by their frequency in the prose of these packages."""
    pool = np.array([word for _, document in corpus.documents(1, packages) for word in document.split()], dtype=object)
    rng = np.random.default_rng(seed)
    while n_bytes > 0:
        for row in rng.integers(len(pool), size=(1000, 200)):
            text = " ".join(pool[row])
            yield text
            n_bytes -= len(text.encode())
            if n_bytes <= 0:
                return
