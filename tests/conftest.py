"""Shared by all tests: the training scripts are importable; no test needs the network or more than one thread."""

import os
import sys
from pathlib import Path

import torch


os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
# the tensors are tiny
torch.set_num_threads(1)
