"""Look at a Pulse from outside: how often its neurons fire, what that costs, and a picture of it.

    python sample.py --model=pulse --prompt="Once upon a time" --energy                # a table of spikes, operations and nanojoules
    python sample.py --model=pulse --prompt="Once upon a time" --raster=spikes.png     # who fires when, and membranes in between

Everything is read through hooks on the matrices and neurons of an unchanged model; the hooks are gone when a function returns.

B batch, T tokens, n neurons that feed a matrix, H memory heads, D their size, K = num_steps.
"""

import dataclasses
from contextlib import ExitStack
from pathlib import Path

import snntorch
import torch
import torch.nn as nn
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from membranes import THRESHOLD
from model import PRESETS, FlowConfig
from scripts import InputError
from snn_model import Neuron, Pulse, PulseConfig

# pJ of one fp32 operation at 45 nm: an addition 0.9, a multiplication 3.7 (Horowitz, ISSCC 2014).
ACCUMULATE, MULTIPLY_ACCUMULATE = 0.9, 4.6
LEFT_OUT = "data movement, norms and gains, activation functions, biases, residual additions, embedding lookup, softmax"
MAX_TOKENS = 100  # of a picture: more would not be readable
SHADES = 8  # counts beyond it have the strongest shade too: most are far below
ROWS, MEMORY_ROWS = 24, 12  # neurons of a block and of a memory's q, k and v in a picture, at most


def only_pulse(model: nn.Module):
    if not isinstance(model, Pulse):
        raise InputError(f"{type(model).__name__} does not spike: choose a Pulse, with --model=pulse or --ckpt")


def in_phases(counts: Tensor, num_steps: int) -> Tensor:
    """Spikes that counts take in a phase code: the ones among the binary digits of |count|. Same shape, int32.

    A neuron's threshold then starts at the largest power of two up to K and halves with every micro-step. A spike lowers the membrane by
    the threshold of its micro-step, and receivers weight it with that: the same counts in as many micro-steps as K has binary digits
    (few-spike neurons, arXiv:2002.00860; weighted spikes, doi 10.1016/j.neucom.2018.05.087).
    """
    size = counts.abs().int()
    return sum(size >> digit & 1 for digit in range(num_steps.bit_length()))


@torch.no_grad()
def firing_rates(model: Pulse, idx: Tensor) -> dict[str, dict]:
    """How the neurons that feed each matrix fire while the model reads idx [B, T].  Name of the matrix, or of the neurons q and k
    that feed the matrix of a memory -> a dict of

        neurons      n
        nonzero      share of (neuron, token) pairs with at least one spike
        spikes       mean |count| per neuron and token, 0 to K
        phased       the same if counts are sent in a phase code (see in_phases)
        silent       share of neurons that never fired
        saturated    share of neurons that fired K spikes at every token

    Matrices that read the same neurons have one dict in common. Raises InputError when the model is not a Pulse.
    """
    only_pulse(model)
    rates, seen = {}, WeakTensorKeyDictionary()

    def look(name: str, counts: Tensor):
        if counts not in seen:
            size = counts.abs().flatten(0, -2).float()  # [B * T, n]; a sum of many bf16 counts would not be exact
            most, least = size.amax(0), size.amin(0)
            seen[counts] = {
                "neurons": size.size(1),
                "nonzero": (size > 0).float().mean().item(),
                "spikes": size.mean().item(),
                "phased": in_phases(size, model.config.num_steps).float().mean().item(),
                "silent": (most == 0).float().mean().item(),
                "saturated": (least == model.config.num_steps).float().mean().item(),
            }
        rates[name] = seen[counts]

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hooks.enter_context(module.register_forward_pre_hook(lambda _, args, name=name: look(name, args[0])))
            elif name.endswith(("memory.q", "memory.k")):
                hooks.enter_context(module.register_forward_hook(lambda _, args, out, name=name: look(name, out[0])))
        model(idx)
    return rates


def mean_over_neurons(rates: dict[str, dict], what: str, prefix: str = "") -> float:
    """The mean of one rate over all neurons that feed matrices whose name begins so, each neuron counted once."""
    distinct = {id(rate): rate for name, rate in rates.items() if name.startswith(prefix)}.values()
    return sum(rate[what] * rate["neurons"] for rate in distinct) / sum(rate["neurons"] for rate in distinct)


def summary(rates: dict[str, dict]) -> dict:
    """The short form for a log: {"spikes": spikes per neuron and token of each block, "silent": share of neurons that never fired}."""
    blocks = sorted({int(name.split(".")[1]) for name in rates if name.startswith("layers.")})
    return {
        "spikes": [round(mean_over_neurons(rates, "spikes", f"layers.{block}."), 4) for block in blocks],
        "silent": round(mean_over_neurons(rates, "silent"), 4),
    }


def nearest_flow(config: PulseConfig) -> FlowConfig:
    """The Flow to compare with: of the presets, with this depth and vocabulary, the one nearest in parameters."""
    sizes = {"vocab_size": config.vocab_size, "n_layer": config.n_layer}
    flows = [dataclasses.replace(preset, **sizes) for preset in PRESETS.values()]
    return min(flows, key=lambda flow: abs(flow.num_params() - config.num_params()))


def energy(model: Pulse, idx: Tensor, flow_config: FlowConfig | None = None) -> dict:
    """What one token of idx [B, T] costs in arithmetic, beside a Flow (default: the nearest in size) that reads T tokens too.

    A spike that arrives at a synapse is one accumulate, so a matrix costs sum |counts| * fan-out accumulates. The matrix S of a
    memory head is read by the spikes of q, and recalled and written by those of k, D numbers each time; lengths and writing
    strength scale what was added up. What stays a multiply-accumulate (MAC): the leak of every membrane, two per neuron, and per
    memory head D² for the leak of S and 5 D for the scaling. Flow's MACs are those of its matrices and of attention, averaged
    over T positions: a sixth of its training FLOPs (2 per MAC, once forward, twice backward). Raises InputError when it is no Pulse.

    Returns {"tokens": T, "rows": [...], "pulse": {...}, "phased": {...}, "flow": {...}}; "synops", "macs" (what a dense network would
    compute) and "nj" (nanojoules) are per token. "pulse" has "spikes_per_synapse" = synops / macs of the matrices, and "accumulates"
    = the share of all MACs that became accumulates. "phased" has "synops", "nj" and "spikes_per_synapse" of the same counts in a
    phase code (see in_phases): every sum is then doubled from one micro-step to the next, which is counted as one accumulate more.
    """
    rates, config = firing_rates(model, idx), model.config
    rows, D, fan_out = [], config.d_model // config.n_head, dict(model.fan_outs())
    phased, doublings = 0.0, 0
    for name, rate in rates.items():
        module = model.get_submodule(name)
        dense = isinstance(module, nn.Linear)
        synapses = module.weight.numel() if dense else rate["neurons"] * fan_out[module]
        synops = rate["spikes"] * synapses
        rows.append({"name": name, **rate, "synops": synops, "macs": synapses, "nj": synops * ACCUMULATE / 1e3})
        phased += rate["phased"] * synapses
        doublings += (config.num_steps.bit_length() - 1) * (module.out_features if dense else config.n_head * fan_out[module])
    synops, matrices = sum(row["synops"] for row in rows), sum(row["macs"] for row in rows)
    memories = sum(block.memory is not None for block in model.layers) * config.n_head * (D * D + 5 * D)
    leaks = sum(2 * neuron.leak.numel() for neuron in model.modules() if isinstance(neuron, Neuron) and neuron.leaky)
    for name, macs in (("memories", memories), ("membranes", leaks)):
        rows.append({"name": name, "macs": macs, "nj": macs * MULTIPLY_ACCUMULATE / 1e3})
    macs = matrices + memories + leaks
    pulse = {"parameters": config.num_params(), "synops": synops, "macs": macs, "nj": sum(row["nj"] for row in rows)}
    pulse |= {what: mean_over_neurons(rates, what) for what in ("nonzero", "spikes")}
    pulse |= {"spikes_per_synapse": synops / matrices, "accumulates": matrices / macs}
    rest = pulse["nj"] - synops * ACCUMULATE / 1e3
    phased = {"synops": phased + doublings, "nj": (phased + doublings) * ACCUMULATE / 1e3 + rest, "spikes_per_synapse": phased / matrices}
    flow = flow_config or nearest_flow(config)
    flow_macs = flow.flops_per_token(idx.size(1)) / 6
    flow = {"parameters": flow.num_params(), "macs": flow_macs, "nj": flow_macs * MULTIPLY_ACCUMULATE / 1e3}
    return {"tokens": idx.size(1), "rows": rows, "pulse": pulse, "phased": phased, "flow": flow}


def energy_table(report: dict) -> str:
    """The result of energy() as text: a line per matrix, Pulse and Flow in all, and what the figures leave out."""
    pulse, phased, flow = report["pulse"], report["phased"], report["flow"]
    rows = [*report["rows"]]
    rows += [{"name": f"{name}, {row['parameters']:,} parameters", **row} for name, row in (("Pulse", pulse), ("Flow", flow))]
    columns = {"nonzero": "{:.1%}", "spikes": "{:.3f}", "phased": "{:.3f}", "synops": "{:,.0f}", "macs": "{:,.0f}", "nj": "{:,.2f}"}
    names = dict(zip(columns, ("nonzero", "spikes/neuron", "phased", "accumulates", "dense MACs", "nJ")))
    lines = [[f"per token of {report['tokens']:,}", *names.values()]]
    lines += [[row["name"], *(form.format(row[column]) if column in row else "-" for column, form in columns.items())] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]) for line in lines]
    text.insert(-2, "")
    return "\n".join(
        [
            *text,
            "",
            f"Flow / Pulse: {flow['nj'] / pulse['nj']:.2f} times the energy, {flow['parameters'] / pulse['parameters']:.2f} times the "
            f"parameters; {pulse['spikes_per_synapse']:.3f} spikes per synapse and token; {pulse['accumulates']:.1%} of Pulse's MACs "
            f"became accumulates.",
            f"In phases, a spike for each 1 of a count in binary: {flow['nj'] / phased['nj']:.2f} times; "
            f"{phased['spikes_per_synapse']:.3f} spikes per synapse and token.",
            f"{ACCUMULATE} pJ per accumulate, {MULTIPLY_ACCUMULATE} pJ per MAC (fp32, 45 nm, Horowitz 2014). Left out: {LEFT_OUT}.",
        ]
    )


@torch.no_grad()
def listen(model: Pulse, ids: list[int]) -> tuple[dict[nn.Module, Tensor], dict[nn.Module, Tensor]]:
    """Read ids token by token, as in generation: (spike counts, membranes [T, n] of every layer of neurons).

    Neurons that have no membrane between tokens are not in the second. Raises InputError when the model is not a Pulse.
    """
    only_pulse(model)
    neurons = [module for module in model.modules() if isinstance(module, snntorch.Leaky)]
    heard = {neuron: ([], []) for neuron in neurons}

    def look(neuron: nn.Module, _, output: tuple[Tensor, Tensor | None]):
        for kept, value in zip(heard[neuron], output):
            if value is not None:
                kept.append(value.flatten().float().cpu())

    device = next(model.parameters()).device
    with ExitStack() as hooks:
        for neuron in neurons:
            hooks.enter_context(neuron.register_forward_hook(look))
        state = model.init_state(1)
        for token in ids:
            model(torch.tensor([[token]], device=device), state=state)
    return tuple({neuron: torch.stack(kept[i]) for neuron, kept in heard.items() if kept[i]} for i in range(2))


def token_label(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token with its blanks made visible; a byte that is no character by itself shows as a replacement mark."""
    text = tokenizer.decode([token], skip_special_tokens=False).replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def raster(model: Pulse, tokenizer: Tokenizer, ids: list[int], path: str | Path):
    """Draw what the neurons do while the model reads ids, into a picture at `path` (.png, .svg, .pdf).

    Tokens from left to right. Above, the spikes by block: an evenly spaced selection of neurons, the fastest membrane on top, and
    q, k, v of a memory. Below, the membranes of three neurons of the block in the middle: of the fastest, the middle and the
    slowest tenth the neuron whose spike count varies most. Raises InputError when matplotlib is missing, the file type unknown,
    the text too long or the model not a Pulse.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise InputError("a raster needs matplotlib: pip install matplotlib") from problem
    if len(ids) > MAX_TOKENS:
        raise InputError(f"the text has {len(ids):,} tokens, a readable raster at most {MAX_TOKENS}: shorten it")
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"{path} is no picture that can be written: end its name in .png, .svg or .pdf")
    counts, membranes = listen(model, ids)
    T, K = len(ids), model.config.num_steps
    groups = []  # (label, layer of neurons, rows)
    for i, block in enumerate(model.layers, 1):
        if block.memory is not None:
            groups += [(f"block {i}, memory {name}", getattr(block.memory, name), MEMORY_ROWS) for name in "qkv"]
        groups.append((f"block {i}", block.hidden, ROWS))
    shown = len(model.layers) // 2
    hidden = model.layers[shown].hidden
    heights = [rows for *_, rows in groups] + [2 * ROWS]
    figure = Figure(figsize=(4 + 0.24 * max(T, 24), 2 + 0.055 * sum(heights)), layout="constrained")
    *above, below = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    most = min(K, SHADES)
    shades = {"cmap": colormaps["RdBu_r"].resampled(2 * most + 1), "vmin": -most - 0.5, "vmax": most + 0.5}
    for axis, (label, neuron, rows) in zip(above, groups):
        n = counts[neuron].size(1)
        step = -(-n // rows)
        order = neuron.leak.detach().cpu().argsort() if neuron.leaky else torch.arange(n)
        chosen = order[step // 2 :: step]
        image = axis.imshow(counts[neuron].T[chosen].numpy(), aspect="auto", interpolation="nearest", **shades)
        axis.set_yticks([])
        axis.tick_params(bottom=False)
        axis.set_ylabel(f"{label}\n1 in {step} of {n:,} neurons", rotation=0, ha="right", va="center", fontsize=8)
    figure.colorbar(image, ax=above, ticks=range(-most, most + 1), aspect=40, extend="both" if most < K else "neither")
    top = THRESHOLD
    if hidden in membranes:
        leak, U = hidden.leak.detach().float().cpu(), membranes[hidden]
        order, tenth = leak.argsort(), max(1, len(leak) // 10)
        middle = (len(leak) - tenth) // 2
        for pace, part in (("fast", order[:tenth]), ("medium", order[middle : middle + tenth]), ("slow", order[-tenth:])):
            neuron = part[counts[hidden][:, part].var(0, correction=0).argmax()]
            top = max(top, U[:, neuron].max().item())
            below.plot(U[:, neuron].numpy(), marker="o", ms=3, lw=1.2, label=f"{pace}, tau {1 + leak[neuron].exp():.1f} tokens")
    else:
        below.text(0.5, 0.5, "none lasts from token to token: tau_max is 1", ha="center", transform=below.transAxes, fontsize=8)
    for level in range(1, min(K, int(top / THRESHOLD) + 1) + 1):
        style, label = ({"ls": "--"}, "threshold") if level == 1 else ({"lw": 0.6}, "one spike more" if level == 2 else None)
        below.axhline(level * THRESHOLD, color="gray", zorder=0, label=label, **style)
    below.set_ylabel(f"membranes of three\nneurons of block {shown + 1}", rotation=0, ha="right", va="center", fontsize=8)
    below.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, fontsize=8, frameon=False)
    below.spines[["top", "right"]].set_visible(False)
    labels = [token_label(tokenizer, token) for token in ids]
    for axis in (above[0], below):
        axis.set_xticks(range(T), labels, rotation=90, fontsize=8, parse_math=False)
    above[0].tick_params(top=True, labeltop=True)
    figure.suptitle("Spikes per neuron and token; in each group fast membranes on top, slow ones below", fontsize=10)
    figure.savefig(path, dpi=130)
