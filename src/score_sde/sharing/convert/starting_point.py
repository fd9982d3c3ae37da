"""Weights to begin with, whoever made them: a bundle, a stock pipeline that can be converted, a network alone."""

import hashlib
import os
from dataclasses import dataclass
from typing import Any

from diffusers import DiTTransformer2DModel, UNet2DModel

from ...models import DiTModel, ScoreUNetModel
from ...pipelines import ScoreSDEPipeline
from ...pipelines.bundle_files import read_config, read_index, saved_class_name
from ...pipelines.wording import shortened
from ...schedulers.scheduling_discrete_score import DiscreteScoreScheduler
from ...schedulers.scheduling_score_sde import ScoreSDEScheduler
from ..bundle_checks import check_component
from ..downloading import NoPipelineFolder, download, is_adapter
from ..facts import read_facts
from ..opening import OWN_PIPELINES, open_bundle, while_unchanged
from .from_diffusers import dit_from_diffusers, pipeline_from_diffusers, published_license
from .original_dit import ORIGINAL_DITS


# networks whose folder may be given without a pipeline around it
NETWORKS = {each.__name__: each for each in (DiTModel, ScoreUNetModel, UNet2DModel, DiTTransformer2DModel)}


@dataclass
class StartingPoint:
    """What there is to begin with.

    Attributes:
        source: the repo on the Hub, or the folder, absolute.
        name: what its card calls it; None where nothing says it.
        base_model: the repo that it is, or is from; None for weights of this machine.
        revision: of a repo its commit, of a folder that says so the run that it is from; else None.
        license: of the weights, None where nothing says it.
        network: the model, in float32; of a DiTTransformer2DModel the `DiTModel` of the same outputs.
        scheduler, vae, id2label: as a `ScoreSDEPipeline` has them; each None where there is none.
        opened: the pipeline of a bundle, with whatever else it has; else None.
    """

    source: str
    name: str | None
    base_model: str | None
    revision: str | None
    license: str | None
    network: Any
    scheduler: Any = None
    vae: Any = None
    id2label: dict[int, str] | None = None
    opened: Any = None

    @property
    def pipeline(self):
        """All of it as a `ScoreSDEPipeline`."""
        if self.opened is not None:
            return self.opened
        role = "unet" if isinstance(self.network, (ScoreUNetModel, UNet2DModel)) else "transformer"
        return ScoreSDEPipeline(self.scheduler, vae=self.vae, id2label=self.id2label, **{role: self.network})


def starting_point(folder_or_repo, revision=None, classes=()):
    """Open a bundle, a DiTPipeline, a pipeline around a UNet2DModel, or the folder of one of `NETWORKS`, with the
    installed classes; no code of it is run, and weights are opened as safetensors only.

    Args:
        folder_or_repo: a folder, or the id of a repo on the Hub.
        revision: branch, tag or commit of a repo.
        classes: of networks from outside this package: see `opening.open_bundle`.

    Raises ValueError for anything else, for what is not sound, and where the Hub refuses.
    """
    on_hub, name = not os.path.isdir(folder_or_repo), str(folder_or_repo).rstrip("/")
    if revision is not None and not on_hub:
        raise ValueError(f"revision {revision!r} is of a repo on the Hub, and {name!r} is a folder: leave it out")
    arguments = {} if revision is None else {"revision": revision}
    patterns = ["*.json", "*.safetensors", "README.md"]
    folder = download(folder_or_repo, patterns, ignore_patterns=["*.*.safetensors"], **arguments)
    facts = read_facts(folder)
    found = {
        "source": name if on_hub else os.path.abspath(folder_or_repo),
        "name": facts.get("model_name"),
        "base_model": name if on_hub else facts.get("base_model"),
        "revision": os.path.basename(folder) if on_hub else facts.get("run_id"),
        "license": facts.get("license") or published_license(name if name in ORIGINAL_DITS else folder),
    }
    if not os.path.lexists(os.path.join(folder, "model_index.json")):
        return StartingPoint(**found, network=open_network(folder, name))
    if saved_class_name(read_index(folder)) in OWN_PIPELINES:
        pipeline = open_bundle(folder, classes=classes)
    else:
        pipeline = pipeline_from_diffusers(folder, frequency_shift=0.0 if name in ORIGINAL_DITS else None)
    scheduler, network, id2label = pipeline.scheduler, pipeline.denoiser, pipeline.config.id2label
    if not isinstance(scheduler, (ScoreSDEScheduler, DiscreteScoreScheduler)):
        scheduler = ScoreSDEScheduler.from_config(scheduler.config)
    return StartingPoint(
        **found,
        network=dit_from_diffusers(network) if isinstance(network, DiTTransformer2DModel) else network,
        scheduler=scheduler,
        vae=getattr(pipeline, "vae", None),
        id2label={int(label): each for label, each in id2label.items()} if id2label else None,
        opened=pipeline if pipeline.scheduler is scheduler and pipeline.denoiser is network else None,
    )


def open_network(folder, name):
    """A network in a folder of its own; `name` is what a message calls it."""
    if is_adapter(folder):
        raise NoPipelineFolder(name)
    if not os.path.lexists(os.path.join(folder, "config.json")):
        inside = os.path.join(name, "pipeline")
        if os.path.lexists(os.path.join(inside, "model_index.json")):
            raise ValueError(f"{name!r} is the folder of a run: start from its pipeline, {inside!r}")
        raise ValueError(
            f"{name!r} holds neither a model_index.json nor a config.json: it must be a pipeline, or a network, in "
            f"diffusers' format; `score-sde convert` makes one of a checkpoint"
        )
    class_name = read_config(folder, "config.json").get("_class_name")
    if class_name not in NETWORKS:
        raise ValueError(f"{name!r} holds a {shortened(class_name)}; it must be one of {', '.join(NETWORKS)}")

    def open_checked():
        check_component(folder, (), class_name, NETWORKS[class_name], None)
        return NETWORKS[class_name].from_pretrained(folder, use_safetensors=True)

    network = while_unchanged(folder, open_checked)
    return dit_from_diffusers(network) if isinstance(network, DiTTransformer2DModel) else network


def weights_hash(network):
    """What tells the weights of a network from others, a text of 16 letters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().view(-1).float().numpy().tobytes())
    return digest.hexdigest()[:16]
