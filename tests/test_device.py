"""Where a process computes."""

import platform
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

import device as device_module
from device import Device, StopNotice, choose_device
from scripts import InputError, out_of_memory

FAULTS = """
import resource, sys, torch
from device import Device
torch.ones(1)
if sys.argv[1] == "kept":
    Device("cpu")
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):  # small blocks between the large ones make the first of them take new places
    torch.ones(2**24)  # 64 MB
before = faults()
for _ in range(10):
    torch.ones(2**24)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")
def test_memory_of_freed_tensors_is_used_again():
    """Without a Device the system maps every new tensor page by page; with one the pages of the last one serve again."""
    faults = {}
    for way in ("kept", "returned"):
        run = subprocess.run([sys.executable, "-c", FAULTS, way], cwd=ROOT, capture_output=True, text=True, check=True)
        faults[way] = int(run.stdout)
    assert faults["kept"] < faults["returned"] / 10


def test_a_number_of_ranks_without_a_rank_is_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="WORLD_SIZE is 2, but RANK is not set: start with torchrun"):
        Device("cpu")


def test_several_processes_do_not_take_apple_s_gpu(monkeypatch):
    """torch.distributed has no collectives for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_device(None).type == "cpu"
    with pytest.raises(InputError, match="--device=mps is for one process, .*: start without torchrun"):
        choose_device("mps")


@pytest.mark.parametrize(("kind", "error", "leaves"), [("cuda", InputError, False), ("cuda", SystemExit, True), ("cpu", InputError, True)])
def test_a_rank_that_failed_does_not_wait_for_the_others(monkeypatch, kind, error, leaves):
    """NCCL's end takes all ranks, and these are in the middle of something: the message would never be read."""
    left = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    device = Device("cpu")
    device.ranks, device.torch = 2, torch.device(kind)
    with pytest.raises(error), device:
        raise error("because")
    assert bool(left) == leaves


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)  # fmt: skip
def test_a_card_has_the_peak_of_its_own_data_sheet(monkeypatch, name, peak):
    """Or none, and is measured."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "randn", lambda *sizes, device: (_ for _ in ()).throw(ZeroDivisionError))
    device = Device("cpu", "bf16")
    device.torch = torch.device("cuda")
    if peak is None:
        with pytest.raises(ZeroDivisionError):
            device.peak_flops()
    else:
        assert device.peak_flops() == (peak, "data sheet")


def test_a_precision_that_is_only_imitated_is_said_and_measured_briefly(monkeypatch):
    """A product of 2,048 x 2,048 numbers takes 20 s there."""
    sizes, make = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device: (sizes.append(size), make(64, 64))[1])
    for real in (True, False):
        monkeypatch.setattr(device_module, "has_bf16", lambda device, real=real: real)
        device = Device("cpu", "bf16")
        assert ("which is only imitated here: fp32 is faster" in str(device)) is not real
        device.peak_flops()
    assert sizes == [(2048, 2048), (256, 256)]
    assert "imitated" not in str(Device("cpu", "fp32"))


def test_memory_that_ran_out_is_known_by_its_words():
    assert out_of_memory(torch.OutOfMemoryError("CUDA")) and out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert out_of_memory(caught.value) and not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_run_under_nohup_does_not_hear_a_terminal_that_closes():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        StopNotice(Device("cpu")).close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop = StopNotice(Device("cpu"))
        signal.raise_signal(signal.SIGHUP)
        assert stop.given(True)
        stop.close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
