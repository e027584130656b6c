"""What training a Flow on a CPU spends its time on besides matrix products, each with a gradient written by hand.

model.py says in plain PyTorch what these functions compute; a GPU, torch.compile and inference take it from there. On a CPU the plain
form reads and writes every intermediate result through main memory and keeps most of them for the backward pass. Here the rows are
taken in portions that stay in the cache from the first operation to the last.

B batch, T tokens, C channels, H query heads, K key/value heads, D = head_dim.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import Function

PORTION = 2**19  # numbers of the first of the tensors: from 2**18 to 2**20 there is little difference


def worthwhile(x: Tensor) -> bool:
    """Whether functions of this file are faster: on a CPU, in eager mode, while gradients are recorded."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def portions(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of tensors [N, ...], so many at a time that those of the first fit the cache."""
    rows = max(1, PORTION // math.prod(tensors[0].shape[1:]))
    return zip(*(x.split(rows) for x in tensors))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """model.py's rotate() of tokens that lie in a row.  x [N, H, D], cos and sin [N, D / 2]"""
    out, cos, sin = torch.empty_like(x), cos[:, None], sin[:, None]
    (a, b), (first, second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return out


class RMSNormByHand(Function):
    """x / rms(x) * weight, then RoPE where `rope` is given. PyTorch's own is eight passes over memory forward and some fifteen
    backward on a CPU, and as many for a rotation."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [..., C], weight [C] in the precision to compute in -> [..., C] of `dtype`

        With rope: x [B, T, H, D] and (cos, sin), each [T, D / 2].
        """
        ctx.rope = rope
        out, scales = torch.empty(x.shape, dtype=dtype), torch.empty(*x.shape[:-1], 1, dtype=weight.dtype)
        for (xc, yc, scale), turns in RMSNormByHand.rows(rope, x, out, scales):
            xc = xc.to(weight.dtype)
            torch.linalg.vector_norm(xc, dim=-1, keepdim=True, out=scale).square_().div_(x.size(-1)).add_(eps).rsqrt_()
            normed = (xc * scale).mul_(weight)
            yc.copy_(turn(normed, *turns) if turns else normed)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    def rows(rope, *tensors: Tensor):
        """Portions of the tensors, [rows, C] or [tokens, H, D] with cos and sin of each token."""
        parts = [x.reshape(-1, *x.shape[2 if rope else -1 :]) for x in tensors]
        first = 0
        for part in portions(*parts):
            place = torch.arange(first, first + len(part[0]))
            yield part, [table[place % len(table)] for table in rope or ()]
            first += len(place)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scales = ctx.saved_tensors
        grad_x, grad_w = torch.empty(x.shape, dtype=x.dtype), torch.zeros_like(weight)
        for (xc, gc, scale, out), turns in RMSNormByHand.rows(ctx.rope, x, grad, scales, grad_x):
            gc = gc.to(weight.dtype)
            gc = turn(gc, turns[0], -turns[1]) if turns else gc
            normed = xc * scale
            aligned = gc * normed
            grad_w += aligned.flatten(0, -2).sum(0)
            torch.mul((gc * weight).addcmul_(normed, (aligned @ weight)[..., None], value=-1 / x.size(-1)), scale, out=out)
        return grad_x, grad_w, None, None, None


class AttentionByHand(Function):
    """Causal attention of whole sequences.  q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D]

    `pieces` are model.py's: (first query, end of the queries, first key, mask) of chunks of queries. A few sequences of one piece at a
    time: their scores stay in the cache, and so does the change between the order of the projections, token by token, and that of the
    products, head by head.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, pieces: list[tuple[int, int, int, Tensor]]) -> Tensor:
        K, out, probabilities = k.size(2), torch.empty(q.shape, dtype=q.dtype), []
        biases = [torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -math.inf) for *_, mask in pieces]
        ctx.bounds = [bounds for *bounds, _ in pieces]
        ctx.rows = max(1, 2 * PORTION // (q.size(2) * max(bias.numel() for bias in biases)))
        for qr, kr, vr, outr in zip(*(x.split(ctx.rows) for x in (q, k, v, out))):
            for (i, j, lo), bias in zip(ctx.bounds, biases):
                scores = (by_head(qr[:, i:j], K) * q.size(-1) ** -0.5) @ by_head(kr[:, lo:j], K).mT
                scores.unflatten(1, (-1, j - i)).add_(bias)
                p = scores.softmax(-1)
                probabilities.append(p)
                from_heads(p @ by_head(vr[:, lo:j], K), outr[:, i:j])
        ctx.save_for_backward(q, k, v, *probabilities)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, *probabilities = ctx.saved_tensors
        K, scale, kept = k.size(2), q.size(-1) ** -0.5, iter(probabilities)
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        wide = torch.promote_types(q.dtype, torch.float32)
        for qr, kr, vr, gr, grad_q, grad_k, grad_v in zip(*(x.split(ctx.rows) for x in (q, k, v, grad, *grads))):
            # Keys and values are seen by several chunks: their gradients add up.
            sum_k, sum_v = (torch.zeros(len(qr) * K, q.size(1), q.size(-1), dtype=wide) for _ in range(2))
            for i, j, lo in ctx.bounds:
                p, g = next(kept), by_head(gr[:, i:j], K)
                ds = torch.ops.aten._softmax_backward_data(g @ by_head(vr[:, lo:j], K).mT, p, -1, p.dtype)
                from_heads((ds @ by_head(kr[:, lo:j], K)).mul_(scale), grad_q[:, i:j])
                sum_k[:, lo:j] += ds.mT @ by_head(qr[:, i:j], K)
                sum_v[:, lo:j] += p.mT @ g
            from_heads(sum_k.mul_(scale), grad_k)
            from_heads(sum_v, grad_v)
        return *grads, None


def by_head(x: Tensor, K: int) -> Tensor:
    """[B, T, H, D] -> [B * K, H / K * T, D]: the query heads that share a key head lie one after the other."""
    return x.transpose(1, 2).reshape(x.size(0) * K, -1, x.size(-1))


def from_heads(x: Tensor, out: Tensor):
    """Undo by_head: [B * K, H / K * T, D] into `out` [B, T, H, D]."""
    out.copy_(x.view(out.size(0), out.size(2), out.size(1), -1).transpose(1, 2))
