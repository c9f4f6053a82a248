"""The allocator of a training process: what it holds, that it mixes nothing up, and what it does without memory.

Each test has a process of its own: an allocator is for good.
"""

import os
import subprocess
import sys

import pytest
from burnish.harness import allocator

MIB = 2**20
START = """
import ctypes, gc, random, resource, sys
import torch
from burnish.harness.allocator import give_back_freed_memory, keep_freed_memory, keep_heap, pool
from burnish.harness.resident import bytes_now, peak_bytes, reset_peak
MIB = 2**20

def block(mib):
    return torch.empty(int(mib * MIB), dtype=torch.uint8)

def pool_bytes():
    counts = (ctypes.c_int64 * 3)()
    pool().allocator_count(counts)
    return tuple(counts)

keep_freed_memory()
"""
needs_pool = pytest.mark.skipif(allocator.pool() is None, reason="no C++ compiler")


def run(code):
    command = [sys.executable, "-c", START + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_glibc_accepts_the_allocator_settings():
    has_glibc = sys.platform.startswith("linux") and "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    assert run("print(keep_heap())") == [str(has_glibc)]


@needs_pool
def test_tensors_keep_their_values_and_no_more_is_held_than_was_in_use():
    """Random sizes on both sides of the limit between heap and pool, freed in random order."""
    code = """
assert (block(8).fill_(1) == 1).all()  # what the first operations load and start is no memory of tensors
rng, held, start, small = random.Random(0), [], bytes_now("cpu"), 0
reset_peak("cpu")
for turn in range(3000):
    if held and (rng.random() < 0.5 or sum(len(tensor) for tensor, _ in held) > 200 * MIB):
        tensor, value = held.pop(rng.randrange(len(held)))
        assert (tensor == value).all(), turn
    else:
        tensor = block(rng.choice([0.01, 0.9, 1, 1.5, 3.3, 8, 20, 45]) * rng.uniform(0.9, 1.1))
        held.append((tensor.fill_(turn % 251), turn % 251))
    del tensor
    used, kept, most = pool_bytes()
    assert used + kept <= most, (used, kept, most)
    large = sum(len(tensor) for tensor, _ in held if len(tensor) >= MIB)
    small = max(small, sum(len(tensor) for tensor, _ in held) - large)
    assert large <= used <= large + 4096 * len(held)
assert all((tensor == value).all() for tensor, value in held)
print(most, small, peak_bytes("cpu") - start)
"""
    most, small, peak = map(int, run(code))
    assert 150 * MIB < most < 300 * MIB
    assert peak - most < 2 * small + 24 * MIB  # the heap, where holes are not given back, and the interpreter


@needs_pool
def test_a_step_like_the_last_one_faults_in_nothing():
    code = """
def step():
    saved = []
    for _ in range(8):
        working = [block(size).fill_(1) for size in (3, 7, 11)]
        saved.append(block(5).fill_(1))
        del working
    while saved:
        saved.pop()
        block(12).fill_(1)

step()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, *pool_bytes())
"""
    faults, used, kept, most = map(int, run(code))
    assert faults * 4096 < 0.05 * (8 * 26 + 8 * 12) * MIB
    assert used == 0
    assert most - MIB < kept <= most
    assert most == (7 * 5 + 26) * MIB


@needs_pool
def test_what_is_kept_can_be_given_back():
    code = """
one, two = block(100).fill_(1), block(50).fill_(1)
before = bytes_now("cpu")
del one
give_back_freed_memory("cpu")
print(before - bytes_now("cpu"), *pool_bytes())
"""
    freed, used, kept, most = map(int, run(code))
    assert freed > 99 * MIB
    assert (used, kept, most) == (50 * MIB, 0, 50 * MIB)


@needs_pool
def test_too_large_a_request_is_an_error_that_names_memory_and_harms_nothing():
    code = """
one, two = block(60).fill_(7), block(40)
del two
now = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (now + 20 * MIB, now + 20 * MIB))
try:
    block(500)
except RuntimeError as error:
    print("t allocate memory" in str(error))
assert (one == 7).all()
print(len(block(50)) // MIB, pool_bytes()[0] // MIB)
"""
    assert run(code) == ["True", "50", "60"]


@needs_pool
def test_the_profiler_sees_what_the_pool_gives_out():
    code = """
from burnish.harness.live_bytes import live_bytes
line = live_bytes(lambda mark: (block(3), [block(2), block(5)]))
print(int(line.live.max()) // MIB, int(line.live[-1]))
"""
    assert run(code) == ["10", "0"]


@needs_pool
def test_reshaped_shared_and_resized_tensors_work():
    code = """
tensor = torch.zeros(4 * MIB, dtype=torch.uint8)
tensor.untyped_storage().resize_(9 * MIB)
tensor.untyped_storage().resize_(0)
shared = torch.ones(3 * MIB, dtype=torch.uint8).share_memory_()
array = torch.ones(2 * MIB, dtype=torch.uint8).numpy()
gc.collect()
print(int(shared.sum(dtype=torch.int64)) // MIB, int(array.sum(dtype="int64")) // MIB)
"""
    assert run(code) == ["3", "2"]
