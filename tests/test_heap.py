"""Freed memory stays, in large pages: seen in processes of their own, since it cannot be undone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
with_large_pages = pytest.mark.skipif(not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(),
                                      reason="this kernel gives no large pages")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")

CODE = """
import resource, sys, torch
from tralign_mini.heap import keep_freed_memory
weights = torch.nn.Linear(2**10, 2**13)  # 32 MiB
def large():  # MiB of this process in large pages
    with open("/proc/self/smaps") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages")) / 2**10
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def size():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 2**10
before = large(), size()
if sys.argv[1] == "keep":
    keep_freed_memory(weights)
print(large() - before[0], size() - before[1])
faults()
print(sum(faults() for _ in range(10)))
tensor = torch.ones(2**24)
print(large() - before[0])
"""


def seen(how: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def test_freed_memory_is_kept_for_the_next_tensor():
    pages = 2**14  # in 64 MiB. What is kept may lie badly aligned for the next one, so some faults remain
    assert seen("keep")[2] < 7 * pages and seen("default")[2] >= 10 * pages


@with_large_pages
def test_weights_and_new_tensors_lie_in_large_pages_and_take_no_more_memory():
    weights, more, faults, with_a_tensor = seen("keep")
    assert weights >= 28 and more < 4  # of 32 MiB: what the first and the last page hold of others stays
    assert faults < 2000 and with_a_tensor >= weights + 60
    assert seen("default")[0] == seen("default")[3] == 0
