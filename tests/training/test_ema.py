"""Averages of weights: power-function profiles, reconstruction after training, several averages in one run."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from runs import equal, train_tiny
from score_sde import load_bundle
from score_sde.ema import PowerFunctionEMA, gamma_of, inner_product, reconstruction_weights, sigma_rel_of
from score_sde.training import reconstruct_ema
from score_sde.training.parts import averages
from score_sde.training.parts.checkpoints import read_state


def test_gamma_and_sigma_rel_are_inverse():
    # the paper's: 5 % and 10 % of the training time are gamma = 16.97 and 6.94
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)
    for gamma in (1e-3, 0.5, 1.0, 7.0, 40.0, 1e4):
        assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, rel=1e-9)
    for sigma_rel in (0.0, -0.1, 0.2887, 0.5, math.nan):
        with pytest.raises(ValueError, match=r"sigma_rel .* must lie in \(0, 0.2887\)"):
            gamma_of(sigma_rel)


def test_sigma_rel_is_the_standard_deviation_of_the_profile():
    for gamma in (0.3, 2.0, 16.97):
        s = (np.arange(200_000) + 0.5) / 200_000
        profile = (gamma + 1) * s**gamma
        mean = (profile * s).mean()
        assert sigma_rel_of(gamma) == pytest.approx(((profile * (s - mean) ** 2).mean()) ** 0.5, rel=1e-5)


def test_inner_products_are_the_integrals():
    s = (torch.arange(400_000, dtype=torch.float64) + 0.5) * 5 / 400_000
    cases = torch.tensor([[5.0, 2.0, 3.0, 0.5], [3.0, 0.5, 5.0, 2.0], [4.0, 7.0, 4.0, 16.0]], dtype=torch.float64)
    for t, gamma, other_t, other_gamma in cases:
        p, q = ((g + 1) * s**g / u ** (g + 1) * (s <= u) for u, g in ((t, gamma), (other_t, other_gamma)))
        expected = (p * q).sum() * 5 / 400_000
        assert inner_product(t, gamma, other_t, other_gamma) == pytest.approx(float(expected), rel=1e-4)


def trajectory(steps, seed=0):
    """A random walk with a drift, as of weights in training, (steps, 64)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, 64, generator=generator, dtype=torch.float64)
    return 0.05 * noise.cumsum(0) + torch.linspace(0, 3, steps, dtype=torch.float64)[:, None].sqrt()


def run_average(points, sigma_rel, steps=()):
    """The power-function average of a trajectory, and its values at some steps."""
    parameter = torch.nn.Parameter(torch.zeros_like(points[0]))
    ema, values = PowerFunctionEMA([parameter], sigma_rel), {}
    for step, point in enumerate(points, start=1):
        parameter.data.copy_(point)
        ema.step([parameter])
        values[step] = ema.shadow_params[0].clone()
    return values[len(points)], {step: values[step] for step in steps}


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_the_average_is_the_integral_of_the_profile(sigma_rel):
    points, gamma = trajectory(50), gamma_of(sigma_rel)
    edges = (torch.arange(51, dtype=torch.float64) / 50) ** (gamma + 1)
    assert (run_average(points, sigma_rel)[0] - edges.diff() @ points).abs().max() < 1e-12


def test_a_stored_average_is_reconstructed_exactly():
    steps = [40, 40, 80, 80, 120, 120]
    for i, (step, sigma_rel) in enumerate(zip(steps, [0.05, 0.1] * 3, strict=True)):
        weights, error = reconstruction_weights(steps, [0.05, 0.1] * 3, step, sigma_rel)
        assert (weights - torch.eye(6, dtype=torch.float64)[i]).abs().max() < 1e-8
        assert error < 1e-6


@pytest.mark.parametrize(("sigma_rel", "step"), [(0.07, 100), (0.25, 100), (0.2, 70)])
def test_the_error_of_a_reconstruction_is_what_is_left_of_the_profile(sigma_rel, step):
    """Integrated by hand, over the profile's own norm."""
    steps, widths = [40, 40, step, step], [0.05, 0.1, 0.05, 0.1]
    weights, error = reconstruction_weights(steps, widths, step, sigma_rel)
    s = (np.arange(200_000) + 0.5) * step / 200_000

    def profile(t, width):
        gamma = gamma_of(width)
        return np.where(s <= t, (gamma + 1) / t * (s / t) ** gamma, 0)

    own = profile(step, sigma_rel)
    left = own - sum(
        float(w) * profile(*each) for w, each in zip(weights, zip(steps, widths, strict=True), strict=True)
    )
    assert error == pytest.approx((np.square(left).sum() / np.square(own).sum()) ** 0.5, rel=1e-3)
    assert 0.01 < error < 1


@pytest.mark.parametrize(("sigma_rel", "step"), [(0.07, 500), (0.03, 500), (0.15, 500), (0.2, 500), (0.08, 325)])
def test_other_lengths_are_reconstructed_from_snapshots(sigma_rel, step):
    """Far nearer to the average that was run beside than the nearest that was stored is."""
    points, stored = trajectory(500), range(25, 501, 25)
    averages = {width: run_average(points, width, stored)[1] for width in (0.05, 0.1)}
    used = [(s, width) for s in stored for width in averages if s <= step]
    weights, error = reconstruction_weights(*zip(*used, strict=True), step, sigma_rel)
    expected, _ = run_average(points[:step], sigma_rel)
    found = sum(w * averages[width][s] for w, (s, width) in zip(weights, used, strict=True))
    nearest = min((averages[width][step] - expected).norm() for width in averages)
    assert weights.sum() == pytest.approx(1, abs=2e-3)
    assert (found - expected).norm() < 0.1 * nearest
    assert error < 0.03


# --- in a run -----------------------------------------------------------------------------------------------------

SEVERAL = ["--ema_decay", 0.9, "--further_ema_decays", 0.5, 0.99, "--ema_snapshot_steps", 2]


def test_every_average_of_a_run_is_the_one_run_beside(tmp_path):
    """From the weights of each step, which checkpoints hold."""
    train_tiny(tmp_path, *SEVERAL, "--max_train_steps", 5, "--checkpointing_steps", 1, "--checkpoints_total_limit", 9)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    trained = [load_file(folder / "model.safetensors") for folder in folders]
    name = "time_embed.0.weight"
    parameter = torch.nn.Parameter(torch.zeros_like(trained[0][name]))
    beside = {"ema": EMAModel([parameter], decay=0.9), "ema-decay-0.5": EMAModel([parameter], decay=0.5)}
    beside |= {f"ema-sigma_rel-{width:g}": PowerFunctionEMA([parameter], width) for width in (0.05, 0.1)}
    for step, folder in enumerate(folders):
        parameter.data.copy_(trained[step][name])
        for file, ema in beside.items():
            ema.step([parameter])
            stored = load_file(folder / f"{file}.safetensors")[name]
            assert (stored - ema.shadow_params[0]).abs().max() < 1e-6
    assert not torch.equal(stored, trained[-1][name])
    snapshots = [(step, width) for step, width, _ in averages.list_snapshots(tmp_path)]
    assert snapshots == [(2, 0.05), (2, 0.1), (4, 0.05), (4, 0.1)]
    _, _, path = averages.list_snapshots(tmp_path)[3]
    assert equal(load_file(path), load_file(folders[3] / "ema-sigma_rel-0.1.safetensors"))


def test_all_averages_survive_a_resume_bit_for_bit(tmp_path):
    arguments = [*SEVERAL, "--checkpointing_steps", 3]
    train_tiny(tmp_path / "whole", *arguments, "--max_train_steps", 6)
    train_tiny(tmp_path / "parts", *arguments, "--max_train_steps", 3)
    train_tiny(tmp_path / "parts", *arguments, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*ema*/*.safetensors")]
    files += [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*06/ema*.safetensors")]
    assert len(files) == 6 + 5
    for file in files:
        assert equal(load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)), file


def weights_of(pipeline_folder):
    return dict(load_bundle(pipeline_folder).transformer.named_parameters())


def test_a_pipeline_is_published_with_another_average(tmp_path, capsys):
    train_tiny(tmp_path, *SEVERAL, "--max_train_steps", 6, "--checkpointing_steps", 6)
    checkpoint = tmp_path / "checkpoints" / "step-00000006"
    output = str(tmp_path / "other")
    reconstruct_ema.main([str(tmp_path), "--decay", "0.5", "--output", output])
    assert equal(weights_of(output), load_file(checkpoint / "ema-decay-0.5.safetensors"))
    assert json.loads((tmp_path / "other" / "training.json").read_text())["config"]["ema_decay"] == 0.5
    card = tmp_path / "pipeline" / "training.json"
    facts = card.read_text()
    assert (
        json.loads((tmp_path / "other" / "training.json").read_text()).items()
        >= {key: json.loads(facts)[key] for key in ("steps", "images_seen", "final_loss", "train_seconds")}.items()
    )
    card.write_text(json.dumps(json.loads(facts) | {"run_id": "another"}))
    with pytest.raises(SystemExit):
        reconstruct_ema.main([str(tmp_path), "--decay", "0.5", "--output", output])
    assert "step-00000006 is of another run, " in capsys.readouterr().err
    card.write_text(facts)

    # a stored profile comes back, up to the rounding to float32
    for step, sigma_rel in ((6, 0.1), (4, 0.05)):
        arguments = ["--sigma_rel", str(sigma_rel), "--step", str(step), "--output", output]
        reconstruct_ema.main([str(tmp_path), *arguments])
        stored = load_file(tmp_path / "ema_snapshots" / f"step-{step:08d}-sigma_rel-{sigma_rel:g}.safetensors")
        found = weights_of(output)
        assert max((found[name] - stored[name]).abs().max() for name in stored) < 1e-6
        assert f"sigma_rel {sigma_rel} at step {step}; relative error of the profile" in capsys.readouterr().out
        facts = json.loads((tmp_path / "other" / "training.json").read_text())
        assert (facts["steps"], facts["ema_sigma_rel"]) == (step, sigma_rel)
        assert ("images_seen" in facts, "ema_decay" in facts["config"]) == (step == 6, False)
    assert "EMA sigma_rel, reconstructed | 0.05" in (tmp_path / "other" / "README.md").read_text()


def test_another_average_is_of_the_step_of_its_checkpoint(tmp_path, capsys):
    """Where the last one could not be written: the pipeline is of a later step."""
    arguments = ["--ema_decay", 0.9, "--further_ema_decays", 0.5, "--checkpointing_steps", 1, "--logging_steps", 1]
    train_tiny(tmp_path, *arguments, "--max_train_steps", 3)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000003")
    reconstruct_ema.main([str(tmp_path), "--decay", "0.5", "--output", str(tmp_path / "other")])
    assert "decay 0.5 at step 2" in capsys.readouterr().out
    facts = json.loads((tmp_path / "other" / "training.json").read_text())
    progress = read_state(tmp_path / "checkpoints" / "step-00000002")["progress"]
    assert (facts["steps"], facts["images_seen"], facts["final_loss"]) == (2, 8, progress["loss"])
    assert facts["train_seconds"] == round(progress["seconds"], 1)
    assert "| optimizer steps | 2 |" in (tmp_path / "other" / "README.md").read_text()


def test_what_cannot_be_reconstructed_is_refused(tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit):
            reconstruct_ema.main([str(tmp_path), *arguments, "--output", str(tmp_path / "other")])
        return capsys.readouterr().err

    assert "holds no pipeline folder" in refused("--sigma_rel", "0.1")
    train_tiny(tmp_path, "--max_train_steps", 2, "--ema_snapshot_steps", 2)
    assert "sigma_rel 0.5 must lie in (0, 0.2887)" in refused("--sigma_rel", "0.5")
    assert "has snapshots up to step 2, not 3" in refused("--sigma_rel", "0.1", "--step", "3")
    assert "holds the decay 0.9; it kept []" in refused("--decay", "0.9")
    card = tmp_path / "pipeline" / "training.json"
    facts = card.read_text()
    card.write_text(json.dumps(json.loads(facts) | {"run_id": "another"}))
    assert "safetensors is of another run, " in refused("--sigma_rel", "0.1")
    card.write_text(facts)
    _, _, snapshot = averages.list_snapshots(tmp_path)[0]
    with open(snapshot, "r+b") as file:
        file.truncate(100)
    assert "safetensors is damaged (" in refused("--sigma_rel", "0.1")
    os.rename(tmp_path / "ema_snapshots", tmp_path / "elsewhere")
    assert "holds no ema_snapshots: train with --ema_snapshot_steps" in refused("--sigma_rel", "0.1")
    assert not (tmp_path / "other").exists()
