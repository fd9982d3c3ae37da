"""Muon beside AdamW: which weights it takes, its step beside torch's, and what a run with it does."""

import pytest
import torch
from helpers.runs import equal, train_tiny
from safetensors.torch import load_file
from torch import nn

from score_sde import DiTModel, ScoreUNetModel
from score_sde.training.parts.optimizers import Muon, hidden_matrices, orthogonalized, square_parts


OPTIONS = {"lr": 0.02, "betas": (0.9, 0.999), "weight_decay": 0.1, "fused": True}


def test_the_step_of_a_matrix_is_that_of_torch():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in [(8, 8), (8, 8), (24, 8), (8, 24), (8,)]]
    theirs = [nn.Parameter(each.detach().clone()) for each in ours]
    muon = Muon(ours, ours[:4], torch.bfloat16, OPTIONS)
    beside = [
        torch.optim.Muon(theirs[:4], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[4:], **OPTIONS),
    ]
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in (muon, *beside):
            optimizer.step()
        for mine, other in zip(ours, theirs, strict=True):
            # of another order of sums in bfloat16
            assert torch.allclose(mine, other, atol=0.02 * 0.2 * 24**0.5 * 0.1)


def test_singular_values_come_near_one_in_each_part_of_a_stack():
    torch.manual_seed(0)
    gradient = torch.randn(40, 8) * torch.logspace(-2, 2, 5).repeat_interleave(8)[:, None]
    parts = square_parts(gradient)
    assert torch.equal(parts.reshape(40, 8), gradient) and parts.shape == (5, 8, 8)
    assert square_parts(torch.ones(32, 8)).shape == (1, 32, 8) and square_parts(torch.ones(42, 8)).shape == (1, 42, 8)
    for matrix in (parts, torch.randn(3, 8, 20), torch.randn(3, 20, 8)):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        found = torch.linalg.svdvals(orthogonalized(matrix))
        assert found.min() > 0.3 and found.max() < 1.3
        # the same directions
        assert torch.allclose(u.mT @ orthogonalized(matrix) @ vh.mT, torch.diag_embed(found), atol=0.5)


def test_what_is_not_finite_changes_nothing():
    matrix, vector = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
    optimizer = Muon([matrix, vector], [matrix], torch.float32, OPTIONS)
    before = matrix.detach().clone(), vector.detach().clone()
    for gradient, found in ((float("nan"), 1.0), (1.0, 0.0)):
        unchanged = torch.equal(matrix, before[0]), torch.equal(vector, before[1])
        assert unchanged == (True, True)
        matrix.grad, vector.grad = torch.full_like(matrix, gradient), torch.full_like(vector, gradient)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
        if found:
            assert not optimizer.state[matrix]["momentum_buffer"].any()
    assert not torch.equal(matrix, before[0]) and not torch.equal(vector, before[1])
    assert matrix.isfinite().all()


@pytest.mark.parametrize(
    ("network", "first", "last"),
    [
        (DiTModel(8, 2, 1, 24, 2, 2), "patch_embed", "proj_out"),
        (
            ScoreUNetModel(8, 1, block_out_channels=(8, 16), layers_per_block=1, attention_resolutions=()),
            "conv_in",
            "conv_out",
        ),
    ],
)
def test_the_layers_that_meet_the_data_are_left_to_adamw(network, first, last):
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    taken = {names[id(each)] for each in hidden_matrices(network)}
    assert taken and not any(name.startswith((first, last)) for name in taken)
    assert {
        name for name in names.values() if name.endswith(".weight") and network.get_parameter(name).ndim > 1
    } > taken
    network.requires_grad_(False)
    assert not hidden_matrices(network)


def test_a_run_with_muon_goes_on_bit_for_bit(tmp_path):
    options = ["--optimizer", "muon", "--checkpointing_steps", 2]
    whole = train_tiny(tmp_path / "whole", *options, "--max_train_steps", 4)
    train_tiny(tmp_path / "parts", *options, "--max_train_steps", 2)
    resumed = train_tiny(tmp_path / "parts", *options, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert equal(whole, resumed)
    last = tmp_path / "parts" / "checkpoints" / "step-00000004"
    state = torch.load(last / "optimizer.bin", weights_only=True)
    matrices = {index for index, each in state["state"].items() if "momentum_buffer" in each}
    assert matrices == set(state["param_groups"][1]["params"]) and load_file(last / "model.safetensors")
    with pytest.raises(ValueError, match="optimizer"):
        train_tiny(tmp_path / "parts", *options[2:], "--max_train_steps", 5, "--resume_from_checkpoint", "latest")
