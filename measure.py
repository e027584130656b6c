"""Measuring for bench.py: jobs that take turns, medians, ratios against a goal as a table and as JSON, memory in bytes."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import muon
import peers
from device import Device
from model import FlowConfig, generate
from scripts import InputError

ROOT = Path(__file__).parent
TINY = FlowConfig(n_layer=2, d_model=64, d_ff=96, head_dim=16, window=16, global_every=2)  # for --quick


def medians(times: dict[str, list[float]]) -> list[float]:
    return [statistics.median(seconds) for seconds in times.values()]


# ---- what is measured ----


def micro_step(model: torch.nn.Module, x: Tensor, y: Tensor, device: Device) -> Callable:
    """Forward and backward as in train.py: bf16 where the hardware has it. Gradients add up."""

    def run():
        with device.autocast():
            loss = model(x, y)[1]
        loss.backward()
        device.wait()

    return run


def update(model: torch.nn.Module, optimizers: list, device: Device, lr: float = 1e-4) -> Callable:
    """What ends a step of train.py."""

    def run():
        muon.update(model, optimizers, lr)
        device.wait()

    return run


def training_step(model: torch.nn.Module, optimizers: list, x: Tensor, y: Tensor, device: Device, lr: float = 1e-4) -> Callable:
    """One step as train.py makes it."""
    parts = micro_step(model, x, y, device), update(model, optimizers, device, lr)
    return lambda: [part() for part in parts]


def tokens(config, batch_size: int, seq_len: int, device="cpu") -> tuple[Tensor, Tensor]:
    """Random inputs and targets [B, T]."""
    x = torch.randint(config.vocab_size, (batch_size, seq_len + 1), device=device)
    return x[:, :-1].contiguous(), x[:, 1:].contiguous()


def adamw(model: torch.nn.Module, lr: float = 1e-4) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def greedy(model: torch.nn.Module, idx: Tensor, n: int, device: Device) -> Callable:
    """n tokens of every prompt, the likeliest each."""

    def run():
        for _ in generate(model, idx, n, temperature=0):
            pass
        device.wait()

    return run


# ---- how it is measured ----


def number(x: float) -> str:
    """Four digits, without an exponent for what is large: 0.07, 1,234, 56,780."""
    return f"{float(f'{x:.4g}'):,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


class Bench:
    """The options, a temporary folder, and the results so far."""

    def __init__(self, args, folder: Path):
        self.repeats, self.quick, self.text, self.folder = args.repeats, args.quick, args.text, folder
        self.device, self.results = Device("cpu"), []
        print("| row | figure | measured | against | there | ratio | goal | spread |\n" + "| --- " * 8 + "|")

    def alternate(self, jobs: dict[str, Callable]) -> dict[str, list[float]]:
        """Seconds of each job, --repeats times in turn after a turn that does not count. A job that returns a float timed itself."""
        times, warm_up = {name: [] for name in jobs}, 0 if self.quick else 1
        for turn in range(self.repeats + warm_up):
            for name, job in jobs.items():
                start = time.perf_counter()
                own = job()
                seconds = own if isinstance(own, float) else time.perf_counter() - start
                if turn >= warm_up:
                    times[name].append(seconds)
        return times

    def record(self, figure: str, value: float, unit: str, against: str, there: float, goal=None, times=None, own=None):
        """Print and keep one result; its ratio is value / there. `goal` is ("at least" or "at most", ratio), `times` are those of
        alternate(), of which those called `own` are this side's (default: the first)."""
        ratio, met, wanted, spread = value / there, None, "", ""
        if goal and not self.quick:
            met = ratio >= goal[1] if goal[0] == "at least" else ratio <= goal[1]
            wanted = f"{goal[0]} {goal[1]:g}: {'met' if met else 'MISSED'}"
        if times:
            own = next(iter(times)) if own is None else own
            ours, times = times[own], {own: times[own]} | times  # in the file this side's are the first
        if times and len(ours) > 1:
            spread = f"{(max(ours) - min(ours)) / statistics.median(ours):.0%}"
        cells = (self.row, figure, f"{number(value)} {unit}", against, f"{number(there)} {unit}", f"{ratio:.3g}", wanted, spread)
        print(f"| {' | '.join(cells)} |", flush=True)
        self.results.append(dict(row=self.row, figure=figure, value=value, unit=unit, against=against, there=there, ratio=ratio,
                                 goal=goal, met=met, seconds=times))  # fmt: skip

    def rates(self, figure: str, jobs: dict[str, Callable], work: float | tuple[float, float], unit: str, goal=None) -> dict[str, float]:
        """Record the rates of two jobs that do so much `work` (both, or each) in units; returns the median seconds of both."""
        times = self.alternate(jobs)
        seconds = medians(times)
        against, (ours, theirs) = list(jobs)[1], (w / s for w, s in zip(work if isinstance(work, tuple) else (work, work), seconds))
        self.record(figure, ours, unit, against, theirs, goal, times)
        return dict(zip(jobs, seconds))

    def documents(self, n_bytes: int, *packages: str) -> Path:
        """A file of n_bytes of words from the prose of these packages."""
        path = self.folder / f"{n_bytes}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in peers.words(n_bytes, packages))
        return path

    def data(self) -> Path:
        """--text prepared for training: nano's vocabulary, the last tenth for validation if it is one document."""
        if self.text is None:
            raise InputError("needs --text=FILE, such as tinyshakespeare.txt")
        out = self.folder / "data"
        if not out.exists():
            script("prepare.py", self.text, f"--out={out}")
        return out


def script(*command, launcher: tuple = (), **environment) -> str:
    """The output of a script of this project. What it could not do is InputError, with its last line."""
    command = [sys.executable, *launcher, str(ROOT / command[0]), *map(str, command[1:])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        raise InputError(f"{' '.join(command[1:])} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


def state_bytes(state) -> int:
    """Bytes of all tensors in a state, whatever it is made of."""
    if isinstance(state, Tensor):
        return state.nbytes
    parts = state if isinstance(state, (list, tuple)) else vars(state).values() if hasattr(state, "__dict__") else ()
    return sum(state_bytes(part) for part in parts)


def tree_bytes(pid: int) -> int:
    """Bytes of a process and all below it, what they share counted once (Linux)."""
    try:
        size = 1024 * sum(map(int, re.findall(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)))  # none of a zombie
        below = [child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    except OSError:  # it has just ended
        return 0
    return size + sum(tree_bytes(int(child)) for child in below)
