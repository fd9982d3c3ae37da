"""Train a score-based diffusion model, in pixels or in the latent space of an autoencoder.

    score-sde train quick_start/diffusion

Writes into output_dir: checkpoints/, samples/ (PNG grids) and pipeline/, a folder that
`ScoreSDEPipeline.from_pretrained` opens, with a model card; where asked for, evaluation.jsonl and ema_snapshots/. To go
on with a stopped run, add `--resume_from_checkpoint latest`.
"""

import os
import sys
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

import torch

from score_sde import ScoreSDEPipeline
from score_sde.pipelines.conditions import null_conditions
from score_sde.sharing.adapters import save_adapter
from score_sde.sharing.bundles import save_bundle
from score_sde.training.parts.alignment import AlignConfig, Alignment, Listening, check_align_block
from score_sde.training.parts.captions import CaptionConfig
from score_sde.training.parts.clean_data import CleanData, CleanDataConfig
from score_sde.training.parts.config import ImageLoopConfig, option
from score_sde.training.parts.diffusion_loss import DiffusionLoss
from score_sde.training.parts.few_steps import (
    DENOISING,
    FewStepConfig,
    FewStepLoss,
    as_teacher,
    check_guides,
    check_taught,
)
from score_sde.training.parts.image_conditions import ImageConditionConfig
from score_sde.training.parts.loop import fit, make_accelerator, show_samples
from score_sde.training.parts.networks import (
    NetworkConfig,
    check_conditions,
    check_sizes,
    make_network,
    network_class,
)
from score_sde.training.parts.options import arguments_of, mapping, one_line_errors, parse
from score_sde.training.parts.point_task import PointTask, PointTrainConfig
from score_sde.training.parts.publishing import PublishConfig, PublishedTask
from score_sde.training.parts.rounds import by_size
from score_sde.training.parts.routing import Routed, RoutingConfig, check_routing
from score_sde.training.parts.run_folder import open_run, surviving
from score_sde.training.parts.samples import sample_grid
from score_sde.training.parts.signal_config import SIGNAL_KINDS
from score_sde.training.parts.sources import has_no_splits, of_no_splits
from score_sde.training.parts.starting import StartConfig, begun, check_told, encoder_of
from score_sde.training.parts.tasks import loss_by_time, share_done
from score_sde.training.parts.text_task import TextTask, TextTrainConfig
from score_sde.training.parts.trackers import main_process_goes_on
from score_sde.training.parts.validation import Validation, ValidationConfig, conditions_of_rows


@dataclass
class TrainConfig(
    StartConfig,
    FewStepConfig,
    ImageLoopConfig,
    CleanDataConfig,
    CaptionConfig,
    ImageConditionConfig,
    AlignConfig,
    RoutingConfig,
    ValidationConfig,
    NetworkConfig,
    PublishConfig,
):
    """Train a score-based diffusion model, in pixels or in the latent space of an autoencoder."""

    configs = "diffusion"
    other_kinds: ClassVar[dict] = {"text": TextTrainConfig, "points": PointTrainConfig, **SIGNAL_KINDS}

    data_kind: str = option(
        "image",
        "image, text, audio, video, array or points; others have other options: --data_kind text --help.",
        "data",
        common=True,
    )
    pooled_captions: bool = option(
        False, "Also tell the network the mean of a caption's vectors, beside the time.", "captions"
    )
    save_text_encoder: bool = option(
        True,
        "Save the text encoder with the pipeline; false names it there, by its Hub id, to be downloaded when a prompt "
        "is given first.",
        "captions",
    )
    sample_prompts: list[str] = option(
        [], "Prompts of the sample grids, in turn; the first captions of the data unless given.", "captions"
    )

    @staticmethod
    def stated_kind(stated):
        """The kind of data that a command line is for; `stated`(option) is what it says for an option, or None."""
        of_points = stated("domain") not in (None, "null")
        return stated("data_kind") or ("points" if of_points else TrainConfig.data_kind)

    def problems(self):
        started = list(self.start_problems())
        yield from started
        if started:
            return
        yield from CleanDataConfig.problems(self)
        yield from ImageLoopConfig.problems(self)
        yield from ValidationConfig.problems(self)
        yield from self.caption_problems()
        yield from self.condition_problems()
        yield from self.align_problems()
        yield from self.routing_problems()
        if self.align_to and self.method != DENOISING:
            yield f"align_to is of {DENOISING}, and not of method {self.method}: leave it out"
        if not self.latents and self.reads_captions != (self.text_encoder is not None):
            yield (
                "caption_column and text_encoder belong together: pass both or neither, but where the weights that "
                "init_from names bring an encoder"
            )
        elif not self.latents and not self.reads_captions and (unused := self.given_without_captions()):
            yield f"{unused} need captions: pass caption_column and text_encoder"
        if not self.save_text_encoder and self.text_encoder and os.path.isdir(self.text_encoder):
            yield (
                f"save_text_encoder false needs a text_encoder on the Hub, which the pipeline can name, not the folder "
                f"{self.text_encoder!r}"
            )
        yield from self.objective_problems()
        yield from self.publish_problems()
        # every argument of the scheduler, and of a network of pixels, is checked here, before any data is opened; so is
        # what the grids at the end will ask for
        try:
            self.make_objective(self.make_scheduler(), self.teaching and self.teaching.network)
            options = mapping("network_kwargs", self.network_kwargs)
            labelled = self.class_conditional and self.label_column is not None
            told = labelled or self.reads_captions or self.has_conditions
            if (
                self.method == DENOISING
                and told
                and options.get("class_dropout_prob") == 0
                and self.sample_guidance_scale != 1
            ):
                yield (
                    f"sample_guidance_scale {self.sample_guidance_scale:g} needs a network that is trained with a "
                    f"class_dropout_prob above 0, not {options['class_dropout_prob']}: or sample with 1"
                )
            _, found = network_class(self.network)
            arguments_of(found, "network_kwargs", self.network_kwargs)
            sizes = self.sizes or [(self.resolution, self.resolution)]
            shape = self.image_channels, *(self.first_size or (self.resolution, self.resolution))
            beside = None if self.latents else self.make_condition(self.image_channels, sizes)
            if not (self.latents or self.vae):
                with torch.device("meta"):  # without memory or time
                    network = make_network(self, shape, num_classes=1, told=beside and beside.arguments())
                check_sizes(network, self.sizes or [])
                if self.align_to:
                    check_align_block(network, self.align_block)
                if self.token_routing:
                    check_routing(network)
        except (TypeError, ValueError, RuntimeError) as error:
            yield str(error)

    def open_data(self, accelerator):
        return CleanData(self, accelerator, captions=self, conditions=self, align=self)

    def open_validation(self, accelerator, task):
        return Validation(self, accelerator, task)


class DiffusionTask(PublishedTask):
    """A score-based diffusion model on the data, scheduler and network of a `TrainConfig`."""

    def __init__(self, config, accelerator):
        config.keep_components(accelerator)
        self.config, self.device = config, accelerator.device
        self.data = config.open_data(accelerator)
        config.check_axes(self.data.shape)
        self.scheduler = config.make_scheduler(self.data.shape)
        id2label = self.data.id2label if config.class_conditional else None
        num_classes = self.data.num_classes if config.class_conditional else None
        if config.teaching:
            check_taught(config.teaching, id2label, self.data.shape)
        captions, condition = self.data.captions, self.data.condition
        told = {} if captions is None else captions.arguments()
        told |= {} if condition is None else condition.arguments()
        if config.teaching:
            check_told("the teacher", config.teaching, captions, condition)
        elif config.lora_rank and config.start:
            who = "lora_rank leaves the network as it is, which"
            check_told(who, config.start, captions, condition, with_its_settings=True)

        def make(num_classes):
            network = make_network(config, self.data.shape, num_classes, told)
            check_sizes(network, self.data.sizes or [], self.data.vae)
            return network

        network, self.id2label, labels, origin = begun(
            config, accelerator, make, num_classes, id2label, config.teaching
        )
        if config.start is not None:
            if captions is None and network.config.get("cross_attention_dim"):
                accelerator.print(
                    f"{config.init_from!r} follows words, of which this run has none: it goes on as without a prompt, "
                    f"and its pipeline takes none; --caption_column keeps them"
                )
            before = captions and config.start.opened and encoder_of(config.start.opened)
            if before and before != captions.fingerprint:
                accelerator.print(
                    f"text_encoder {captions.source!r} is another one than that of {config.init_from!r}: what its "
                    f"vectors mean is learned anew"
                )
        super().__init__(config, network, self.data.dataset, self.data.fingerprint(), origin)
        self.component, _ = network_class(config.network)
        self.conditions = [name for name in self.data.told if config.class_conditional or name != "class_labels"]
        # a network under adapters may have classes that the data have not
        self.labels_drawn = None if "class_labels" in self.conditions else ()
        self.prompts = None if captions is None else config.sample_prompts or self.data.examples
        if condition is not None:
            # those of the rows, which are told as their other conditions are
            self.prompts = config.sample_prompts or None
        if captions is not None and not config.save_text_encoder and os.path.isdir(captions.source):
            raise ValueError(
                f"save_text_encoder false needs a text encoder on the Hub, which the pipeline can name, not the folder "
                f"{captions.source!r}"
            )
        check_conditions(self.model, self.conditions)
        teacher = config.teaching and as_teacher(config.teaching.network, accelerator)
        null_of = partial(null_conditions, config.teaching.network if config.teaching else network)
        objective = config.make_objective(self.scheduler, teacher, null_of)
        if config.method != DENOISING:
            check_guides(objective, self.conditions, null_of)
        loss, weight = (DiffusionLoss, config.vlb_weight) if config.method == DENOISING else (FewStepLoss, 0.0)
        self.loss = loss(objective, self.data, network, self.conditions, labels, weight)
        self.dropout_prob = self.model.config.get("class_dropout_prob", 0.0) if self.conditions else 0.0
        if config.token_routing:
            check_routing(network)
        self.alignment = self.data.vision and Alignment(config, network, self.data.vision)
        self.evaluation_steps, self.validation = config.evaluation_steps, None
        if config.evaluation_steps:
            self.validation = config.open_validation(accelerator, self)

    @cached_property
    def shown(self):
        """What a sample grid is of: {"prompts", "labels", "conditions"}, as `sample_grid` takes them."""
        if self.data.condition is None:
            return {"prompts": self.prompts, "labels": self.labels_drawn}
        dataset, rows = self.data.dataset, range(self.config.sample_num_images)
        # of a stream, the first ones as they come
        groups = [(None, rows)] if self.config.streaming else by_size(dataset, rows)
        seen = []
        for size, numbers in groups:
            _, conditions = conditions_of_rows(self.loss, dataset, numbers, self.config.seed, self.device)
            for name in self.data.captions.names if self.prompts else ():
                del conditions[name]
            seen.append((size, numbers, conditions))
        return {"prompts": self.prompts, "conditions": seen}

    def modules_to_save(self):
        return {} if self.alignment is None else {"align_projection": self.alignment.projection}

    def compute_loss(self, state, batch, draws):
        config, network = self.config, state.model
        share = share_done(state.progress, config.max_train_steps, config.max_train_seconds)
        if config.token_routing:
            network = Routed(network, self.model.patch, config.token_routing, draws)
        if self.alignment is None:
            losses = self.loss(network, batch, draws, self.dropout_prob, share)
            return losses.mean(), loss_by_time(losses.detach(), draws.times, self.scheduler)
        # the features are to be those of the mirrored images
        batch, heard = self.data.mirrored(batch, draws), Listening(network, config.align_block)
        losses = self.loss.of_mirrored(heard, batch, draws, self.dropout_prob, share)
        aligned = self.alignment(state.modules["align_projection"], heard, batch).mean()
        details = loss_by_time(losses.detach(), draws.times, self.scheduler) | {"alignment_loss": aligned}
        return losses.mean() + config.align_weight * aligned, details

    def make_pipeline(self, network):
        captions, words = self.data.captions, {}
        if captions is not None:
            named = {"text_encoder": captions.source, "fingerprint": captions.fingerprint}
            settings = captions.settings if self.config.save_text_encoder else captions.settings | named
            words = {"prompt_settings": {name: value for name, value in settings.items() if value is not None}}
            if self.config.save_text_encoder:
                words |= {"text_encoder": captions.text_encoder, "tokenizer": captions.tokenizer}
        measured = None if self.data.condition is None else self.data.condition.measured
        pipeline = ScoreSDEPipeline(
            scheduler=self.scheduler,
            vae=self.data.vae,
            id2label=self.id2label,
            condition_from=measured,
            **self.data.units,
            **{self.component: network},
            **words,
        )
        if captions is not None and not self.config.save_text_encoder:
            pipeline.use_named_encoder(captions.text_encoder, captions.tokenizer)
        return pipeline

    def evaluate(self, network):
        return self.validation.measure(network)

    def sampled(self, pipeline, path):
        """Write a sample grid; return what the card says of it."""
        nfe = sample_grid(pipeline, self.config, path, **self.shown, sizes=self.data.sizes)
        return {
            "guidance_scale": self.config.sample_guidance_scale,
            "num_inference_steps": self.config.sample_num_inference_steps,
            "network_evaluations": nfe,
        } | ({"prompts": self.prompts[: self.config.sample_num_images]} if self.prompts else {})

    def facts(self):
        facts = self.data.facts(self.config) | {"conditions": self.conditions} | self.config.few_step_facts()
        return facts | ({} if self.alignment is None else {"alignment": self.alignment.facts()})

    def save(self, pipeline, folder, facts, samples):
        save = save_adapter if self.config.lora_rank else save_bundle
        return save(pipeline, folder, facts=facts, sample_grid=samples)


# what is trained, by the kind of data
TASKS = {"image": DiffusionTask, "text": TextTask, "points": PointTask}
TASKS |= dict.fromkeys(SIGNAL_KINDS, DiffusionTask)


def main(argv=None):
    config = parse(TrainConfig, sys.argv[1:] if argv is None else argv)
    accelerator = make_accelerator(config)
    with open_run(config, accelerator) as run:
        train(config, accelerator, run)


def train(config, accelerator, run):
    if config.evaluation_steps and config.evaluation_split != config.split and has_no_splits(config.dataset):
        accelerator.print(of_no_splits(config.dataset, config.evaluation_split, config.split))
    task = TASKS[config.data_kind](config, accelerator)
    network, facts = fit(config, accelerator, run, task)

    # the result: a folder that from_pretrained opens, with its card
    with main_process_goes_on(accelerator):
        if accelerator.is_main_process:
            folder, samples = task.make_bundle(network, facts, "pipeline")
            if samples:
                with surviving("the log"):
                    show_samples(accelerator, run, task, samples, facts["steps"])
            print(f"samples: {samples or 'none'}\npipeline: {folder}")
            if config.push_to_hub:
                task.uploads.finish(folder, facts["steps"])


if __name__ == "__main__":
    with one_line_errors():
        main()
