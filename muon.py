"""Muon for the hidden matrices, AdamW for everything else, on one process or many.

Muon (Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; scaled to LLMs by Liu et al. 2025,
arXiv:2502.16982) takes the momentum of a matrix and replaces it by the nearest orthogonal matrix: every direction of the
update gets the same length, where Adam would spend most of it on a few. Four steps of a polynomial iteration (Newton-Schulz), all
matrix products, stand in for the SVD.

    optimizers = build_optimizers(model, lr=3e-3)     # [Muon, AdamW]: step both, they share one learning rate
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

# Odd quintics a x + b x³ + c x⁵, one per step, each the best at bringing to 1 what the one before has left (Polar Express,
# arXiv:2505.16932, with a cushion of 0.1: without it the first has a valley that bf16 fills with noise). Singular values from
# 1/310 of the bound below up to the bound end between 0.65 and 1.13. One step fewer costs 0.007 bits per byte on nano.
NS_COEFFICIENTS = (
    (7.5274, -18.2825, 12.5647),
    (3.6721, -2.2937, 0.4054),
    (3.3372, -2.2527, 0.4303),
    (2.3400, -1.7335, 0.4104),
)
# Matrices of one shape are orthogonalised as one batch of at most this many elements: small ones gain from it, and on a CPU what
# does not fit its cache loses.
BATCH_ELEMENTS = {"cpu": 2**20, "cuda": 2**24, "mps": 2**24}


def orthogonalise(G: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The orthogonal factor U Vᵀ of each matrix of G = U S Vᵀ, approximately.

    G [..., R, C] of any float type -> [..., R, C] of `dtype`, in which the products are computed. Singular values above 1/310 of
    `bound` end between 0.65 and 1.13, smaller ones lower. `bound` is 1 to 2.6 times the largest of them (2.6: 2,048 that are
    all alike). The iteration is stable in bf16, whose rounding lifts some singular values to 1.2; fp32 is for
    hardware that has no bf16 products and only imitates them. A zero matrix stays zero.
    """
    X = G.reshape(-1, *G.shape[-2:])
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT  # X Xᵀ is then the smaller of the two Gram matrices
    X = (X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp(min=1e-30)).to(dtype)
    for step, (a, b, c) in enumerate(NS_COEFFICIENTS):
        A = torch.bmm(X, X.mT)  # not @, which takes twice as long for one large matrix
        if step == 0:
            # The singular values s must be at most 1. Their 8-norm, (sum of s⁸)^(1/8) = |A²|^(1/4), bounds the largest much closer than
            # the Frobenius norm, the 2-norm, and costs nothing here (1 % more for bf16's rounding). Instead of X it scales the
            # coefficients, in fp32.
            A2 = torch.bmm(A, A)
            bound = torch.linalg.vector_norm(A2, dim=(-2, -1), keepdim=True, dtype=torch.float32) ** 0.25 * 1.01
            bound = bound.clamp(min=1e-3)  # that of no matrix but zero is so small
            a = (a / bound)[..., 0]
            B = (A * (b / bound**3)).addcmul_(A2.float(), c / bound**5)
        else:
            B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        B.diagonal(dim1=-2, dim2=-1).add_(a)
        B = B.to(X.dtype)
        X = torch.bmm(B, X)  # (a + b A + c A²) X
    return (X.mT if tall else X).reshape(G.shape)


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters, momentum with Nesterov, decoupled weight decay.

    The update is scaled by 0.2 * sqrt(max(rows, columns)), so that its RMS is that of a typical AdamW update and one
    learning rate serves both optimizers (arXiv:2502.16982, eq. 4). Gradients are expected to be the same on all ranks (DDP
    has averaged them). Each rank keeps the momentum of its share of the matrices, orthogonalises those, and the results
    are gathered: work and memory divide by the number of ranks, and the update is the one a single process would make.

    `state_dict` and `load_state_dict` must be called on all ranks; the state they exchange is whole and does not depend on
    the number of ranks. `dtype` is that of orthogonalise(). Raises ValueError for a parameter that is not a matrix.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1, dtype: torch.dtype = torch.bfloat16):
        params = list(params)
        for p in params:
            if p.ndim != 2:
                raise ValueError(f"Muon takes matrices, not a parameter of shape {tuple(p.shape)}: give it to AdamW")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        shapes: dict[torch.Size, list[Tensor]] = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        # One batch = `each` matrices of one shape for every rank; in the last batch of a shape some ranks may get fewer.
        self.batches: list[tuple[list[Tensor], int]] = []
        for shape, matrices in shapes.items():
            each = max(1, min(BATCH_ELEMENTS[matrices[0].device.type] // shape.numel(), -(-len(matrices) // self.ranks)))
            step = each * self.ranks
            self.batches += [(matrices[i : i + step], each) for i in range(0, len(matrices), step)]

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        lr, momentum = group["lr"], group["momentum"]
        for matrices, each in self.batches:
            mine = matrices[self.rank * each : (self.rank + 1) * each]
            shape = matrices[0].shape
            updates = torch.zeros(each, *shape, dtype=self.dtype, device=matrices[0].device)
            if mine:
                grads = [p.grad for p in mine]
                for p in mine:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum"] for p in mine]
                torch._foreach_lerp_(buffers, grads, 1 - momentum)
                nesterov = torch._foreach_lerp(grads, buffers, momentum)
                updates[: len(mine)] = orthogonalise(torch.stack(nesterov), self.dtype)
            if self.ranks > 1:
                gathered = updates.new_empty(self.ranks * each, *shape)
                dist.all_gather_single(gathered, updates)
                updates = gathered
            scale = 0.2 * max(shape) ** 0.5
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            torch._foreach_add_(matrices, [u.to(p.dtype) for u, p in zip(updates, matrices)], alpha=-lr * scale)

    @torch.no_grad()
    def state_dict(self) -> dict:
        """{"momentum": one fp32 tensor per matrix, in the order of the parameters}, on the CPU, whole on every rank."""
        whole = {}
        for matrices, each in self.batches:
            for i, p in enumerate(matrices):
                buffer = self.state[p].get("momentum") if i // each == self.rank else None
                buffer = torch.zeros_like(p) if buffer is None else buffer
                if self.ranks > 1:
                    buffer = buffer.clone()
                    dist.broadcast(buffer, src=i // each)
                whole[p] = buffer.to("cpu", copy=True)
        return {"momentum": [whole[p] for p in self.param_groups[0]["params"]]}

    @torch.no_grad()
    def load_state_dict(self, state: dict):
        whole = dict(zip(self.param_groups[0]["params"], state["momentum"], strict=True))
        for matrices, each in self.batches:
            for p in matrices[self.rank * each : (self.rank + 1) * each]:
                self.state[p]["momentum"] = whole[p].to(p.device, p.dtype, copy=True)


def build_optimizers(
    model: torch.nn.Module, lr: float, weight_decay: float = 0.1, dtype: torch.dtype = torch.bfloat16
) -> list[torch.optim.Optimizer]:
    """[Muon, AdamW] for a Flow or a Pulse: `model.muon_params()` to Muon, which computes in `dtype`, everything else to AdamW.

    Of AdamW's parameters only the matrices decay: embedding, head, and `decay` and `write` of a Pulse's memories. Norms and other
    vectors do not.
    """
    matrices = model.muon_params()
    ids = {id(p) for p in matrices}
    groups = decay_groups([p for p in model.parameters() if id(p) not in ids], weight_decay)
    return [
        Muon(matrices, lr=lr, weight_decay=weight_decay, dtype=dtype),
        # Of a trained nano's embedding the rarest rows have gradients of 5e-8 (rms, one batch): the usual eps would shorten their steps.
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-10, fused=True),
    ]


def decay_groups(params: Iterable[Tensor], weight_decay: float) -> list[dict]:
    """AdamW's parameter groups: matrices decay, vectors do not."""
    params = list(params)
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def update(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], lr: float, max_norm: float = 1.0) -> Tensor:
    """What ends a training step: gradients clipped to `max_norm`, a step of every optimizer at this rate, gradients dropped.

    Returns the norm of the gradients before they were clipped.
    """
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return grad_norm
