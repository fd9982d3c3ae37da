"""The options of training on sound, videos and arrays: those of the objective and the loop as of images."""

from dataclasses import dataclass

import torch

from .config import LoopConfig, option
from .few_steps import DENOISING, FewStepConfig
from .networks import NetworkConfig, make_network
from .options import mapping
from .publishing import PublishConfig
from .routing import RoutingConfig, check_routing
from .signal_data import ArrayDataConfig, AudioDataConfig, SignalData, SignalSourceConfig, VideoDataConfig
from .starting import StartConfig
from .validation import HeldOutConfig, HeldOutLoss


@dataclass
class SignalTrainConfig(
    StartConfig,
    FewStepConfig,
    LoopConfig,
    SignalSourceConfig,
    RoutingConfig,
    HeldOutConfig,
    NetworkConfig,
    PublishConfig,
):
    configs = "diffusion"

    def problems(self):
        started = list(self.start_problems())
        yield from started
        if started:
            return
        yield from self.data_problems()
        yield from self.source_problems()
        yield from LoopConfig.problems(self)
        yield from self.held_out_problems()
        yield from self.routing_problems()
        yield from self.objective_problems()
        yield from self.publish_problems()
        labelled = self.class_conditional and self.label_column is not None
        options = mapping("network_kwargs", self.network_kwargs)
        guided = self.sample_guidance_scale != 1 and self.method == DENOISING
        if guided and (not labelled or options.get("class_dropout_prob") == 0):
            yield (
                f"sample_guidance_scale {self.sample_guidance_scale:g} needs classes, and a network that is trained "
                f"with a class_dropout_prob above 0: or sample with 1"
            )
        try:
            self.make_objective(self.make_scheduler())
            shape = self.known_shape()
            if shape is not None and not (self.latents or self.vae):
                with torch.device("meta"):  # without memory or time
                    network = make_network(self, shape, num_classes=1)
                if self.token_routing:
                    check_routing(network)
        except (TypeError, ValueError, RuntimeError) as error:
            yield str(error)

    def known_shape(self):
        """The shape of a sample where the options say it, else None."""
        return None

    def open_data(self, accelerator):
        return SignalData(self, accelerator)

    def open_validation(self, accelerator, task):
        if self.latents:
            raise ValueError("evaluation_steps needs data, which latents are not: pass --vae and --dataset instead")
        return HeldOutLoss(self, accelerator, task, self.open_rows(self.evaluation_split))


@dataclass
class AudioTrainConfig(SignalTrainConfig, AudioDataConfig):
    """Train a score-based diffusion model of sound."""

    data_kind: str = option("audio", "audio, or another kind, which has other options.", "data", common=True)

    def known_shape(self):
        return (self.audio_channels, self.length) if self.length > 0 else None


@dataclass
class VideoTrainConfig(SignalTrainConfig, VideoDataConfig):
    """Train a score-based diffusion model of videos."""

    data_kind: str = option("video", "video, or another kind, which has other options.", "data", common=True)

    def known_shape(self):
        return self.image_channels, self.frames, self.resolution, self.resolution


@dataclass
class ArrayTrainConfig(SignalTrainConfig, ArrayDataConfig):
    """Train a score-based diffusion model of arrays: signals, time series, fields, volumes."""

    data_kind: str = option("array", "array, or another kind, which has other options.", "data", common=True)


SIGNAL_KINDS = {"audio": AudioTrainConfig, "video": VideoTrainConfig, "array": ArrayTrainConfig}
