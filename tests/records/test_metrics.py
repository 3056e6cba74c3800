"""What a generation cost, and many of them together."""

from __future__ import annotations

import pytest

from anabranch.records.metrics import Metrics, measure, overhead_of, summary


def of(sampled: int, in_threads: int, critical: int, blocks: tuple[int, ...] = (), **more) -> Metrics:
    more = dict(inserted=0, max_concurrency=1, longest_context=10) | more
    return measure(sampled=sampled, in_threads=in_threads, critical=critical, blocks=blocks, **more)


def test_ratios_of_one_answer():
    m = of(30, 20, 15, (2, 3), inserted=10)
    assert (m.total_tokens, m.num_forks, m.num_threads, m.threads_per_block) == (40, 2, 5, (2, 3))
    assert (m.acceleration_ratio, m.token_speedup, m.parallel_ratio) == (1 - 15 / 40, 40 / 15, 20 / 40)
    nothing = of(0, 0, 0)
    assert (nothing.acceleration_ratio, nothing.token_speedup, nothing.parallel_ratio) == (0.0, 1.0, 0.0)
    assert (nothing.trigger_rate, m.trigger_rate) == (0.0, 1.0)


def test_answers_count_by_their_tokens_and_peaks_are_the_highest():
    """A long answer weighs more in ratios of tokens than a short one; the highest peak need not be the last."""
    long = of(90, 60, 45, (3,), max_concurrency=3, longest_context=50, pages_peak=9, wall_seconds=3.0)
    short = of(10, 0, 10, well_formed=False, longest_context=20, pages_peak=4, wall_seconds=1.0)
    for answers in ([long, short], [short, long]):
        s = summary(answers)
        assert (s["answers"], s["total_tokens"], s["critical_path_tokens"]) == (2, 100, 55)
        assert s["parallel_ratio"] == pytest.approx(60 / 100)
        assert (s["acceleration_ratio"], s["token_speedup"]) == (pytest.approx(1 - 55 / 100), pytest.approx(100 / 55))
        assert (s["max_concurrency"], s["longest_context"], s["pages_peak"]) == (3, 50, 9)
        assert (s["trigger_rate"], s["format_correctness"], s["wall_seconds"]) == (0.5, 0.5, 2.0)
        assert (s["num_forks"], s["threads_per_block"]) == (1, 3)
    with pytest.raises(ValueError, match="no results"):
        summary([])


def test_overhead_is_what_deciding_takes_of_all_phases():
    seconds = {"prefill": 1.0, "decode": 5.0, "plan": 1.5, "strategy": 0.5, "sampling": 2.0}
    assert overhead_of(seconds) == (2.0, 0.2) and overhead_of({}) == (0, 0.0)
    s = summary([of(1, 0, 1, seconds=seconds), of(1, 0, 1, seconds={"prefill": 10.0})])
    assert (s["prefill_seconds"], s["overhead_seconds"], s["overhead"]) == (11.0, 2.0, 0.1)


def test_overhead_is_a_share_of_a_calls_time():
    seconds = {"prefill": 1.0, "decode": 2.0, "sampling": 0.5, "plan": 0.3, "strategy": 0.2}
    counts = dict(sampled=1, inserted=0, in_threads=0, critical=1, max_concurrency=1, longest_context=1)
    m = measure(blocks=[], seconds=seconds, **counts)
    assert m.overhead == pytest.approx(0.125)
