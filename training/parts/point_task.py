"""Training on points: angles on tori, points of spheres, numbers in boxes, measurements in flat space."""

import json
from dataclasses import dataclass
from typing import ClassVar

import torch

from score_sde import ScoreSDEPipeline, ScoreSDEScheduler
from score_sde.models.transformer_score_dit import DOMAINS
from score_sde.sharing.adapters import save_adapter
from score_sde.sharing.bundles import save_bundle

from .clean_samples import CleanSamples
from .config import LoopConfig, option
from .diffusion_loss import DiffusionLoss
from .networks import NetworkConfig, check_conditions, make_point_network, network_class
from .objective_config import ObjectiveConfig
from .options import arguments_of, mapping
from .point_data import PointData, PointDataConfig
from .point_likelihood import likelihood_metrics, point_nats
from .provenance import provenance
from .publishing import PublishConfig, PublishedTask
from .samples import labels_of
from .sources import table_on_hub
from .starting import ADOPTED, StartConfig, begun, is_of_points
from .tasks import loss_by_time


# of the likelihood while training goes on; `score-sde evaluate` is exacter
TOLERANCE = 1e-3


@dataclass
class PointTrainConfig(StartConfig, ObjectiveConfig, LoopConfig, PointDataConfig, NetworkConfig, PublishConfig):
    """Train a score-based diffusion model on points: angles, points of a sphere, numbers in a box or of any size."""

    configs = "diffusion"
    adopted: ClassVar[tuple[str, ...]] = (*ADOPTED, "domain")
    # which points have not
    vae, latents, normalize_latents = None, None, False

    data_kind: str = option("points", "points, or another kind, which has other options.", "data", common=True)
    sde_type: str | None = option(  # type: ignore[assignment]  # the domain decides
        None, "Noise path: ve on a domain, whose path it is; in flat space vp unless given.", "path and objective", True
    )
    prediction_type: str | None = option(  # type: ignore[assignment]
        None,
        "What the network predicts: on a domain score or epsilon, in flat space v_prediction unless given.",
        "path and objective",
        common=True,
    )
    sample_num_images: int = option(2000, "Points in a picture of samples.", "samples and logs")
    evaluation_steps: int = option(
        0,
        "Optimizer steps between evaluations of the averaged weights (evaluation.jsonl), the last of them at the end: "
        "the negative log-likelihood of held-out points in nats; 0 for none.",
        "samples and logs",
        common=True,
    )
    evaluation_points: int = option(1000, "Points of an evaluation, the first ones.", "samples and logs")
    evaluation_split: str = option("validation", "Split that the held-out points are from.", "samples and logs")

    def problems(self):
        for problems in (StartConfig.problems, PointDataConfig.problems):
            found = list(problems(self))
            yield from found
            if found:
                return
        on_domain = self.domain_of_scheduler is not None
        self.sde_type = self.sde_type or ("ve" if on_domain else "vp")
        self.prediction_type = self.prediction_type or ("epsilon" if on_domain else "v_prediction")
        yield from LoopConfig.problems(self)
        yield from self.objective_problems()
        yield from self.publish_problems()
        if self.vlb_weight:
            yield f"vlb_weight {self.vlb_weight} is of images: points have no learned variance, leave it out"
        if self.time_shift is not None:
            yield f"time_shift {self.time_shift} is of images and signals, whose dimension is large: leave it out"
        if self.evaluation_steps < 0:
            yield f"evaluation_steps {self.evaluation_steps} must be at least 0"
        if self.evaluation_points < 2:
            yield f"evaluation_points {self.evaluation_points} must be at least 2"
        labelled = self.class_conditional and self.label_column is not None
        if not labelled and self.sample_guidance_scale != 1:
            yield f"sample_guidance_scale {self.sample_guidance_scale:g} needs classes: pass label_column, or 1"
        # every argument of scheduler, objective and network is checked here, before any data is opened
        try:
            self.make_objective(self.make_scheduler())
            with torch.device("meta"):  # without memory or time
                make_point_network(self, sum(self.domains.values()), num_classes=2 if labelled else None)
        except (TypeError, ValueError, RuntimeError) as error:
            yield str(error)

    def check_start(self):
        """Raise ValueError for weights of another kind of data than points."""
        if not is_of_points(self.start.network):
            raise ValueError("it is no pipeline of points: images are --data_kind image, sounds --data_kind audio, ...")

    def adopt(self, options, whence):
        """As `StartConfig.adopt`. The domain, which network and scheduler both have, is an option of its own."""
        network, scheduler = (mapping(name, options[name]) for name in ("network_kwargs", "scheduler_kwargs"))
        theirs = network.pop("domain", None) or scheduler.get("domain") or "flat"
        scheduler.pop("domain", None)
        # of several parts, as networks keep them
        theirs = options.get("domain") or (theirs if isinstance(theirs, str) else json.dumps(dict(theirs)))
        options = options | {"network_kwargs": json.dumps(network), "scheduler_kwargs": json.dumps(scheduler)}
        if "domain" in self.given and named(self.domain) != named(theirs):
            yield f"domain {self.domain!r} contradicts {theirs!r} of {whence}: leave it out"
        else:
            self.domain = theirs
        yield from super().adopt({name: each for name, each in options.items() if name != "domain"}, whence)

    def make_scheduler(self):
        named = {"sde_type": self.sde_type, "prediction_type": self.prediction_type, "domain": self.domain_of_scheduler}
        options = arguments_of(ScoreSDEScheduler, "scheduler_kwargs", self.scheduler_kwargs, named)
        return ScoreSDEScheduler(**{name: each for name, each in named.items() if each is not None}, **options)


class PointTask(PublishedTask):
    """A score-based diffusion model on the points, scheduler and network of a `PointTrainConfig`."""

    unit = "points"

    def __init__(self, config, accelerator):
        self.accelerator, self.scheduler = accelerator, config.make_scheduler()
        self.data = PointData(config, accelerator)
        dataset = self.data.dataset
        id2label = dataset.id2label if config.class_conditional else None
        network, self.id2label, self.labels, origin = begun(
            config,
            accelerator,
            lambda num_classes: make_point_network(config, dataset.shape[0], num_classes),
            id2label and len(id2label),
            id2label,
        )
        self.renumber(dataset, network)
        super().__init__(config, network, dataset, dataset.fingerprint(), origin)
        self.component, _ = network_class(config.network)
        told = config.class_conditional and dataset.labels is not None
        self.conditions = ["class_labels"] if told else []
        check_conditions(network, self.conditions)
        points = CleanSamples(num_classes=dataset.num_classes)
        self.loss = DiffusionLoss(config.make_objective(self.scheduler), points, network, self.conditions)
        self.dropout_prob = network.config.get("class_dropout_prob", 0.0) if self.conditions else 0.0
        self.evaluation_steps, self.held_out, self.measured = config.evaluation_steps, None, {}
        if config.evaluation_steps:
            with accelerator.main_process_first():
                self.held_out = self.data.split(config.evaluation_split)
                self.renumber(self.held_out, network)

    def compute_loss(self, state, batch, draws):
        losses = self.loss(state.model, batch, draws, self.dropout_prob)
        return losses.mean(), loss_by_time(losses.detach(), draws.times, self.scheduler)

    def renumber(self, dataset, network):
        """Give the classes of points the numbers that they have in a network under adapters."""
        if self.labels is not None:
            names = self.id2label or {label: str(label) for label in range(network.config["num_classes"])}
            dataset.renumber(self.labels.cpu(), names)

    def after_step(self, state):
        self.measured = {}  # of other weights

    def make_pipeline(self, network):
        coordinates = self.data.coordinates
        return ScoreSDEPipeline(
            scheduler=self.scheduler,
            id2label=self.id2label,
            data_mean=list(coordinates.mean),
            data_std=list(coordinates.std),
            columns=",".join(coordinates.columns),
            coordinates=coordinates.on_sphere,
            **{self.component: network},
        )

    @torch.compiler.set_stance("force_eager")
    def sampled(self, pipeline, path):
        config, count = self.config, self.config.sample_num_images
        labels = labels_of(range(count), pipeline) if self.conditions else None
        pipeline.set_progress_bar_config(desc="sampling", leave=False)
        output = pipeline(
            batch_size=count,
            class_labels=labels,
            guidance_scale=config.sample_guidance_scale if labels else 1.0,
            num_inference_steps=config.sample_num_inference_steps,
            generator=[torch.Generator("cpu").manual_seed(i) for i in range(count)],
        )
        beside, names = self.shown()
        asked = labels and [self.id2label[label] for label in labels]
        pipeline.kind.save_grid(output.images, path, captions=asked, data=beside, data_captions=names)
        return {
            "guidance_scale": config.sample_guidance_scale,
            "num_inference_steps": config.sample_num_inference_steps,
            "network_evaluations": output.nfe,
        }

    def shown(self):
        """(values of the data that samples are shown beside, their classes' names or None): as many of each class as of
        samples, from the whole of the file, which may be sorted."""
        dataset, count = self.data.dataset, self.config.sample_num_images
        if not self.conditions:
            return dataset.values()[spread(torch.arange(len(dataset)), count)].numpy(), None
        of_class = count // len(dataset.class_counts)
        found = [torch.nonzero(dataset.labels == label)[:, 0] for label in self.id2label]
        rows = torch.cat([spread(each, of_class) for each in found])
        return dataset.values()[rows].numpy(), [self.id2label[label] for label in dataset.labels[rows].tolist()]

    @torch.compiler.set_stance("force_eager")
    def evaluate(self, network):
        pipeline = self.make_pipeline(network).to(self.accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
        settings = LikelihoodSettings(self.config.batch_size, self.config.seed, num_workers=self.config.num_workers)
        nats, labels, _ = point_nats(pipeline, self.held_out, self.config.evaluation_points, settings, self.accelerator)
        self.measured = {"nats": nats, "labels": labels}
        of_classes = {
            f"held_out_nats_{self.id2label[label]}": float(nats[labels == label].mean())
            for label in sorted(set([] if labels is None else labels.tolist()))
        }
        return {"held_out_loss": float(nats.mean())} | of_classes

    def facts(self):
        config, coordinates = self.config, self.data.coordinates
        facts = {"dataset": config.dataset, "dataset_on_hub": table_on_hub(config.dataset), "split": config.split}
        facts |= {"columns": list(coordinates.columns), "domain": self.scheduler.config.get("domain")}
        facts["units"] = config.units
        return {"data_kind": "points", "conditions": self.conditions} | facts | self.data.dataset.row_facts()

    def save(self, pipeline, folder, facts, samples):
        metrics = []
        if self.measured:
            own = {"dataset": self.config.dataset, "dataset_on_hub": table_on_hub(self.config.dataset)}
            shared = own | {"split": self.config.evaluation_split, "seed": self.config.seed, "tolerance": TOLERANCE}
            found = self.measured["nats"], self.measured["labels"], self.id2label, self.data.coordinates
            metrics = likelihood_metrics(*found, shared | provenance(self.accelerator.device))
        if self.config.lora_rank:
            return save_adapter(pipeline, folder, facts=facts, sample_grid=samples)
        return save_bundle(pipeline, folder, facts=facts, metrics=metrics, sample_grid=samples)


def named(domain):
    """The names of a domain, an option, in order."""
    return domain if domain in DOMAINS else list(mapping("domain", domain))


def spread(rows, count):
    """At most so many of the numbers of rows, as far from each other as can be."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


@dataclass
class LikelihoodSettings:
    """What `point_nats` is told beside its points."""

    batch_size: int
    seed: int
    tolerance: float = TOLERANCE
    num_workers: int | None = None
