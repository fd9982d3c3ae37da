"""Time of `ScoreSDEScheduler.step` beside that of diffusers' schedulers, on latents of a usual size.

    python benchmarks/step_overhead.py

All run in the same process, one trajectory after the other, in turn; figures are medians over the rounds of the time
per step, with the network's output given. Run it on an idle machine.
"""

import argparse
import statistics
import time

import diffusers
import torch

from score_sde import ScoreSDEScheduler


STOCK = diffusers.DPMSolverMultistepScheduler
SCHEDULERS = {
    "diffusers DPMSolverMultistepScheduler": lambda: STOCK(),
    "diffusers UniPCMultistepScheduler": lambda: diffusers.UniPCMultistepScheduler(),
    "diffusers DDIMScheduler": lambda: diffusers.DDIMScheduler(clip_sample=False),
} | {
    f"score_sde {predictor}": lambda predictor=predictor: ScoreSDEScheduler.from_config(
        STOCK().config, predictor=predictor
    )
    for predictor in ("dpmpp_2m", "ddim", "unipc_2", "auto", "ancestral")
}


def seconds_per_step(scheduler, sample, output, steps):
    scheduler.set_timesteps(steps, device=sample.device)
    timesteps = scheduler.timesteps
    if sample.device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for timestep in timesteps:
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    if sample.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / len(timesteps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs="+", default=[16, 4, 32, 32], help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of a trajectory (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=51, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    sample, output = (torch.randn(options.shape, generator=generator).to(options.device) for _ in range(2))
    schedulers = {name: make() for name, make in SCHEDULERS.items()}
    times = {name: [] for name in schedulers}
    for _ in range(options.rounds):
        for name, scheduler in schedulers.items():
            times[name].append(seconds_per_step(scheduler, sample, output, options.steps))
    base = statistics.median(times["diffusers DPMSolverMultistepScheduler"])
    print("| scheduler | microseconds a step | relative to DPMSolverMultistepScheduler |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {1e6 * statistics.median(values):.0f} | {statistics.median(values) / base:.2f} |")


if __name__ == "__main__":
    main()
