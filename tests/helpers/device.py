"""The device of the tests in tests/gpu. With SCORE_SDE_TEST_DEVICE=cpu the same tests run on the CPU, where they say
nothing of a GPU, but whether they are right."""

import copy
import os

import torch


DEVICE = torch.device(os.environ.get("SCORE_SDE_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"


def on_device(value):
    """A copy of a module, or a tensor, on the device."""
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else copy.deepcopy(value).to(DEVICE)


def difference(found, expected):
    """The largest difference of two tensors, relative to the largest value of the second."""
    assert found.shape == expected.shape
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).abs().max() / expected.abs().max())
