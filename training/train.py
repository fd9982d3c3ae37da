"""Train a score-based diffusion model, in pixels or in the latent space of an autoencoder.

    score-sde train quick_start/diffusion

Writes into output_dir: checkpoints/, samples/ (PNG grids) and pipeline/, a folder that
`ScoreSDEPipeline.from_pretrained` opens, with a model card; where asked for, evaluation.jsonl and ema_snapshots/. To go
on with a stopped run, add `--resume_from_checkpoint latest`.
"""

import os
import sys
import threading
from dataclasses import dataclass

import diffusers
import torch
from huggingface_hub.utils import validate_repo_id

from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler, ScoreUNetModel
from score_sde.losses import TIME_DENSITIES, WEIGHTINGS, Objective, hybrid_loss
from score_sde.schedulers.paths import PREDICTIONS, SDE_TYPES, moved
from score_sde.sharing.bundles import save_bundle
from score_sde.sharing.facts import check_license
from score_sde.sharing.hub import push_to_hub
from score_sde.training.parts.clean_data import CleanData, CleanDataConfig
from score_sde.training.parts.config import LoopConfig, one_of, option
from score_sde.training.parts.loop import fit, make_accelerator, sample_path, save_grid
from score_sde.training.parts.options import arguments_of, mapping, one_line_errors, parse
from score_sde.training.parts.run_folder import open_run, surviving
from score_sde.training.parts.validation import ValidationConfig, make_validation


NETWORKS = {"dit": ("transformer", DiTModel), "unet": ("unet", ScoreUNetModel)}


@dataclass
class TrainConfig(LoopConfig, CleanDataConfig, ValidationConfig):
    """Train a score-based diffusion model, in pixels or in the latent space of an autoencoder."""

    configs = "diffusion"

    network: str = option(
        "dit",
        f"{' or '.join(f'{name} ({kind.__name__})' for name, (_, kind) in NETWORKS.items())}.",
        "network",
        common=True,
    )
    network_name: str | None = option(
        None, "A published configuration of the network by name, such as DiT-S/2.", "network", common=True
    )
    network_kwargs: str = option(
        "{}",
        "Arguments of the network's class, as YAML: {hidden_size: 256}; they win over network_name.",
        "network",
        common=True,
    )
    model_name: str = option("score-sde model", "Name of the model on its card.", "card and Hub")
    license: str | None = option(
        None, "Licence of the trained weights on its card, as the Hub calls it: apache-2.0.", "card and Hub"
    )
    class_conditional: bool = option(True, "Train on class labels, where the data has them.", "network", common=True)
    sde_type: str = option("vp", f"Noise path: {one_of(SDE_TYPES)}.", "path and objective", common=True)
    prediction_type: str = option(
        "v_prediction", f"What the network predicts: {one_of(PREDICTIONS)}.", "path and objective", common=True
    )
    scheduler_kwargs: str = option(
        "{}", "More arguments of ScoreSDEScheduler, as YAML: {beta_max: 20}.", "path and objective"
    )
    time_density: str = option(
        "uniform", f"Density of the training times: {one_of(TIME_DENSITIES)}.", "path and objective"
    )
    time_density_kwargs: str = option("{}", "Its numbers, as YAML: {mean: -1.2, std: 1.2}.", "path and objective")
    weighting: str = option(
        "output",
        f"Weight of the squared error of x0: {one_of(WEIGHTINGS)}; score_sde.losses has the published combinations.",
        "path and objective",
    )
    weighting_kwargs: str = option("{}", "Its numbers, as YAML: {gamma: 5}.", "path and objective")
    vlb_weight: float = option(
        0.0,
        "Learn the variance, too, by this weight of the variational bound (DiT: 0.001); needs discrete_vp.",
        "path and objective",
    )
    push_to_hub: str | None = option(
        None, "Upload the pipeline to this repo on the Hub, somebody/model, at the end.", "card and Hub", common=True
    )
    hub_private: bool = option(False, "Make that repo private, if it is new.", "card and Hub")
    push_steps: int = option(
        0,
        "Optimizer steps between uploads of the averaged weights, in the background; 0 for none before the end.",
        "card and Hub",
    )
    sample_num_images: int = option(64, "Images in a sample grid.", "samples and logs")
    sample_guidance_scale: float = option(
        1.0, "Classifier-free guidance of the sample grids: 1 is none.", "samples and logs"
    )
    sample_num_inference_steps: int = option(50, "Time steps of the sample grids.", "samples and logs")

    def problems(self):
        yield from CleanDataConfig.problems(self)
        yield from LoopConfig.problems(self)
        yield from ValidationConfig.problems(self)
        if self.network not in NETWORKS:
            yield f"network {self.network!r} is unknown; choose one of {', '.join(NETWORKS)}"
        try:
            check_license(self.license)
        except ValueError as error:
            yield str(error)
        if not self.vlb_weight >= 0:
            yield f"vlb_weight {self.vlb_weight} must be at least 0"
        if self.vlb_weight > 0 and (self.sde_type != "discrete_vp" or self.weighting not in ("output", "simple")):
            yield f"vlb_weight {self.vlb_weight} needs sde_type discrete_vp and weighting output"
        if self.push_to_hub:
            try:
                validate_repo_id(self.push_to_hub)
            except ValueError as error:
                yield f"push_to_hub {self.push_to_hub!r}: {error}"
        if self.push_steps < 0 or (self.push_steps and not self.push_to_hub):
            yield f"push_steps {self.push_steps} must be at least 0, and needs push_to_hub"
        if self.sample_num_images < 1 or self.sample_num_inference_steps < 1:
            yield "sample_num_images and sample_num_inference_steps must be at least 1"
        # every argument of the scheduler, and of a network of pixels, is checked here, before any data is opened; so is
        # what the grids at the end will ask for
        try:
            self.make_objective(self.make_scheduler())
            options = mapping("network_kwargs", self.network_kwargs)
            labelled = self.class_conditional and self.label_column is not None
            if labelled and options.get("class_dropout_prob") == 0 and self.sample_guidance_scale != 1:
                yield (
                    f"sample_guidance_scale {self.sample_guidance_scale:g} needs a network that is trained with a "
                    f"class_dropout_prob above 0, not {options['class_dropout_prob']}: or sample with 1"
                )
            if self.network in NETWORKS:
                _, network_class = NETWORKS[self.network]
                arguments_of(network_class, "network_kwargs", self.network_kwargs)
            if self.network in NETWORKS and not (self.latents or self.vae):
                with torch.device("meta"):  # without memory or time
                    make_network(self, (self.image_channels, self.resolution, self.resolution), num_classes=1)
        except (TypeError, ValueError, RuntimeError) as error:
            yield str(error)

    def make_scheduler(self):
        learned = {"variance_type": "learned_range"} if self.vlb_weight > 0 else {}
        return ScoreSDEScheduler(
            sde_type=self.sde_type,
            prediction_type=self.prediction_type,
            **learned | mapping("scheduler_kwargs", self.scheduler_kwargs),
        )

    def make_objective(self, scheduler):
        return Objective(
            scheduler,
            "levels" if self.vlb_weight > 0 else self.time_density,
            self.weighting,
            mapping("time_density_kwargs", self.time_density_kwargs),
            mapping("weighting_kwargs", self.weighting_kwargs),
        )


def make_network(config, shape, num_classes):
    """The network for samples of this shape (channels, size, size). Raises ValueError for options that don't fit."""
    _, network_class = NETWORKS[config.network]
    build = network_class
    if config.network_name:

        def build(**kwargs):
            return network_class.from_name(config.network_name, **kwargs)

    from_data = {"sample_size": shape[1], "in_channels": shape[0], "num_classes": num_classes}
    if config.vlb_weight > 0 or config.network_name:
        from_data["learn_sigma"] = config.vlb_weight > 0
    options = mapping("network_kwargs", config.network_kwargs)
    try:
        return build(**(from_data | options))
    except (TypeError, RuntimeError) as error:  # of values of other types
        raise ValueError(f"network_kwargs {config.network_kwargs!r}: {error}") from error


def loss_by_time(losses, t, scheduler, parts=4):
    """{name: (sum, count)} of the losses in equal parts of the time."""
    part = ((t - scheduler.t_min) / (scheduler.t_max - scheduler.t_min) * parts).long().clamp(0, parts - 1)
    part = moved(part, losses.device)
    sums, counts = (torch.zeros(parts, device=losses.device).index_add(0, part, x) for x in (losses, losses * 0 + 1))
    return {f"loss_in_quarter_{i + 1}": torch.stack([sums[i], counts[i]]) for i in range(parts)}


@torch.compiler.set_stance("force_eager")
def sample_grid(pipeline, config, path, seed=0):
    """Draw images, the classes in turn, one seed per image, and write them as a PNG grid; return the number of network
    evaluations."""
    count = config.sample_num_images
    labels = None if pipeline.num_classes is None else [i % pipeline.num_classes for i in range(count)]
    pipeline.set_progress_bar_config(desc="sampling", leave=False)
    output = pipeline(
        batch_size=count,
        class_labels=labels,
        guidance_scale=1.0 if labels is None else config.sample_guidance_scale,
        num_inference_steps=config.sample_num_inference_steps,
        generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(count)],
    )
    save_grid(output.images, path, columns=pipeline.num_classes if labels is not None else None)
    return output.nfe


def main(argv=None):
    config = parse(TrainConfig, sys.argv[1:] if argv is None else argv)
    accelerator = make_accelerator(config)
    with open_run(config, accelerator) as run:
        train(config, accelerator, run)


def train(config, accelerator, run):
    scheduler = config.make_scheduler()
    data = CleanData(config, accelerator)
    num_classes = data.num_classes if config.class_conditional else None
    model = make_network(config, data.shape, num_classes)
    id2label = data.id2label if num_classes else None
    component, _ = NETWORKS[config.network]

    objective = config.make_objective(scheduler)

    # labels are dropped here, by numbers that are drawn for the whole step
    model.drops_labels = False

    def losses_of(model, batch, draws, class_dropout_prob=0.0):
        """The loss of each sample of a batch, and its time."""
        x0 = data.draw(batch, draws)
        t = draws.times = objective.times(draws.stratified())
        noise, labels = draws.normal(x0.shape[1:]), batch["labels"] if num_classes else None
        if num_classes and class_dropout_prob > 0:  # for guidance
            labels = labels.masked_fill(draws.chance(class_dropout_prob), num_classes)
        if config.vlb_weight > 0:
            pixels = data.vae is None
            losses = hybrid_loss(model, scheduler, x0, noise, t, labels, config.vlb_weight, discretized=pixels)
        else:
            losses = objective(model, x0, noise, t, labels)
        return losses, t

    class_dropout_prob = model.config.class_dropout_prob

    def compute_loss(model, batch, draws):
        losses, t = losses_of(model, batch, draws, class_dropout_prob)
        return losses.mean(), loss_by_time(losses.detach(), t, scheduler)

    def make_pipeline(network):
        return ScoreSDEPipeline(scheduler=scheduler, vae=data.vae, id2label=id2label, **{component: network})

    def on_sample(network, path):
        sample_grid(make_pipeline(network), config, path)

    def make_bundle(network, facts, name):
        pipeline, grid = make_pipeline(network), None
        facts |= data.facts(config) | {
            "model_name": config.model_name,
            "license": config.license,
            "repo_id": config.push_to_hub,
            "diffusers": diffusers.__version__,
        }
        with surviving("the sample grid"):
            path = sample_path(config.output_dir, facts["steps"])
            nfe = sample_grid(pipeline, config, path)
            grid = path
            facts["samples"] = {
                "guidance_scale": config.sample_guidance_scale,
                "num_inference_steps": config.sample_num_inference_steps,
                "network_evaluations": nfe,
            }
        return save_bundle(pipeline, os.path.join(config.output_dir, name), facts=facts, sample_grid=grid), grid

    def push(folder, steps):
        message = f"{config.model_name}, {steps:,} steps"
        try:
            address = push_to_hub(
                folder, config.push_to_hub, private=config.hub_private or None, commit_message=message
            )
            print(f"pushed: {address}")
        except (OSError, ValueError) as error:  # the bundle is saved: no reason to fail
            print(f"{error}; nothing is lost: `score-sde push {folder} {config.push_to_hub}` pushes it")

    uploads = []

    def on_push(network, facts):
        if uploads and uploads[-1].is_alive():
            print(f"step {facts['steps']}: not pushed, the upload before still runs")
            return
        folder, _ = make_bundle(network, facts, "pushed")
        # a daemon: what doesn't answer keeps no run from ending
        uploads.append(threading.Thread(target=push, args=(folder, facts["steps"]), daemon=True))
        uploads[-1].start()

    on_evaluation = None
    if config.evaluation_steps:
        on_evaluation = make_validation(config, accelerator, data, losses_of, make_pipeline)
    network, facts = fit(
        config,
        accelerator,
        run,
        model,
        data.dataset,
        compute_loss,
        on_sample,
        on_evaluation,
        on_push,
        config.push_steps,
        data.fingerprint(),
    )

    # the result: a folder that from_pretrained opens, with its card
    with surviving("the log"):
        accelerator.end_training()
    # no other process waits for what follows
    if accelerator.is_main_process:
        folder, grid = make_bundle(network, facts, "pipeline")
        print(f"samples: {grid or 'none'}\npipeline: {folder}")
        if uploads:
            uploads[-1].join()
        if config.push_to_hub:
            push(folder, facts["steps"])


if __name__ == "__main__":
    with one_line_errors():
        main()
