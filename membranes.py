"""What the neurons and memories of Pulse compute for a whole sequence at once: input currents, leaking membranes, spikes, what is looked
up, each with its gradient.

The gradients are written by hand. Firing has none, so a surrogate takes its place. Those of the others autograd could find, but on a
CPU the passes over memory that it would take, not the matrix products, are what training a small Pulse would spend its time on.

B batch, T tokens, N neurons of a layer.
"""

import importlib.util
import math
from collections.abc import Callable
from functools import cache, wraps

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLD = 1.0  # a membrane n thresholds high fires n spikes
CHUNK = 32  # tokens of a sequence that the parallel forms take in one piece
SHARPNESS = 2.0  # 1 / half-width, in thresholds, of the surrogate's blur


class Fire(torch.autograd.Function):
    """Membranes -> spike counts: num_steps micro-steps of integrate-and-fire with soft reset, in closed form.

    A membrane above the threshold fires and loses one threshold, num_steps times: clamp(ceil(U - 1), 0, num_steps) spikes, the
    counts of snntorch.Leaky(beta=1, reset_mechanism="subtract"). A signed neuron does the same below zero, with negative spikes.
    With a `rheobase` the membrane has to stand that much higher for each of these counts. `fine` widens the blur of the gradient.
    For the gradient the staircase is a ramp, blurred with a Lorentzian: the atan surrogate (snntorch's default) for all levels
    together, at the cost of one. Its tails reach the silent and the saturated neurons; a ramp without them learns 6 to 9 % worse.
    Backpropagating through the micro-steps instead would count a silent neuron num_steps times and explode.
    """

    @staticmethod
    def forward(ctx, mem: Tensor, rheobase: float, num_steps: int, signed: bool, dtype: torch.dtype, price: float, fine: float) -> Tensor:
        """`price` is the derivative of the loss per spike, on top of what flows back: a penalty on firing (see Pulse)."""
        ctx.save_for_backward(mem)
        ctx.least, ctx.num_steps, ctx.signed, ctx.price, ctx.sharpness = THRESHOLD + rheobase, num_steps, signed, price, SHARPNESS / fine
        if not signed:
            return (mem - ctx.least).ceil_().clamp_(0, num_steps).to(dtype)
        return mem.abs().sub_(ctx.least).ceil_().clamp_(0, num_steps).copysign_(mem).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (mem,) = ctx.saved_tensors
        if ctx.price:
            fired = F.hardshrink(mem, ctx.least) if ctx.signed else F.threshold(mem, ctx.least, 0.0)
            grad = torch.add(grad, fired.sign_(), alpha=ctx.price)
        # atan(a) - atan(b) with a = sharpness (u + 0.5), u = how far above the first threshold, and b = a - sharpness K is the angle of
        # (1 + a b, a - b): one function instead of two, and on a CPU, where PyTorch has atan2 in vector instructions and atan not, a
        # fifth of the time.
        a = mem.abs().sub_(ctx.least - 0.5) if ctx.signed else mem - (ctx.least - 0.5)
        angle = torch.addcmul(a.new_ones(()), a, a - ctx.num_steps, value=ctx.sharpness**2)
        torch.atan2(angle.new_tensor(ctx.sharpness * ctx.num_steps), angle, out=angle)
        return torch.addcmul(a.new_zeros(()), angle, grad, value=1 / math.pi), *[None] * 6


class Square(torch.autograd.Function):
    """relu(x)², in half of the passes over memory."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.relu()
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        return (grad * x).mul_(2)


class Unit(torch.autograd.Function):
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


class Drive(torch.autograd.Function):
    """The input current of neurons: x / rms(x) * gain + bias over the last dimension.

    F.rms_norm and two more operations give the same; by hand forward and backward take half as many passes over memory.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale, gain)
        return torch.addcmul(bias, normed, gain)

    @staticmethod
    def backward(ctx, grad: Tensor):
        normed, scale, gain = ctx.saved_tensors
        aligned = grad * normed
        grad_x = (grad * gain).addcmul_(normed, (aligned @ gain)[..., None], value=-1 / gain.numel()).mul_(scale)
        rows = tuple(range(grad.ndim - 1))
        return grad_x, aligned.sum(rows), grad.sum(rows), None


def compiled_apart(op: Callable, like: Callable) -> Callable:
    """A function as one operation to torch.compile, which would unroll its loop; `like` makes tensors of the results' shapes.

    Only there: the first call of such an operation takes PyTorch two seconds.
    """
    apart = torch.library.custom_op(f"slms::{op.__name__}", op, mutates_args=())
    apart.register_fake(like)

    @wraps(op)
    def call(*args, **kwargs):
        return (apart if torch.compiler.is_compiling() else op)(*args, **kwargs)

    return call


def scan(x: Tensor, beta: Tensor, carry: Tensor, reverse: bool = False) -> Tensor:
    """U_t = beta_t U_{t-1} + x_t for all t, U_{-1} = carry.  x, beta [B, T, N], carry [B, N] -> U [B, T, N]

    `reverse` runs from the last token to the first. On a GPU the work of membranes_gpu.py, if Triton is installed.
    """
    kernel = triton_scan() if x.is_cuda else None
    return (kernel or chunked_scan)(x, beta, carry, reverse)


@cache
def triton_scan() -> Callable | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from membranes_gpu import scan

    return scan


def chunked_scan(x: Tensor, beta: Tensor, carry: Tensor, reverse: bool = False) -> Tensor:
    """scan in PyTorch's operations. All chunks of the sequence take their L steps side by side, each from zero, and multiply up what
    they leave of the past. What comes before a chunk follows from the chunks' ends by the same recurrence."""
    B, T, N = x.shape
    L = min(CHUNK, T)
    if T % L:
        pad = -T % L
        sides = (0, 0, pad, 0) if reverse else (0, 0, 0, pad)
        U = chunked_scan(F.pad(x, sides), F.pad(beta, sides), carry, reverse)
        return (U[:, pad:] if reverse else U[:, :T]).contiguous()
    x, beta = x.reshape(B, T // L, L, N), beta.reshape(B, T // L, L, N)
    U, left = torch.empty_like(x), torch.empty_like(beta)  # left = the product of the chunk's betas so far
    steps = list(zip(*(tensor.unbind(2) for tensor in (x, beta, U, left))))
    if reverse:
        steps.reverse()
    (first, first_beta, U_before, left_before), *later = steps
    U_before.copy_(first)
    left_before.copy_(first_beta)
    for x_t, beta_t, U_t, left_t in later:
        torch.addcmul(x_t, beta_t, U_before, out=U_t)
        torch.mul(left_before, beta_t, out=left_t)
        U_before, left_before = U_t, left_t
    past = carry[:, None]  # of each chunk
    if T > L:
        ends = chunked_scan(U_before, left_before, carry, reverse)
        past = torch.cat([ends[:, 1:], past] if reverse else [past, ends[:, :-1]], 1)
    return U.addcmul_(left, past[:, :, None]).view(B, T, N)


scan = compiled_apart(scan, lambda x, beta, carry, reverse=False: torch.empty_like(x, memory_format=torch.contiguous_format))


class Leak(torch.autograd.Function):
    """The membranes of a whole sequence, U_t = beta_t U_{t-1} + (1 - beta_t) I_t with beta = sigmoid(z).

    current I, z [B, T, N], mem [B, N] -> U [B, T, N]. The gradient is the same recurrence run backwards.
    """

    @staticmethod
    def forward(ctx, current: Tensor, z: Tensor, mem: Tensor) -> Tensor:
        beta = z.sigmoid()
        U = scan(torch.addcmul(current, current, beta, value=-1), beta, mem)
        ctx.save_for_backward(U, current, beta)
        return U

    @staticmethod
    def backward(ctx, grad: Tensor):
        U, current, beta = ctx.saved_tensors
        grad = scan(grad, F.pad(beta[:, 1:], (0, 0, 0, 1)), torch.zeros_like(grad[:, 0]), reverse=True)
        grad_mem = beta[:, 0] * grad[:, 0]
        grad.addcmul_(grad, beta, value=-1)
        return grad, (U - current).mul_(grad), grad_mem  # dU/dz = beta (1 - beta) (U_{t-1} - I) = (1 - beta) (U_t - I)


def recall(own: Tensor, seen: Tensor, kept: Tensor, left: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    S, W = first.new_empty(len(own) + 1, *first.shape), torch.empty_like(own)
    S[0] = first
    for i in range(len(own)):
        torch.baddbmm(own[i], seen[i], S[i], alpha=-1, out=W[i])
        torch.baddbmm(S[i] * left[i], kept[i].mT, W[i], out=S[i + 1])
    return S, W


def recall_gradients(seen: Tensor, kept: Tensor, left: Tensor, grad_S: Tensor, grad_W: Tensor) -> tuple[Tensor, Tensor]:
    grad_S, grad_W = grad_S.clone(), grad_W.clone()
    for i in range(len(grad_W) - 1, -1, -1):
        grad_W[i].baddbmm_(kept[i], grad_S[i + 1])
        grad_S[i].addcmul_(left[i], grad_S[i + 1]).baddbmm_(seen[i].mT, grad_W[i], alpha=-1)
    return grad_S, grad_W


recall = compiled_apart(recall, lambda own, seen, kept, left, first: (first.new_empty(len(own) + 1, *first.shape), torch.empty_like(own)))
recall_gradients = compiled_apart(recall_gradients, lambda *args: tuple(map(torch.empty_like, args[-2:])))


class Recall(torch.autograd.Function):
    """A matrix S that chunks of a sequence write in turn: W_i = own_i - seen_i S_i and S_{i+1} = left_i S_i + kept_iᵀ W_i.

    own [n, B, L, D], seen, kept [n, B, L, K], left [n, B, 1, 1], S_0 [B, K, D] -> S [n + 1, B, K, D], W [n, B, L, D]

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
    """A matrix that maps keys to values, written by the delta rule and leaking: only what it does not know yet is written.

        S_t = a_t S_{t-1} + k_t (b_t (v_t - k_t a_t S_{t-1}))ᵀ         o_t = q_t S_t

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
    S, writes = Recall.apply(own, seen, kept, a[..., -1:, :], S)
    o = ((q @ k.mT) * fade) @ writes + a * (q @ S[:-1])
    o = o.unflatten(1, (B, H)).permute(1, 0, 3, 2, 4).reshape(B, n * L, H, D)[:, :T]  # as they lie side by side in a token's row
    return o.transpose(1, 2), S[-1].view(B, H, D, D).clone()  # a view would keep those of all chunks alive
