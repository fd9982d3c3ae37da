"""The pretended CUDA device counts, and refuses, what a real one does."""

import pytest
import torch
from networks import small_dit, tiny_unet
from pretended_cuda import CUDA, PretendedCuda, generator


COUNTED = {
    "an operation": (lambda x: x + 1, (1, 0, 0)),
    "in place": (lambda x: x.add_(1), (1, 0, 0)),
    "a view": (lambda x: x[0, 1:].reshape(1, 2).expand(4, 2), (0, 0, 0)),
    "empty memory": (lambda x: torch.empty_like(x), (0, 0, 0)),
    "made there": (lambda x: torch.zeros(3, device=CUDA), (1, 0, 0)),
    "drawn there": (lambda x: torch.randn(3, device=CUDA, generator=generator()), (1, 0, 0)),
    "a number of the host": (lambda x: x * torch.tensor(2.0, dtype=torch.float64), (1, 0, 0)),
    "there already": (lambda x: x.to(CUDA), (0, 0, 0)),
    "sent": (lambda x: torch.ones(3).pin_memory().to(CUDA, non_blocking=True), (0, 1, 0)),
    "sent while the host waits": (lambda x: torch.ones(3).to(CUDA), (0, 1, 1)),
    "written down there": (lambda x: torch.tensor([1.0], device=CUDA), (0, 1, 1)),
    "sent in place": (lambda x: x.copy_(torch.ones(2, 3), non_blocking=True), (0, 1, 0)),
    "a list as an index": (lambda x: x[[0, 1]], (1, 1, 1)),
    "one value": (lambda x: x.max().item(), (2, 0, 1)),
    "a decision": (lambda x: bool((x > 2).any()), (3, 0, 1)),
    "a list": (lambda x: x.tolist(), (0, 0, 1)),
    "back": (lambda x: x.cpu(), (0, 0, 1)),
    "which": (lambda x: (x > 2).nonzero(), (2, 0, 1)),
    "those": (lambda x: x[x > 2], (2, 0, 1)),
    "the same?": (lambda x: torch.equal(x, x), (1, 0, 1)),
}


@pytest.mark.parametrize(("operation", "expected"), COUNTED.values(), ids=COUNTED)
def test_what_is_counted(operation, expected):
    with PretendedCuda() as cuda:
        x = torch.arange(6.0).reshape(2, 3).to(CUDA)
        with cuda.watched() as work:
            operation(x)
    assert work.counts == expected, work


@pytest.mark.parametrize(
    "mistake", [lambda x: x + torch.ones(3), lambda x: torch.cat([x, torch.ones(3)]), lambda x: x @ torch.ones(3)]
)
def test_two_devices_are_refused(mistake):
    with PretendedCuda(), pytest.raises(RuntimeError, match="same device"):
        mistake(torch.ones(3).to(CUDA))


@pytest.mark.parametrize("make", [small_dit, tiny_unet])
def test_networks_compute_there_what_they_compute_on_the_cpu(make):
    model, x, t, labels = make(), torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 2])

    def gradient(model, *inputs):
        model(*inputs[:2], class_labels=inputs[2]).sample.square().mean().backward()
        return next(model.parameters()).grad

    expected = gradient(model, x, t, labels)
    model.zero_grad()
    with PretendedCuda():
        found = gradient(model.to(CUDA), *(each.to(CUDA) for each in (x, t, labels)))
        assert found.is_cuda
        assert (found.cpu() - expected).abs().max() < 1e-5 * expected.abs().max()
