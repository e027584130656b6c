"""Where a process computes (CPU, GPU or Apple's GPU), in which precision, and as which of torchrun's processes."""

import ctypes
import errno
import math
import os
import re
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from scripts import InputError, lock_folder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of matrix products; weights are always fp32
# Dense bf16 peak in FLOP/s from the makers' data sheets; others are measured with matrix products at the start.
PEAK_FLOPS = {
    "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def choose_device(name: str | None) -> torch.device:
    """cuda, mps or cpu, the best that is there unless named; under torchrun each process takes the GPU of its local rank."""
    alone = (os.environ.get("WORLD_SIZE") or "1") == "1"
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and alone else "cpu"
    if name == "mps" and not alone:
        raise InputError("--device=mps is for one process, torch.distributed does not reach Apple's GPU: start without torchrun")
    try:
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches on this one
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, AttributeError) as problem:
        why = str(problem).splitlines()[0].split(". ")[0]
        raise InputError(f"--device={name} cannot be used here ({why}): leave it out to take what is there") from problem
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are done in hardware here, and so gain anything over fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type == "mps"


def keep_freed_memory():
    """Let glibc keep the large blocks that tensors leave behind for the next ones, as PyTorch does on a GPU.

    Usually it hands them back to the system at once, and each new one is mapped and zeroed page by page at its first use: a sixth of
    a training step of an 11M Flow on two cores. Other C libraries have no mallopt and are left as they are.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class StopNotice:
    """Notes Ctrl-C, SIGTERM or a closed terminal without ending the process; given() tells all ranks of it at the same step.

    torchrun passes a notice on and kills 30 s later, so the ranks tell each other every few seconds, however long a step takes.
    """

    EVERY = 5.0  # seconds, about

    def __init__(self, device: "Device"):
        self.device, self.came, self.steps = device, False, 0
        self.restart()
        hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []  # nohup ignores it, and so does this then
        self.numbers = [signal.SIGINT, signal.SIGTERM, *hangup]
        for number in self.numbers:
            signal.signal(number, self.note)

    def restart(self):
        """From here on a step may take another time."""
        self.last, self.next, self.clock = self.steps, 0, time.perf_counter()  # steps when the ranks last met, when they meet again

    def note(self, *_):
        self.came = True

    def given(self, meeting: bool) -> bool:
        """Whether a rank has been told to stop. To be asked by every rank after every step; with `meeting` they tell each other now."""
        self.steps += 1
        if self.device.ranks == 1:
            return self.came
        if self.steps < self.next and not meeting:
            return False
        came, seconds = self.device.sum([float(self.came), time.perf_counter() - self.clock])
        per_step = seconds / self.device.ranks / (self.steps - self.last)
        self.last, self.next, self.clock = self.steps, self.steps + max(1, int(self.EVERY / per_step)), time.perf_counter()
        return came > 0

    def close(self):
        """From here on each ends the process at once, as usual."""
        for number in self.numbers:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


class Device:
    """Where this process computes, in which precision (of DTYPES), and how it talks to the other ranks of a torchrun."""

    def __init__(self, name: str | None, dtype: str | None = None):
        self.ranks, self.rank = int(os.environ.get("WORLD_SIZE") or 1), int(os.environ.get("RANK") or 0)
        if self.ranks > 1 and "RANK" not in os.environ:
            raise InputError(f"WORLD_SIZE is {self.ranks}, but RANK is not set: start with torchrun, or unset WORLD_SIZE")
        self.claimed: int | None = None  # the folder that this process alone may write
        self.torch = choose_device(name)
        self.dtype = DTYPES[dtype or ("bf16" if has_bf16(self.torch) else "fp32")]
        if self.torch.type == "cpu":
            keep_freed_memory()
        if self.ranks > 1:
            cuda = self.torch.type == "cuda"
            dist.init_process_group("nccl" if cuda else "gloo", device_id=self.torch if cuda else None)

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, failed, *_):
        """Leave the other ranks. When all went well a rank ends here, without Python's finalization: there it has happened, on a busy
        machine, that one of gloo's threads wanted Python once more and aborted a process whose work was done."""
        if self.claimed is not None:
            os.close(self.claimed)
        if self.ranks > 1:
            # Together, when all is well. After a failure the others are elsewhere, and NCCL would wait for them: torchrun ends them.
            if failed in (None, SystemExit) or self.torch.type != "cuda":
                self.leave()
            if failed is None:
                sys.stdout.flush()
                os._exit(0)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.torch) if self.torch.type == "cuda" else self.torch.type
        name += f" ({torch.get_num_threads()} threads)" if self.torch.type == "cpu" else ""
        precision = "bf16 matrix products over fp32 weights" if self.dtype == torch.bfloat16 else "fp32"
        precision += ", which is only imitated here: fp32 is faster" if self.imitates() else ""
        return f"{self.ranks} x {name}, {precision}"

    def leave(self):
        """Leave the other ranks, all at once: from here on each is alone."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def imitates(self) -> bool:
        return self.dtype == torch.bfloat16 and not has_bf16(self.torch)

    def claim(self, folder: Path):
        """Keep other runs out of a folder as long as this one goes on. Raises InputError in the first rank when one is in it."""
        if self.rank == 0:
            self.claimed = lock_folder(folder)

    def say(self, *text, **options):
        """print() of the first rank. When nobody reads any more (`| head`, a closed terminal) it is as if Ctrl-C had been pressed."""
        if self.rank == 0:
            try:
                print(*text, **options)
            except OSError as problem:
                if problem.errno not in (errno.EPIPE, errno.EIO):
                    raise
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                signal.raise_signal(signal.SIGINT)

    def autocast(self):
        return torch.autocast(self.torch.type, torch.bfloat16) if self.dtype == torch.bfloat16 else nullcontext()

    def parallel(self, model):
        """The model whose backward pass averages gradients over the ranks; the model itself when there is one rank."""
        if self.ranks == 1:
            return model
        # With bucket views DDP holds no second copy of the gradients, but for those of micro-steps before the last. Buffers never change.
        devices = [self.torch] if self.torch.type == "cuda" else None
        return DistributedDataParallel(model, devices, gradient_as_bucket_view=True, forward_sync_buffers=False)

    def put(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets [B, T] of windows [B, T + 1]."""
        tensor = torch.from_numpy(rows)
        tensor = tensor.pin_memory().to(self.torch, non_blocking=True) if self.torch.type == "cuda" else tensor.to(self.torch)
        return tensor[:, :-1].contiguous(), tensor[:, 1:].contiguous()

    def wait(self):
        """Until everything asked of the device is done, for honest times."""
        if self.torch.type == "cuda":
            torch.cuda.synchronize()
        elif self.torch.type == "mps":
            torch.mps.synchronize()

    def sum(self, numbers: list[float]) -> list[float]:
        """Each number summed over the ranks."""
        if self.ranks == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.torch)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def barrier(self):
        """Wait for the other ranks. Also the last thing to do before a process ends: after any other collective one of gloo's threads
        may still hold a tensor of Python's when the interpreter is gone, and abort."""
        if self.ranks > 1:
            dist.barrier()

    def peak_flops(self) -> tuple[float, str]:
        """(FLOP/s of dense matrix products that MFU is measured against, where the figure comes from)"""
        if self.torch.type == "cuda" and self.dtype == torch.bfloat16:
            for name, peak in PEAK_FLOPS.items():
                # An L40 is not an L4, and a part of an A100 or a card for laptops has its own peak.
                if re.search(rf"\b{name}\b(?!.*\b(MIG|Laptop|Max-Q|Ti|SUPER|D)\b)", torch.cuda.get_device_name(self.torch)):
                    return peak, "data sheet"
        size = 256 if self.imitates() else 2048  # which would take minutes
        a, best = torch.randn(size, size, device=self.torch).to(self.dtype), math.inf
        n = 1 if self.torch.type == "cpu" else 16  # products at a time: on a GPU one is over sooner than asking for it
        for _ in range(8):
            start = time.perf_counter()
            for _ in range(n):
                product = a @ a
            product[0, 0].item()  # waits for the device
            best = min(best, time.perf_counter() - start)
        return n * 2 * size**3 / best, "measured"
