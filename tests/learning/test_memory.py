import subprocess
import sys

import psutil
import torch

from pipeline.learning.memory import largest, peak_memory


def test_the_peak_of_a_process_is_no_less_than_what_it_holds_now():
    peak = peak_memory(torch.device("cpu"))
    assert peak.keys() == {"memory/rank_peak_gib"}
    now = psutil.Process().memory_info().rss / 2**30
    # The kernel counts pages in batches, so the two may differ by a few megabytes.
    assert 0.95 * now <= peak["memory/rank_peak_gib"] < now + 64


def test_a_group_needs_what_its_largest_rank_needs():
    ranks = [{"memory/rank_peak_gib": r, "memory/device_peak_gib": d} for r, d in ((2.0, 7.0), (3.0, 5.0))]
    assert largest(ranks) == {"memory/rank_peak_gib": 3.0, "memory/device_peak_gib": 7.0}


PAGE_FAULTS = """
import resource, sys, torch
from pipeline.learning.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory(torch.device("cpu"))
def use():
    torch.zeros(64 * 2**20, dtype=torch.uint8).add_(1)
for _ in range(5):  # until the heap is as large as it has to be
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_that_is_kept_is_not_asked_for_again():
    """Ten tensors of 64 MiB, one after the other: 16,384 pages of 4 KiB each, or fewer large ones."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", PAGE_FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("kept", "returned")
    }
    assert faults["returned"] > 200
    assert faults["kept"] < faults["returned"] / 5
