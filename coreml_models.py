"""Flow and Pulse as the device computes them: the same functions as model.py and snn_model.py in the shapes that Core ML likes.

One module computes some of the layers for Q tokens at known places: every shape is fixed, and what depends on the position comes
in as an input (rows of the embedding, cos and sin, masks, the position itself). What is remembered from token to token is
one tensor or more per layer, `caches`. Two layouts, chosen by `target`:

    ane    activations [1, C, 1, Q] and 1x1 convolutions, attention head by head: what the Neural Engine runs fastest
    gpu    activations [1, Q, C], linear layers, the fused attention operation

Sizes are Python numbers throughout: one that is read from a tensor's shape would become operations of the program, and the
cast among them is where coremltools 9.0 fails with numpy 2.4.

Q new tokens, S keys, C = d_model, H query heads, K key heads, D = head_dim, N = neurons of a layer.
"""

import torch
import torch.nn as nn
from torch import Tensor

from membranes import THRESHOLD
from model import Flow, FlowConfig
from snn_model import DELAYS, KEY_EPS, Pulse

PREFILL = {"flow": 32, "pulse": 8}  # tokens of a prompt that prefill reads at a time; Pulse's neurons take them one by one
ALIGN = 32  # the Neural Engine pads the last dimension of a tensor to 64 bytes
MAX_DIM = 16_384  # the Neural Engine takes no larger dimension


def cache_size(config: FlowConfig, layer: int, context: int) -> int:
    """Tokens that a layer's cache holds: the window or the context, rounded up to ALIGN."""
    n = context if config.is_global(layer) else min(config.window, context)
    return -(-n // ALIGN) * ALIGN


def ranges(total: int, n: int) -> list[tuple[int, int]]:
    """0..total cut into n parts, as equal as can be."""
    return [(total * i // n, total * (i + 1) // n) for i in range(n)]


class OnDevice(nn.Module):
    """What both networks need. Layout: `c` is the axis of the channels, `t` that of the tokens, `grid` the shape of a gain."""

    def __init__(self, target: str, Q: int):
        super().__init__()
        self.ane, self.Q = target == "ane", Q
        self.c, self.t = (1, 3) if self.ane else (2, 1)

    def matrix(self, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        rows, columns = weight.shape
        layer = nn.Conv2d(columns, rows, 1, bias=bias is not None) if self.ane else nn.Linear(columns, rows, bias=bias is not None)
        layer.weight = nn.Parameter(weight.detach().view(layer.weight.shape), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def constant(self, name: str, value: Tensor | float, axis: int, ndim: int) -> None:
        """A vector along one axis of `ndim`; a parameter, because buffers are taken for states."""
        value = torch.as_tensor(value, dtype=torch.float32).detach().flatten()
        shape = [1] * ndim
        shape[axis] = value.numel()
        self.register_parameter(name, nn.Parameter(value.view(shape).clone(), requires_grad=False))

    def heads_of(self, x: Tensor, n: int, D: int, last: str) -> Tensor:
        """[1, n, D, Q] (last "t") or [1, n, Q, D] (last "d") of projected activations."""
        if self.ane:
            return x.reshape(1, n, D, self.Q)
        x = x.reshape(1, self.Q, n, D)
        return x.permute(0, 2, 3, 1) if last == "t" else x.permute(0, 2, 1, 3)

    def delay(self, s: Tensor, late: Tensor, tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """snn_model.delay: s [1, N, 1, Q] or [1, Q, N], late [1, N, 1, M] or [1, M, N] -> (what arrives, the new `late`)"""
        longest = max(tokens)
        sent = torch.cat([late, s], self.t)
        parts = sent.split([len(part) for part in torch.arange(s.size(self.c)).tensor_split(len(tokens))], self.c)
        arrived = [part.narrow(self.t, longest - d, self.Q) for d, part in zip(tokens, parts)]
        return torch.cat(arrived, self.c) if len(arrived) > 1 else arrived[0], sent.narrow(self.t, self.Q, longest)

    def make_head(self, weight: Tensor) -> None:
        """The head in parts that the Neural Engine takes; the others need only one."""
        parts = -(-len(weight) // MAX_DIM) if self.ane else 1
        self.head = nn.ModuleList(self.matrix(weight[a:b]) for a, b in ranges(len(weight), parts))

    def logits(self, x: Tensor) -> list[Tensor]:
        """[1, V'] per part of the head, of the last token only."""
        return [part(x).reshape(1, -1) for part in self.head]


def rms_norm(x: Tensor, root_eps: Tensor, axis: int, total: bool = False) -> Tensor:
    """x / sqrt(mean(x²) + eps) in numbers that fp16 can hold; with `total` the sum instead of the mean, `root_eps` = sqrt(eps).

    Divided by m = max(|x|, sqrt(eps)) first, everything squared is at most 1: x² would overflow from 256 on, vanish below 2e-4,
    and so would eps. nn.RMSNorm becomes NaN for a vector of zeros on the device; this gives zeros.
    """
    m = torch.maximum(x.abs().amax(axis, keepdim=True), root_eps)
    y, small = x / m, root_eps / m
    squares = (y * y).sum(axis, keepdim=True) if total else (y * y).mean(axis, keepdim=True)
    return y * torch.rsqrt(squares + small * small)


# ---- Flow ----


class FlowOnDevice(OnDevice):
    """Layers first to last - 1 of a Flow for Q tokens; the last package of several also has the head.

    Inputs, in this order, those that the layers need: `x` the rows of the embedding or what the package before gave; `cos` and
    `sin` of the positions; `mask_window`, `mask_full` [1, 1, Q, S], 0 where a query may look and predict.MASKED elsewhere; `position`
    int32 [1] of the first token; then the caches. A layer's cache holds keys and values, [1, 2K, D, S] (ane) or [1, 2K, S, D].
    A global layer writes its tokens at `position`, a sliding one moves its cache by Q and appends them.
    """

    def __init__(self, model: Flow, target: str, Q: int, context: int, first: int, last: int):
        super().__init__(target, Q)
        config = self.config = model.config
        self.first, self.last, self.context = first, last, context
        self.layers = list(range(first, last))
        self.slides = any(not config.is_global(i) for i in self.layers)
        self.sees_all = any(config.is_global(i) for i in self.layers)
        self.d = 2 if self.ane else 3  # the axis of D in [1, n, D, Q] or [1, n, Q, D]; the other one is the tokens'
        self.blocks = nn.ModuleList(self.block(model.layers[i]) for i in self.layers)
        self.constant("root_eps", config.norm_eps**0.5, 0, 1)
        # sum(q²) + D eps = D (mean(q²) + eps): the softmax's 1 / sqrt(D) for nothing, and no constant that fp16 would round
        self.constant("root_eps_total", (config.norm_eps * config.head_dim) ** 0.5, 0, 1)
        if last == config.n_layer:
            self.constant("norm", model.norm.weight, 1 if self.ane else 2, 4 if self.ane else 3)
            self.make_head(model.lm_head.weight)

    def block(self, source) -> nn.Module:
        block = OnDevice("ane" if self.ane else "gpu", self.Q)
        attn, mlp = source.attn, source.mlp
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(block, name, self.matrix(getattr(attn, name).weight))
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(block, name, self.matrix(getattr(mlp, name).weight))
        for name, norm in (("attn_norm", source.attn_norm), ("mlp_norm", source.mlp_norm)):
            block.constant(name, norm.weight, self.c, 4 if self.ane else 3)
        for name, norm in (("q_norm", attn.q_norm), ("k_norm", attn.k_norm)):
            block.constant(name, norm.weight, self.d, 4)
        return block

    def cache_shapes(self) -> list[tuple[int, ...]]:
        K, D = 2 * self.config.n_kv_head, self.config.head_dim
        sizes = [cache_size(self.config, i, self.context) for i in self.layers]
        return [(1, K, D, S) if self.ane else (1, K, S, D) for S in sizes]

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        C, half, Q = self.config.d_model, self.config.head_dim // 2, self.Q
        angle = (1, 1, half, Q) if self.ane else (1, 1, Q, half)
        shapes = {"x": (1, C, 1, Q) if self.ane else (1, Q, C), "cos": angle, "sin": angle}
        if self.slides:
            window = next(cache_size(self.config, i, self.context) for i in self.layers if not self.config.is_global(i))
            shapes["mask_window"] = (1, 1, Q, window if Q == 1 else window + Q)
        if self.sees_all:
            full = next(cache_size(self.config, i, self.context) for i in self.layers if self.config.is_global(i))
            shapes |= {"mask_full": (1, 1, Q, full), "position": (1,)}
        return shapes

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.split(self.config.head_dim // 2, self.d)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], self.d)

    def remember(self, layer: int, cache: Tensor, new: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor]:
        """(the cache with the new keys and values in it, the keys and values to look at)"""
        if self.config.is_global(layer):
            if self.ane:
                cache[:, :, :, position : position + self.Q] = new
            else:
                cache[:, :, position : position + self.Q] = new
            return cache, cache
        both = torch.cat([cache, new], 5 - self.d)
        rolled = both[:, :, :, self.Q :] if self.ane else both[:, :, self.Q :]
        # One token sees exactly the rolled cache. The first of several sees Q - 1 tokens more than the last one leaves.
        return rolled, rolled if self.Q == 1 else both

    def attend(self, q: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
        """The heads' outputs as activations.  q [1, H, D, Q] or [1, H, Q, D] with the softmax's scale in it (ane)"""
        H, K, D, Q = self.config.n_head, self.config.n_kv_head, self.config.head_dim, self.Q
        if not self.ane:
            k, v = kv.split(K, 1)
            q = q.reshape(1, K, H // K * Q, D)  # the query heads of a key head stacked, as in model.py
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, 1, H // K, 1))
            return y.reshape(1, H, Q, D).permute(0, 2, 1, 3).reshape(1, Q, H * D)
        heads = kv.split(1, 1)
        outputs = []
        for q_group, k, v in zip(q.split(H // K, 1), heads[:K], heads[K:]):  # [1, H/K, D, Q] and [1, 1, D, S]
            p = (torch.matmul(q_group.transpose(2, 3), k) + mask).softmax(3)  # [1, H/K, Q, S]
            outputs.append(torch.matmul(v, p.transpose(2, 3)))
        return torch.cat(outputs, 1).reshape(1, H * D, 1, Q)

    def forward(self, *args: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and caches -> ([activations] or the parts of the last token's logits, the new caches)"""
        inputs = dict(zip(self.input_shapes(), args))
        caches, after = args[len(inputs) :], []
        x, cos, sin, position = inputs["x"], inputs["cos"], inputs["sin"], inputs.get("position")
        config = self.config
        for layer, block, cache in zip(self.layers, self.blocks, caches):
            y = rms_norm(x, self.root_eps, self.c) * block.attn_norm
            q = self.heads_of(block.q_proj(y), config.n_head, config.head_dim, "d")
            k = self.heads_of(block.k_proj(y), config.n_kv_head, config.head_dim, "d")
            v = self.heads_of(block.v_proj(y), config.n_kv_head, config.head_dim, "d")
            # The fused attention operation has its own scale.
            q = rms_norm(q, self.root_eps_total if self.ane else self.root_eps, self.d, total=self.ane) * block.q_norm
            k = rms_norm(k, self.root_eps, self.d) * block.k_norm
            new = torch.cat([self.rotate(k, cos, sin), v], 1)
            cache, kv = self.remember(layer, cache, new, position)
            after.append(cache)
            mask = inputs["mask_full"] if config.is_global(layer) else inputs["mask_window"]
            x = x + block.o_proj(self.attend(self.rotate(q, cos, sin), kv, mask))
            y = rms_norm(x, self.root_eps, self.c) * block.mlp_norm
            x = x + block.down_proj(nn.functional.silu(block.gate_proj(y)) * block.up_proj(y))
        if self.last < config.n_layer:
            return [x], after
        x = x.narrow(self.t, self.Q - 1, 1)
        return self.logits(rms_norm(x, self.root_eps, self.c) * self.norm), after


# ---- Pulse ----


class NeuronOnDevice(OnDevice):
    """A layer of neurons for Q tokens, one after the other: the plain recurrence, without surrogate, as snn.Leaky does not trace."""

    def __init__(self, neuron, target: str, Q: int):
        super().__init__(target, Q)
        self.num_steps, self.gated, self.least = neuron.config.num_steps, neuron.gate_gain is not None, THRESHOLD + neuron.rheobase
        self.leaky, self.signed, self.normed, self.square = neuron.leaky, neuron.signed, neuron.normed, neuron.square
        # coremltools makes a batch_norm of x * gain + bias, whose epsilon of 1e-5 flips spikes; subtraction it leaves alone.
        constants = {"gain": neuron.gain, "minus_bias": -neuron.bias}
        if self.gated:
            constants |= {"minus_gate_gain": -neuron.gate_gain, "leak": neuron.leak}
        elif self.leaky:
            constants["step"] = 1 - neuron.leak.sigmoid()  # 1 - beta, what a membrane moves towards its current
        for name, value in constants.items():
            self.constant(name, value, self.c, 4 if self.ane else 3)
        self.constant("root_eps", neuron.config.norm_eps**0.5, 0, 1)

    def fire(self, mem: Tensor) -> Tensor:
        """A membrane above n thresholds fires n spikes, at most num_steps."""
        if not self.signed:
            return (mem - self.least).ceil().clamp(0, self.num_steps)
        return (mem.abs() - self.least).ceil().clamp(0, self.num_steps) * mem.sign()

    def drive(self, x: Tensor, gain: Tensor, minus_bias: Tensor) -> Tensor:
        return (rms_norm(x, self.root_eps, self.c) if self.normed else x) * gain - minus_bias

    def forward(self, x: Tensor, mem: Tensor | None = None, gate: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        current = self.drive(x, self.gain, self.minus_bias)
        if self.square:
            current = current.relu() * current
        if not self.leaky:
            return self.fire(current), None
        steps = [self.step] * self.Q if not self.gated else self.drive(gate, self.minus_gate_gain, self.leak).sigmoid().split(1, self.t)
        membranes = []
        for now, step in zip(current.split(1, self.t), steps):
            mem = mem + step * (now - mem)
            membranes.append(mem)
        return self.fire(torch.cat(membranes, self.t) if self.Q > 1 else mem), mem


class MemoryOnDevice(OnDevice):
    """The associative memory for Q tokens: writes what it does not know yet, then reads, token by token."""

    def __init__(self, memory, target: str, Q: int):
        super().__init__(target, Q)
        self.config = memory.config
        for name in ("encode", "q", "k", "v", "o"):
            setattr(self, name, NeuronOnDevice(getattr(memory, name), target, Q))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "decay", "write"):
            layer = getattr(memory, name)
            setattr(self, name, self.matrix(layer.weight, layer.bias))
        self.constant("least", KEY_EPS, 0, 1)  # as in Memory.forward: a silent query or key stays silent

    def forward(self, x: Tensor, late: Tensor, mem_q: Tensor, mem_k: Tensor, S: Tensor) -> tuple[Tensor, list[Tensor]]:
        C, H, Q = self.config.d_model, self.config.n_head, self.Q
        s, _ = self.encode(x)
        q, mem_q = self.q(self.q_proj(s), mem_q)
        k, mem_k = self.k(self.k_proj(s), mem_k)
        v, _ = self.v(self.v_proj(s))
        k, late = self.delay(k, late, (1,))
        q, k, v = (self.heads_of(z, H, C // H, "t") for z in (q, k, v))  # [1, H, D, Q]
        q, k = (z * torch.rsqrt((z * z).sum(2, keepdim=True) + self.least) for z in (q, k))
        decay = 1 - self.heads_of(self.decay(s), H, 1, "t").sigmoid()  # = exp(-softplus(z)), the leak a_t
        write = self.heads_of(self.write(s), H, 1, "t").sigmoid()  # [1, H, 1, Q]
        outputs = []
        for q_t, k_t, v_t, a_t, b_t in zip(*(z.split(1, 3) for z in (q, k, v, decay, write))):
            S = S * a_t
            news = b_t * (v_t - torch.matmul(S.transpose(2, 3), k_t))
            S = S + torch.matmul(k_t, news.transpose(2, 3))
            outputs.append(torch.matmul(S.transpose(2, 3), q_t))
        o = torch.cat(outputs, 3) if Q > 1 else outputs[0]
        o = o.reshape(1, C, 1, Q) if self.ane else o.permute(0, 3, 1, 2).reshape(1, Q, C)
        return self.o_proj(self.o(o)[0]), [late, mem_q, mem_k, S]


class PulseOnDevice(OnDevice):
    """Layers first to last - 1 of a Pulse for Q tokens, and the head.

    Inputs: `x` the rows of the input's table or what the package before gave; for a package that is not the first `token`, those rows,
    of which every block and the head read some; then per layer the spikes on the way, those to the gates if they have some of their
    own, the membranes and, with a memory, the spikes of keys on the way, the membranes of queries and keys and the matrix [1, H, D, D].
    """

    def __init__(self, model: Pulse, target: str, Q: int, context: int, first: int, last: int):
        super().__init__(target, Q)
        self.config, self.first, self.last = model.config, first, last
        self.layers = list(range(first, last))
        self.blocks = nn.ModuleList(self.block(model.layers[i], target) for i in self.layers)
        self.constant("root_eps", model.config.norm_eps**0.5, 0, 1)
        self.constant("first_share", model.token_share[0], 0, 1)
        for more, block in zip(model.token_share.diff()[first:last], self.blocks):
            block.constant("more", more, 0, 1)
        if last == model.config.n_layer:
            self.out = NeuronOnDevice(model.out, target, 1)
            self.make_head(model.lm_head.weight)

    def block(self, source, target: str) -> nn.Module:
        block, feed = OnDevice(target, self.Q), nn.Module()
        block.memory = MemoryOnDevice(source.memory, target, self.Q) if source.memory is not None else None
        for part, ours in ((source, block), (source.feed_forward, feed)):
            ours.encode, ours.hidden = NeuronOnDevice(part.encode, target, self.Q), NeuronOnDevice(part.hidden, target, self.Q)
            for name, layer in part.named_children():
                if isinstance(layer, nn.Linear):
                    setattr(ours, name, self.matrix(layer.weight))
        block.gate_encode = NeuronOnDevice(source.gate_encode, target, self.Q) if source.gate_encode is not None else None
        block.feed_forward = feed
        return block

    def vector(self, n: int) -> tuple[int, ...]:
        """The shape of a state of n numbers: they lie along the last dimension, which the Neural Engine pads."""
        return (1, 1, 1, n) if self.ane else (1, 1, n)

    def cache_shapes(self) -> list[tuple[int, ...]]:
        C, N, H = self.config.d_model, self.config.d_hidden, self.config.n_head
        shapes = []
        for block in self.blocks:
            shapes += [self.vector(C * max(DELAYS))] * (1 + (block.gate_encode is not None))
            shapes += [self.vector(N)] if block.hidden.leaky else []
            shapes += [self.vector(C)] * 3 + [(1, H, C // H, C // H)] if block.memory is not None else []
        return shapes

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        shape = (1, self.config.d_model, 1, self.Q) if self.ane else (1, self.Q, self.config.d_model)
        return {"x": shape} if self.first == 0 else {"x": shape, "token": shape}

    def forward(self, *args: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and states -> ([activations] or the parts of the last token's logits, the new states)"""
        inputs = dict(zip(self.input_shapes(), args))
        caches, after = iter(args[len(inputs) :]), []

        def column(cache, tokens=1):
            return cache.reshape(1, -1, 1, tokens) if self.ane else cache.reshape(1, tokens, -1)

        def row(new):
            after.append(new.reshape(1, 1, 1, -1) if self.ane else new.reshape(1, 1, -1))

        x = inputs["x"]
        token = rms_norm(inputs.get("token", x), self.root_eps, self.c)
        if self.first == 0:
            x = self.first_share * token
        for block in self.blocks:
            late = column(next(caches), max(DELAYS))
            late_gates = column(next(caches), max(DELAYS)) if block.gate_encode is not None else None
            mem = column(next(caches)) if block.hidden.leaky else None
            if block.memory is not None:
                y, remembered = block.memory(x, *(column(next(caches)) for _ in range(3)), next(caches))
                x = x + y
            s, late = self.delay(block.encode(x)[0], late, DELAYS)
            g = s
            if late_gates is not None:
                g, late_gates = self.delay(block.gate_encode(x)[0], late_gates, DELAYS)
            h, mem = block.hidden(block.in_proj(s), mem, block.gate_proj(g) if block.hidden.gated else None)
            x = x + block.out_proj(h)
            feed = block.feed_forward
            x = x + feed.down_proj(feed.hidden(feed.up_proj(feed.encode(x)[0]))[0]) + block.more * token
            for vectors in (late, late_gates, mem):
                if vectors is not None:
                    row(vectors)
            if block.memory is not None:
                *vectors, S = remembered
                for vector in vectors:
                    row(vector)
                after.append(S)
        if self.last < self.config.n_layer:
            return [x], after
        return self.logits(self.out(x.narrow(self.t, self.Q - 1, 1))[0]), after
