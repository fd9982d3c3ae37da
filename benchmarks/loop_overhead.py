"""Time of a step of the training loop beside that of a bare one: the same model, loss and AdamW, and nothing else.

    OMP_NUM_THREADS=1 python benchmarks/loop_overhead.py

The DiT of the quick start on latents in memory. Both take turns, a short run each in every round; the figures are
medians over all steps of the processor's time, which other programs disturb less than that of the clock. `fit` reads
from a DataLoader, clips gradients, looks for steps that are not finite, and averages the weights; the bare loop does
none of these. Averaging is timed alone, too: it is work that was asked for.
"""

import argparse
import statistics
import tempfile
import time

import torch

from score_sde import DiTModel, ScoreSDEScheduler
from score_sde.losses import Objective
from score_sde.training.parts.averages import Averages
from score_sde.training.parts.loop import fit, make_accelerator
from score_sde.training.parts.run_folder import open_run
from score_sde.training.parts.tasks import Task
from score_sde.training.train import TrainConfig


class Latents(torch.utils.data.Dataset):
    """Rows of 4x8x8 in memory."""

    def __init__(self, rows=4096):
        generator = torch.Generator().manual_seed(0)
        self.values = torch.randn(rows, 4, 8, 8, generator=generator)
        self.labels = torch.randint(10, (rows,), generator=generator)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, row):
        return {"latents": self.values[row], "labels": self.labels[row]}


def make_model():
    """As training/configs/quick_start/diffusion.yaml has it."""
    torch.manual_seed(0)
    return DiTModel(8, 2, 4, hidden_size=256, num_layers=6, num_attention_heads=4, num_classes=10)


def seconds_of_fit(objective, data, options):
    """The time from each step to the next."""
    begun = []

    class Denoising(Task):
        def compute_loss(self, state, batch, draws):
            begun.append(time.process_time())
            x0, t = batch["latents"], objective.times(draws.stratified())
            conditions = {"class_labels": batch["labels"]}
            return objective(state.model, x0, draws.normal(x0.shape[1:]), t, conditions).mean(), {}

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            output_dir=folder, max_train_steps=options.steps, batch_size=options.batch_size, checkpointing_steps=0
        )
        accelerator = make_accelerator(config)
        with open_run(config, accelerator) as run:
            fit(config, accelerator, run, Denoising(make_model(), data))
    return [later - earlier for earlier, later in zip(begun, begun[1:], strict=False)]


def seconds_of_bare_loop(objective, data, options):
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    begun = []
    for step in range(options.steps):
        begun.append(time.process_time())
        rows = torch.arange(step * options.batch_size, (step + 1) * options.batch_size) % len(data)
        x0, labels = data.values[rows], data.labels[rows]
        t = objective.times(torch.rand(options.batch_size, dtype=torch.float64).clamp_min(2**-53))
        objective(model, x0, torch.randn_like(x0), t, {"class_labels": labels}).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [later - earlier for earlier, later in zip(begun, begun[1:], strict=False)]


def seconds_of_averaging(options):
    model = make_model()
    averages, skipped, seconds = Averages(TrainConfig(), model), torch.zeros(()), []
    for _ in range(options.steps):
        start = time.process_time()
        averages.step(skipped)
        seconds.append(time.process_time() - start)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=15, help="of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=12, help="(default: %(default)s)")
    options = parser.parse_args()
    objective, data = Objective(ScoreSDEScheduler(prediction_type="v_prediction")), Latents()
    found = {"fit": [], "bare loop": [], "averaging the weights": []}
    for _ in range(options.rounds):
        # the first step of a run allocates
        found["fit"] += seconds_of_fit(objective, data, options)[1:]
        found["bare loop"] += seconds_of_bare_loop(objective, data, options)[1:]
        found["averaging the weights"] += seconds_of_averaging(options)[1:]
    bare = statistics.median(found["bare loop"])
    print("| | ms of processor time a step, median | relative to the bare loop | steps |\n|---|---|---|---|")
    for name, seconds in found.items():
        median = statistics.median(seconds)
        print(f"| {name} | {1000 * median:.1f} | {median / bare:.3f} | {len(seconds)} |")


if __name__ == "__main__":
    main()
