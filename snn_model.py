"""Pulse: a spiking language model.

The interface is Flow's, the inside is not. Every matrix is fed by spikes, integer counts between -num_steps and num_steps, so that a
product is a sum of weights; only input_map is not, it becomes part of a table. What one token leaves for the next: the membranes of
leaky integrate-and-fire neurons, spikes still on their way (axonal delays) and, in some blocks, an associative memory (a linear
attention) written and read by spikes. All are linear in the sequence and constant in memory; there is no softmax attention.

    python train.py --model=pulse       # trains the nano preset of this file
    python snn_model.py                 # prints the presets: parameters and FLOPs per token

The neuron is snntorch's Leaky. Token by token it runs snntorch's own recurrence; over a whole sequence the same recurrence is
evaluated in parallel, which is what makes training fast: membranes.py and associate.py do that.

B batch, T tokens, C = d_model, N = neurons of a layer, H memory heads, D = C / H, K = num_steps, V vocabulary.
"""

import math
from dataclasses import dataclass, fields

import snntorch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from associate import Unit, associate
from loss import linear_cross_entropy
from membranes import CHUNK, THRESHOLD, Delay, Drive, Fire, Leak, Square

# How strongly a neuron is driven at the start. K levels are worth having only if they are used: with a gain of 1 most neurons
# fire once or not at all, and digits are copied wrongly.
GAIN = 2.0  # encoders, and leaky neurons without a gate
HIDDEN_GAIN = 4.0  # leaky neurons with one
SQUARE_GAIN = 1.0  # hidden neurons of the feed-forward part, whose current is squared
KEY_GAIN = 1.5  # queries and keys of the memory
READ_GAIN = 4.0  # what is read from the memory
OUT_GAIN = 4.0  # what feeds the head
STEPS = 16  # with more, neurons whose spikes are carried from token to token count more finely
MAX_STEPS = 256  # bf16 holds all integers up to here
LEAKS = ("gated", "learned", "fixed")
START_SCALE = 0.1  # of matrices whose result is normalized: it changes nothing yet, but lets Muon's first steps turn the weights further
TAU_KEY = 1.5  # tokens: time constant of the slowest queries and keys at the start, little more than the present
KEY_EPS = 1e-3  # added to the squared length of a query or key before it is scaled to 1: a silent one stays silent
DELAYS = (0, 0, 1, 1, 2, 3, 4, 5)  # how many tokens late each eighth of a block's input spikes reaches its leaky neurons
TAU_MEMORY = (64.0, 256.0)  # time constants in tokens of the fastest and the slowest memory head, at the start


@dataclass(frozen=True)
class PulseConfig:
    """The sizes of a Pulse. Raises ValueError when they cannot belong together."""

    vocab_size: int = 1024
    n_layer: int = 4
    d_model: int = 128
    d_hidden: int = 192  # leaky neurons of a block
    d_ff: int = 352  # neurons of its feed-forward part
    num_steps: int = 48  # micro-steps (time steps within a token) = most spikes that a neuron fires per token
    # Time constant in tokens of the slowest neurons at the start; 1 = no membrane between tokens, 1 % worse in 500 steps. 32 is no better.
    tau_max: float = 4.0
    rheobase: float = 1.0  # thresholds more that encoders need before they fire: so finer steps cost no more spikes
    leak: str = "gated"  # the time constants are set by every token, "learned" one per neuron, or "fixed"
    n_head: int = 2  # heads of the associative memory
    memory_every: int = 3  # layer i has a memory when (i + 1) % memory_every == 0
    norm_eps: float = 1e-6

    def __post_init__(self):
        for field in fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be at least 1")
        if self.num_steps > MAX_STEPS:
            raise ValueError(f"num_steps={self.num_steps} must be at most {MAX_STEPS}: larger counts are not exact in bf16")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps={self.norm_eps} must be above 0")
        if not 1 <= self.tau_max < math.inf:
            raise ValueError(f"tau_max={self.tau_max} must be at least 1 token, 1 is a neuron without memory")
        if not 0 <= self.rheobase < math.inf:
            raise ValueError(f"rheobase={self.rheobase} must be at least 0, in thresholds; 0 is none")
        if self.leak not in LEAKS:
            raise ValueError(f"leak={self.leak} must be one of {', '.join(LEAKS)}")
        if self.d_model % (2 * self.n_head):
            raise ValueError(f"d_model={self.d_model} must be a multiple of 2 * n_head={2 * self.n_head}")

    def has_memory(self, layer: int) -> bool:
        return (layer + 1) % self.memory_every == 0

    def fine(self) -> float:
        """How many times finer neurons count whose spikes are carried from token to token: 3 with num_steps=48, 1 up to STEPS."""
        return max(1.0, self.num_steps / STEPS)

    def is_gated(self) -> bool:
        return self.leak == "gated" and self.tau_max > 1

    def gates_apart(self) -> bool:
        """Whether the gates have encoders of their own that do not count finely: how far a membrane leaks need not be exact."""
        return self.is_gated() and self.fine() > 1

    def num_params(self) -> int:
        """The number of parameters, the tied embedding counted once."""
        C, N, H, leaky, gated = self.d_model, self.d_hidden, self.n_head, self.tau_max > 1, self.is_gated()
        block = (2 + gated) * C * N + (2 + leaky + gated) * N + 2 * (C + 1) * self.d_ff + (2 + self.gates_apart()) * 2 * C
        memory = 4 * C * C + 2 * C * H + 2 * H + 12 * C
        n_memory = sum(self.has_memory(i) for i in range(self.n_layer))
        return self.vocab_size * C + C * C + self.n_layer * block + n_memory * memory + 2 * C + self.n_layer + 1

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of one training step (forward and backward) per token, the same for any `seq_len` >= CHUNK.

        6 per weight of a matrix product; the memory's products inside a chunk of L tokens are 6 * (5 L / 2 + 3 D) * C, of which
        L / 2 each for k kᵀ, q kᵀ and the products with their masked halves. Scan and firing are not matrix products and not counted.
        """
        C, L, D = self.d_model, min(CHUNK, seq_len), self.d_model // self.n_head
        n_memory = sum(self.has_memory(i) for i in range(self.n_layer))
        block = (2 + self.is_gated()) * C * self.d_hidden + 2 * C * self.d_ff
        matrices = self.vocab_size * C + C * C + self.n_layer * block + n_memory * (4 * C * C + 2 * C * self.n_head)
        return 6 * matrices + n_memory * 6 * C * (2.5 * L + 3 * D)


PRESETS: dict[str, PulseConfig] = {  # Flow's widths and depths, d_ff chosen for Flow's number of parameters
    "nano": PulseConfig(),
    "small": PulseConfig(num_steps=16, n_layer=9, d_model=512, d_hidden=768, d_ff=1280, n_head=8),
    "base": PulseConfig(num_steps=16, vocab_size=32_768, n_layer=12, d_model=768, d_hidden=1152, d_ff=1856, n_head=12),
    "1b": PulseConfig(num_steps=16, vocab_size=32_768, n_layer=18, d_model=2048, d_hidden=3072, d_ff=9344, n_head=16),
}


# ------------------------------------------------------------------------------------------------------------- the neuron


class Neuron(snntorch.Leaky):
    """A layer of N leaky integrate-and-fire neurons: real-valued input -> spike counts in [0, K], or [-K, K] when signed.

        I_t = x_t / rms(x_t) * gain + bias        U_t = beta_t U_{t-1} + (1 - beta_t) I_t        spikes_t = fire(U_t)

    The membrane moves towards its input current, by 1 - beta of the way: whatever beta is, it cannot saturate by adding up.
    Firing leaves it as it is from token to token; only inside fire() is it counted down, to find the number of spikes. The time
    constant, beta = 1 - 1 / tau, is learned for each neuron, or chosen token by token by a second input g, the gate:
    beta_t = sigmoid(g_t / rms(g_t) * gate_gain + logit(beta)). A membrane can then let go of the past in one token, or hold what it
    has while thirty pass. With `tau` [N] = None nothing lasts from token to token. With `square` the current is relu(I)², as in
    arXiv:2109.08668: a neuron then computes with products of its inputs. With a `rheobase` a membrane has to be that far above the
    threshold before it fires: spikes_t = fire(U_t - rheobase), signed: sign(U_t) fire(|U_t| - rheobase). Without `normed` the current
    is x_t * gain + bias. `fine`: how many times finer than others it counts (see encoder).
    """

    def __init__(
        self, n: int, config: PulseConfig, gain: float, tau: Tensor | None = None, gated=False, signed=False, normed=True, square=False,
        rheobase=0.0, fine=1.0,
    ):  # fmt: skip
        super().__init__(0.0, THRESHOLD, reset_mechanism="none")
        snntorch.SpikingNeuron.instances.pop()  # snntorch's list of all neurons would keep every model alive for ever
        del self.beta  # a number there; here it follows from parameters and input, and is no part of a checkpoint
        self.register_buffer("beta", torch.zeros(()), persistent=False)
        self.config, self.leaky, self.signed, self.normed, self.square = config, tau is not None, signed, normed, square
        self.rheobase, self.fine = rheobase, fine
        self.price = 0.0  # of a spike in the loss, set by Pulse.forward
        self.gain = nn.Parameter(torch.full((n,), gain))
        if self.leaky and not gated:
            self.gain.data *= (2 * tau - 1).sqrt()  # = sqrt((1 + beta) / (1 - beta)): slow membranes stand as high as fast ones
        self.bias = nn.Parameter(torch.zeros(n))
        self.leak = nn.Parameter(torch.log(tau - 1), requires_grad=config.leak != "fixed") if tau is not None else None  # logit(beta)
        self.gate_gain = nn.Parameter(torch.ones(n)) if gated else None

    def fire(self, mem: Tensor) -> Tensor:
        """Spike counts of membranes, in the dtype of the matrix product that follows (counts are exact in any)."""
        device = mem.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else mem.dtype
        return Fire.run(mem, self.rheobase, self.config.num_steps, self.signed, dtype, self.price, self.fine)

    def drive(self, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # bf16 membranes would flip 0.6 % of the spikes
        return Drive.run(x, gain, bias, self.config.norm_eps) if self.normed else x * gain + bias

    def forward(self, x: Tensor, mem: Tensor | None = None, gate: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x [B, T, N], the membranes [B, N] before it and, if gated, g [B, T, N] -> spikes [B, T, N] and the membranes after it."""
        current = self.drive(x, self.gain, self.bias)
        if self.square:
            current = Square.run(current)
        if not self.leaky:
            return self.fire(current), None
        z = self.leak.expand_as(current) if gate is None else self.drive(gate, self.gate_gain, self.leak)
        if current.size(1) == 1:
            self.beta = z[:, 0].sigmoid()
            spikes, mem = super().forward((1 - self.beta) * current[:, 0], mem)
            self.beta, self.mem = self.beta.detach(), mem.detach()  # never read again; they must not keep a graph alive
            return spikes[:, None], mem
        U = Leak.run(current, z, mem)
        return self.fire(U), U[:, -1].clone()  # a view would keep the membranes of all tokens alive


def encoder(config: PulseConfig, gain: float | None = None, fine: float = 1.0) -> Neuron:
    """Neurons that turn real numbers [B, T, C] into counts. Where `gain` is not given, it grows with the rheobase.

    With `fine` > 1 a spike stands for 1 / fine of the current that it stands for otherwise, and its price is 1 / fine too. The rheobase is
    up to twice as high, so that more neurons stay silent. The gradient is blurred over the same range of currents as without.
    """
    least = (THRESHOLD + config.rheobase * min(fine, 2.0)) * fine
    gain = gain or (GAIN + config.rheobase) * fine
    return Neuron(config.d_model, config, gain, signed=True, rheobase=least - THRESHOLD, fine=fine)


def time_constants(n: int, longest: float) -> Tensor:
    """n time constants from 1.05 tokens to the longest, evenly in the logarithm and shuffled."""
    return torch.exp(torch.linspace(math.log(1.05), math.log(longest), n))[torch.randperm(n)]


# -------------------------------------------------------------------------------------------------- the associative memory


def delay(s: Tensor, late: Tensor, tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Spikes that arrive some tokens late (axonal delay), equal parts of the N fibres by as many as `tokens` says.

    s [B, T, N], late [B, M, N] = what the M tokens before sent, M the longest delay -> what arrives [B, T, N] and the new `late`.
    """
    T = s.size(1)
    sent = torch.cat([late.to(s.dtype), s], 1)
    return Delay.run(sent, T, tokens), sent[:, T:].clone()  # a view would keep all of `sent` alive


class Memory(nn.Module):
    """Looks up by content what was read before: queries, keys and values are spikes, and so is what goes back.

    The spikes of the keys arrive one token late, so that a value is written under what preceded it, and a query for the present
    finds what followed it before: the induction heads of a transformer (arXiv:2209.11895), with one matrix per head. A transformer
    has to discover them. Here they are there from the first step, since queries and keys start with the same weights, and what is
    read is sent back through the transpose of what turned it into a value. What was never written reads as zero, and fires nothing.
    """

    def __init__(self, config: PulseConfig):
        super().__init__()
        C, self.config = config.d_model, config
        self.encode = encoder(config)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.q = Neuron(C, config, KEY_GAIN, time_constants(C, TAU_KEY), signed=True)
        self.k = Neuron(C, config, KEY_GAIN, time_constants(C, TAU_KEY), signed=True)
        self.v = encoder(config, fine=config.fine())
        self.o = Neuron(C, config, READ_GAIN, signed=True, normed=False)
        # Per head and token: log a_t = -softplus(decay), b_t = sigmoid(write).
        self.decay, self.write = nn.Linear(C, config.n_head), nn.Linear(C, config.n_head)

    @torch.no_grad()
    def start(self):
        """The first weights: an induction head that forgets slowly, and whose leak and writing strength depend on nothing yet."""
        for layer in (self.k_proj, self.v_proj):
            nn.init.orthogonal_(layer.weight)
        self.q_proj.weight.copy_(self.k_proj.weight)
        self.o_proj.weight.copy_(self.v_proj.weight.T / math.sqrt(2 * self.config.n_layer))
        for p in (*self.decay.parameters(), *self.write.parameters()):
            nn.init.zeros_(p)
        tau = torch.exp(torch.linspace(*map(math.log, TAU_MEMORY), self.config.n_head))
        self.decay.bias.copy_(torch.log(torch.expm1(1 / tau)))  # softplus of it = 1 / tau

    def forward(self, x: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        late, mem_q, mem_k, S = state
        B, T, C = x.shape
        s, _ = self.encode(x)
        q, mem_q = self.q(self.q_proj(s), mem_q)
        k, mem_k = self.k(self.k_proj(s), mem_k)
        v, _ = self.v(self.v_proj(s))
        k, late = delay(k, late, (1,))
        q, k, v = (z.to(S.dtype).view(B, T, self.config.n_head, -1).transpose(1, 2) for z in (q, k, v))  # [B, H, T, D]
        q, k = (Unit.run(z, KEY_EPS) for z in (q, k))
        decay = -F.softplus(self.decay(s).to(S.dtype)).transpose(1, 2)
        write = self.write(s).to(S.dtype).sigmoid().transpose(1, 2)
        with torch.autocast(x.device.type, enabled=False):
            o, S = associate(q, k, v, decay, write, S)
        return self.o_proj(self.o(o.transpose(1, 2).reshape(B, T, C))[0]), (late, mem_q, mem_k, S)

    def init_state(self, B: int, **kind) -> tuple[Tensor, ...]:
        C, H = self.config.d_model, self.config.n_head
        late, mem_q, mem_k = torch.zeros(B, 1, C, **kind), torch.zeros(B, C, **kind), torch.zeros(B, C, **kind)
        return late, mem_q, mem_k, torch.zeros(B, H, C // H, C // H, **kind)


# ------------------------------------------------------------------------------------------------------------------ Pulse


class FeedForward(nn.Module):
    """Neurons without a membrane between tokens: what a block works out from one token alone."""

    def __init__(self, config: PulseConfig):
        super().__init__()
        self.encode = encoder(config)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.hidden = Neuron(config.d_ff, config, SQUARE_GAIN, square=True)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        s, _ = self.encode(x)
        h, _ = self.hidden(self.up_proj(s))
        return self.down_proj(h)


class Block(nn.Module):
    """Looks up (in some blocks), carries over in leaky neurons, works out: each adds to the residual stream x [B, T, C]."""

    def __init__(self, config: PulseConfig, layer: int):
        super().__init__()
        C, N, self.config, gated = config.d_model, config.d_hidden, config, config.is_gated()
        self.memory = Memory(config) if config.has_memory(layer) else None
        self.encode = encoder(config, fine=config.fine())
        self.in_proj = nn.Linear(C, N, bias=False)
        self.gate_encode = encoder(config) if config.gates_apart() else None
        self.gate_proj = nn.Linear(C, N, bias=False) if gated else None
        tau = time_constants(N, config.tau_max) if config.tau_max > 1 else None
        self.hidden = Neuron(N, config, HIDDEN_GAIN if gated else GAIN, tau, gated)
        self.out_proj = nn.Linear(N, C, bias=False)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        late, late_gates, mem, remembered = state
        if self.memory is not None:
            y, remembered = self.memory(x, remembered)
            x = x + y
        s, late = delay(self.encode(x)[0], late, DELAYS)
        g = s
        if self.gate_encode is not None:
            g, late_gates = delay(self.gate_encode(x)[0], late_gates, DELAYS)
        h, mem = self.hidden(self.in_proj(s), mem, self.gate_proj(g) if self.gate_proj is not None else None)
        x = x + self.out_proj(h)
        return x + self.feed_forward(x), (late, late_gates, mem, remembered)

    def init_state(self, B: int, **kind) -> tuple:
        late, mem = torch.zeros(B, max(DELAYS), self.config.d_model, **kind), torch.zeros(B, self.config.d_hidden, **kind)
        remembered = self.memory.init_state(B, **kind) if self.memory is not None else None
        return late, torch.zeros_like(late) if self.gate_encode is not None else None, mem if self.hidden.leaky else None, remembered


class PulseState:
    """What Pulse remembers between calls: the same amount after 10 tokens and after 100,000."""

    def __init__(self, batch_size: int, layers: list[tuple]):
        self.batch_size, self.layers = batch_size, layers


class Pulse(nn.Module):
    """The spiking network. `checkpointing = True` recomputes each block in the backward pass instead of keeping its activations.

    `rate_penalty` times the mean number of spikes per synapse and token is minimised too, but is not in the loss that is returned.
    A spike of a neuron that counts `fine` times finer costs 1 / fine. The derivative by a spike is a constant: each neuron adds it to
    the gradient of its spikes, which takes no time.
    """

    def __init__(self, config: PulseConfig):
        super().__init__()
        self.config, self.checkpointing, self.rate_penalty = config, False, 0.0
        self.cross_entropy = linear_cross_entropy  # train.py --compile replaces it
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.out = encoder(config, OUT_GAIN)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.lm_head.weight = self.token_embedding.weight
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        # The head's rows are similar for tokens that can follow the same text, such as digits. Read as they are, counts of few spikes
        # would not tell such tokens apart. So a token is read as its row of the head's matrix times this one.
        self.input_map = nn.Parameter(torch.eye(config.d_model))
        # How much of the token is in the stream when a block, and last the head, reads it: more from block to block, so that it is
        # not lost among what they add; none at first for the head, which is asked what comes next.
        self.token_share = nn.Parameter(torch.cat([torch.linspace(1, 4, config.n_layer), torch.zeros(1)]))
        self.table: Tensor | None = None  # input_table() as it was when the last state was made
        for name, module in self.layers.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if name.endswith(("out_proj", "o_proj", "down_proj")):
                    module.weight.data /= math.sqrt(2 * config.n_layer)
                elif name.endswith(("in_proj", "gate_proj", "up_proj")):
                    module.weight.data *= START_SCALE
        for memory in filter(None, (block.memory for block in self.layers)):
            memory.start()

    def forward(self, idx: Tensor, targets: Tensor | None = None, state: PulseState | None = None) -> tuple[Tensor | None, Tensor | None]:
        """idx [B, T] int64 -> (logits, loss).

        With `targets` [B, T] (-1 = ignored): (None, mean cross-entropy in nats). Without: logits [B, T, V], or those of the
        last position [B, 1, V] when a `state` is given, which then has seen these T tokens too. Raises ValueError when the
        state was made for another batch size.
        """
        if state is not None and state.batch_size != idx.size(0):
            raise ValueError(f"the state holds {state.batch_size} sequences, the input {idx.size(0)}: make one with init_state")
        if torch.is_grad_enabled():  # only a gradient has use for prices
            pairs = self.fan_outs()
            synapses = sum(neuron.gain.numel() * fan_out for neuron, fan_out in pairs)
            for neuron, fan_out in pairs:
                neuron.price = self.rate_penalty * fan_out / (synapses * idx.numel() * neuron.fine) if self.training else 0.0
        states = self.empty_states(idx.size(0)) if state is None else state.layers
        if state is not None and not torch.is_grad_enabled():
            x = F.embedding(idx, self.table)
        else:
            x = self.mapped(self.token_embedding(idx))
        # Normalized, so that a token is not lost among what the blocks add: a memory has to see which one it was.
        token = F.rms_norm(x, (self.config.d_model,), eps=self.config.norm_eps)
        x, more = self.token_share[0] * token, self.token_share.diff()
        for i, block in enumerate(self.layers):
            if self.checkpointing and self.training:
                x, after = checkpoint(block, x, states[i], use_reentrant=False)
            else:
                x, after = block(x, states[i])
            x = x + more[i] * token
            if state is not None:
                state.layers[i] = after
        if state is not None:
            x = x[:, -1:]
        s, _ = self.out(x)
        if targets is None:
            return self.lm_head(s), None
        return None, self.cross_entropy(s.flatten(0, 1), self.lm_head.weight.to(s.dtype), targets.flatten())

    def fan_outs(self) -> list[tuple[Neuron, int]]:
        """The neurons that feed matrices, those of the memories too, and how many synapses each of their spikes reaches. Not memory.v:
        its spikes are what is written, they reach no matrix and have no price."""
        C, N, H, pairs = self.config.d_model, self.config.d_hidden, self.config.n_head, [(self.out, self.config.vocab_size)]
        gated, apart = self.config.is_gated(), self.config.gates_apart()
        for block in self.layers:
            pairs += [(block.encode, 2 * N if gated and not apart else N), (block.hidden, C)]
            pairs += [(block.gate_encode, N)] if apart else []
            pairs += [(block.feed_forward.encode, self.config.d_ff), (block.feed_forward.hidden, C)]
            if block.memory is not None:
                pairs += [(block.memory.encode, 3 * C + 2 * H), (block.memory.o, C)]
                pairs += [(block.memory.q, C // H), (block.memory.k, 2 * (C // H))]  # q reads S, k is recalled from S and written
        return pairs

    def init_state(self, batch_size: int, max_len: int | None = None) -> PulseState:
        """The state before the first token, on the device of the weights, at least fp32; `max_len` is Flow's and changes nothing.

        A state is for the weights of this moment: what is read for each token is looked up in a table made here.
        """
        self.table = self.input_table().detach()
        return PulseState(batch_size, self.empty_states(batch_size))

    def empty_states(self, batch_size: int) -> list[tuple]:
        weight = self.token_embedding.weight
        kind = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        return [block.init_state(batch_size, **kind) for block in self.layers]

    def input_table(self) -> Tensor:
        """Of every token what the first block reads, before it is normalized: [V, C]. To run the network this is all that it takes."""
        return self.mapped(self.token_embedding.weight)

    def mapped(self, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            return rows @ self.input_map

    @torch.no_grad()
    def shorten(self, factor: float):
        """Multiply the matrices whose results are normalized by a factor. What the network computes stays, but for norm_eps.

        Only their direction matters, and training makes them many times longer, so that a step of the same length turns them ever
        less. A restarted learning rate acts on them only if they are short again.
        """
        normalized = tuple(f".{name}_proj.weight" for name in ("in", "gate", "up", "q", "k", "v"))
        for name, weight in self.layers.named_parameters():
            if name.endswith(normalized):
                weight *= factor

    @torch.no_grad()
    def quieten(self, factor: float):
        """Multiply by a factor the currents of the neurons whose counts need not be exact, so that they fire less.

        Those are the neurons that feed the head, the feed-forward parts and the gates (if these have their own), and queries and keys.
        The head's matrix gets as much larger; what is read for a token stays, since it is normalized.
        """
        quiet = ("out", "feed_forward.encode", "gate_encode", "memory.q", "memory.k")
        for name, module in self.named_modules():
            if isinstance(module, Neuron) and name.endswith(quiet):
                module.gain *= factor
                module.bias *= factor
        self.lm_head.weight /= factor

    def muon_params(self) -> list[nn.Parameter]:
        """The big hidden matrices, for Muon; embedding, betas, gains, biases and the memory's decay and write are AdamW's."""
        return [self.input_map, *(m.weight for m in self.layers.modules() if isinstance(m, nn.Linear) and m.bias is None)]


if __name__ == "__main__":
    for preset, config in PRESETS.items():
        print(f"{preset:6s} {config.num_params():>13,} parameters   training FLOPs per token: {config.flops_per_token(2048) / 1e6:,.1f}M")
