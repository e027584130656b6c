"""What the neurons of Pulse compute for a whole sequence at once: input currents, leaking membranes, spikes and
their delays, each with its gradient.

The gradients are written by hand. Firing has none, so a surrogate takes its place. Autograd could find the others, but on a CPU a
small Pulse would then spend most of its training on passes over memory, not on matrix products.

B batch, T tokens, N neurons of a layer.
"""

import importlib.util
import math
from collections.abc import Callable
from functools import cache, wraps

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLD = 1.0  # a membrane above n thresholds fires n spikes
CHUNK = 32  # tokens of a sequence that the parallel forms take in one piece
SHARPNESS = 2.0  # 1 / half-width, in thresholds, of the surrogate's blur


class Function(torch.autograd.Function):
    """A function with its gradient by hand. Without gradients run() calls forward() directly: for a single token PyTorch's apply()
    takes longer than the arithmetic."""

    @classmethod
    def run(cls, *args):
        return cls.apply(*args) if torch.is_grad_enabled() else cls.forward(Unrecorded(), *args)


class Unrecorded:
    """The context of a forward() without a backward()."""

    def save_for_backward(self, *tensors: Tensor):
        pass


class Fire(Function):
    """Membranes -> spike counts: num_steps micro-steps of integrate-and-fire with soft reset, in closed form.

    A membrane above the threshold fires and loses one threshold, num_steps times: clamp(ceil(U - 1), 0, num_steps) spikes, the
    counts of snntorch.Leaky(beta=1, reset_mechanism="subtract"). A signed neuron does the same below zero, with negative spikes.
    With a `rheobase` the membrane has to stand that much higher for each of these counts. `fine` widens the blur of the gradient.
    For the gradient the staircase is a ramp, blurred with a Lorentzian: snntorch's atan surrogate, wider (SHARPNESS), for all levels
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
        # With a = 0.5 + height above the first threshold, s = sharpness, K = num_steps, atan(s a) - atan(s (a - K)) is the angle of the
        # point (1 + s² a (a - K), s K): one function instead of two, and on a CPU, where PyTorch has atan2 in vector instructions and
        # atan not, a fifth of the time.
        a = mem.abs().sub_(ctx.least - 0.5) if ctx.signed else mem - (ctx.least - 0.5)
        x = torch.addcmul(a.new_ones(()), a, a - ctx.num_steps, value=ctx.sharpness**2)
        angle = torch.atan2(x.new_tensor(ctx.sharpness * ctx.num_steps), x, out=x)
        return torch.addcmul(a.new_zeros(()), angle, grad, value=1 / math.pi), *[None] * 6


class Square(Function):
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


class Drive(Function):
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


class Delay(Function):
    """Equal parts of the fibres, each so many tokens late: sent [B, M + T, N] -> [B, T, N]. Autograd would fill and add up a whole
    tensor for every part."""

    @staticmethod
    def forward(ctx, sent: Tensor, T: int, tokens: tuple[int, ...]) -> Tensor:
        ctx.shape, ctx.tokens = sent.shape, tokens
        return torch.cat(Delay.parts(sent, T, tokens), -1)

    @staticmethod
    def parts(sent: Tensor, T: int, tokens: tuple[int, ...]) -> list[Tensor]:
        longest = sent.size(1) - T
        return [part[:, longest - d : longest - d + T] for d, part in zip(tokens, sent.tensor_split(len(tokens), -1))]

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_sent = grad.new_zeros(ctx.shape)
        for part, g in zip(Delay.parts(grad_sent, grad.size(1), ctx.tokens), grad.tensor_split(len(ctx.tokens), -1)):
            part.copy_(g)
        return grad_sent, None, None


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
    """scan in PyTorch's operations. All chunks take their L steps side by side, each from U = 0, and multiply up their betas (`left`).
    The U before each chunk follows from the chunks' ends by the same recurrence; left times it is then added."""
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


class Leak(Function):
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
