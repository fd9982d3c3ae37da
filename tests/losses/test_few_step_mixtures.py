"""Objectives of few steps lead a small network to the exact map of a mixture, which is not linear: in one
dimension what turns one distribution function into the other. From a teacher and from the data, on four paths.

The networks see many such numbers at once, each of its own: errors whose weight is by their size, pseudo-Huber and
normalised ones, lead to the mean only where the size is that of many; of one number the first lead to the median."""

import pytest
import torch
from maps import TWO_PEAKS, quantile
from test_losses import Output
from tiny import seeded

from score_sde import ScoreSDEScheduler
from score_sde.losses import FEW_STEP_METHODS


# method, its numbers, path, prediction, whether a teacher is followed, training steps, the error that is reached
KINDS = [
    ("flow_map", {}, "vp", "v_prediction", True, 1000, 0.2),
    ("consistency", {}, "edm", "edm", True, 500, 0.15),
    ("ect", {}, "edm", "edm", False, 1000, 0.15),
    ("scm", {}, "linear", "flow_prediction", True, 1000, 0.15),
    ("scm", {"step": 0.0}, "linear", "flow_prediction", True, 500, 0.2),
    ("mean_flow", {"moving": 0.75, "power": 0.5}, "linear", "flow_prediction", True, 1000, 0.2),
]
SAMPLES, NUMBERS = 16, 32


class Each(torch.nn.Module):
    """A network of one number, of each one of a sample (B, N)."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, timestep, timestep_to=None):
        of_each = {"timestep": timestep} | ({} if timestep_to is None else {"timestep_to": timestep_to})
        of_each = {name: times.repeat_interleave(x.shape[1]) for name, times in of_each.items()}
        return Output(self.network(x.reshape(-1, 1), **of_each).sample.reshape(x.shape))


class Map(torch.nn.Module):
    """An exact denoiser, and what a sample and its two times add to its output; zero at first."""

    def __init__(self, teacher, scheduler):
        super().__init__()
        torch.manual_seed(0)
        self.teacher, self.scheduler = teacher, scheduler
        widths = [4, 96, 96, 96, 1]
        layers = [torch.nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
        self.layers = torch.nn.Sequential(*(part for each in layers for part in (each, torch.nn.SiLU())))[:-1]
        torch.nn.init.zeros_(layers[-1].weight)
        torch.nn.init.zeros_(layers[-1].bias)

    def forward(self, scaled, timestep, timestep_to=None):
        row, path = self.scheduler.parameterization, self.scheduler.path
        t = row.path_time(timestep)
        s = t if timestep_to is None else row.path_time(timestep_to)
        x = scaled / row.row(t).input_scale[:, None]
        c, u = path.straight_coordinates(t, 1.0)
        y, places = x / c[:, None], [path.straight_coordinates(each, 1.0)[1] for each in (t, s)]
        inputs = torch.stack([y[:, 0], 2 * u - 1, 2 * places[1] - 1, (u - places[1])], 1).float()
        return Output(self.teacher(scaled, timestep).sample + self.layers(inputs))


def case(sde_type, prediction_type):
    scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type=prediction_type, t_min=0.01, t_max=0.99)
    path = scheduler.path

    def teacher(scaled, timestep):
        t = scheduler.path_time(timestep)[:, None]
        row = scheduler.parameterization.row(t)
        x, alpha = scaled / row.input_scale, path.alpha(t)
        variances = alpha**2 * TWO_PEAKS.variances.T + path.sigma(t) ** 2  # (B, K)
        away = x - alpha * TWO_PEAKS.means.T
        share = torch.softmax(TWO_PEAKS.weights.log() - away**2 / variances / 2 - variances.log() / 2, dim=1)
        means = TWO_PEAKS.means.T + alpha * TWO_PEAKS.variances.T / variances * away
        denoised = (share * means).sum(1, keepdim=True)
        return Output(((denoised - row.a * x) / row.b).to(scaled.dtype))

    return scheduler, teacher


@torch.no_grad()
def errors(network, scheduler, network_map):
    """Root mean square distance from the exact map, in one step and, of a flow map, in two, over the data's standard
    deviation: through the scheduler."""
    scheduler = ScoreSDEScheduler.from_config(scheduler.config, network_map=network_map, denoise_final=False)
    shares = ((torch.arange(500, dtype=torch.float64) + 0.5) / 500).unsqueeze(1)
    begin, end = (torch.full((1, 1), each, dtype=torch.float64) for each in (scheduler.t_max, scheduler.t_min))
    wanted, found = quantile(TWO_PEAKS, scheduler.path, shares, end), []
    for steps in (1, 2) if network_map == "flow_map" else (1,):
        x = quantile(TWO_PEAKS, scheduler.path, shares, begin).float()
        scheduler.set_timesteps(steps)
        for t, to in zip(scheduler.timesteps, scheduler.timesteps_to, strict=True):
            told = {"timestep_to": to.expand(len(x))} if network_map == "flow_map" else {}
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t.expand(len(x)), **told).sample, t, x)
            x = x.prev_sample
        found.append(float(((x - wanted).square().mean() / wanted.var()).sqrt()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options", "sde_type", "prediction_type", "taught", "steps", "bound"), KINDS)
def test_methods_reach_the_map_of_a_mixture(method, options, sde_type, prediction_type, taught, steps, bound):
    scheduler, teacher = case(sde_type, prediction_type)
    kind = FEW_STEP_METHODS[method]
    objective = kind(scheduler, Each(teacher) if taught else None, time_density="uniform", options=options)
    network, generator = Each(Map(teacher, scheduler)), seeded(1)
    before = errors(network, scheduler, objective.network_map)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x0 = TWO_PEAKS.sample(SAMPLES * NUMBERS, generator).float().reshape(SAMPLES, NUMBERS)
        noise = torch.randn(x0.shape, generator=generator)
        numbers = torch.rand(3, SAMPLES, generator=generator, dtype=torch.float64).clamp_min(2**-53)
        drawn = objective.draw(*numbers, step / steps)
        objective(network, x0, noise, drawn, progress=step / steps).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    after = errors(network, scheduler, objective.network_map)
    # from 0.95 and 0.46 on the paths of which the last time is noise, and from 0.33
    assert before[0] > 0.3 and max(after) < bound
