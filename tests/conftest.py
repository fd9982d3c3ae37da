"""Shared by all tests: training scripts and benchmarks are importable; no test needs the network or a second thread."""

import os
import sys
from pathlib import Path

import torch


os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("training", "benchmarks")]
# the tensors are tiny
torch.set_num_threads(1)
