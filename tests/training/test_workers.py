"""Processes that load data: whose signals they obey, and that they end."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from accelerate import Accelerator

from score_sde.training.parts.workers import DataLoader


def begun():
    """An iterator over numbers, with two processes that load them, and these."""
    iterator = iter(DataLoader(range(100_000), 2, Accelerator(cpu=True), batch_size=2))
    return iterator, [psutil.Process(worker.pid) for worker in iterator._workers]


def signal_of_another(name, workers):
    subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)


def test_signals_of_others_do_not_end_them():
    """The first comes while they begin, and more batches are asked for than were loaded before."""
    iterator, workers = begun()
    signal_of_another("TERM", workers)
    found = [next(iterator).tolist()]
    signal_of_another("INT", workers)
    signal_of_another("TERM", workers)
    time.sleep(0.2)
    found += [next(iterator).tolist() for _ in range(20)]
    assert found == [[2 * i, 2 * i + 1] for i in range(21)]
    assert all(worker.is_running() for worker in workers)
    # this process has its signals as before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}


def test_the_parent_ends_them():
    iterator, workers = begun()
    next(iterator)
    workers[0].terminate()
    assert workers[0].wait(10) in (0, None)
    del iterator
    assert psutil.wait_procs(workers, timeout=10)[1] == []


ENDS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "terminated": "os.kill(os.getpid(), signal.SIGTERM)",
    # the traceback keeps the iterator, and it the processes, until all is over
    "failed": "raise RuntimeError('it failed')",
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_they_end_with_their_parent_whatever_its_end(end):
    script = f"""
import os, signal
from test_workers import begun
def main():
    iterator, workers = begun()
    next(iterator)
    print(*(worker.pid for worker in workers), flush=True)
    {ENDS[end]}
main()
"""
    paths = [os.path.dirname(__file__), *sys.path]
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths))),
    )
    assert result.returncode == {"killed": -signal.SIGKILL, "terminated": -signal.SIGTERM, "failed": 1}[end]
    deadline = time.monotonic() + 30  # torch's look every 5 s
    while any(psutil.pid_exists(int(pid)) for pid in result.stdout.split()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
