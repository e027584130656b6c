"""Muon for the hidden matrices, AdamW for everything else, on one process or many.

Muon (Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; scaled to LLMs by Liu et al. 2025,
arXiv:2502.16982) takes the momentum of a matrix and replaces it by the nearest orthogonal matrix: every direction of the
update gets the same length, where Adam would spend most of it on a few. Five Newton-Schulz steps, all matrix products,
stand in for the SVD.

    optimizers = build_optimizers(model, lr=3e-3)     # [Muon, AdamW]: step both, they share one learning rate
"""

import torch
import torch.distributed as dist
from torch import Tensor

# A quintic whose slope at 0 is steep: it does not converge to 1 but sends every singular value into about [0.7, 1.2] quickly.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Matrices of one shape are orthogonalised as one batch of at most this many elements: small ones gain from it, large ones
# would only cost memory.
BATCH_ELEMENTS = 2**24


def orthogonalise(G: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal factor U Vᵀ of each matrix of G = U S Vᵀ, approximately: singular values between 0.68 and 1.14.

    G [..., R, C] of any float type -> [..., R, C] in bf16 (the iteration is stable in it). A zero matrix stays zero.
    """
    a, b, c = NS_COEFFICIENTS
    X = G.bfloat16().view(-1, *G.shape[-2:])
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT  # X Xᵀ is then the smaller of the two Gram matrices
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # the spectral norm is at most the Frobenius norm: now <= 1
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A²
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return (X.mT if tall else X).reshape(G.shape)


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters, momentum with Nesterov, decoupled weight decay.

    The update is scaled by 0.2 * sqrt(max(rows, columns)), so that its RMS is that of a typical AdamW update and one
    learning rate serves both optimizers (arXiv:2502.16982, eq. 4). Gradients are expected to be the same on all ranks (DDP
    has averaged them). Each rank keeps the momentum of its share of the matrices, orthogonalises those, and the results
    are gathered: work and memory divide by the number of ranks, and the update is the one a single process would make.

    `state_dict` and `load_state_dict` must be called on all ranks; the state they exchange is whole and does not depend on
    the number of ranks. Raises ValueError for a parameter that is not a matrix.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        params = list(params)
        for p in params:
            if p.ndim != 2:
                raise ValueError(f"Muon takes matrices, not a parameter of shape {tuple(p.shape)}: give it to AdamW")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        shapes: dict[torch.Size, list[Tensor]] = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        # One batch = `each` matrices of one shape for every rank; in the last batch of a shape some ranks may get fewer.
        self.batches: list[tuple[list[Tensor], int]] = []
        for shape, matrices in shapes.items():
            each = max(1, min(BATCH_ELEMENTS // shape.numel(), -(-len(matrices) // self.ranks)))
            step = each * self.ranks
            self.batches += [(matrices[i : i + step], each) for i in range(0, len(matrices), step)]

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        lr, momentum = group["lr"], group["momentum"]
        for matrices, each in self.batches:
            mine = matrices[self.rank * each : (self.rank + 1) * each]
            shape = matrices[0].shape
            updates = torch.zeros(each, *shape, dtype=torch.bfloat16, device=matrices[0].device)
            if mine:
                grads = [p.grad for p in mine]
                for p in mine:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum"] for p in mine]
                torch._foreach_lerp_(buffers, grads, 1 - momentum)
                nesterov = torch._foreach_lerp(grads, buffers, momentum)
                updates[: len(mine)] = orthogonalise(torch.stack(nesterov))
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


def build_optimizers(model: torch.nn.Module, lr: float, weight_decay: float = 0.1) -> list[torch.optim.Optimizer]:
    """[Muon, AdamW] for a Flow or a Pulse: `model.muon_params()` to Muon, everything else to AdamW.

    Only the embedding and the head among AdamW's parameters decay; norms and other vectors have no scale to keep small.
    """
    matrices = model.muon_params()
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [
        Muon(matrices, lr=lr, weight_decay=weight_decay),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-10, fused=True),
    ]
