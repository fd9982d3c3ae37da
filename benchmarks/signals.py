"""Reference runs of signals: a Gaussian process, against its closed form, and spoken digits, judged by a classifier.

    python benchmarks/signals.py --data shared/data --work runs/signals --part gaussian_process
    python benchmarks/signals.py --data shared/data --work runs/signals --part spoken_digits
    python benchmarks/signals.py --report

Each part trains where its pipeline is not there yet, or goes on with its checkpoint, measures, and writes into
benchmarks/signals.json and beside it the PNGs; --report writes their tables into benchmarks/README.md. Other options
are of `score-sde train`.
"""

import argparse
import io
import json
import math
import os
import re
import subprocess
import sys

import datasets
import matplotlib
import numpy as np
import torch

from score_sde import ScoreSDEPipeline
from score_sde.pipelines.sounds import power
from score_sde.sharing.bundles import add_metrics
from score_sde.training.parts.provenance import provenance
from score_sde.training.parts.sounds import read_sound


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


HERE = os.path.dirname(os.path.abspath(__file__))
RECORD = os.path.join(HERE, "signals.json")
MARKS = "<!-- signals -->", "<!-- end of signals -->"

# --- a Gaussian process -----------------------------------------------------------------------------------------------

LENGTH, MEAN, SCALE = 32, 20.0, 3.0


def covariance():
    """Of a process with an exponential and a white part, in the units of its data (LENGTH, LENGTH)."""
    lag = np.abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH)))
    return SCALE**2 * (0.9 * np.exp(-lag / 5) + 0.1 * np.eye(LENGTH))


def draw_process(count, seed):
    return np.random.default_rng(seed).multivariate_normal(np.full(LENGTH, MEAN), covariance(), count)


def write_process(folder):
    """Train and test data, {split}.npy of rows (LENGTH,)."""
    os.makedirs(folder, exist_ok=True)
    for split, count, seed in (("train", 50_000, 0), ("test", 512, 1)):
        path = os.path.join(folder, f"{split}.npy")
        if not os.path.isfile(path):
            np.save(path, draw_process(count, seed).astype(np.float32))
    return os.path.join(folder, "{split}.npy")


def cosines():
    """The orthonormal cosine transform, DCT-II (LENGTH, LENGTH)."""
    k, n = np.meshgrid(np.arange(LENGTH), np.arange(LENGTH), indexing="ij")
    found = np.sqrt(2 / LENGTH) * np.cos(np.pi * (n + 0.5) * k / LENGTH)
    found[0] /= math.sqrt(2)
    return found


def measure_process(pipeline, dataset, count, rows, steps=30):
    truth, test = covariance(), np.load(dataset.replace("{split}", "test"))[:rows]
    generator = torch.Generator().manual_seed(0)
    parts = [
        pipeline(batch_size=min(512, count), num_inference_steps=steps, generator=generator).images[:, 0]
        for _ in range(max(1, count // 512))
    ]
    drawn = np.concatenate(parts).astype(np.float64)
    # power of the cosine transform, by frequency
    true_power = np.einsum("ki,ij,kj->k", cosines(), truth, cosines())
    found_power = np.mean(((drawn - MEAN) @ cosines().T) ** 2, axis=0)
    images = torch.from_numpy(test)[:, None]
    likelihood = pipeline.log_likelihood(images=images, trace="exact", rtol=1e-4, atol=1e-4)
    found = likelihood.log_prob.cpu().double().numpy()
    normal = torch.distributions.MultivariateNormal(torch.full((LENGTH,), MEAN).double(), torch.from_numpy(truth))
    exact = normal.log_prob(torch.from_numpy(test).double()).numpy()
    draw_figure(true_power, found_power, exact / LENGTH, found / LENGTH, count)

    def relative_error(values):
        return float(np.linalg.norm(np.cov(values.T) - truth) / np.linalg.norm(truth))

    return {
        "samples": count,
        "num_inference_steps": steps,
        "mean_error": float(np.abs(drawn.mean(0) - MEAN).max() / SCALE),
        "covariance_error": relative_error(drawn),
        "covariance_error_of_exact_samples": relative_error(draw_process(count, 5)),
        "power_ratio": [float(each) for each in found_power / true_power],
        "rows": rows,
        "nats_per_dim": float(-found.mean() / LENGTH),
        "nats_per_dim_exact": float(-exact.mean() / LENGTH),
        "log_density_rms_error_per_dim": float(np.sqrt(np.mean((found - exact) ** 2)) / LENGTH),
        "likelihood_nfe": likelihood.nfe,
    }


def draw_figure(true_power, found_power, exact, found, count):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    axes[0].loglog(np.arange(1, LENGTH), true_power[1:], "k-", label="exact")
    axes[0].loglog(np.arange(1, LENGTH), found_power[1:], "C0.", label=f"{count:,} samples")
    axes[0].set(xlabel="frequency, half periods in the window", ylabel="power")
    axes[0].legend(frameon=False)
    axes[1].plot(exact, found, "C0.", ms=3)
    axes[1].axline((exact.mean(), exact.mean()), slope=1, color="k", lw=0.8)
    axes[1].set(xlabel="exact log-density, nats/dim", ylabel="of the model's ODE")
    figure.tight_layout()
    figure.savefig(os.path.join(HERE, "signals_gaussian_process.png"), dpi=110)


# --- spoken digits ----------------------------------------------------------------------------------------------------

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def clips(path):
    """(sound (N, 8192), labels (N,)) of a parquet file, each filled up by zeros."""
    data = datasets.load_dataset("parquet", data_files=path, split="train")
    data = data.cast_column("audio", datasets.Audio(decode=False))
    sounds = np.zeros((len(data), 8192), np.float32)
    for row, value in zip(sounds, data["audio"], strict=True):
        samples, _ = read_sound(io.BytesIO(value["bytes"]))
        row[: samples.shape[1]] = samples[0, :8192]
    return sounds, np.asarray(data["label"])


def log_spectra(sounds):
    """Features of clips: the logarithm of the power in 32 bands of frequency by 32 times (N, 1024)."""
    found = torch.stack([power(sound[None], window=256, hop=256) for sound in sounds])[:, 1:, :32]
    return (found.unflatten(1, (-1, 4)).mean(2) + 1e-4).log().flatten(1).double()


class Ridge:
    """Ridge regression on log spectra, one column for each class."""

    def __init__(self, sounds, labels, strength=1000.0):
        x = log_spectra(sounds)
        self.mean, self.std = x.mean(0), x.std(0).clamp_min(1e-3)
        x = self.features(sounds)
        y = torch.nn.functional.one_hot(torch.from_numpy(labels), 10).double()
        self.weights = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)

    def features(self, sounds):
        return torch.nn.functional.pad((log_spectra(sounds) - self.mean) / self.std, (0, 1), value=1.0)

    def classes(self, sounds):
        return (self.features(sounds) @ self.weights).argmax(1).numpy()


def measure_digits(pipeline, data, guidance_scale, per_class, steps, batch_size=20):
    train, test = (clips(os.path.join(data, f"spoken_digits_{split}.parquet")) for split in ("train", "test"))
    judge, labels = Ridge(*train), [i % 10 for i in range(10 * per_class)]
    parts = []
    for start in range(0, len(labels), batch_size):
        own = labels[start : start + batch_size]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(own))]
        settings = {"guidance_scale": guidance_scale, "num_inference_steps": steps, "generator": generators}
        output = pipeline(class_labels=own, **settings)
        parts.append(output.images[:, 0])
    drawn = np.concatenate(parts)
    found, asked = judge.classes(drawn), np.asarray(labels)
    spectrograms(drawn, test, os.path.join(HERE, "signals_spoken_digits.png"))
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (asked, found), 1)
    return {
        "samples": len(labels),
        "guidance_scale": guidance_scale,
        "num_inference_steps": steps,
        "nfe": output.nfe,
        "accuracy_of_test_clips": float((judge.classes(test[0]) == test[1]).mean()),
        "test_clips": len(test[1]),
        "accuracy_of_samples": float((found == asked).mean()),
        "confusion": confusion.tolist(),
    }


def digits_metrics(found):
    """What the card says."""
    who = "a ridge regression on log spectra of the real training clips"
    explanation = f"share that {who} takes for the digit asked for; of {found['test_clips']} real test clips "
    explanation += f"{found['accuracy_of_test_clips']:.1%}"
    metric = {"name": "accuracy of the digits", "type": "accuracy", "value": round(found["accuracy_of_samples"], 3)}
    metric |= {"n": found["samples"], "explanation": explanation, "dataset": "spoken digits", "split": "train"}
    metric |= {name: found[name] for name in ("guidance_scale", "num_inference_steps", "nfe")}
    return [metric | {"seed": 0, "sampler": "auto"} | provenance(torch.device("cpu"))]


def spectrograms(drawn, test, path):
    """A sample of every digit above a real test clip of it."""
    figure, axes = plt.subplots(2, 10, figsize=(14, 3.4), sharex=True, sharey=True)
    for digit, name in enumerate(DIGITS):
        real = test[0][np.flatnonzero(test[1] == digit)[0]]
        for row, sound in enumerate((drawn[digit], real)):
            shown = 10 * (power(sound[None], window=256, hop=64) + 1e-6).log10()
            axes[row, digit].imshow(shown, origin="lower", aspect="auto", vmin=-50, vmax=20, extent=(0, 1.024, 0, 4))
        axes[0, digit].set_title(name, fontsize=9)
    axes[0, 0].set_ylabel("sample, kHz")
    axes[1, 0].set(xlabel="s", ylabel="test clip, kHz")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


# --- both -------------------------------------------------------------------------------------------------------------


def trained(config, dataset, work, options):
    """The pipeline of a config, which is trained, or goes on, where it isn't there yet."""
    folder = os.path.join(work, config.split("/")[0])
    if not os.path.isfile(os.path.join(folder, "pipeline", "model_index.json")):
        resume = ["--resume_from_checkpoint", "latest"] * os.path.isdir(os.path.join(folder, "checkpoints"))
        command = [sys.executable, "-m", "score_sde.cli", "train", config, "--dataset", dataset, "--output_dir", folder]
        subprocess.run([*command, *resume, *options], check=True)
    return os.path.join(folder, "pipeline")


def record(part, found, folder):
    with open(os.path.join(folder, "training.json"), encoding="utf-8") as file:
        facts = json.load(file)
    known = {}
    if os.path.isfile(RECORD):
        with open(RECORD, encoding="utf-8") as file:
            known = json.load(file)
    kept = ("steps", "images_seen", "parameters", "train_seconds", "machine")
    known[part] = {name: facts.get(name) for name in kept} | found | provenance(torch.device("cpu"))
    with open(RECORD, "w", encoding="utf-8") as file:
        file.write(json.dumps(known, indent=1) + "\n")


def process_table(found):
    ratios = found["power_ratio"]
    return [
        f"Gaussian process, {LENGTH} steps, {found['parameters']:,} parameters, {found['steps']:,} optimizer steps:",
        "",
        "| | model | exact |",
        "|---|---|---|",
        f"| negative log-likelihood of {found['rows']} test rows, nats/dim | {found['nats_per_dim']:.4f} | "
        f"{found['nats_per_dim_exact']:.4f} |",
        f"| rms error of a row's log-density, nats/dim | {found['log_density_rms_error_per_dim']:.4f} | 0 |",
        f"| relative error of the covariance of {found['samples']:,} samples | {found['covariance_error']:.3f} | "
        f"{found['covariance_error_of_exact_samples']:.3f} |",
        f"| power of the samples by the true one, over frequencies | {min(ratios):.3f} to {max(ratios):.3f} | 1 |",
        "",
        "![Spectrum and log-densities](signals_gaussian_process.png)",
        "",
    ]


def digits_table(found):
    clips_at_once, minutes = found["images_seen"] // found["steps"], found["train_seconds"] / 60
    return [
        f"Spoken digits, raw waveforms of 8,192 values at 8 kHz, {found['parameters']:,} parameters, "
        f"{found['steps']:,} optimizer steps of {clips_at_once} clips ({minutes:.0f} minutes). Digits that a ridge "
        f"regression on log spectra of the real training clips recognises:",
        "",
        "| | clips | recognised |",
        "|---|---|---|",
        f"| real test clips | {found['test_clips']} | {found['accuracy_of_test_clips']:.1%} |",
        f"| samples, {found['num_inference_steps']} steps, guidance {found['guidance_scale']:g} | {found['samples']} "
        f"| {found['accuracy_of_samples']:.1%} |",
        "",
        "![Spectrograms](signals_spoken_digits.png)",
        "",
    ]


TABLES = {"gaussian_process": process_table, "spoken_digits": digits_table}


def report():
    """Write the tables into benchmarks/README.md."""
    with open(RECORD, encoding="utf-8") as file:
        known = json.load(file)
    lines = [line for part, table in TABLES.items() if part in known for line in table(known[part])]
    path, block = os.path.join(HERE, "README.md"), "\n".join([MARKS[0], "", *lines, MARKS[1]])
    with open(path, encoding="utf-8") as file:
        page = re.sub(f"{MARKS[0]}.*{MARKS[1]}", lambda _: block, file.read(), flags=re.DOTALL)
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="shared/data", help="folder of the spoken digits' parquet files")
    parser.add_argument("--work", default="runs/signals", help="folder of the runs")
    parser.add_argument("--part", choices=TABLES)
    parser.add_argument("--samples", type=int, default=4096, help="of the Gaussian process")
    parser.add_argument("--rows", type=int, default=256, help="of the Gaussian process, for their likelihood")
    parser.add_argument("--per_class", type=int, default=20, help="samples of each digit")
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--report", action="store_true")
    arguments, options = parser.parse_known_args()
    if arguments.part:
        dataset = os.path.join(arguments.data, "spoken_digits_{split}.parquet")
        if arguments.part == "gaussian_process":
            dataset = write_process(os.path.join(arguments.work, "data"))
        folder = trained(f"{arguments.part}/diffusion", dataset, arguments.work, options)
        pipeline = ScoreSDEPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        if arguments.part == "gaussian_process":
            found = measure_process(pipeline, dataset, arguments.samples, arguments.rows)
        else:
            settings = arguments.guidance_scale, arguments.per_class, arguments.steps
            found = measure_digits(pipeline, arguments.data, *settings)
            add_metrics(folder, digits_metrics(found))
        print({name: value for name, value in found.items() if not isinstance(value, list)})
        record(arguments.part, found, folder)
    if arguments.report:
        report()


if __name__ == "__main__":
    main()
