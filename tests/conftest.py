"""Shared by all tests: no test needs the network or a second thread."""

import os

import pytest
import torch
from hub.server import LocalHub

from runs import forget_runs


os.environ["HF_HUB_OFFLINE"] = "1"
# of the processes that tests start: on all cores at once, two threads for each would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"
# the tensors are tiny
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def running_hub():
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def local_hub(running_hub):
    """An empty Hub on this machine, and processes that use it: see `hub.server`."""
    running_hub.reset()
    return running_hub


@pytest.fixture(autouse=True)
def fresh_process():
    """Scripts run one after another in this process as if each had its own."""
    forget_runs()
