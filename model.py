"""Flow: a transformer language model in one file. Only its loss is elsewhere (loss.py), because Pulse has it too. On a CPU by_hand.py
(training) and decode.py (writing) replace parts of this file: they compute the same, faster.

Flow is Qwen3 (arXiv:2505.09388) with Gemma's mix of local and global layers (arXiv:2503.19786): pre-RMSNorm, grouped-query
attention with QK-norm and RoPE, a sliding window in most layers, SwiGLU, tied embeddings, no biases. A Qwen3 folder from
Hugging Face loads into it unchanged (`Flow.from_pretrained`).

    python train.py                     # trains the nano preset of this file
    python model.py                     # prints the presets: parameters and FLOPs per token

B batch, T new tokens, S keys seen, C = d_model, H query heads, K key/value heads, D = head_dim, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import by_hand
from decode import Decoder
from huggingface import config_from_hf, hf_name, read_weights
from loss import linear_cross_entropy


@dataclass(frozen=True)
class FlowConfig:
    """The sizes of a Flow. Raises ValueError when they cannot belong together."""

    vocab_size: int = 1024
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 2
    d_model: int = 128
    head_dim: int = 32
    d_ff: int = 352
    window: int = 128  # a sliding layer sees this many tokens, the current one included
    global_every: int = 4  # layer i sees everything when (i + 1) % global_every == 0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    max_seq_len: int = 2048  # the longest sequence it is meant for; forward() does not refuse a longer one, train.py and sample.py do
    tie_embeddings: bool = True
    global_layers: tuple[int, ...] | None = None  # when given: exactly these layers see everything (imported models)

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
            if field.type is float and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0 and finite")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}, the key heads they share")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: RoPE rotates pairs, choose an even one")
        if self.global_layers is not None:
            object.__setattr__(self, "global_layers", tuple(self.global_layers))  # may be given as a list
            if foreign := set(self.global_layers) - set(range(self.n_layer)):
                raise ValueError(f"global_layers names layer {min(foreign)}, there are layers 0 to {self.n_layer - 1}")

    def is_global(self, layer: int) -> bool:
        """Whether this layer sees the whole past; else it sees the last `window` tokens."""
        if self.global_layers is not None:
            return layer in self.global_layers
        return (layer + 1) % self.global_every == 0

    def num_params(self) -> int:
        """The number of parameters, tied embeddings counted once."""
        q, kv = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        layer = self.d_model * (2 * q + 2 * kv + 3 * self.d_ff) + 2 * self.head_dim + 2 * self.d_model
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return embeddings + self.n_layer * layer + self.d_model

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of one training step (forward and backward) per token of a `seq_len`-token sequence.

        6 per weight of a matrix product (2 forward, 4 backward; the head counts, the embedding lookup does not), and
        12 * n_head * head_dim per key that is really looked at: causal attention sees (T + 1) / 2 keys on average, a
        sliding layer fewer. nanoGPT and PaLM count T keys, which flatters the utilisation; this does not.
        """
        q, kv = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        matrices = self.n_layer * self.d_model * (2 * q + 2 * kv + 3 * self.d_ff) + self.vocab_size * self.d_model
        w = min(self.window, seq_len)
        keys_global = (seq_len + 1) / 2
        keys_sliding = w - w * (w - 1) / (2 * seq_len)  # the mean over positions i of min(i + 1, w)
        n_global = sum(self.is_global(i) for i in range(self.n_layer))
        return 6 * matrices + 12 * q * (n_global * keys_global + (self.n_layer - n_global) * keys_sliding)


PRESETS: dict[str, FlowConfig] = {  # a new one needs a Pulse in snn_model.py and a recipe in train.py too
    "nano": FlowConfig(),
    "small": FlowConfig(n_layer=9, d_model=512, n_head=8, n_kv_head=4, head_dim=64, d_ff=1344, window=256, global_every=6),
    "base": FlowConfig(
        vocab_size=32_768, n_layer=12, d_model=768, n_head=12, n_kv_head=4, head_dim=64, d_ff=2048, window=512, global_every=6
    ),
    "1b": FlowConfig(
        vocab_size=32_768, n_layer=18, d_model=2048, n_head=16, n_kv_head=8, head_dim=128, d_ff=8192, window=128, global_every=6
    ),
}


# ---- building blocks ----

CHUNK = 128  # queries whose scores a CPU computes at once


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv:1910.07467), computed in fp32.

    Under autocast the result is already in the half precision of the matrix products that follow: one cast for all of them.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [..., C] -> [..., C], then rotated by `rope` where it is given: x [B, T, H, D]"""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        work = torch.promote_types(x.dtype, torch.float32)
        if by_hand.worthwhile(x):
            return by_hand.RMSNormByHand.apply(x, self.weight.to(work), self.eps, dtype, rope)
        x = F.rms_norm(x.to(work), self.weight.shape, self.weight.to(work), self.eps).to(dtype)
        return x if rope is None else rotate(x, *rope)


def rope_table(start: int, stop: int, head_dim: int, theta: float, device) -> tuple[Tensor, Tensor]:
    """cos and sin [stop - start, head_dim / 2] of the rotary embedding (arXiv:2104.09864), in fp32: bf16 cannot count to 2,048."""
    inv_freq = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.arange(start, stop, device=device, dtype=torch.float32)[:, None] * inv_freq
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE with the half-split pairing of Llama and Qwen: (x_i, x_{i + D/2}) turn by the angle of their position.  x [B, T, H, D]"""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # [T, 1, D/2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v with shared key heads.  q [B, H, T, D], k and v [B, K, S, D], mask bool [T, S], True = may look."""
    (B, H, T, D), K = q.shape, k.size(1)
    # The query heads of one key head are stacked: no copies of the keys, and no enable_gqa, which together with a mask leaves
    # CUDA only the kernel that materialises all scores.
    q = q.reshape(B, K, H // K * T, D)
    mask = None if mask is None else mask.repeat(H // K, 1)  # [H/K * T, S]
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H, T, D)
    # On a CPU three plain operations train 1.4 to 2.3 times as fast as the fused kernel, whose bf16 backward is slow.
    scores = (q * D**-0.5) @ k.mT  # [B, K, H/K * T, S]
    if mask is not None:
        scores = scores + by_hand.additive(mask, q.dtype)
    return (scores.softmax(-1) @ v).view(B, H, T, D)


def band(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """The mask [T, S] of queries and keys at these positions: no look ahead, and not further back than the window."""
    distance = queries[:, None] - keys
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def chunks_of_queries(T: int, window: int | None, size: int, device) -> list[tuple[int, int, int, Tensor]]:
    """[(i, j, lo, mask [j - i, j - lo])]: queries i to j look at keys lo to j, and the mask leaves out what is not theirs.

    So of masked scores at most a chunk's worth is computed on each side. lo is a multiple of 32, with which CPUs' matrix units are faster.
    """
    pos, chunks = torch.arange(T, device=device), []
    for i in range(0, T, size):
        j, lo = min(i + size, T), 0 if window is None else max(0, i - window + 1) // 32 * 32
        chunks.append((i, j, lo, band(pos[i:j], pos[lo:j], window)))
    return chunks


def flashes(q: Tensor, k: Tensor) -> bool:
    """Whether flash attention can be asked for directly: half precision on an NVIDIA GPU of 2020 or later."""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16) or k.dtype != q.dtype:
        return False
    if q.size(-1) % 8 or q.size(-1) > 256:
        return False
    return torch.version.cuda is not None and torch.cuda.get_device_capability(q.device) >= (8, 0)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """What causal_attention computes, in one kernel that skips what lies outside the window and shares key heads.

    F.scaled_dot_product_attention has no window; given a mask it computes all T x T scores. It would also choose cuDNN here, which
    plans anew for every new length: a tenth of a second for each prompt.
    """
    T, left = q.size(2), -1 if window is None else window - 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # as the projections left them: no copy
    options = dict(window_size_left=left, window_size_right=0)
    return torch.ops.aten._flash_attention_forward(q, k, v, None, None, T, T, 0.0, False, False, **options)[0].transpose(1, 2)


def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Sliding attention cut into blocks of one window: a block's queries look at their own block and the one before, as B * n sequences."""
    B, H, T, D = q.shape
    n, pos = -(-T // window), torch.arange(window, device=q.device)
    blocks = F.pad(q, (0, 0, 0, n * window - T)).view(B, H, n, window, D).transpose(1, 2)  # [B, n, H, W, D]
    pairs = (F.pad(x, (0, 0, window, n * window - T)).unfold(2, 2 * window, window) for x in (k, v))  # [B, K, n, D, 2W]
    k, v = (x.permute(0, 2, 1, 4, 3) for x in pairs)  # [B, n, K, 2W, D]
    mask = band(pos + window, torch.arange(2 * window, device=q.device), window)
    first = attend(blocks[:, 0], k[:, 0, :, window:], v[:, 0, :, window:], mask[:, window:])  # none before it
    rest = attend(*(x[:, 1:].flatten(0, 1) for x in (blocks, k, v)), mask)
    out = torch.cat([first[:, None], rest.view(B, n - 1, H, window, D)], dim=1)
    return out.transpose(1, 2).reshape(B, H, n * window, D)[:, :, :T]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention of a whole sequence to itself, in time T * window in a sliding layer.  q [B, H, T, D], k and v [B, K, T, D]"""
    T = q.size(2)
    if flashes(q, k):
        return flash_attention(q, k, v, window)
    if window is not None and T > 2 * window:
        return attention_in_blocks(q, k, v, window)
    if window is not None and T <= window:
        window = None
    on_cpu = q.device.type == "cpu"
    if window is None and not on_cpu:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    chunks = chunks_of_queries(T, window, CHUNK if on_cpu else T, q.device)
    out = [attend(q[:, :, i:j], k[:, :, lo:j], v[:, :, lo:j], mask) for i, j, lo, mask in chunks]
    return torch.cat(out, dim=2)


class KVCache:
    """What Flow remembers between calls: the keys and values of every layer, and how many tokens it has seen (`pos`).

    A global layer keeps `max_len` tokens, a sliding one only the last `window`: token p lies in slot p % window.
    """

    def __init__(self, config: FlowConfig, batch_size: int, max_len: int, device, dtype):
        self.config, self.pos, self.batch_size, self.max_len = config, 0, batch_size, max_len
        sizes = [max_len if config.is_global(i) else min(config.window, max_len) for i in range(config.n_layer)]
        shapes = [(batch_size, 2 * config.n_kv_head, size, config.head_dim) for size in sizes]
        self.kv = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]  # the keys' heads, then the values'

    def check(self, idx: Tensor):
        """Raise ValueError when these tokens [B, T] cannot be the next ones."""
        B, T = idx.shape
        if self.batch_size != B:
            raise ValueError(f"the state holds {self.batch_size} sequences, the input {B}: make one with init_state({B}, ...)")
        if self.pos + T > self.max_len:
            raise ValueError(f"{self.pos} + {T} tokens do not fit a state of {self.max_len}: make one with a larger max_len")

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the T new keys and values of a layer and let their queries look back.  q [B, H, T, D], k and v [B, K, T, D]"""
        cache, pos, T = self.kv[layer], self.pos, k.size(2)
        window, size = None if self.config.is_global(layer) else self.config.window, cache.size(2)
        kv = torch.cat([k, v], dim=1).to(cache.dtype)
        if T == 1:  # one token: its slot, no mask; the order of the slots does not matter, positions are in the keys
            cache[:, :, pos % size] = kv[:, :, 0]
            return attend(q, *cache[:, :, : min(pos + 1, size)].chunk(2, dim=1), None)
        new = torch.arange(pos, pos + T, device=q.device)
        past, kept = torch.arange(max(0, pos - size), pos, device=q.device), new[-size:]
        seen = torch.cat([cache[:, :, past % size], kv], dim=2) if pos else kv  # before new ones take their places
        cache[:, :, kept % size] = kv[:, :, -size:]
        if pos == 0:
            return causal_attention(q, *kv.chunk(2, dim=1), window)
        return attend(q, *seen.chunk(2, dim=1), band(new, torch.cat([past, new]), window))


class Attention(nn.Module):
    """x [B, T, C] -> [B, T, C]; `rope` = (cos, sin) of the T positions, [T, D / 2] each. With a cache the keys before x are there too."""

    def __init__(self, config: FlowConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.window = None if config.is_global(layer) else config.window
        q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.d_model, q, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv, bias=False)
        self.o_proj = nn.Linear(q, config.d_model, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)  # QK-norm keeps the attention logits bounded (arXiv:2302.05442)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.config.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))  # [B, T, H or K, D]
        q, k = self.q_norm(q, rope), self.k_norm(k, rope)
        if cache is None and by_hand.worthwhile(x):
            pieces = by_hand.pieces(chunks_of_queries, T, self.window, CHUNK, q.dtype)
            return self.o_proj(by_hand.AttentionByHand.apply(q, k, v, pieces).flatten(2))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H or K, T, D]
        y = causal_attention(q, k, v, self.window) if cache is None else cache.attend(self.layer, q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """The gated feed-forward layer of arXiv:2002.05202."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then SwiGLU, each of a normalized x and added to it: x [B, T, C] -> [B, T, C]."""

    def __init__(self, config: FlowConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rope, cache)
        return x + self.mlp(self.mlp_norm(x))


# ---- Flow ----


class Flow(nn.Module):
    """The transformer. `checkpointing = True` recomputes each block in the backward pass instead of keeping its activations."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config, self.checkpointing, self.cross_entropy = config, False, linear_cross_entropy  # train.py --compile replaces the last
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight
        for name, p in self.named_parameters():
            if p.ndim == 2:  # what writes into the residual stream starts smaller, so that depth does not blow it up (GPT-2)
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if deep else 0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None, state: KVCache | None = None) -> tuple[Tensor | None, Tensor | None]:
        """idx [B, T] int64 -> (logits, loss).

        With `targets` [B, T] (-1 = ignored): (None, mean cross-entropy in nats). Without: logits [B, T, V], or those of the
        last position [B, 1, V] when a `state` is given, which then has seen these T tokens too. Raises ValueError when the
        state was made for another batch size or is full.
        """
        B, T = idx.shape
        start = 0
        if state is not None:
            start = state.pos
            state.check(idx)
        rope = rope_table(start, start + T, self.config.head_dim, self.config.rope_theta, idx.device)
        x = self.token_embedding(idx)
        for block in self.layers:
            if self.checkpointing and self.training and state is None:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, state)
        if state is not None:
            state.pos += T
            x = x[:, -1:]
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x), None
        return None, self.cross_entropy(x.flatten(0, 1), self.lm_head.weight.to(x.dtype), targets.flatten())

    def init_state(self, batch_size: int, max_len: int) -> KVCache:
        """An empty cache for `batch_size` sequences of at most `max_len` tokens, in the dtype and on the device of the weights."""
        weight = self.token_embedding.weight
        return KVCache(self.config, batch_size, max_len, weight.device, weight.dtype)

    def muon_params(self) -> list[nn.Parameter]:
        """The hidden matrices, for Muon; all others (embedding, head, norms) are AdamW's."""
        return [p for p in self.layers.parameters() if p.ndim == 2]

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> "Flow":
        """A Flow with the weights of a Qwen3-type Hugging Face folder (config.json and safetensors, sharded or not).

        Raises FileNotFoundError when a file is missing, ValueError when one is broken or the folder holds another architecture.
        """
        config = FlowConfig(**config_from_hf(Path(path)))
        weights = read_weights(Path(path), dtype)
        with torch.device("meta"):  # sizes without memory; the loaded tensors become the parameters
            model = cls(config)
        if config.tie_embeddings and "model.embed_tokens.weight" in weights:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        theirs = {name: hf_name(name) for name in model.state_dict()}
        shapes = {theirs[name]: tensor.shape for name, tensor in model.state_dict().items()}
        strange = [n for n in sorted(weights.keys() | shapes) if n not in weights or weights[n].shape != shapes.get(n)]
        if strange:
            raise ValueError(f"{path} holds other weights than its config.json says: {', '.join(strange[:4])}")
        model.load_state_dict({name: weights[theirs[name]] for name in theirs}, assign=True)
        if config.tie_embeddings:
            model.lm_head.weight = model.token_embedding.weight
        return model


# ---- generation ----

MAX_PENALTY = 100  # of repetition: far beyond use, and no logit becomes infinite


def sample_token(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """logits [B, V] -> token ids [B]: greedy at temperature 0, else drawn from the top_k / top_p part of the distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.size(-1):
        values, kept = logits.topk(top_k)  # by index: logits in bf16 are often equal, and more than k can reach the k-th value
        logits = torch.full_like(logits, -math.inf).scatter_(1, kept, values)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:  # nucleus sampling (arXiv:1904.09751): the fewest tokens whose probabilities reach top_p
        ranked, order = probs.sort(descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        probs = torch.zeros_like(probs).scatter_(1, order, ranked)
    return torch.multinomial(probs, 1)[:, 0]


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits [B, V] where those of the tokens in `seen` (bool [B, V]) are divided by the penalty if positive, multiplied if negative.

    The paper (see generate) divides all, which makes a token with a negative logit likelier; this form is that of transformers.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # in bf16 a penalty of 1.01 acts like 1.007 to 1.013
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


@torch.inference_mode()
def generate(
    model: nn.Module,
    idx: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_ids: Sequence[int] = (),
) -> Iterator[Tensor]:
    """Continue prompts; yields one [B] tensor of token ids per step, the same for Flow and Pulse.

    `idx` is [B, T], or B lists of unequal length. Unequal prompts need no padding: the model reads as many tokens as the
    shortest has, then the longer ones go on being read token by token while the others already answer, so that every row
    gets exactly what it would get alone. A row yields -1 while its prompt is read and after one of `stop_ids`.
    `repetition_penalty` (arXiv:1909.05858, 4.1; 1.2 there, 1 is off) makes a row's own tokens, its prompt's too, less likely. Raises
    ValueError for a prompt without tokens and for a value out of range.
    """
    prompts = [list(map(int, row)) for row in idx]
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and each at least one token")
    if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"temperature={temperature} must be 0 or more, top_k={top_k} 1 or more, top_p={top_p} above 0 to 1 (None is off)")
    if not 1 <= repetition_penalty <= MAX_PENALTY:
        raise ValueError(f"repetition_penalty={repetition_penalty} must be 1 (off) to {MAX_PENALTY}")
    device = next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    shortest, longest = int(lengths.min()), int(lengths.max())
    table = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)
    model = Decoder(model) if isinstance(model, Flow) else model
    state = model.init_state(len(prompts), longest + max_new_tokens)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    plain = shortest == longest and not stop_ids  # every row speaks at every step: nothing to keep account of
    tokens = table[:, :shortest]
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device) if repetition_penalty != 1 else None
    for t in range(shortest, longest + max_new_tokens):
        logits = model(tokens, state=state)[0][:, -1]
        if seen is not None:  # only what the model has read: the padding of a row is never in it
            logits = penalized(logits, seen.scatter_(1, tokens, True), repetition_penalty)
        new = sample_token(logits, temperature, top_k, top_p)
        if plain:
            yield new
            tokens = new[:, None]
            continue
        reading = t < lengths
        silent = reading | done | (t >= lengths + max_new_tokens)
        yield torch.where(silent, -1, new)
        done |= ~reading & (new[:, None] == stops).any(1)
        if bool((done | (t + 1 >= lengths + max_new_tokens)).all()):
            return
        tokens = torch.where(reading, table[:, min(t, longest - 1)], new)[:, None]


if __name__ == "__main__":
    for preset, config in PRESETS.items():
        flops = "  ".join(f"{config.flops_per_token(T) / 1e6:,.1f}M at {T}" for T in (256, 1024, 2048))
        print(f"{preset:6s} {config.num_params():>13,} parameters   training FLOPs per token: {flops}")
