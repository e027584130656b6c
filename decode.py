"""Decoding: a Flow that writes one token per sequence and step, in few and large operations.

A step of a small model is bound by its hundreds of calls of a microsecond each, not by arithmetic; that of a larger one by
memory, because every token reads all of the weights. `Decoder` is the network of model.py once more, for this case alone:
no modules, no mask, one normalisation for all heads, with the same state and the same logits. int8=True reads a quarter of the
bytes of large matrices. Eight and more sequences at once on a CPU multiply with a copy of the large matrices: twice the memory.

    generate(model, prompts, 100)                       # model.py's generate makes a Decoder of a Flow by itself
    generate(Decoder(model, int8=True), prompts, 100)   # python sample.py --int8

B batch, H query heads, K key/value heads, D = head_dim, C = d_model, S keys seen.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 2**17  # weights: so few are read in less time than a call takes, and copying them costs nothing
MANY = 8  # vectors at once, for which a matrix is worth a copy in another order


def joined(weights: list[Tensor], int8: bool, gain: Tensor | float = 1.0) -> Callable[..., Tensor]:
    """(x, onto=None) -> onto + [W_1 (gain * x), W_2 (gain * x), ...] of matrices [N_i, C] that read the same input: x [B, C] and the
    result [B, sum of N_i] in fp32.

    int8 keeps large matrices in 8 bits per weight, one scale per row, and rounds x to bf16 as training does. Otherwise they are used
    where they are, in their own precision.
    """
    weights, dtype = [w.detach() for w in weights], weights[0].dtype
    if dtype == torch.float32 and sum(w.numel() for w in weights) <= SMALL:
        matrix = (torch.cat(weights) * gain).mT
        return lambda x, onto=None: torch.mm(x, matrix) if onto is None else torch.addmm(onto, x, matrix)
    product = eight_bits(weights, gain) if int8 else as_they_are(weights, gain)
    return lambda x, onto=None: product(x) if onto is None else onto + product(x)


def eight_bits(weights: list[Tensor], gain: Tensor | float) -> Callable[[Tensor], Tensor]:
    rows = torch.cat(weights).float() * gain
    scales = (rows.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
    packed = (rows / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    if missing := -rows.size(1) % 64:  # the kernel reads whole vector registers: of other rows it would read past the end
        packed = F.pad(packed, (0, missing))
        return lambda x: torch._weight_int8pack_mm(F.pad(x.bfloat16(), (0, missing)), packed, scales).float()
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), packed, scales).float()


def as_they_are(weights: list[Tensor], gain: Tensor | float) -> Callable[[Tensor], Tensor]:
    # With one vector MKL reads a large fp32 matrix at half the speed of the memory, as a batch of 16-row matrices at nine tenths of it.
    # A few vectors it multiplies 1.5 to 2.7 times as fast when they stand on the right (2 to 4 of them, measured with AVX2). MANY are
    # multiplied by oneDNN, with a copy of the matrices in its own order: 1.2 to 2.5 times as fast (8 to 128 vectors, with AVX-512).
    dtype = weights[0].dtype
    mkl = dtype == torch.float32 and weights[0].device.type == "cpu"
    fits = mkl and all(len(w) % 16 == 0 and w.is_contiguous() for w in weights)
    blocks = [w.view(-1, 16, w.size(1)) for w in weights] if fits else None  # [N / 16, 16, C]

    @functools.cache
    def packed() -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights) * gain, 2 * MANY)

    def apart(x: Tensor) -> Tensor:
        if mkl and len(x) >= MANY and torch.backends.mkldnn.is_available():
            return torch.ops.mkldnn._linear_pointwise(x, packed(), None, "none", [], "")
        x = (x * gain).to(dtype)
        if blocks and len(x) == 1:
            return torch.cat([torch.bmm(w, x.mT.expand(len(w), -1, 1)).view(1, -1) for w in blocks], -1)
        return torch.cat([(w @ x.mT).mT if mkl else F.linear(x, w) for w in weights], -1).float()

    return apart


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ) v. A GPU's fused attention may be cuDNN's, which plans for every length anew: 50 to 80 ms per token."""
    return (q @ k.mT).softmax(-1) @ v


class Decoder:
    """Called as its model is: (idx [B, T], state=...) -> (logits of the last position [B, 1, V], None). Several tokens at a time,
    such as a prompt, go to the model itself. It keeps the weights of the moment: after training or moving them make another."""

    def __init__(self, model: nn.Module, int8: bool = False):
        self.model, self.config = model, model.config
        c, device = self.config, model.token_embedding.weight.device
        H, K, D, C = c.n_head, c.n_kv_head, c.head_dim, c.d_model
        self.inv_freq = c.rope_theta ** -(torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)
        # rms_norm(x) = sqrt(C) x / sqrt(|x|² + C eps): three calls where torch's makes eight. sqrt(C) is part of the gains; in the
        # queries' it cancels with the scale of the scores, 1 / sqrt(D).
        self.eps_C, self.eps_D = (torch.tensor((n * c.norm_eps) ** 0.5, device=device) for n in (C, D))
        self.attend = functools.partial(F.scaled_dot_product_attention, scale=1.0) if device.type == "cpu" else plain_attention
        self.embedding, self.layers = model.token_embedding.weight.detach(), []
        for block in model.layers:
            attn, mlp = block.attn, block.mlp
            attn_gain, mlp_gain = (norm.weight.detach().float() * C**0.5 for norm in (block.attn_norm, block.mlp_norm))
            heads_gain = torch.cat([attn.q_norm.weight.expand(H, D), attn.k_norm.weight.expand(K, D) * D**0.5]).detach().float()
            qkv = joined([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight], int8, attn_gain)
            gate_up = joined([mlp.gate_proj.weight, mlp.up_proj.weight], int8, mlp_gain)
            out, down = joined([attn.o_proj.weight], int8), joined([mlp.down_proj.weight], int8)
            self.layers.append((qkv, heads_gain, out, gate_up, down))
        self.head = joined([model.lm_head.weight], int8, model.norm.weight.detach().float() * C**0.5)

    def parameters(self):
        return self.model.parameters()

    def init_state(self, batch_size: int, max_len: int):
        return self.model.init_state(batch_size, max_len)

    def __call__(self, idx: Tensor, state) -> tuple[Tensor, None]:
        if idx.size(1) > 1:
            with torch.no_grad():
                return self.model(idx, state=state)
        state.check(idx)
        B, H, K, D = idx.size(0), self.config.n_head, self.config.n_kv_head, self.config.head_dim
        norm, pos = torch.linalg.vector_norm, state.pos
        angles = self.inv_freq * pos
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat([cos, cos]), torch.cat([-sin, sin])  # (a, b) -> (a cos - b sin, b cos + a sin)
        x = F.embedding(idx[:, 0], self.embedding).float()  # [B, C]
        for (qkv, heads_gain, out, gate_up, down), cache in zip(self.layers, state.kv):
            heads = qkv(x / norm(x, dim=-1, keepdim=True).hypot_(self.eps_C)).view(B, H + 2 * K, D)
            qk = heads[:, : H + K]
            turned = qk / norm(qk, dim=-1, keepdim=True).hypot_(self.eps_D) * heads_gain
            torch.addcmul(turned * cos, turned.roll(D // 2, -1), sin, out=qk)
            size = cache.size(2)
            cache[:, :, pos % size] = heads[:, H:]
            if pos + 1 < size:
                cache = cache.narrow(2, 0, pos + 1)
            # The query heads of one key head are stacked, as in model.attend.
            q = heads[:, :H].view(B, K, H // K, D)
            q = q if cache.dtype == q.dtype else q.to(cache.dtype)
            y = self.attend(q, cache[:, :K], cache[:, K:])
            x = out(y.reshape(B, H * D), x)
            gate, up = gate_up(x / norm(x, dim=-1, keepdim=True).hypot_(self.eps_C)).chunk(2, -1)
            x = down(F.silu(gate) * up, x)
        state.pos += 1
        return self.head(x / norm(x, dim=-1, keepdim=True).hypot_(self.eps_C))[:, None], None
