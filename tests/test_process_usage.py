"""What a program and the processes below it use."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time

from jobs.process_usage import Sample, UsageSampler, descendants

BURN = "import time\nwhile time.process_time() < 0.5: pass\nprint('burnt', flush=True)\ninput()"


def test_children_and_theirs_are_found() -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN!r}])"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"burnt\n"
        found = descendants(os.getpid())
        assert {os.getpid(), process.pid} < found
        assert len(descendants(process.pid)) == 2
        process.communicate(b"\n")
    assert process.pid not in descendants(os.getpid())


def test_the_work_of_children_counts_and_memory_is_seen() -> None:
    with UsageSampler(every_s=0.01, memory=True) as sampler:
        start = time.monotonic()
        with subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"burnt\n"
            looks = len(sampler.samples)
            while len(sampler.samples) < looks + 2:  # what a process does after the last look at it is lost
                time.sleep(0.01)
            process.communicate(b"\n")
        end = time.monotonic()
    usage = sampler.between(start - 1, end + 1)
    assert usage.ours_s - usage.driver_s > 0.4
    assert usage.machine_s > 0.4
    assert 10 < sampler.peak_mb < 100_000


def test_work_stays_counted_when_nobody_waits_for_who_did_it() -> None:
    with UsageSampler(every_s=0.01) as sampler:
        # The child ends first and is never waited for by its parent; then the parent ends.
        child = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {BURN!r}], stdin=-1); input()"
        with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"burnt\n"
            looks = len(sampler.samples)
            while len(sampler.samples) < looks + 2:
                time.sleep(0.01)
            process.kill()
    worked = [sample.ours_s for sample in sampler.samples]
    assert worked[-1] - worked[0] > 0.4
    assert all(later >= earlier - 0.05 for earlier, later in itertools.pairwise(worked))


def test_moments_between_samples_are_interpolated() -> None:
    sampler = UsageSampler()
    sampler.samples = [Sample(0, 0, 0, 0, 5), Sample(2, 4, 1, 10, 7), Sample(4, 4, 1, 20, 6)]
    usage = sampler.between(1, 3)
    assert (usage.wall_s, usage.ours_s, usage.driver_s, usage.machine_s) == (2, 2, 0.5, 10)
    assert usage.free_cores == (os.cpu_count() or 1) - 4
    assert sampler.peak_mb == 7
