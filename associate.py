"""The associative memory of Pulse for a whole sequence at once, with its gradient written by hand as in membranes.py.

B batch, T tokens, H memory heads, D their size; a sequence is n chunks of L tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from membranes import CHUNK, Function, compiled_apart


class Unit(Function):
    """x / sqrt(|x|² + eps) over the last dimension."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale)
        return unit

    @staticmethod
    def backward(ctx, grad: Tensor):
        unit, scale = ctx.saved_tensors
        return torch.addcmul(grad, unit, (grad * unit).sum(-1, keepdim=True), value=-1).mul_(scale), None


def recall(own: Tensor, seen: Tensor, kept: Tensor, left: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The loop of Recall: S and W of all chunks."""
    S, W = first.new_empty(len(own) + 1, *first.shape), torch.empty_like(own)
    S[0] = first
    for i in range(len(own)):
        torch.baddbmm(own[i], seen[i], S[i], alpha=-1, out=W[i])
        torch.baddbmm(S[i] * left[i], kept[i].mT, W[i], out=S[i + 1])
    return S, W


def recall_gradients(seen: Tensor, kept: Tensor, left: Tensor, grad_S: Tensor, grad_W: Tensor) -> tuple[Tensor, Tensor]:
    """The same loop backwards: the whole gradients of S and W, from those that reach them from outside the loop."""
    grad_S, grad_W = grad_S.clone(), grad_W.clone()
    for i in range(len(grad_W) - 1, -1, -1):
        grad_W[i].baddbmm_(kept[i], grad_S[i + 1])
        grad_S[i].addcmul_(left[i], grad_S[i + 1]).baddbmm_(seen[i].mT, grad_W[i], alpha=-1)
    return grad_S, grad_W


recall = compiled_apart(recall, lambda own, seen, kept, left, first: (first.new_empty(len(own) + 1, *first.shape), torch.empty_like(own)))
recall_gradients = compiled_apart(recall_gradients, lambda *args: tuple(map(torch.empty_like, args[-2:])))


class Recall(Function):
    """A matrix S that chunks of a sequence write in turn: W_i = own_i - seen_i S_i and S_{i+1} = left_i S_i + kept_iᵀ W_i.

    own, seen, kept [n, B H, L, D], left [n, B H, 1, 1], S_0 [B H, D, D] -> S [n + 1, B H, D, D], W [n, B H, L, D]

    Autograd would keep two tensors and make a dozen small ones per chunk, most of the time that a long sequence takes here. Of the
    gradients only those of W and S pass from chunk to chunk; the others are products over all chunks at once.
    """

    @staticmethod
    def forward(ctx, own: Tensor, seen: Tensor, kept: Tensor, left: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        S, W = recall(own, seen, kept, left, first)
        ctx.save_for_backward(seen, kept, left, S, W)
        return S, W

    @staticmethod
    def backward(ctx, grad_S: Tensor, grad_W: Tensor):
        seen, kept, left, S, W = ctx.saved_tensors
        grad_S, grad_W = recall_gradients(seen, kept, left, grad_S, grad_W)
        left = (grad_S[1:] * S[:-1]).sum((-2, -1), keepdim=True)
        return grad_W, -(grad_W @ S[:-1].mT), W @ grad_S[1:].mT, left, grad_S[0]


def associate(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, write: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix that maps keys to values, written by the delta rule and leaking: only what it does not know yet is written (the gated
    delta rule, arXiv:2412.06464).

        S_t = a_t S_{t-1} + k_tᵀ b_t (v_t - a_t k_t S_{t-1})         o_t = q_t S_t         (q_t, k_t, v_t are rows)

    q, k, v [B, H, T, D]; decay = log a_t and write = b_t [B, H, T]; S [B, H, D, D] -> o [B, H, T, D] and the last S.
    Chunks of L tokens: what the tokens of a chunk write depends on each other through a triangular system, solved for all chunks
    at once as a function of the S that a chunk starts with (arXiv:2406.06484); Recall then carries S from chunk to chunk.
    """
    B, H, T, D = q.shape
    if T == 1:
        S = S * decay.exp()[..., None]
        S = S + k.mT @ (write[..., None] * (v - k @ S))
        return q @ S, S
    L = min(CHUNK if q.device.type == "cpu" else 2 * CHUNK, T)  # a GPU waits for each of Recall's small steps: rather fewer
    pad, n = -T % L, -(-T // L)
    if pad:  # neither writes nor forgets
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        decay, write = (F.pad(x, (0, pad)) for x in (decay, write))
    q, k, v, decay, write, S = (x.flatten(0, 1) for x in (q, k, v, decay, write, S))
    # Chunk by chunk, [n, B H, L, ...], as Recall reads them.
    q, k, v, decay, write = (x.unflatten(1, (n, L)).transpose(0, 1).contiguous() for x in (q, k, v, decay, write))
    c = decay.cumsum(-1)
    a, w = c.exp()[..., None], write[..., None]
    lower = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
    fade = (c[..., :, None] - c[..., None, :]).masked_fill(~lower, -math.inf).exp()  # what is left of token j at token i
    system = (w * (k @ k.mT) * fade).tril(-1) + torch.eye(L, dtype=q.dtype, device=q.device)
    solved = torch.linalg.solve_triangular(system, torch.cat([w * v, w * a * k], -1), upper=False, unitriangular=True)
    own, seen = solved.chunk(2, -1)  # a chunk writes own - seen S
    kept = k * (c[..., -1:] - c).exp()[..., None]
    S, writes = Recall.run(own, seen, kept, a[..., -1:, :], S)
    o = ((q @ k.mT) * fade) @ writes + a * (q @ S[:-1])
    o = o.unflatten(1, (B, H)).permute(1, 0, 3, 2, 4).reshape(B, n * L, H, D)[:, :T]  # as they lie side by side in a token's row
    return o.transpose(1, 2), S[-1].view(B, H, D, D).clone()  # a view would keep those of all chunks alive
