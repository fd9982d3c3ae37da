"""Tests of one CUDA GPU: `pytest -m gpu`. Most compare it with the CPU, in float32."""

import pytest
import torch
from device import DEVICE, ON_GPU


@pytest.fixture(autouse=True)
def gpu():
    """A GPU that rounds as float32 does, and nothing left of what was compiled before."""
    if ON_GPU and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA")
    torch._dynamo.reset()
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield DEVICE
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
