"""The reference runs themselves, each in a process of its own, and how they are measured: see reference_runs.py."""

import json
import time
from dataclasses import replace

import torch
from accelerate import Accelerator
from cifar10 import ResNet56Features
from efficientnet import EfficientNetFeatures, linear_classifier
from reference_runs import MEASURING
from safetensors.torch import load_file, save
from work import Work

from score_sde.pipelines import kinds
from score_sde.pipelines.latents import encode_moments
from score_sde.sharing.bundles import add_metrics
from score_sde.sharing.facts import dataset_name
from score_sde.training import encode_latents, evaluate, train, train_autoencoder
from score_sde.training.parts.classifier import EPOCHS, trained_classifier
from score_sde.training.parts.config import DataConfig
from score_sde.training.parts.data import ImageDataset
from score_sde.training.parts.figures import distance_metrics, sampling_facts
from score_sde.training.parts.metrics import ClassifierFeatures
from score_sde.training.parts.options import parse
from score_sde.training.parts.plots import plot_runs
from score_sde.training.parts.provenance import provenance
from score_sde.training.parts.real_images import complete
from score_sde.training.parts.rounds import FeatureTable, real_batches, rounds
from score_sde.training.parts.samples import draw, labels_of, quantized


PIECE = 15 * 2**20
TINY_UNET = "{block_out_channels: [32, 32], layers_per_block: 1, attention_resolutions: [16]}"
TINY_DIT = "{patch_size: 4, hidden_size: 32, num_layers: 1, num_attention_heads: 2}"
# seconds between the start of a training script and its first step, and of the pipeline after its last
OPENING = 20
WARM_UP = ["--max_train_steps", "3", "--sample_num_images", "10", "--sample_num_inference_steps", "1"]
LITTLE = ["--max_train_steps", "3", "--batch_size", "4", "--lr_warmup_steps", "1", "--logging_steps", "1"]
LITTLE += ["--compile", "false", "--num_workers", "0", "--mixed_precision", "no"]
LITTLE_DIFFUSION = [*LITTLE, "--sample_num_images", "10", "--sample_num_inference_steps", "2", "--network_kwargs"]


class Run(Work):
    """One of the reference runs."""

    def __init__(self, options):
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        facts = {"run": options.run, "compiled": not options.eager, "torch": torch.__version__, "device": device}
        super().__init__(options.run, options, options.data[0], options.until - time.time(), **facts)

    def train(self, main, arguments, little, until=None):
        """Train by a script's main, the steps of its configuration or those that there is time for, `until` a time."""
        arguments = [*arguments, "--seed", self.options.seed]
        until = self.ends - MEASURING[self.name] if until is None else until
        seconds = max(1, until - time.monotonic() - OPENING)
        arguments += [] if self.options.warm_up else ["--max_train_seconds", seconds]
        arguments += ["--compile", "false"] if self.options.eager else []
        arguments += WARM_UP if self.options.warm_up else []
        arguments += little if self.options.little else []
        main(list(map(str, arguments)))

    def is_trained(self, output):
        """Whether there is something to measure, and time is meant for it."""
        return not self.options.warm_up and (output / "pipeline/model_index.json").is_file()


# --- features -----------------------------------------------------------------------------------------------------


# --- measuring ----------------------------------------------------------------------------------------------------


class Measured:
    """A pipeline that is measured, by the package's own functions, beside real images.

    Args:
        network: the `Features`; `dataset` and `reference_split` name the real images.
    """

    def __init__(self, work, pipeline, dataset, **options):
        self.work, self.accelerator = work, Accelerator(cpu=not torch.accelerator.is_available())
        self.device = self.accelerator.device
        torch.set_float32_matmul_precision("high")
        little = work.options.little
        arguments = {"pipeline": pipeline, "dataset": dataset, "num_images": 20 if little else 5000}
        arguments |= {"num_inference_steps": 2 if little else 30, "batch_size": 10 if little else 500} | options
        arguments = [str(part) for key, value in arguments.items() for part in (f"--{key}", value)]
        config = parse(evaluate.EvaluateConfig, [*arguments, "--features", "given.onnx"])
        self.pipeline = evaluate.open_pipeline(config, self.device)
        self.config = complete(config, evaluate.image_shape(self.pipeline))
        self.folder = str(pipeline)

    def images(self, split):
        data = ImageDataset(self.config, split=split)
        if self.work.options.little:
            data.data = data.data.select(range(40))
        data.keep_images()
        return data

    def features(self, network, data):
        """(the `FeatureTable` of real images, labels)."""
        table, labels = FeatureTable(network, self.accelerator), []
        workers = 0 if self.device.type == "cpu" else 8
        config = replace(self.config, num_workers=workers)
        for _, batch, size in real_batches(data, len(data), config, self.accelerator, "real images"):
            table.add(batch["images"], size)
            labels.append(batch["labels"].cpu())
        return table, torch.cat(labels)

    def in_bf16(self):
        """The same pipeline with a network in bfloat16, as it was trained, on a GPU; with it 5,000 images are drawn."""
        if self.device.type == "cuda":
            self.pipeline.denoiser.to(torch.bfloat16)

    def drawn(self, scale, count=None):
        """(images (N, C, H, W) as 8 bits have them, on the CPU, labels, network evaluations)."""
        config, images, nfe = self.config, [], None
        for own, _ in rounds(count or config.num_images, config.batch_size, self.accelerator):
            found, nfe = draw(self.pipeline, own, config.seed, scale, config.num_inference_steps)
            if not torch.isfinite(found).all():
                raise ValueError(f"some images of seeds {own[0]} to {own[-1]} are not finite")
            images.append(quantized(found).cpu())
        images = torch.cat(images)
        return images, torch.tensor(labels_of(range(len(images)), self.pipeline)), nfe

    def table(self, network, images):
        table = FeatureTable(network, self.accelerator)
        for part in images.split(self.config.batch_size):
            table.add(part.to(self.device), len(part))
        return table

    def distances(self, network, table, real, scale, nfe):
        config = replace(self.config, guidance_scale=scale)
        facts = sampling_facts(self.pipeline, nfe, config)
        return distance_metrics([table], real, network, facts, config, self.accelerator)

    def accuracies(self, right, right_of_real, who, scale, nfe):
        """The metrics of a classifier that recognised samples, (N,), and real test images."""
        config = replace(self.config, guidance_scale=scale)
        found = []
        for name, values, split in (("real images", right_of_real, "test"), ("samples", right, config.split)):
            of_samples = sampling_facts(self.pipeline, nfe, config) if name == "samples" else {}
            metric = {"name": f"accuracy of {who} on {name}", "type": "accuracy", "n": len(values), "split": split}
            metric |= {"value": round(float(values.float().mean()), 4)} | of_samples
            print(f"{metric['name']}, guidance {scale}: {metric['value']}", flush=True)
            found.append(metric)
        return found

    def add(self, metrics):
        """Write metrics to the pipeline's card and to the result."""
        own = {"dataset": dataset_name({"dataset": self.config.dataset, "dataset_on_hub": False})}
        own |= {"dataset_on_hub": False, "seed": self.config.seed} | provenance(self.device)
        own |= {"resolution": self.config.resolution, "image_channels": self.config.image_channels}
        metrics = [metric | own for metric in metrics]
        add_metrics(self.folder, metrics)
        self.work.write(metrics=self.work.facts.get("metrics", []) + metrics)

    def likelihood(self, count, batch_size):
        config = replace(self.config, likelihood=2 if self.work.options.little else count, batch_size=batch_size)
        config.tolerance = 1e-2 if self.work.options.little else 1e-4
        test = self.images("test")
        self.add(evaluate.measure_likelihood(self.pipeline, test, config, self.accelerator))

    def nearest(self, images, table, data, real, path, count=10, shown=5):
        """A picture: in each row a sample and the real images nearest to it in the features; and the median distance to
        the nearest, beside that of the real images to one another."""
        found, _ = table.columns()
        known, _ = real.columns()
        found, known = (x.to(self.device).double() for x in (found, known))
        own = known[:: max(1, len(known) // 2000)]
        distances = torch.cat([torch.cdist(part, known) for part in found.split(500)])
        among = torch.cat([torch.cdist(part, known).kthvalue(2).values for part in own.split(500)])
        order = distances[:count].topk(shown, largest=False).indices.cpu()
        rows = [torch.stack([images[i], *(data[int(j)]["images"] for j in order[i])]) for i in range(count)]
        save_grid(torch.cat(rows), path, columns=shown + 1)
        medians = {"of_samples": float(distances.min(1).values.median()), "among_real": float(among.median())}
        pixels = [float((images[i] - data[int(order[i][0])]["images"]).square().mean().sqrt()) for i in range(count)]
        return {"median_distance_to_nearest": medians, "rms_pixel_difference_to_nearest": pixels}


def save_grid(images, path, columns):
    kind = kinds.Image(images.shape[1], tuple(images.shape[2:]), images.shape[1])
    kind.save_grid(kind.output(images), path, columns=columns)


# --- the runs -----------------------------------------------------------------------------------------------------


def cifar10(work):
    dataset, output = work.data / "cifar10", work.folder / "run"
    with work.part("training"):
        arguments = ["cifar10/one_gpu", "--dataset", dataset, "--output_dir", output]
        # without compilation a step takes the host as long as the GPU takes for twice the images
        arguments += ["--batch_size", 512] if work.options.eager else []
        work.train(train.main, arguments, [*LITTLE_DIFFUSION, TINY_UNET])
    work.write(speed=work.speed("run"))
    if not work.is_trained(output):
        return
    with work.part("opening"):
        measured = Measured(work, output / "pipeline", dataset)
        network = ResNet56Features(work.data / "resnet56_cifar10.safetensors", measured.device)
        train_data, test_data = measured.images("train"), measured.images("test")
        real, _ = measured.features(network, train_data)
        of_test, labels = measured.features(network, test_data)
        right_of_real = of_test.columns()[1].argmax(1) == labels
    if "opening" in work.facts["failed"]:
        return
    measured.in_bf16()
    for scale in (1.0, 1.5, "likelihood", 2.0):
        if scale == "likelihood":
            with work.part("likelihood"):
                work.needs(20)
                Measured(work, output / "pipeline", dataset).likelihood(256, batch_size=256)
            continue
        with work.part(f"samples_{scale:g}"):
            work.needs(15)
            images, asked, nfe = measured.drawn(scale)
            save_grid(images[:100], work.folder / f"samples_{scale:g}.png", columns=10)
            table = measured.table(network, images)
            metrics = measured.distances(network, table, real, scale, nfe)
            right = table.columns()[1].argmax(1) == asked
            measured.add(metrics + measured.accuracies(right, right_of_real, network.name, scale, nfe))
            if scale == 1.5:
                found = measured.nearest(images, table, train_data, real, work.folder / "nearest.png")
                work.write(nearest=found)
    finish(work, [output])
    with work.part("weights"):
        save_pieces(output / "pipeline/unet", work.folder / "weights")


def save_pieces(network, folder):
    """The weights of a network in fp16, in pieces: cat weights-* > model.fp16.safetensors."""
    folder.mkdir(exist_ok=True)
    weights = load_file(network / "diffusion_pytorch_model.safetensors")
    content = save({name: tensor.half().contiguous() for name, tensor in weights.items()})
    for i, start in enumerate(range(0, len(content), PIECE)):
        (folder / f"weights-{i:02d}").write_bytes(content[start : start + PIECE])


def clothing128(work):
    dataset, output, latents = work.data / "clothing256", work.folder / "run", work.folder / "latents"
    with work.part("encoding"):
        path = few_rows(work, dataset)
        arguments = ["clothing128/latents", "--dataset", path, "--vae", work.data / "taesd3", "--output_dir", latents]
        arguments += ["--both_flips", "true", "--num_workers", 0 if work.options.little else 8]
        arguments += ["--resolution", 32] if work.options.little else []
        encode_latents.main(list(map(str, arguments)))
    with work.part("training"):
        network = TINY_UNET.replace("16", "4") if work.options.little else None
        arguments = ["clothing128/one_gpu", "--latents", latents, "--output_dir", output]
        work.train(train.main, arguments, [*LITTLE_DIFFUSION, network])
    work.write(speed=work.speed("run"))
    if not work.is_trained(output):
        return
    with work.part("opening"):
        count = 20 if work.options.little else 1000
        measured = Measured(work, output / "pipeline", dataset, num_images=count, batch_size=min(count, 250))
        network = EfficientNetFeatures(work.data / "efficientnet_lite0/model.safetensors", measured.device)
        train_data, test_data = measured.images("train"), measured.images("test")
        real, labels = measured.features(network, train_data)
        of_test, test_labels = measured.features(network, test_data)
        classify = linear_classifier(real.columns()[0], labels, measured.pipeline.num_classes)
        right_of_real = classify(of_test.columns()[0]).argmax(1) == test_labels
    if "opening" in work.facts["failed"]:
        return
    measured.in_bf16()
    who = f"a linear classifier of training photographs on {network.name}"
    for scale in (1.0, 2.0, 3.0):
        with work.part(f"samples_{scale:g}"):
            work.needs(6)
            images, asked, nfe = measured.drawn(scale)
            save_grid(images[:60], work.folder / f"samples_{scale:g}.png", columns=10)
            table = measured.table(network, images)
            right = classify(table.columns()[0]).argmax(1) == asked
            metrics = measured.distances(network, table, real, scale, nfe)
            measured.add(metrics + measured.accuracies(right, right_of_real, who, scale, nfe))
            if scale == 2.0:
                found = measured.nearest(images, table, train_data, real, work.folder / "nearest.png", count=6)
                work.write(nearest=found)
    finish(work, [output])


def few_rows(work, dataset):
    """The dataset; of a rehearsal, a file with a few of its rows."""
    if not work.options.little:
        return dataset
    path = work.folder / "few.parquet"
    ImageDataset(DataConfig(dataset=str(dataset)), "train").data.select(range(40)).to_parquet(path)
    return path


def fashion_data(work):
    """Fashion-MNIST, or where it isn't there the 10,000 images of it inside the package."""
    there = (work.data / "fashion_mnist/train.parquet").exists() and (work.data / "fashion_mnist/test.parquet").exists()
    return work.data / "fashion_mnist" if there else "fashion_mnist_10k"


def fashion_mnist(work):
    dataset, output = fashion_data(work), work.folder / "run"
    with work.part("training"):
        arguments = ["fashion_mnist/one_gpu", "--dataset", dataset, "--output_dir", output]
        work.train(train.main, arguments, [*LITTLE_DIFFUSION, TINY_UNET.replace("16", "14")])
    work.write(speed=work.speed("run"))
    if not work.is_trained(output):
        return
    with work.part("likelihood"):
        measured = Measured(work, output / "pipeline", dataset)
        measured.likelihood(500, batch_size=250)
    with work.part("samples"):
        measured.in_bf16()
        images, _, _ = measured.drawn(1.0, count=100)
        save_grid(images, work.folder / "samples_1.png", columns=10)
    finish(work, [output])


def quick_start(work):
    """The quick start's networks with four times as many images in a step and as many steps as there is time for, up to
    four times as many; measured by a classifier of all of Fashion-MNIST."""
    at, steps = work.folder, {"autoencoder": 3600, "diffusion": 5600}
    half = work.began + (work.ends - MEASURING["quick_start"] - work.began) * 0.45
    few = ["--dataset", few_rows(work, "fashion_mnist_10k")]
    with work.part("autoencoder"):
        arguments = ["quick_start/autoencoder", "--output_dir", at / "autoencoder"]
        arguments += ["--max_train_steps", steps["autoencoder"], "--batch_size", 128, *few]
        work.train(train_autoencoder.main, arguments, LITTLE, until=half)
        work.write(training_psnr_db=json.loads((at / "autoencoder/vae/training.json").read_text())["training_psnr_db"])
    with work.part("latents"):
        arguments = ["quick_start/latents", "--vae", at / "autoencoder/vae", "--output_dir", at / "latents", *few]
        encode_latents.main(list(map(str, arguments)))
    with work.part("training"):
        arguments = ["quick_start/diffusion", "--latents", at / "latents", "--output_dir", at / "run"]
        arguments += ["--max_train_steps", steps["diffusion"], "--batch_size", 256, "--compile", "true"]
        work.train(train.main, arguments, [*LITTLE_DIFFUSION, TINY_DIT])
    work.write(speed=work.speed("run"))
    if not work.is_trained(at / "run"):
        return
    with work.part("reconstructions"):
        measured = Measured(work, at / "run/pipeline", fashion_data(work), num_inference_steps=20)
        train_data, test_data = measured.images("train"), measured.images("test")
        work.write(test_psnr_db=psnr(measured, test_data))
    with work.part("samples"):
        # the figures of metrics.json of the quick start are of 500 samples, guidance 1.5
        classifier = trained_classifier(train_data, EPOCHS, 0, measured.device)
        network = ClassifierFeatures(classifier, f"a small classifier of {len(train_data):,} training images")
        real, _ = measured.features(network, train_data)
        of_test, labels = measured.features(network, test_data)
        right_of_real = of_test.columns()[1].argmax(1) == labels
        for scale in (1.0, 1.5):
            images, asked, nfe = measured.drawn(scale)
            save_grid(images[:100], at / f"samples_{scale:g}.png", columns=10)
            table = measured.table(network, images)
            right = table.columns()[1].argmax(1) == asked
            metrics = measured.distances(network, table, real, scale, nfe)
            measured.add(metrics + measured.accuracies(right, right_of_real, network.name, scale, nfe))
    finish(work, [at / "run"])


@torch.no_grad()
def psnr(measured, data, count=1000):
    """Mean PSNR in dB of the reconstructions of images."""
    vae, errors = measured.pipeline.vae, []
    for _, batch, _ in real_batches(data, min(count, len(data)), measured.config, measured.accelerator):
        mean, _ = encode_moments(vae, batch["images"])
        decoded = vae.decode(mean).sample.clamp(-1, 1)
        errors.append(((decoded - batch["images"]) / 2).square().flatten(1).mean(1))
    return float((-10 * torch.cat(errors).log10()).mean())


def finish(work, folders):
    with work.part("curves"):
        work.needs(1)
        plot_runs(folders, work.folder / "curves.png")
    work.write(done=True)


RUNS = {"cifar10": cifar10, "clothing128": clothing128, "fashion_mnist": fashion_mnist, "quick_start": quick_start}
