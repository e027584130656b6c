"""Pre-train a model through the three-phase curriculum: windows of 256, then 1,024, then 2,048 tokens.

    python train.py                                   # all three phases of the nano preset on the built-in corpus
    python train.py --phase=1 --steps=100             # one phase, and fewer steps of it
    python train.py --data=data/mybook --out=out/mybook --preset=small --n_layer=6
    torchrun --nproc_per_node=2 train.py --phase=3    # two processes: each trains on its share of every batch

Every phase starts from the weights that the one before left in --out, warms the learning rate up again and lets it fall
along a cosine (warm restarts, arXiv:1608.03983). The batch of a step depends on (seed, phase, step) alone and last.pt
holds everything else, so a run that was killed goes on where it was when the same command is given again, and ends in the
same weights. A run leaves in --out: phase{1,2,3}.pt, phase{1,2,3}_best.pt (lowest validation loss), log.jsonl, curves.png.
"""

import dataclasses
import datetime
import errno
import json
import math
import shlex
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

import prepare
import spikes
from checkpoint import MODELS, PHASES, find_checkpoint, load_checkpoint, load_weights, save_checkpoint
from curves import draw_curves, trim_log
from device import DTYPES, Device, StopNotice
from model import PRESETS
from muon import build_optimizers, update
from resume import beginning, check_same, check_start, give_back, let_go, previous, read_start, restoring, start_over
from scripts import ArgumentParser, InputError, out_of_memory, run
from shards import Windows, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a preset is trained with unless options say otherwise."""

    micro_step_tokens: tuple[int, int, int]  # batch_size * seq_len of phases 1, 2, 3, all processes together
    grad_accum: int
    steps: tuple[int, int, int]  # optimizer steps of the phases
    lr: tuple[float, float, float]  # their peaks


# nano's rates are from sweeps over whole curricula (docs/pulse_log.md). Phase 1: of 0.003 to 0.016 this one solves most problems later.
# Phase 2: half the batch of phase 1, at 1/sqrt(2) of its rate; so many steps because sums are learned late. Phase 3, which is short:
# a quarter is better than half and all of it. The other presets' rates follow from nano's of phases 1 and 3 by 1/sqrt(d_model) (their
# batch is not halved in phase 2), their steps give 20 tokens per parameter: neither has been tried.
RECIPES = {
    "nano": Recipe((2048, 1024, 2048), 1, (1500, 4000, 500), (0.004, 0.0028, 0.001)),
    "small": Recipe((32_768,) * 3, 1, (8_000, 5_000, 3_000), (0.002, 0.002, 0.0005)),
    "base": Recipe((32_768,) * 3, 8, (4_000, 2_500, 1_500), (0.0016, 0.0016, 0.0004)),
    "1b": Recipe((16_384,) * 3, 32, (24_000, 14_000, 8_000), (0.001, 0.001, 0.00025)),
}
RATE_PENALTY = 0.1  # of Pulse: nats per (spike per synapse and token); nano then needs less than a sixth of Flow's energy
SHORTEN = 0.25  # of Pulse: factor, at the start of phase 2, of matrices of which only the direction matters
WARMUP = 0.02  # of a phase's steps
FINAL_LR = 0.05  # of the peak: what the cosine would reach one step after a phase's last
CHINCHILLA = 20  # tokens per parameter that use a training budget best (arXiv:2203.15556)


def lr_at(step: int, steps: int, peak: float) -> float:
    """The learning rate of a step of a phase: linear warm-up, then a cosine from the peak towards FINAL_LR of it."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress)))


# ------------------------------------------------------------------------------------------------------------------- data


@torch.no_grad()
def evaluate(model, data: Windows, token_bytes: np.ndarray, eval_tokens: int, batch_size: int, device: Device) -> tuple[float, float]:
    """(mean nats per token, bits per byte) over the same windows every time, spread evenly over the validation text."""
    n = max(1, min(data.n_windows, eval_tokens // data.seq_len))
    chosen = np.linspace(0, data.n_windows - 1, n).round().astype(int)[device.rank :: device.ranks]
    nats, n_tokens, n_bytes = 0.0, 0, 0
    model.eval()
    for i in range(0, len(chosen), batch_size):
        rows = np.stack([data.read(w) for w in chosen[i : i + batch_size]]).astype(np.int64)
        x, y = device.put(rows)
        with device.autocast():
            _, loss = model(x, y)
        nats, n_tokens, n_bytes = nats + loss.item() * y.numel(), n_tokens + y.numel(), n_bytes + int(token_bytes[rows[:, 1:]].sum())
    model.train()
    nats, n_tokens, n_bytes = device.sum([nats, n_tokens, n_bytes])
    return nats / n_tokens, nats / math.log(2) / max(1, n_bytes)


def report(model, data: Windows, token_bytes: np.ndarray, batch_size: int, args, device: Device, say, where: str) -> dict:
    """Evaluate, print the result (of a Pulse also how it fires), and return what goes into the log."""
    with torch.compiler.set_stance("force_eager") if args.compile else nullcontext():
        val_loss, val_bpb = evaluate(model, data, token_bytes, args.eval_tokens, batch_size, device)
        say(f"{where}  validation loss {val_loss:.4f}  {val_bpb:.4f} bits per byte", flush=True)
        firing = {}
        if args.model == "pulse":
            x, _ = device.put(data.read(0)[None].astype(np.int64))
            with device.autocast():
                firing = spikes.summary(spikes.firing_rates(model, x))
            say(f"  spikes per neuron and token {firing['spikes']} by block, {firing['silent']:.1%} of the neurons silent")
    return {"val_loss": round(val_loss, 5), "val_bpb": round(val_bpb, 5), **firing}


def compile_parts(model: torch.nn.Module):
    """Compile the loss, and the blocks for one shape. There are two kinds of blocks at most: that takes seconds where the whole model takes
    a minute, for nearly the same speed. What the phase before compiled is dropped first: torch keeps a limited number of versions."""
    torch.compiler.reset()
    for block in model.layers:
        block.compile(dynamic=False)
    model.cross_entropy = torch.compile(model.cross_entropy, dynamic=False)


# -------------------------------------------------------------------------------------------------- start of a phase, log


def start_phase(args, phase: int, is_first: bool, config, tokenizer_json: str, settings: dict, grad_accum: int, device: Device, say):
    """(model, optimizers, (step, tokens, seconds, wall, best)): of this phase's last checkpoint, of the phase before, of --init, or new."""
    torch.manual_seed(args.seed)
    model = MODELS[args.model][0](config).to(device.torch)
    model.checkpointing = args.checkpointing
    if args.model == "pulse":
        model.rate_penalty = settings["rate_penalty"] / grad_accum  # it acts in every micro-step
    optimizers = build_optimizers(model, settings["lr"], args.weight_decay, device.dtype)
    step, tokens, seconds, wall, best = 0, 0, 0.0, 0.0, math.inf
    origin, same_phase = previous(args.out, phase)
    later = [n for n in PHASES if n > phase and (args.out / f"phase{n}.pt").exists()]
    if later and not same_phase:
        why = f"{args.out}/phase{later[0]}.pt was trained without a phase {phase}"
        raise InputError(f"{why}: remove it with --fresh --phase={phase}, or name another --out")
    begins = is_first and not same_phase
    origin = beginning(args, phase) if begins else origin
    weights_only = origin is not None and origin.parent != args.out  # of another run (--init) nothing else
    if origin:
        checkpoint = read_start(origin)
        if same_phase:
            check_same(origin, checkpoint["settings"], settings)
        check_start(origin, checkpoint, args, config, tokenizer_json)
        load_weights(model, checkpoint, origin)
        if not weights_only:
            for optimizer, state in zip(optimizers, checkpoint["optimizer"], strict=True):
                optimizer.load_state_dict(state)
                optimizer.param_groups[0]["weight_decay"] = args.weight_decay  # AdamW's state brings that of the phase before along
            tokens, seconds, wall = checkpoint["tokens"], checkpoint["seconds"], checkpoint["wall"]
        if same_phase:
            step, best = checkpoint["step"], checkpoint["best"]
        elif phase == 2 and args.model == "pulse":
            model.shorten(args.shorten or SHORTEN)
        elif phase == 3 and args.quieten:
            model.quieten(args.quieten)
        say(f"continuing {origin} at step {step:,}" if same_phase else f"starting from {origin}")
    elif phase > 1:
        say(f"no {args.out}/phase{phase - 1}.pt: starting from new weights (the curriculum would train --phase={phase - 1} first)")
    if device.rank == 0:
        log = args.out / "log.jsonl"
        trim_log(log, phase, step) if same_phase else trim_log(log, phase - 1, 10**9)
    if args.compile:
        compile_parts(model)
    return model, optimizers, (step, tokens, seconds, wall, best)


def start_wandb(args, config, plan: dict):
    """A Weights & Biases run of the folder's name: one that was stopped goes on in the same."""
    try:
        import wandb
    except ImportError as problem:
        raise InputError("--wandb needs the package wandb: pip install wandb") from problem
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if value is not None}
    phases = {f"phase{n}": dict(zip(("seq_len", "batch_size", "grad_accum", "steps"), sizes)) for n, sizes in plan.items()}
    name = args.out.resolve().name
    tracker = wandb.init(project=args.wandb, name=name, id=name, resume="allow", config=options | dataclasses.asdict(config) | phases)
    tracker.define_metric("*", step_metric="tokens")
    return tracker


# ------------------------------------------------------------------------------------------------------------------- main


def parse_args(argv=None):
    sizes = "The sizes at the end are those of nano, small, base and 1b: --n_layer=6 overrides the preset's."
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], epilog=sizes)
    parser.add_argument("--model", choices=MODELS, default="flow", help="which network (default: flow)")
    parser.add_argument("--preset", choices=PRESETS, default="nano", help="its size (default: nano)")
    parser.add_argument("--data", type=Path, default=Path("data/builtin"), help="folder made by prepare.py (default: data/builtin)")
    parser.add_argument("--out", type=Path, help="folder of the run (default: out/<model>)")
    parser.add_argument("--init", metavar="CKPT", help="first weights: a checkpoint or the folder of a run with the tokenizer of --data")
    parser.add_argument("--phase", type=int, choices=PHASES, help="train this phase only (default: all that are not finished)")
    parser.add_argument("--steps", type=int, help="optimizer steps per phase (default: the preset's)")
    parser.add_argument("--batch_size", type=int, help="sequences per process and micro-step (default: the preset's share of tokens)")
    parser.add_argument("--grad_accum", type=int, help="micro-steps per optimizer step (default: the preset's, shared among processes)")
    parser.add_argument("--seq_len", type=int, help="window in tokens (default: the phase's, 256, 1024 or 2048)")
    parser.add_argument("--lr", type=float, help="peak learning rate of Muon and AdamW (default: the preset's for the phase)")
    parser.add_argument("--weight_decay", type=float, default=0.1, help="decoupled weight decay of matrices and embeddings (default: 0.1)")
    parser.add_argument("--rate_penalty", type=float, help=f"Pulse: nats per spike per synapse and token (default: {RATE_PENALTY})")
    parser.add_argument("--shorten", type=float, help=f"Pulse: factor of normalized matrices at the start of phase 2 (default: {SHORTEN})")
    parser.add_argument("--quieten", type=float, help="Pulse: factor of currents whose counts need not be exact, from phase 3 on")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the order of the data (default: 0)")
    parser.add_argument("--save_interval", type=int, default=250, help="steps between checkpoints (default: 250)")
    parser.add_argument("--eval_interval", type=int, default=250, help="steps between evaluations (default: 250)")
    parser.add_argument("--log_interval", type=int, default=25, help="steps between log lines (default: 25)")
    parser.add_argument("--eval_tokens", type=int, default=2**16, help="validation tokens per evaluation, at most (default: 65,536)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="of matrix products (default: bf16 where the device multiplies it fast)")
    parser.add_argument("--compile", action="store_true", help="torch.compile blocks and loss: faster on a GPU, after half a minute of it")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, a third more arithmetic")
    parser.add_argument("--fresh", action="store_true", help="start over, from --phase if given, in place of what is there")
    parser.add_argument("--price", type=float, help="dollars per hour of the machine, to show the cost so far")
    parser.add_argument("--wandb", metavar="PROJECT", help="also log to this Weights & Biases project")
    fields = [field for _, Config, _ in MODELS.values() for field in dataclasses.fields(Config)]
    sizes = {field.name: field.type for field in fields if field.type in (int, float, str) and field.name != "vocab_size"}
    for name, kind in sizes.items():
        presets = {model: [getattr(config, name, None) for config in presets.values()] for model, (_, _, presets) in MODELS.items()}
        values = {model: ", ".join(map(str, values if len(set(values)) > 1 else values[:1])) for model, values in presets.items()
                  if None not in values}  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, help="; ".join(f"{model.capitalize()} {value}" for model, value in values.items()))
    args = parser.parse_args(argv)
    positive = ("steps", "batch_size", "grad_accum", "seq_len", "lr", "price")
    for name in (*positive, "save_interval", "eval_interval", "log_interval", "eval_tokens"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < 2**31:
            raise InputError(f"--{name}={getattr(args, name)} must be positive and below 2**31")
    if not 0 <= args.seed < 2**63 or not 0 <= args.weight_decay < math.inf:
        raise InputError(f"--seed={args.seed} and --weight_decay={args.weight_decay} must be 0 or more, below 2**63 and finite")
    if args.rate_penalty and args.model != "pulse" or not 0 <= (args.rate_penalty or 0) < math.inf:
        raise InputError(f"--rate_penalty={args.rate_penalty} must be 0 or more, and is for --model=pulse only")
    for name, phase in (("shorten", 2), ("quieten", 3)):
        value = getattr(args, name)
        if value is not None and (args.model != "pulse" or not 0 < value <= 1):
            raise InputError(f"--{name}={value} must be above 0 and at most 1, which changes nothing, and is for --model=pulse only")
        if value is not None and args.phase not in (None, phase):
            raise InputError(f"--{name}={value} acts at the start of phase {phase}, this command trains phase {args.phase}: leave it out")
    args.out = args.out or Path("out") / args.model
    args.sizes = {name: getattr(args, name) for name in sizes if getattr(args, name) is not None}
    return args


def model_config(args, vocab_size: int, start: dict | None = None):
    """The preset, or what --init holds, with the sizes that options override; the vocabulary is the data's."""
    _, Config, presets = MODELS[args.model]
    base = presets[args.preset]
    if start:
        if start["model"] != args.model:
            raise InputError(f"--init={args.init} holds a {start['model']}: give --model={start['model']}, or other first weights")
        base = Config(**start["config"])
        vocab_size = max(vocab_size, base.vocab_size)  # an embedding from elsewhere may have rows without a token
    foreign = args.sizes.keys() - {f.name for f in dataclasses.fields(Config)}
    if foreign:
        raise InputError(f"--{sorted(foreign)[0]} is not a size of --model={args.model}: leave it out")
    try:
        return dataclasses.replace(base, vocab_size=vocab_size, **args.sizes)
    except ValueError as problem:
        raise InputError(f"these sizes do not fit together: {problem}") from problem


def main(argv=None):
    args = parse_args(argv)
    try:
        with Device(args.device, args.dtype) as device, restoring(args.out, device):
            train(args, device, device.say)
    except (RuntimeError, MemoryError) as problem:
        if cause := getattr(problem, "inner_exception", None):  # BackendCompilerFailed, whose module takes seconds to import
            why = str(cause).splitlines()[0]
            remedy = "install a C++ compiler and Python's headers, or leave it out"
            raise InputError(f"--compile does not work here ({why}): {remedy}") from problem
        if out_of_memory(problem):
            remedy = "lower --batch_size and raise --grad_accum, give --checkpointing, or choose a smaller model"
            raise InputError(f"the model or a batch of it does not fit into the memory: {remedy}") from problem
        raise
    except OSError as problem:
        if problem.filename is None and problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # a write knows no name
            problem.filename = str(args.out)
        raise


def train(args, device: Device, say):
    # Data: made first if it is the default and not there.
    if args.data == Path("data/builtin") and not (args.data / "meta.json").exists():
        say("data/builtin does not exist yet: preparing the built-in corpus (python prepare.py)")
        if device.rank == 0:
            prepare.main([])
        device.barrier()
    meta = prepare.load_meta(args.data)
    tokenizer_json, tokenizer = load_tokenizer(args.data)
    fingerprint, token_bytes = prepare.tokenizer_fingerprint(tokenizer_json), prepare.token_bytes(tokenizer)
    init = read_start(find_checkpoint(args.init)) if args.init else None
    config, imported = model_config(args, meta["vocab_size"], init), bool(init) and init.get("imported", not init["phase"])
    del init
    recipe = RECIPES[args.preset]

    # Every phase is planned before anything is trained or removed: the plan is compared with Chinchilla's optimum, and a phase with
    # too little data is found out now, not after the phases before it.
    plan, windows = {}, {}
    for phase in [args.phase] if args.phase else PHASES:
        seq_len, limit = args.seq_len or PHASES[phase][1], getattr(config, "max_seq_len", math.inf)  # a Pulse reads any number
        # The recipe's batch, shared among the ranks: fewer micro-steps first, then fewer sequences, of which each rank has one at least.
        grad_accum = -(-recipe.grad_accum // device.ranks)
        batch_size = recipe.micro_step_tokens[phase - 1] * recipe.grad_accum // (seq_len * grad_accum * device.ranks)
        batch_size, grad_accum = args.batch_size or max(1, batch_size), args.grad_accum or grad_accum
        plan[phase] = (seq_len, batch_size, grad_accum, args.steps or recipe.steps[phase - 1])
        splits = ("train", "val")
        windows[phase] = {split: Windows(args.data, phase, split, seq_len, meta["vocab_size"], fingerprint) for split in splits}
        if seq_len > limit:
            raise InputError(f"phase {phase} has windows of {seq_len:,} tokens, the model reads {limit:,}: add --max_seq_len={seq_len}")
    planned = sum(seq_len * batch_size * accum * steps * device.ranks for seq_len, batch_size, accum, steps in plan.values())
    peak, source = device.peak_flops()
    say(f"device: {device}; peak {peak / 1e12:.3g} TFLOP/s ({source})")
    say(f"model: {args.model} {args.preset}, {config.num_params():,} parameters, vocabulary {config.vocab_size:,}")
    say(f"plan: {planned:,} tokens, {planned / config.num_params():.1f} per parameter (Chinchilla's optimum is about {CHINCHILLA})")

    # Files of the run.
    tracker = start_wandb(args, config, plan) if args.wandb and device.rank == 0 else None
    if (args.out / "meta.json").exists():
        raise InputError(f"--out={args.out} holds data of prepare.py: name another folder for the run")
    args.out.mkdir(parents=True, exist_ok=True)
    log, last = args.out / "log.jsonl", args.out / "last.pt"
    device.claim(args.out)
    if device.rank == 0:
        give_back(args.out)
    device.barrier()
    if args.fresh:
        start_over(args, min(plan), config, tokenizer_json, device)
    device.barrier()

    def record(**line):
        if device.rank == 0:
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
        if tracker:
            tracker.log(line)

    stop = StopNotice(device)  # ends the run after the step in progress, with everything saved
    for phase, (seq_len, batch_size, grad_accum, steps) in plan.items():
        sequences = batch_size * grad_accum * device.ranks  # of one optimizer step
        peak_lr = args.lr or recipe.lr[phase - 1]
        settings = {"model": args.model, "init": args.init, **dataclasses.asdict(config), "data": meta["fingerprint"], "seq_len": seq_len}
        settings |= {"sequences_per_step": sequences, "steps": steps, "lr": peak_lr, "weight_decay": args.weight_decay, "seed": args.seed}
        rate_penalty = RATE_PENALTY if args.rate_penalty is None else args.rate_penalty
        settings |= {"rate_penalty": rate_penalty} if args.model == "pulse" else {}
        settings |= {"shorten": args.shorten or SHORTEN} if args.model == "pulse" and phase == 2 else {}
        settings |= {"quieten": args.quieten} if args.model == "pulse" and phase == 3 else {}
        final = args.out / f"phase{phase}.pt"
        if final.exists():
            check_same(final, load_checkpoint(final)["settings"], settings)
            say(f"phase {phase} is finished ({final}); --fresh would start over")
            if device.rank == 0 and last.exists() and load_checkpoint(last)["phase"] == phase:  # a kill came between the two files
                last.unlink()
            device.barrier()
            continue
        data, tokens_per_step = windows[phase], sequences * seq_len
        passes = steps * tokens_per_step / data["train"].n_tokens
        say(f"\nphase {phase}, {PHASES[phase][0]}: {steps:,} steps of {sequences} x {seq_len:,} = {tokens_per_step:,} tokens,", end=" ")
        say(f"{passes:.2f} times through {data['train'].n_tokens:,} tokens of {args.data}")

        model, optimizers, progress = start_phase(
            args, phase, phase == min(plan), config, tokenizer_json, settings, grad_accum, device, say
        )
        step, tokens, seconds, wall, best = progress
        network = device.parallel(model)

        # The loop: learning rate, micro-steps, update, log, evaluate, save.
        model.train()
        losses, logged, began = [], (step, seconds), time.perf_counter()
        if args.init and tokens == 0:  # --init before training
            figures = report(model, data["val"], token_bytes, batch_size, args, device, say, f"phase {phase} step     0/{steps:,}")
            record(step=0, phase=phase, tokens=tokens, seconds=round(seconds, 3), **figures)
        stop.restart()
        while step < steps:
            clock = time.perf_counter()
            lr = lr_at(step, steps, peak_lr)
            for micro in range(grad_accum):
                first = ((step * grad_accum + micro) * device.ranks + device.rank) * batch_size  # number of its first example
                x, y = device.put(data["train"].batch(args.seed, phase, first, batch_size))
                # Gradients are averaged over the ranks once per step, in the backward pass of the last micro-step.
                with network.no_sync() if device.ranks > 1 and micro < grad_accum - 1 else nullcontext():
                    with device.autocast():
                        _, loss = network(x, y)
                    (loss / grad_accum).backward()
                losses.append(loss.detach())
            grad_norm = update(model, optimizers, lr)  # clips, steps, drops the gradients
            step, tokens = step + 1, tokens + tokens_per_step

            ending = step == steps
            stopping = stop.given(step % args.log_interval == 0) and not ending
            log_now = ending or stopping or step % args.log_interval == 0
            evaluate_now, save_now = ending or step % args.eval_interval == 0, ending or step % args.save_interval == 0
            if log_now or evaluate_now or save_now:
                device.wait()
                if not math.isfinite(grad_norm):  # so neither are the weights by now: nothing more is saved
                    why = f"the gradient is {grad_norm:.3g} at step {step}, the loss {losses[-1]:.4g}"
                    or_less = " or --rate_penalty" if (args.rate_penalty or 0) > RATE_PENALTY else ""
                    raise InputError(f"{why}: start over with --fresh and a lower --lr than {peak_lr}{or_less}")
            seconds += time.perf_counter() - clock
            total_wall = wall + time.perf_counter() - began
            if log_now:
                (mean_loss,) = device.sum([torch.stack(losses).mean().item() / device.ranks])
                per_step = (seconds - logged[1]) / (step - logged[0])
                rate, mfu = tokens_per_step / per_step, config.flops_per_token(seq_len) * tokens_per_step / per_step / (peak * device.ranks)
                eta = datetime.timedelta(seconds=round((steps - step) * per_step))
                cost = f"  ${total_wall / 3600 * args.price:.2f}" if args.price else ""
                say(
                    f"phase {phase} step {step:>5,}/{steps:,}  loss {mean_loss:.4f}  lr {lr:.2e}  grad {grad_norm:.2f}"
                    f"  {per_step * 1e3:.0f} ms  {rate:,.0f} tokens/s  mfu {mfu:.1%}  eta {eta}{cost}",
                    flush=True,
                )
                record(
                    step=step, phase=phase, tokens=tokens, seconds=round(seconds, 3), loss=round(mean_loss, 5), lr=lr,
                    grad_norm=round(grad_norm.item(), 5), tokens_per_s=round(rate, 1), mfu=round(mfu, 4),
                )  # fmt: skip
                losses, logged = [], (step, seconds)
            improved = False
            if evaluate_now:
                figures = report(model, data["val"], token_bytes, batch_size, args, device, say, f"phase {phase} step {step:>5,}/{steps:,}")
                record(step=step, phase=phase, tokens=tokens, seconds=round(seconds, 3), **figures)
                improved, best = figures["val_loss"] < best, min(best, figures["val_loss"])
            if improved or save_now or stopping:
                checkpoint = dict(
                    model=args.model, config=dataclasses.asdict(config), weights=model.state_dict(), tokenizer=tokenizer_json,
                    settings=settings, data_fingerprint=meta["fingerprint"], phase=phase, step=step, tokens=tokens, seconds=seconds,
                    wall=total_wall, best=best, imported=imported,
                )  # fmt: skip
                if improved and device.rank == 0:
                    save_checkpoint(args.out / f"phase{phase}_best.pt", checkpoint)
                if save_now or stopping:
                    checkpoint["optimizer"] = [optimizer.state_dict() for optimizer in optimizers]  # gathered: all ranks take part
                    if device.rank == 0:
                        save_checkpoint(final if ending else last, checkpoint)
                        if ending:
                            last.unlink(missing_ok=True)
                if device.rank == 0:
                    let_go(args.out)  # what --fresh has set aside: now there is something in its place
                del checkpoint
            if stopping:
                break
        if device.rank == 0:
            draw_curves(args.out)
        if step < steps:
            say(f"stopped at step {step:,}; saved in {last}: the same command{' without --fresh' * args.fresh} goes on from there")
            device.barrier()
            raise SystemExit(130)
        device.barrier()
        say(f"phase {phase} took {time.perf_counter() - began:.0f} s, evaluation included; weights in {final}")
    stop.close()
    if tracker:
        tracker.finish()
    say(f"\nnext: python sample.py --ckpt={shlex.quote(str(args.out))}")


if __name__ == "__main__":
    run(main)
