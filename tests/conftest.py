"""Shared by all tests: training scripts and benchmarks are importable; no test needs the network or a second thread."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hub.server import LocalHub


os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("training", "benchmarks")]
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
