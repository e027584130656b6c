"""membranes.scan on a GPU: one Triton kernel where PyTorch's own operations would be a hundred, each waiting for the one before."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 32  # tokens and neurons that a program takes at once


@triton.jit
def then(beta, U, beta2, U2):
    """Two stretches of U_t = beta_t U_{t-1} + x_t, one after the other."""
    return beta * beta2, beta2 * U + U2


@triton.jit
def kernel(x, beta, carry, U, T, N, REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program takes some neurons of one sequence through all T tokens, ROWS of them in parallel."""
    b, row, n = tl.program_id(1).to(tl.int64), tl.arange(0, ROWS)[:, None], tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    past = tl.load(carry + b * N + n, mask=n < N, other=0.0)
    for first in range(0, T, ROWS):
        t = first + row
        inside = (t < T) & (n < N)
        at = (b * T + (T - 1 - t if REVERSE else t)) * N + n
        left, new = tl.associative_scan((tl.load(beta + at, mask=inside, other=1.0), tl.load(x + at, mask=inside, other=0.0)), 0, then)
        new += left * past
        tl.store(U + at, new, mask=inside)
        past = tl.sum(tl.where(row == ROWS - 1, new, 0.0), 0)[None, :]


def scan(x: Tensor, beta: Tensor, carry: Tensor, reverse: bool = False) -> Tensor:
    """U_t = beta_t U_{t-1} + x_t for all t, U_{-1} = carry.  x, beta [B, T, N], carry [B, N], all of one dtype -> U [B, T, N]"""
    B, T, N = x.shape
    x, beta, carry, U = x.contiguous(), beta.contiguous(), carry.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernel[triton.cdiv(N, COLUMNS), B](x, beta, carry, U, T, N, REVERSE=reverse, ROWS=ROWS, COLUMNS=COLUMNS)
    return U
