"""Where to stop: the smallest time against the quality of samples, for data on lower-dimensional sets.

    python benchmarks/early_stopping.py    # early_stopping.json and .png beside this file; a few minutes on two cores

The score of such data grows as 1 / sigma near the end, whatever the network. Two targets in two dimensions: a circle in
flat space, and a box half of whose mass lies on two of its faces (domain "box"). A small network is trained on each
down to sigma_min; trajectories then end at larger and larger t_min, with a last denoising and without. The error is the
Wasserstein distance of what should be certain (the distance to the circle, the second coordinate in the box) from its
true distribution.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib
import torch

from score_sde import ScoreSDEScheduler
from score_sde.losses import Objective


SIGMA_MIN = 0.0005
STOPS = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]


def circle(n, generator):
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def faces(n, generator):
    points = 2 * torch.rand(n, 2, generator=generator) - 1
    on_face = torch.rand(n, generator=generator) < 0.5
    points[:, 1] = torch.where(on_face, points[:, 1].sign(), points[:, 1])
    return points


# name: (data, domain, sigma_max, what should be certain)
TARGETS = {
    "circle in the plane": (circle, None, 10.0, lambda x: x.norm(dim=1)),
    "box, half on its faces": (faces, "box", None, lambda x: x[:, 1]),
}


class Network(torch.nn.Module):
    """A perceptron of the point, in the box its distances from the walls in units of sigma, and waves of log sigma,
    divided by sigma."""

    def __init__(self, scheduler, width=128):
        super().__init__()
        self.scheduler = scheduler
        inputs = 2 + 16 + (4 if scheduler.domain else 0)
        layers = [torch.nn.Linear(inputs, width), torch.nn.SiLU()]
        for _ in range(2):
            layers += [torch.nn.Linear(width, width), torch.nn.SiLU()]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(width, 2))

    def forward(self, x, timestep):
        sigma = self.scheduler.path.sigma(self.scheduler.path_time(timestep)).float().reshape(-1, 1)
        waves = 2.0 ** torch.arange(-3, 5) * sigma.log()
        inputs = [x / (1 + sigma**2).sqrt(), waves.sin().expand(len(x), -1), waves.cos().expand(len(x), -1)]
        if self.scheduler.domain:
            inputs.append((torch.cat([1 - x, 1 + x], dim=1) / sigma).clamp_max(4))
        self.sample = self.layers(torch.cat(inputs, dim=1)) / sigma
        return self


def train(data, scheduler, steps, generator):
    torch.manual_seed(0)
    network, objective = Network(scheduler), Objective(scheduler, weighting="simple")
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x0, u = data(512, generator), torch.rand(512, generator=generator, dtype=torch.float64)
        loss = objective(network, x0, torch.randn(x0.shape, generator=generator), objective.times(u)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return network


@torch.no_grad()
def sample(network, scheduler, steps, n):
    generator = torch.Generator().manual_seed(1)
    scheduler.set_timesteps(steps)
    x = scheduler.init_noise((n, 2), generator)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample, t, x, generator=generator).prev_sample
    return x


def wasserstein(a, b):
    return float((a.sort().values - b.sort().values).abs().mean())


def measure(steps_of_training, num_samples):
    results = {}
    for name, (data, domain, sigma_max, certain) in TARGETS.items():
        settings = {"sde_type": "ve", "prediction_type": "score", "domain": domain}
        settings |= {"sigma_min": SIGMA_MIN, "sigma_max": sigma_max, "predictor": "ddim"}
        network = train(data, ScoreSDEScheduler(**settings), steps_of_training, torch.Generator().manual_seed(0))
        truth = certain(data(num_samples, torch.Generator().manual_seed(2)))
        for steps in (30, 100):
            for final in (True, False):
                errors = []
                for stop in STOPS:
                    path = network.scheduler.path
                    t_min = max(float(path.t_from_half_log_snr(torch.tensor(-math.log(stop)))), path.t_min)
                    scheduler = ScoreSDEScheduler(**settings, t_min=t_min, denoise_final=final)
                    errors.append(wasserstein(certain(sample(network, scheduler, steps, num_samples)), truth))
                results[f"{name}, {steps} steps, {'denoised' if final else 'with its noise'}"] = errors
                print(name, steps, final, [f"{error:.4f}" for error in errors], flush=True)
    return results


def draw(results, path):
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(TARGETS), figsize=(9, 3.6), sharey=True)
    for panel, name in zip(panels, TARGETS, strict=True):
        for label, errors in results.items():
            if label.startswith(name):
                style = "-" if "denoised" in label else "--"
                colour = "tab:blue" if " 30 steps" in label else "tab:orange"
                panel.plot(STOPS, errors, style, color=colour, marker=".", label=label.removeprefix(f"{name}, "))
        panel.set(xscale="log", yscale="log", title=name, xlabel="sigma where the trajectory stops")
    panels[0].set_ylabel("Wasserstein distance")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_steps", type=int, default=2000)
    parser.add_argument("--num_samples", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    results = measure(arguments.train_steps, arguments.num_samples)
    facts = {"sigma": STOPS, "train_steps": arguments.train_steps, "num_samples": arguments.num_samples}
    arguments.output.write_text(json.dumps(facts | {"wasserstein": results}, indent=1) + "\n", encoding="utf-8")
    draw(results, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
