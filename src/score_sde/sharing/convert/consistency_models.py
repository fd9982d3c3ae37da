"""Checkpoints of openai/consistency_models (Song et al. 2023), whose networks are ADM's."""

import os

from ...models.unet_score import ScoreUNetModel
from ...pipelines import ScoreSDEPipeline
from ...pipelines.wording import check_choice
from ...schedulers.scheduling_score_sde import ScoreSDEScheduler
from .checkpoints import fill, read_checkpoint, tensors
from .guided_diffusion import guided_diffusion_table


# of the weights that the authors released
LICENSE = "mit"
# a network of `ScoreUNetModel.from_name`, and what is other in it
CM_NETWORKS = {
    "imagenet64": ("ADM-64", {"dropout": 0.0}),
    "lsun256": ("ADM-256", {"resnet_time_scale_shift": "default", "num_classes": None}),
}


def unet_from_consistency_models(path, network, num_train_timesteps=40, **network_kwargs):
    """A `ScoreUNetModel` and its `ScoreSDEScheduler` from a checkpoint of openai/consistency_models.

    Args:
        path: a released file, such as cd_imagenet64_lpips.pt.
        network: "imagenet64" or "lsun256"; `network_kwargs` are arguments that differ, such as num_classes=None.
        num_train_timesteps: number of levels: 40 of the distilled ones (cd), 201 of ct_imagenet64, 151 of those that
            were trained on LSUN (ct).

    Returns:
        (model, scheduler): the scheduler is that of diffusers' CMStochasticIterativeScheduler. Raises ValueError for a
        file that is not such a checkpoint, with what is wrong.
    """
    check_choice("network", network, CM_NETWORKS)
    name, own = CM_NETWORKS[network]
    state = tensors(read_checkpoint(path), f"{os.path.basename(path)} is no checkpoint of consistency_models")
    # no label stands for none
    model = ScoreUNetModel.from_name(name, **({"class_dropout_prob": 0.0, "learn_sigma": False} | own | network_kwargs))
    model = fill(model, guided_diffusion_table(model, new_attention_order=True), state, os.path.basename(path))
    config = {"_class_name": "CMStochasticIterativeScheduler", "num_train_timesteps": num_train_timesteps}
    return model, ScoreSDEScheduler.from_config(config)


def pipeline_from_consistency_models(path, network, **arguments):
    """A `ScoreSDEPipeline` from a checkpoint of consistency_models, by the arguments of
    `unet_from_consistency_models`."""
    model, scheduler = unet_from_consistency_models(path, network, **arguments)
    return ScoreSDEPipeline(scheduler, unet=model)
