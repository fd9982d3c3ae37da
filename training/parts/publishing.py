"""What a run makes of its network on the way and at the end: a pipeline folder with its card, and uploads of it to the
Hub."""

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import diffusers
from huggingface_hub.utils import validate_repo_id

from score_sde.sharing.bundles import add_metrics
from score_sde.sharing.facts import check_license, read_json
from score_sde.sharing.hub import push_to_hub

from .config import option
from .hashes import hash_of_file
from .loop import sample_path
from .run_folder import surviving
from .tasks import Task


@dataclass
class PublishConfig:
    model_name: str = option("score-sde model", "Name of the model on its card.", "card and Hub")
    license: str | None = option(
        None, "Licence of the trained weights on its card, as the Hub calls it: apache-2.0.", "card and Hub"
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

    def publish_problems(self):
        try:
            check_license(self.license)
        except ValueError as error:
            yield str(error)
        if self.push_to_hub:
            try:
                validate_repo_id(self.push_to_hub)
            except ValueError as error:
                yield f"push_to_hub {self.push_to_hub!r}: {error}"
        if self.push_steps < 0 or (self.push_steps and not self.push_to_hub):
            yield f"push_steps {self.push_steps} must be at least 0, and needs push_to_hub"


class PublishedTask(Task):
    """A task whose network becomes a pipeline folder. A subclass states how: `make_pipeline`(network), the pipeline;
    `sampled`(pipeline, path), which writes its samples and returns what the card says of them; `facts`(), what the card
    says of the data; and `save`(pipeline, folder, facts, samples)."""

    def __init__(self, config, network, dataset, data_fingerprint=None, origin=None):
        super().__init__(network, dataset, data_fingerprint, origin)
        self.config, self.push_steps, self.uploads = config, config.push_steps, Uploads(config)

    def sample(self, network, path):
        self.sampled(self.make_pipeline(network), path)

    def make_bundle(self, network, facts, name):
        """Save the pipeline with its facts and samples as a folder of output_dir; (folder, path of the samples or
        None)."""
        config, pipeline, samples = self.config, self.make_pipeline(network), None
        facts |= self.facts() | {
            "model_name": config.model_name,
            "license": config.license or (self.origin or {}).get("license"),
            "base_model": (self.origin or {}).get("base_model"),
            "started_from": self.origin,
            "repo_id": config.push_to_hub,
            "diffusers": diffusers.__version__,
        }
        with surviving(f"the {self.pictures}"):
            path = sample_path(config.output_dir, facts["steps"], self.samples_suffix)
            facts["samples"] = self.sampled(pipeline, path)
            samples = path
        folder = os.path.join(config.output_dir, name)
        before = measured(folder, facts["steps"])
        self.save(pipeline, folder, facts, samples)
        if before and before["model"] == digests(folder):
            # a run that is resumed at its end: what `evaluate` found is true of this model, too
            add_metrics(folder, before["metrics"])
        return folder, samples

    def push(self, network, facts):
        if self.uploads.is_busy():
            print(f"step {facts['steps']}: not pushed, the upload before still runs")
            return
        folder, _ = self.make_bundle(network, facts, "pushed")
        self.uploads.begin(folder, facts["steps"])


def measured(folder, steps):
    """The figures of the bundle in a folder, and of which model they are; None where there are none, or of other
    steps, whose weights need not be read."""
    metrics, facts = (read_json(os.path.join(folder, f"{name}.json")) for name in ("metrics", "training"))
    if not metrics or not facts or facts.get("steps") != steps:
        return None
    return {"metrics": metrics, "model": digests(folder)}


def digests(folder):
    """{path: digest} of the weights and configs of a pipeline's parts."""
    paths = (path for pattern in ("*/*.safetensors", "*/*config.json") for path in Path(folder).glob(pattern))
    return {path.relative_to(folder): hash_of_file(path) for path in paths}


class Uploads:
    """Uploads to the repo of a `TrainConfig`: one at a time on the way, in the background, and one at the end. What
    fails is said, and costs no more than the upload."""

    def __init__(self, config):
        self.config, self.thread = config, None

    def is_busy(self):
        return self.thread is not None and self.thread.is_alive()

    def begin(self, folder, steps):
        # a daemon: what doesn't answer keeps no run from ending
        self.thread = threading.Thread(target=self.push, args=(folder, steps), daemon=True)
        self.thread.start()

    def finish(self, folder, steps):
        """Wait for what is on its way, then upload this."""
        if self.thread is not None:
            self.thread.join()
        self.push(folder, steps)

    def push(self, folder, steps):
        repo = self.config.push_to_hub
        message = f"{self.config.model_name}, {steps:,} steps"
        try:
            address = push_to_hub(folder, repo, private=self.config.hub_private or None, commit_message=message)
            print(f"pushed: {address}")
        except (OSError, ValueError) as error:  # the bundle is saved: no reason to fail
            print(f"{error}; nothing is lost: `score-sde push {folder} {repo}` pushes it")
