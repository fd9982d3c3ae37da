"""What opens can then draw: bundles with schedulers of another kind are refused, and say what to do."""

import diffusers
import pytest
import torch
from tiny import draw, random_dit, tiny_pipeline

from score_sde import ScoreSDEPipeline, ScoreSDEScheduler, load_bundle, save_bundle
from score_sde.sharing.bundle_checks import DRIVEN_SCHEDULERS, SCHEDULERS


def draws(scheduler):
    pipeline = ScoreSDEPipeline(scheduler, transformer=random_dit())
    pipeline.set_progress_bar_config(disable=True)
    try:
        images = pipeline(
            class_labels=[1], num_inference_steps=10, generator=torch.Generator().manual_seed(0), output_type="latent"
        ).images
    except Exception:  # of whatever kind
        return False
    return bool(torch.isfinite(images).all())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", sorted({*SCHEDULERS} - {"ScoreSDEScheduler", "DiscreteScoreScheduler"}))
def test_the_schedulers_that_open_are_those_by_which_a_pipeline_draws(name):
    try:
        scheduler = getattr(diffusers.schedulers, name)()
    except TypeError:  # it needs a number of tokens, or the like
        scheduler = None
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    assert (scheduler is not None and draws(scheduler)) == (name in DRIVEN_SCHEDULERS)


@pytest.mark.parametrize(
    "scheduler",
    [diffusers.VQDiffusionScheduler(5), diffusers.HeliosScheduler(), diffusers.KarrasVeScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_of_another_kind_is_refused_at_opening(tmp_path, scheduler):
    ScoreSDEPipeline(scheduler, transformer=random_dit()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="(cannot draw by|'scheduler' is) a .*: pass .*scheduler="):
        load_bundle(tmp_path)
    ours = ScoreSDEScheduler(prediction_type="v_prediction")
    torch.testing.assert_close(draw(load_bundle(tmp_path, scheduler=ours)), draw(tiny_pipeline()), rtol=0, atol=1e-5)


def test_a_missing_variant_is_said_as_diffusers_says_it(tmp_path):
    stock = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(sample_size=8, block_out_channels=(32,) * 4), ScoreSDEScheduler()
    )
    stock.save_pretrained(tmp_path / "stock")
    save_bundle(tiny_pipeline(), tmp_path / "bundle")
    with pytest.raises(ValueError) as theirs:
        diffusers.DDPMPipeline.from_pretrained(tmp_path / "stock", variant="fp16")
    with pytest.raises(ValueError) as ours:
        load_bundle(tmp_path / "bundle", variant="fp16")
    assert str(ours.value).startswith(str(theirs.value)) and "load it without variant" in str(ours.value)
