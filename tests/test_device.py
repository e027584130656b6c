"""Where a process computes."""

import platform
import subprocess
import sys

import pytest
from conftest import ROOT

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
