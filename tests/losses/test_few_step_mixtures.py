"""Each objective of few steps leads a small network to the exact map of a mixture, which is not linear: in one
dimension what turns one distribution function into the other. From a teacher and from the data, on several paths."""

import pytest
import torch
from maps import TWO_PEAKS, quantile
from test_losses import Output
from tiny import seeded

from score_sde import ScoreSDEScheduler
from score_sde.losses import FEW_STEP_METHODS


# method, path, prediction, and whether a teacher is followed
KINDS = [
    ("flow_map", "vp", "v_prediction", True),
    ("mean_flow", "cosine_vp", "v_prediction", False),
    ("consistency", "edm", "edm", True),
    ("ect", "linear", "flow_prediction", False),
    ("scm", "subvp", "sample", True),
]
STEPS, SAMPLES = 500, 256


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
@pytest.mark.parametrize(("method", "sde_type", "prediction_type", "taught"), KINDS)
def test_each_method_reaches_the_map_of_a_mixture(method, sde_type, prediction_type, taught):
    scheduler, teacher = case(sde_type, prediction_type)
    objective = FEW_STEP_METHODS[method](scheduler, teacher if taught else None, time_density="uniform")
    network, generator = Map(teacher, scheduler), seeded(1)
    before = errors(network, scheduler, objective.network_map)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        x0 = TWO_PEAKS.sample(SAMPLES, generator).float()
        noise = torch.randn(x0.shape, generator=generator)
        numbers = torch.rand(3, SAMPLES, generator=generator, dtype=torch.float64).clamp_min(2**-53)
        drawn = objective.draw(*numbers, step / STEPS)
        objective(network, x0, noise, drawn, progress=step / STEPS).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    after = errors(network, scheduler, objective.network_map)
    print(method, sde_type, prediction_type, taught, before, after)
    assert before[0] > 0.5 and after[0] < 0.15 and after[-1] < 0.1
