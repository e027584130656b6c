"""The losses of both networks: the cross-entropy of a head's matrix, in memory that does not grow with the logits, and distillation's."""

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = {"cpu": 2**23, "cuda": 2**25, "mps": 2**25}  # held at once: on a GPU 2**23 take 1.5 times as long, 2**27 need 1.2 GB more


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softmax(x Wᵀ) without ever holding the logits of all positions.

    The gradient of a chunk of rows is known as soon as its logits are, so it is taken at once and the logits are dropped:
    no recomputation, memory rows * V instead of B * T * V. (torch 2.13's F.linear_cross_entropy does the same but sums the
    loss in bf16: off by 0.06 to 0.38 nats at V = 32,768.)
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """x [N, C] and weight [V, C] of one dtype, targets [N] with -1 = ignored -> the mean in nats, fp32 at least."""
        n_targets = (targets >= 0).sum().clamp(min=1)
        losses, grad_x = [], torch.empty_like(x)
        grad_w = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        rows = max(1, LOGITS[x.device.type] // weight.size(0))
        for xc, tc, gc in zip(x.split(rows), targets.split(rows), grad_x.split(rows)):
            kept, index = (tc >= 0)[:, None], tc.clamp(min=0)[:, None]
            log_p = (xc @ weight.T).to(grad_w.dtype).log_softmax(-1)
            losses.append(-(log_p.gather(1, index) * kept).sum())
            if any(ctx.needs_input_grad):
                p = log_p.exp_()
                p.scatter_add_(1, index, torch.full_like(log_p[:, :1], -1.0))  # d loss / d logits = softmax - one-hot
                p = p.mul_(kept.to(p.dtype) / n_targets).to(x.dtype)
                torch.mm(p, weight, out=gc)
                grad_w += p.T @ xc
        ctx.save_for_backward(grad_x, grad_w.to(weight.dtype))
        return torch.stack(losses).sum() / n_targets

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad, grad_w * grad, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """LinearCrossEntropy; without gradients the weight is detached, since a Function sees requires_grad even under no_grad."""
    return LinearCrossEntropy.apply(x, weight if torch.is_grad_enabled() else weight.detach(), targets)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, targets: Tensor, weight: float, temperature: float) -> Tensor:
    """(1 - w) cross-entropy + w T² KL(teacher || student) at temperature T, mean in nats over targets >= 0 (arXiv:1503.02531, 2).

    logits and teacher_logits [B, T, V], targets [B, T]. T² keeps the gradient's size where a high T would shrink it.
    """
    kept = targets >= 0
    student, teacher = logits[kept].float(), teacher_logits[kept].float()  # [N, V]
    hard = F.cross_entropy(student, targets[kept])
    log_p, log_q = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return (1 - weight) * hard + weight * temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
