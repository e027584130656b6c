"""What training a Flow on a CPU spends its time on besides matrix products, each with a gradient written by hand.

model.py says in plain PyTorch what these functions compute; a GPU, torch.compile and inference use that form. On a CPU the plain
form reads and writes every intermediate result through main memory and keeps most of them for the backward pass. Here the rows are
taken in portions that stay in the cache from the first operation to the last.

B batch, T tokens, C channels, H query heads, K key/value heads, D = head_dim.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import Function

PORTION = 2**19  # elements of the first tensor in a portion: 2**18 to 2**20 are about as fast


def worthwhile(x: Tensor) -> bool:
    """Whether functions of this file are faster: on a CPU, in eager mode, while gradients are recorded."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def portions(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of tensors [N, ...], so many at a time that those of the first fit the cache."""
    rows = max(1, PORTION // math.prod(tensors[0].shape[1:]))
    return zip(*(x.split(rows) for x in tensors))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to scores: 0 where it is True, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -math.inf)


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """model.py's rotate() of tokens that lie in a row.  x [N, H, D], cos and sin [N, D / 2]"""
    out, cos, sin = torch.empty_like(x) if out is None else out, cos[:, None], sin[:, None]
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
            normed = xc * scale
            if not turns:
                torch.mul(normed, weight, out=yc)
            elif dtype == weight.dtype:
                turn(normed.mul_(weight), *turns, out=yc)
            else:
                yc.copy_(turn(normed.mul_(weight), *turns))
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    def rows(rope, *tensors: Tensor):
        """Portions of the tensors, [rows, C] or [tokens, H, D] with cos and sin of each token."""
        if rope is None:
            yield from ((part, None) for part in portions(*(x.reshape(-1, x.size(-1)) for x in tensors)))
            return
        parts = list(portions(*(x.flatten(0, 1) for x in tensors)))
        (B, T), rows = tensors[0].shape[:2], len(parts[0][0])
        times = -(-rows // T) + 1 if B > 1 else 1  # copies of the tables in a row: a portion may begin inside a sequence
        tables = [table.expand(times, -1, -1).reshape(-1, table.size(1)) for table in rope]
        for n, part in enumerate(parts):
            first = n * rows % T
            yield part, [table[first : first + len(part[0])] for table in tables]

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


@functools.lru_cache(maxsize=8)  # every layer and every step asks again
def pieces(chunks_of_queries: Callable, T: int, window: int | None, size: int, dtype: torch.dtype) -> list[tuple[int, int, int, Tensor]]:
    """model.py's chunks_of_queries (passed in: it imports this file) with masks to add, in a global layer without keys that all may see."""
    chunks = chunks_of_queries(T, window, size, "cpu")
    return [(i, j, lo, additive(mask if window else mask[:, i:], dtype)) for i, j, lo, mask in chunks]


class AttentionByHand(Function):
    """Causal attention of whole sequences.  q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D]

    `pieces`, as above: (first query, end of the queries, first key, mask of their last keys to be added); what comes before those
    keys is seen by all. A few sequences at a time: their scores stay in the cache, and so does the change between the order of the
    projections, token by token, and that of the products, head by head.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, pieces: list[tuple[int, int, int, Tensor]]) -> Tensor:
        K, out, probabilities = k.size(2), torch.empty(q.shape, dtype=q.dtype), []
        ctx.bounds = [bounds for *bounds, _ in pieces]
        ctx.rows = max(1, 2 * PORTION // (q.size(2) * max((j - i) * (j - lo) for i, j, lo in ctx.bounds)))
        for qr, kr, vr, outr in zip(*(x.split(ctx.rows) for x in (q, k, v, out))):
            qr, keys, values = qr * q.size(-1) ** -0.5, by_head(kr, K), by_head(vr, K)
            for i, j, lo, bias in pieces:
                scores = torch.bmm(by_head(qr[:, i:j], K), keys[:, lo:j].mT)
                scores.unflatten(1, (-1, j - i))[..., j - lo - bias.size(1) :].add_(bias)
                p = torch.softmax(scores, -1, out=scores)  # row by row, so in place
                probabilities.append(p)
                from_heads(torch.bmm(p, values[:, lo:j]), outr[:, i:j])
        ctx.save_for_backward(q, k, v, *probabilities)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, *probabilities = ctx.saved_tensors
        K, scale, kept = k.size(2), q.size(-1) ** -0.5, iter(probabilities)
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        wide = torch.promote_types(q.dtype, torch.float32)
        for qr, kr, vr, gr, grad_q, grad_k, grad_v in zip(*(x.split(ctx.rows) for x in (q, k, v, grad, *grads))):
            keys, values = by_head(kr, K), by_head(vr, K)
            # Keys and values are seen by several chunks: their gradients add up.
            sum_k, sum_v = (torch.zeros(keys.shape, dtype=wide) for _ in range(2))
            for i, j, lo in ctx.bounds:
                p, g = next(kept), by_head(gr[:, i:j], K)
                ds = torch.bmm(g, values[:, lo:j].mT)
                torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
                from_heads(torch.bmm(ds, keys[:, lo:j]), grad_q[:, i:j])
                sum_k[:, lo:j] += torch.bmm(ds.mT, by_head(qr[:, i:j], K))
                sum_v[:, lo:j] += torch.bmm(p.mT, g)
            grad_q.mul_(scale)
            from_heads(sum_k.mul_(scale), grad_k)
            from_heads(sum_v, grad_v)
        return *grads, None


def by_head(x: Tensor, K: int) -> Tensor:
    """[B, T, H, D] -> [B * K, H / K * T, D]: the query heads that share a key head lie one after the other."""
    return x.transpose(1, 2).reshape(x.size(0) * K, -1, x.size(-1))


def from_heads(x: Tensor, out: Tensor):
    """Undo by_head: [B * K, H / K * T, D] into `out` [B, T, H, D]."""
    out.copy_(x.view(out.size(0), out.size(2), out.size(1), -1).transpose(1, 2))
