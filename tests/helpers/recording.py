"""What a training run shows its network, and where it holds a whole one: written down while the real code runs."""

from contextlib import contextmanager
from unittest import mock

import torch

from score_sde.models import transformer_score_dit, unet_score
from score_sde.training.parts.averages import Averages


@contextmanager
def recorded_run():
    """{"times": those that networks embed in training, before anything is made of them; "frequencies": the dtypes of
    random ones; "whole": at every time the averages were asked for, whether a whole network was in this process}."""
    record = {"times": [], "frequencies": [], "whole": []}

    def embed(timestep, *arguments, original=transformer_score_dit.get_timestep_embedding, **options):
        if torch.is_grad_enabled() and timestep.device.type != "meta":
            record["times"] += timestep.tolist()
        return original(timestep, *arguments, **options)

    def embed_fourier(self, timestep, original=unet_score.FourierEmbedding.forward):
        if torch.is_grad_enabled() and timestep.device.type != "meta":
            record["times"] += timestep.tolist()
            record["frequencies"].append(str(self.weight.dtype))
        return original(self, timestep)

    def publish(self, original=Averages.publish):
        network = original(self)
        record["whole"].append(network is not None)
        return network

    with (
        mock.patch.object(transformer_score_dit, "get_timestep_embedding", embed),
        mock.patch.object(unet_score, "get_timestep_embedding", embed),
        mock.patch.object(unet_score.FourierEmbedding, "forward", embed_fourier),
        mock.patch.object(Averages, "publish", publish),
    ):
        yield record
