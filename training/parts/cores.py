"""How many of the machine's cores are free for a CPU's threads, and for processes that load data."""

import math
import os

import psutil
import torch


# processes that load data for a GPU, at most, of a dataset that doesn't say another number as its `most_workers`
MOST_WORKERS = 8


def own_cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def loading_processes(config, accelerator, dataset):
    """config.num_workers, or where that is None as many as suit: none on a CPU, which trains with all of its cores; for
    a GPU one less than there are cores for it, at most `MOST_WORKERS`, and no more than shared memory has room for."""
    if config.num_workers is not None:
        return config.num_workers
    if accelerator.device.type == "cpu":
        return 0
    cores = own_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # three batches of each, of float32: moments and their mirror images are the largest
    size = 3 * config.batch_size * 4 * 4 * math.prod(getattr(dataset, "shape", ()))
    shared = psutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
    most = getattr(dataset, "most_workers", MOST_WORKERS)
    return int(max(0, min(most, cores - 1, shared // size)))


def warn_of_busy_cores(accelerator):
    """Say so, once, where other programs leave fewer cores than there are threads on a CPU: these wait for one another,
    and one without a core makes all the others spin."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = processes * torch.get_num_threads()
    if accelerator.device.type != "cpu" or not accelerator.is_local_main_process or threads == processes:
        return
    own = own_cores()
    # what others use now, while this process waits; the share is that of all the machine's cores
    free = own * (1 - psutil.cpu_percent(interval=0.2) / 100)
    fitting = max(1, round(free) // processes)
    if torch.get_num_threads() > fitting:
        print(
            f"about {free:.0f} of {own} cores are free, for {threads} threads: a step may take many times as long as "
            f"with OMP_NUM_THREADS={fitting}"
        )
