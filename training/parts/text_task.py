"""Training on tokens: text, molecules as strings, anything that a tokenizer parts."""

from dataclasses import dataclass
from functools import partial

import torch

from score_sde import DiscreteScoreScheduler, ScoreSDETextPipeline
from score_sde.losses import DISCRETE_LOSSES, DISCRETE_TIME_DENSITIES, DiscreteObjective, drop_conditions
from score_sde.pipelines.conditions import null_conditions
from score_sde.pipelines.writing import whole_file
from score_sde.schedulers.discrete_paths import DISCRETE_PATHS, DISCRETE_PREDICTIONS, NOISES
from score_sde.sharing.adapters import save_adapter
from score_sde.sharing.bundles import save_bundle

from .bound import bound_metrics, measure_bound, nats
from .config import LoopConfig, one_of, option, sample_problems
from .networks import NetworkConfig, check_conditions, make_token_network, network_class
from .options import arguments_of, mapping
from .provenance import provenance
from .publishing import PublishConfig, PublishedTask
from .samples import labels_of
from .sources import text_on_hub
from .starting import begun
from .tasks import loss_by_time
from .text_data import TextData, TextDataConfig
from .text_start import NAMED, TextStartConfig


@dataclass
class TextTrainConfig(TextStartConfig, LoopConfig, TextDataConfig, NetworkConfig, PublishConfig):
    """Train a score-based diffusion model on tokens: text, molecules as strings."""

    configs = "diffusion"

    data_kind: str = option("text", "text, or image, which has other options.", "data", common=True)
    process: str = option(
        "absorbing",
        f"What becomes of a token, {one_of(DISCRETE_PATHS)}: the mask, or any token.",
        "path and objective",
        common=True,
    )
    noise: str = option("log_linear", f"Noise schedule: {one_of(NOISES)}.", "path and objective", common=True)
    prediction_type: str = option(
        "sample",
        f"What the network predicts, {one_of(DISCRETE_PREDICTIONS)}: the clean token's distribution, given all tokens "
        f"or the other ones, or the concrete score.",
        "path and objective",
        common=True,
    )
    scheduler_kwargs: str = option(
        "{}", "More arguments of DiscreteScoreScheduler, as YAML: {predictor: tau_leaping}.", "path and objective"
    )
    loss: str = option(
        "elbo", f"Form of the bound on the likelihood: {one_of(DISCRETE_LOSSES)}.", "path and objective", common=True
    )
    time_density: str = option(
        "uniform", f"Density of the training times: {one_of(DISCRETE_TIME_DENSITIES)}.", "path and objective"
    )
    sample_num_texts: int = option(8, "Texts that are drawn as samples.", "samples and logs")
    sample_guidance_scale: float = option(
        1.0, "Classifier-free guidance of the samples: 1 is none.", "samples and logs"
    )
    sample_num_inference_steps: int = option(128, "Time steps of the samples.", "samples and logs")
    evaluation_steps: int = option(
        0,
        "Optimizer steps between evaluations of the averaged weights (evaluation.jsonl), the last of them at the end: "
        "the bound on the likelihood of held-out texts; 0 for none.",
        "samples and logs",
        common=True,
    )
    evaluation_texts: int = option(256, "Sequences of an evaluation, the first ones.", "samples and logs")
    evaluation_split: str = option("validation", "Split that the held-out texts are from.", "samples and logs")

    def problems(self):
        # first: it fills in the options that come with the weights
        started = list(TextStartConfig.problems(self))
        yield from started
        if started:
            return
        yield from TextDataConfig.problems(self)
        yield from LoopConfig.problems(self)
        yield from self.publish_problems()
        yield from sample_problems(self, "sample_num_texts")
        if self.evaluation_steps < 0:
            yield f"evaluation_steps {self.evaluation_steps} must be at least 0"
        if self.evaluation_texts < 2:
            yield f"evaluation_texts {self.evaluation_texts} must be at least 2"
        # every argument of scheduler, objective and network is checked here, before any data is opened
        try:
            self.make_objective(self.make_scheduler(vocab_size=2))
            options = mapping("network_kwargs", self.network_kwargs)
            labelled = self.class_conditional and self.label_column is not None
            if labelled and options.get("class_dropout_prob") == 0 and self.sample_guidance_scale != 1:
                yield (
                    f"sample_guidance_scale {self.sample_guidance_scale:g} needs a network that is trained with a "
                    f"class_dropout_prob above 0, not {options['class_dropout_prob']}: or sample with 1"
                )
            if not labelled and self.sample_guidance_scale != 1:
                yield f"sample_guidance_scale {self.sample_guidance_scale:g} needs classes: pass label_column, or 1"
            says_tokens = ("sample", "leave_one_out") if self.process == "absorbing" else ("leave_one_out",)
            if options.get("time_conditioning") is False and self.prediction_type not in says_tokens:
                yield (
                    f"prediction_type {self.prediction_type!r} of process {self.process!r} depends on the time, which "
                    f"a network with time_conditioning false isn't told: pass prediction_type {says_tokens[-1]}, or "
                    f"network_kwargs with time_conditioning true"
                )
            with torch.device("meta"):  # without memory or time
                make_token_network(self, vocab_size=2, num_classes=2 if labelled else None)
        except (TypeError, ValueError, RuntimeError) as error:
            yield str(error)

    def make_scheduler(self, vocab_size):
        named = {name: getattr(self, name) for name in NAMED}
        options = arguments_of(DiscreteScoreScheduler, "scheduler_kwargs", self.scheduler_kwargs, named)
        for name, why in (
            ("vocab_size", "is for the data to say"),
            ("timestep_type", "is of pipelines of diffusers, which tell their networks no time"),
        ):
            if name in options:
                raise ValueError(f"scheduler_kwargs: {name} {options[name]!r} {why}: leave it out")
        return DiscreteScoreScheduler(vocab_size, **named, **options)

    def make_objective(self, scheduler):
        return DiscreteObjective(scheduler, self.loss, self.time_density)


class TextTask(PublishedTask):
    """A score-based diffusion model on the tokens, scheduler and network of a `TextTrainConfig`."""

    samples_suffix, unit = ".txt", "texts"

    def __init__(self, config, accelerator):
        self.accelerator = accelerator
        self.data = TextData(config, accelerator, config.known_tokenizer)
        vocab_size = len(self.data.tokenizer)
        self.scheduler = config.make_scheduler(vocab_size)
        self.objective = config.make_objective(self.scheduler)
        id2label = self.data.dataset.id2label if config.class_conditional else None

        def make(num_classes):
            return make_token_network(config, vocab_size, num_classes)

        network, self.id2label, self.labels, origin = begun(
            config, accelerator, make, id2label and len(id2label), id2label
        )
        super().__init__(config, network, self.data.dataset, self.data.fingerprint(), origin)
        self.component, _ = network_class(config.network)
        self.conditions = ["class_labels"] if id2label else []
        # a network under adapters may have classes that the data have not
        self.labels_drawn = None if self.conditions else ()
        check_conditions(network, self.conditions)
        self.dropout_prob = network.config.get("class_dropout_prob", 0.0) if self.conditions else 0.0
        self.evaluation_steps, self.held_out, self.measured = config.evaluation_steps, None, {}
        if config.evaluation_steps:
            with accelerator.main_process_first():
                self.held_out = self.data.split(config.evaluation_split)
        # once nothing can be refused any more
        config.keep_tokenizer(accelerator)

    def compute_loss(self, state, batch, draws):
        tokens, t = batch["tokens"], self.objective.times(draws.stratified())
        draws.times, conditions = t, self.told(batch)
        if self.dropout_prob > 0:  # for guidance
            null_of = partial(null_conditions, self.model)
            conditions = drop_conditions(conditions, null_of, draws.chance(self.dropout_prob))
        losses = self.objective(state.model, tokens, t, draws.uniforms(tokens.shape[1:]), conditions)
        return losses.mean(), loss_by_time(losses.detach(), draws.times, self.scheduler)

    def told(self, batch):
        """What the network is told of a batch, {keyword of its forward: tensor (B, ...)}."""
        if not self.conditions:
            return {}
        return {"class_labels": batch["labels"] if self.labels is None else self.labels[batch["labels"]]}

    def after_step(self, state):
        self.measured = {}  # of other weights

    def make_pipeline(self, network):
        return ScoreSDETextPipeline(
            scheduler=self.scheduler,
            tokenizer=self.data.tokenizer,
            id2label=self.id2label,
            **{self.component: network},
        )

    @torch.compiler.set_stance("force_eager")
    def sampled(self, pipeline, path):
        numbers = range(self.config.sample_num_texts)
        labels = labels_of(numbers, pipeline, self.labels_drawn)
        output = sample_texts(pipeline, numbers, 0, self.config, labels)
        names = labels and [(self.id2label or {}).get(label, str(label)) for label in labels]
        write_numbered(path, output.texts, names)
        return {
            "guidance_scale": self.config.sample_guidance_scale,
            "num_inference_steps": self.config.sample_num_inference_steps,
            "network_evaluations": output.nfe,
            "texts": output.texts,
        } | ({"classes": names} if names else {})

    @torch.compiler.set_stance("force_eager")
    def evaluate(self, network):
        config, bound = self.config, partial(nats, self.scheduler, network, told=self.told)
        found = measure_bound(bound, self.held_out, config.evaluation_texts, config, self.accelerator, config.seed)
        self.measured = found
        return {"held_out_loss": found["nats_per_token"]} | {
            name: found[name] for name in ("bits_per_token", "bits_per_character")
        }

    def facts(self):
        config = self.config
        keys = ("dataset", "split", "length", "packing")
        # that of what was started from has no name here
        keys += ("tokenizer",) if config.known_tokenizer is None else ()
        facts = {"dataset_on_hub": text_on_hub(config.dataset)} | {key: getattr(config, key) for key in keys}
        return {"data_kind": "text", "conditions": self.conditions} | facts | self.data.dataset.row_facts()

    def save(self, pipeline, folder, facts, samples):
        metrics = []
        if self.measured:
            shared = {"dataset": self.config.dataset, "seed": self.config.seed}
            metrics = bound_metrics(self.measured, shared | provenance(self.accelerator.device), bool(self.conditions))
        save = save_adapter if self.config.lora_rank else save_bundle
        return save(pipeline, folder, facts=facts, metrics=metrics)


def sample_texts(pipeline, numbers, seed, config, labels=None):
    """What a pipeline returns of the texts of these numbers, each from the seed of its number."""
    pipeline.set_progress_bar_config(desc="sampling", leave=False)
    return pipeline(
        batch_size=len(numbers),
        class_labels=labels,
        guidance_scale=config.sample_guidance_scale if labels else 1.0,
        num_inference_steps=config.sample_num_inference_steps,
        generator=[torch.Generator("cpu").manual_seed(seed + i) for i in numbers],
    )


def write_numbered(path, texts, names=None):
    """Write texts into a file, each under a line with its number and, of classes, the name of its own."""
    names = names or [""] * len(texts)
    parts = [
        f"[{number}] {name}".rstrip() + f"\n{text}\n"
        for number, (name, text) in enumerate(zip(names, texts, strict=True))
    ]
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", errors="replace") as file:
        file.write("\n".join(parts))
