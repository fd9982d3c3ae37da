"""Processes that load data, which end by the word of their parent alone."""

import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager

import torch


# whether a process can tell whose signal it got (Linux); where it cannot, the signals of others end it
TELLS_SENDERS = hasattr(signal, "sigwaitinfo")


class DataLoader(torch.utils.data.DataLoader):
    """torch's, whose processes outlive the SIGTERM and SIGINT that a scheduler, `timeout`, or Ctrl-C sends to a whole
    group of processes: their parent decides what it means, and may need further batches.

    They end when the parent says so, as it does at its own end, and within seconds of its death: torch has them look.
    """

    def __init__(self, dataset, workers, accelerator, **batches):
        pin_memory = accelerator.device.type == "cuda"
        super().__init__(dataset, num_workers=workers, pin_memory=pin_memory, worker_init_fn=obey_parent, **batches)

    def __iter__(self):
        with held_back(signal.SIGTERM, signal.SIGINT):  # in processes that begin, until they obey
            return super().__iter__()


@contextmanager
def held_back(*numbers):
    """Let this thread, and processes that it forks, receive signals later."""
    if not TELLS_SENDERS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent(_):
    """Let this process, a worker, go on at SIGINT, and at the SIGTERM of any other than its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if TELLS_SENDERS:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_by_parent, args=(os.getppid(),), daemon=True).start()


def end_by_parent(started_by):
    """End this process at the first SIGTERM of its parent, or of anyone once the process that started it is gone."""
    parent = multiprocessing.parent_process().pid  # not always the one that started it: forkserver
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent and os.getppid() == started_by:
        pass
    os._exit(0)
