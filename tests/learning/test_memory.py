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
