"""What the numbers that go into a network and come out of it mean: the time it is told, the input it is given, and the
denoised sample that its output stands for. The rows are in `paths`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .domains import Domain
from .paths import SCALED_INPUT, Path, as_time, expand_all, expand_to, is_one, network_time, path_time, prediction, sent


@dataclass(frozen=True)
class Parameterization:
    """A network's convention on a path.

    prediction_type, sigma_data: see `paths.prediction`.
    time_input, time_scale, time_offset: see `paths.network_time`.
    limit: f(denoised) -> denoised, which clips or thresholds where configured.
    domain: where samples live; None for flat space.
    """

    path: Path
    prediction_type: str
    sigma_data: float
    time_input: str
    time_scale: float
    time_offset: float
    limit: Callable[[torch.Tensor], torch.Tensor]
    domain: Domain | None = None

    def row(self, t):
        """The `Prediction` at path times t."""
        return prediction(self.path, self.prediction_type, t, self.sigma_data)

    def timestep(self, t):
        """The number that the network receives as time at path time t: float32, the shape of t."""
        return network_time(self.path, t, self.time_input, self.time_scale, self.time_offset).to(torch.float32)

    def path_time(self, timesteps):
        """Path time in [0, 1], float64, of the number(s) that the network receives."""
        return path_time(self.path, timesteps, self.time_input, self.time_scale, self.time_offset)

    def scaled(self, x, input_scale):
        """The input of the network for samples x, by the input_scale of the row, shaped to go with x."""
        return input_scale * x if self.prediction_type in SCALED_INPUT else x

    def denoiser(self, network, limited=True):
        """The network as a function f(x, t) -> denoised samples: see `ScoreSDEScheduler.denoiser`."""

        def denoise(x, t):
            t = as_time(t)
            if t.ndim and is_one(t):
                t = t[0]
            a, b, input_scale = expand_all(self.row(t), x)
            if self.domain is not None:
                score = network(self.domain.wrap(x), per_sample(self.timestep(t), x))
                return x + b * self.domain.lifted(x, score)
            output = network(self.scaled(x, input_scale), per_sample(self.timestep(t), x))
            denoised = a * x + b * output[:, : x.shape[1]]
            return self.limit(denoised) if limited else denoised

        return denoise

    def steered(self, network, steer, path_time):
        """A network whose denoised samples are `steer(x, t, denoise)`: see `ScoreSDEScheduler.steered`; `path_time` is
        f(timesteps) -> path times."""

        def call(model_input, timesteps):
            t, variance = path_time(timesteps), None
            a, b, input_scale = expand_all(self.row(t), model_input)
            x = model_input / input_scale if self.prediction_type in SCALED_INPUT else model_input

            def remember_variance(model_input, timesteps):
                nonlocal variance
                output = network(model_input, timesteps)
                variance = output[:, x.shape[1] :].detach()
                return output

            denoised = steer(x, t, self.denoiser(remember_variance, limited=False))
            output = (denoised - a * x) / b
            return torch.cat([output, variance], dim=1)

        return call


def per_sample(numbers, x):
    """Numbers () or (B,) as float32 (B,) on the device of samples x (B, ...)."""
    if is_one(numbers):
        # an argument of a kernel, which nobody waits for
        return torch.full((len(x),), float(numbers.reshape(-1)[0]), device=x.device)
    return sent(numbers, x.device, torch.float32).expand(len(x))


def threshold(denoised, ratio, largest):
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): the `ratio`-quantile of a sample's magnitude, between 1
    and `largest`, becomes 1."""
    magnitude = torch.quantile(denoised.flatten(1).abs(), ratio, dim=1)
    limit = expand_to(magnitude.clamp(1, largest), denoised)
    return torch.minimum(torch.maximum(denoised, -limit), limit) / limit
