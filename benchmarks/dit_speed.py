"""Speed and memory of `score_sde`'s DiTModel beside diffusers' DiTTransformer2DModel of the same size and, with
--original (a clone of facebookresearch/DiT; it needs timm), the model of the paper's authors.

The models run in the same process, round by round, one right after the other and in alternating order, so that slow
drifts of the machine touch all alike; it still has to be idle. Speeds are medians over the rounds in images per
second; a ratio is the median of the rounds' own ratios, ours / theirs. Peak memory is that of training steps, in a
fresh process per model: on a CPU the resident memory of the whole process with its libraries, on a GPU the memory that
torch allocated.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import diffusers
import torch
from diffusers import DiTTransformer2DModel

from score_sde.models.transformer_score_dit import DiTModel


WARMUP_STEPS = 2


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, width=100)
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where both models run")
    parser.add_argument("--size", nargs="+", default=["S/4", "S/2"], help="sizes of the paper, {S,B,L,XL}/{2,4,8}")
    parser.add_argument("--batch", type=int, default=8, help="images (32x32x4 latents) per step")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds, each with one step of either model")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the arithmetic (autocast)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    parser.add_argument("--original", help="folder of a clone of facebookresearch/DiT, measured too")
    parser.add_argument("--output", type=Path, help="JSON file to write machine, versions and figures to")
    arguments = parser.parse_args()
    for name in ("batch", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; use --device cpu")
    return arguments


def build_ours(size, arguments):
    return DiTModel.from_name(f"DiT-{size}")


def build_diffusers(size, arguments):
    with torch.device("meta"):
        config = build_ours(size, arguments).config
    return DiTTransformer2DModel(
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.hidden_size // config.num_attention_heads,
        num_embeds_ada_norm=config.num_classes,
    )


def build_original(size, arguments):
    sys.path.insert(0, arguments.original)
    models = importlib.import_module("models")
    model = models.DiT_models[f"DiT-{size}"]()
    model.config = build_diffusers("S/8", arguments).config  # of the latents, the same for every size
    return model


BUILDERS = {"score_sde": build_ours, "diffusers": build_diffusers, "facebookresearch": build_original}


def names_of(arguments):
    return [name for name in BUILDERS if name != "facebookresearch" or arguments.original]


class Workload:
    """One model with its optimizer and a fixed batch; `train` and `sample` each do one step and wait for its end."""

    def __init__(self, build, size, arguments):
        torch.manual_seed(0)
        with torch.device(arguments.device):
            model = build(size, arguments)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)  # all alike: no zero-initialised layers in one of them
        self.model = model.to(arguments.device)
        if arguments.compile:
            self.model.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        shape = (arguments.batch, model.config.in_channels, model.config.sample_size, model.config.sample_size)
        self.latents = torch.randn(shape, device=arguments.device)
        self.timestep = torch.randint(1, 1000, (arguments.batch,), device=arguments.device)
        self.labels = torch.randint(1000, (arguments.batch,), device=arguments.device)
        self.dtype = getattr(torch, arguments.dtype)

    def forward(self):
        with torch.autocast(self.latents.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(self.latents, self.timestep, self.labels)
            return getattr(output, "sample", output)

    def train(self):
        self.model.train()
        self.forward().float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.wait()

    @torch.no_grad()
    def sample(self):
        self.model.eval()
        self.forward()
        self.wait()

    def wait(self):
        if self.latents.is_cuda:
            torch.cuda.synchronize()


def training_memory(name, size, arguments):
    """Peak memory of training steps in bytes; for a fresh process."""
    workload = Workload(BUILDERS[name], size, arguments)
    for _ in range(WARMUP_STEPS):
        workload.train()
    if arguments.device == "cuda":
        return torch.cuda.max_memory_allocated()
    # kibibytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds_per_step(workloads, mode, repeats):
    """{name: [seconds of each round]} of one mode ("train" or "sample") of every workload, interleaved."""
    steps = {name: getattr(workload, mode) for name, workload in workloads.items()}
    for step in steps.values():
        for _ in range(WARMUP_STEPS):
            step()
    seconds = {name: [] for name in steps}
    for repeat in range(repeats):
        for name in list(steps) if repeat % 2 == 0 else reversed(steps):
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(sizes, arguments):
    """{size: {name: bytes}}. Call it before anything large is built: Linux counts the peak of the process that starts
    another one towards the new one's."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {
            size: {name: pool.apply(training_memory, (name, size, arguments)) for name in names_of(arguments)}
            for size in sizes
        }


def measure(size, memory, arguments):
    """All figures of one size, as they stand in the JSON file."""
    workloads = {name: Workload(BUILDERS[name], size, arguments) for name in names_of(arguments)}
    figures = {
        name: {
            "parameters": sum(parameter.numel() for parameter in workload.model.parameters()),
            "train_peak_memory_bytes": memory[name],
        }
        for name, workload in workloads.items()
    }
    figures["ratio"] = {}
    for mode in ("train", "sample"):
        seconds = seconds_per_step(workloads, mode, arguments.repeats)
        for name in workloads:
            figures[name][f"{mode}_images_per_second"] = arguments.batch / statistics.median(seconds[name])
            figures[name][f"{mode}_seconds"] = seconds[name]
        for name in list(workloads)[1:]:
            rounds = zip(seconds[name], seconds["score_sde"], strict=True)
            figures["ratio"].setdefault(name, {})[mode] = statistics.median(theirs / ours for theirs, ours in rounds)
    return figures


def machine(device):
    """What the figures were measured on."""
    facts = {
        "cpu": platform.processor() or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0],
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        facts["cpu"] = cpuinfo.read_text().split("model name")[1].split("\n")[0].strip("\t :")
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def main():
    arguments = parse_arguments()
    with torch.device("meta"):
        for size in arguments.size:  # an unknown size is refused before anything runs
            build_ours(size, arguments)
    options = {key: value for key, value in vars(arguments).items() if key not in ("output", "size")}
    report = {
        "machine": machine(arguments.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "options": options,
        "sizes": {},
    }
    print(json.dumps({key: report[key] for key in ("machine", "versions", "options")}, indent=2), "\n", flush=True)
    print("| size | model | parameters | train, images/s | sample, images/s | train peak memory, GB |")
    print("|---|---|---|---|---|---|")
    memory = peak_memory(arguments.size, arguments)
    for size in arguments.size:
        figures = report["sizes"][size] = measure(size, memory[size], arguments)
        for name in names_of(arguments):
            row = figures[name]
            speeds = f"{row['train_images_per_second']:.2f} | {row['sample_images_per_second']:.2f}"
            gigabytes = row["train_peak_memory_bytes"] / 1e9
            print(f"| DiT-{size} | {name} | {row['parameters']:,} | {speeds} | {gigabytes:.2f} |")
        for name, ratio in figures["ratio"].items():
            print(f"| DiT-{size} | ours / {name} | | {ratio['train']:.2f} | {ratio['sample']:.2f} | |", flush=True)
    report["machine"]["load_average_at_end"] = os.getloadavg()[0]
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
