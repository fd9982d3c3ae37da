"""How many of the machine's cores are free for a CPU's threads."""

import os

import psutil
import torch


def warn_of_busy_cores(accelerator):
    """Say so, once, where other programs leave fewer cores than there are threads on a CPU: these wait for one another,
    and one without a core makes all the others spin."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = processes * torch.get_num_threads()
    if accelerator.device.type != "cpu" or not accelerator.is_local_main_process or threads == processes:
        return
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # what others use now, while this process waits; the share is that of all the machine's cores
    free = own * (1 - psutil.cpu_percent(interval=0.2) / 100)
    fitting = max(1, round(free) // processes)
    if torch.get_num_threads() > fitting:
        print(
            f"about {free:.0f} of {own} cores are free, for {threads} threads: a step may take many times as long as "
            f"with OMP_NUM_THREADS={fitting}"
        )
