"""Training objectives: a density over times and a denoising loss, both read off the scheduler that will sample."""

import torch

from .paths import expand_to, prediction, training_target


def uniform_times(scheduler, u):
    """t uniform in [t_min, t_max]."""
    return scheduler.t_min + (scheduler.t_max - scheduler.t_min) * u


def log_normal_times(scheduler, u, mean=-1.2, std=1.2):
    """log(sigma / alpha) normal with the mean and standard deviation of Karras et al. 2022 (Table 1), cut to
    [t_min, t_max]."""
    log_sigma = mean + std * 2**0.5 * torch.erfinv(2 * u - 1)
    return scheduler.path.t_from_half_log_snr(-log_sigma).clamp(scheduler.t_min, scheduler.t_max)


# each maps uniform numbers in (0, 1), float64, to times
TIME_DENSITIES = {"uniform": uniform_times, "log_normal": log_normal_times}


def denoising_loss(network, scheduler, x0, noise, t, class_labels=None):
    """Denoising score matching: the mean squared error of the network's output, per sample.

    The error is measured in what the network predicts, so an error in x0 counts by 1/b^2 of the prediction type's row
    (`paths`, Eq. 6): for epsilon this is the "simple" loss of Ho et al. 2020, for edm the weighting of Karras et al.
    2022, for flow_prediction flow matching.

    Args:
        network: called as network(x, timestep, class_labels=...).sample; a second half of channels is not trained.
        scheduler: the `ScoreSDEScheduler` that will sample; it owns the path and what the output means.
        x0: clean samples (B, C, ...). noise: standard normal, the same shape. t: path times (B,).

    Returns:
        (B,) float32 losses.
    """
    path, config = scheduler.path, scheduler.config
    x_t = path.sample(x0, noise, t)
    row = prediction(path, config.prediction_type, t, config.sigma_data)
    target = training_target(path, config.prediction_type, x0, noise, t, config.sigma_data)
    output = network(expand_to(row.input_scale, x_t) * x_t, scheduler.timestep(t), class_labels=class_labels).sample
    error = output[:, : x0.shape[1]].float() - target.float()
    return error.square().flatten(1).mean(1)
