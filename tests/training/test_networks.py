"""Networks from outside the package: trained by the name of their class, resumed, saved with their code."""

import json
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from runs import TINY_RUN, equal, run
from score_sde import load_bundle
from score_sde.training import evaluate, reconstruct_ema, train
from score_sde.training.parts.networks import network_class


SOURCE = '''
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput


@dataclass
class Output(BaseOutput):
    sample: torch.Tensor


class Convolution(ModelMixin, ConfigMixin):
    """One convolution, and what it adds for the time and the class."""

    @register_to_config
    def __init__(self, sample_size=8, in_channels=1, num_classes=None, kernel_size=3, scale=1000.0):
        super().__init__()
        self.convolution = torch.nn.Conv2d(in_channels, in_channels, kernel_size, padding=kernel_size // 2)
        self.time = torch.nn.Linear(1, in_channels)
        self.classes = torch.nn.Embedding((num_classes or 0) + 1, in_channels)

    def forward(self, sample, timestep, class_labels=None):
        time = timestep.to(sample.dtype).expand(len(sample))[:, None] / self.config.scale
        none = torch.full((len(sample),), self.config.num_classes or 0, device=sample.device)
        told = self.time(time) + self.classes(none if class_labels is None else class_labels)
        return Output(self.convolution(sample) + told[:, :, None, None])


class Blind(Convolution):
    """It takes no classes."""

    def forward(self, sample, timestep):
        return super().forward(sample, timestep)


class Demanding(Convolution):
    def forward(self, sample, timestep, prompt):
        return super().forward(sample, timestep)


class Plain(torch.nn.Module):
    def forward(self, sample, timestep):
        return sample
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The name of a module in the working folder that is nowhere on Python's path."""
    folder = tmp_path / "work"
    folder.mkdir()
    name = f"networks_of_{tmp_path.name}".replace("-", "_")
    (folder / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", str(folder))])
    yield name
    sys.modules.pop(name, None)


def train_outside(output_dir, network, *arguments):
    run(train.main, *TINY_RUN, "--network", network, "--output_dir", output_dir, *arguments)
    return load_file(output_dir / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def test_a_network_from_outside_is_trained_resumed_and_opened_again(outside, tmp_path):
    network, options = f"{outside}:Convolution", ["--checkpointing_steps", 2, "--network_kwargs", "{kernel_size: 5}"]
    whole = train_outside(tmp_path / "whole", network, *options, "--max_train_steps", 4)
    train_outside(tmp_path / "parts", network, *options, "--max_train_steps", 2)
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    assert equal(train_outside(tmp_path / "parts", network, *options, *more), whole)

    _, found = network_class(network)
    opened = found.from_pretrained(tmp_path / "whole" / "pipeline" / "transformer")
    assert equal(dict(opened.named_parameters()), whole)
    assert (opened.config.kernel_size, opened.config.num_classes, opened.config.sample_size) == (5, 10, 8)
    # it was told the classes, and that there is no class only where it can be: it says nothing of a dropout
    first, last = (
        load_file(tmp_path / "whole" / "checkpoints" / f"step-{step:08d}" / "model.safetensors")["classes.weight"]
        for step in (2, 4)
    )
    changed = (first != last).any(1)
    assert changed[:10].any() and not changed[10]
    pipeline = load_bundle(tmp_path / "whole" / "pipeline", classes=[found])
    assert type(pipeline.transformer) is found and equal(dict(pipeline.transformer.named_parameters()), whole)
    # and the folder has its code
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "whole" / "pipeline", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.transformer).__name__ == "Convolution"
    generator = torch.Generator().manual_seed(0)
    assert pipeline(class_labels=[3], num_inference_steps=2, generator=generator).images[0].size == (8, 8)


def test_what_comes_after_training_opens_it_by_its_name(outside, small_data, tmp_path):
    network = f"{outside}:Convolution"
    options = ["--further_ema_decays", 0.5, "--checkpointing_steps", 2, "--max_train_steps", 2]
    train_outside(tmp_path / "run", network, "--dataset", small_data, *options)
    folder, other = tmp_path / "run" / "pipeline", tmp_path / "other"
    run(reconstruct_ema.main, tmp_path / "run", "--decay", 0.5, "--network", network, "--output", other)
    stored = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "ema-decay-0.5.safetensors")
    assert equal(load_file(other / "transformer" / "diffusion_pytorch_model.safetensors"), stored)
    measured = ["--num_images", 0, "--likelihood", 2, "--tolerance", 0.1, "--test_split", "train"]
    run(evaluate.main, "--pipeline", folder, "--network", network, *measured)
    [metric] = json.loads((folder / "metrics.json").read_text())
    assert metric["n"] == 2


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("{}", "is unknown; choose one of dit, unet, or a class of your own by package.module:Class"),
        ("no_such_module:Network", "network 'no_such_module:Network' cannot be imported: No module named"),
        ("{}:Absent", "cannot be imported: module '.*' has no attribute 'Absent'"),
        ("{}:Plain", "is no model of diffusers: let the class inherit ModelMixin and ConfigMixin"),
        ("{}:Output", "is no model of diffusers"),
        (
            "{}:Demanding",
            r"its forward must take \(sample, timestep\), and more only by name; it takes \(self, .*prompt",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(outside, network, message):
    with pytest.raises(ValueError, match=message):
        network_class(network.format(outside))


def test_it_is_refused_as_an_option_in_one_line(outside, capsys):
    with pytest.raises(SystemExit):
        run(train.main, "--network", f"{outside}:Plain", "--dataset", "does_not_exist.parquet")
    error = capsys.readouterr().err
    assert f"network '{outside}:Plain' is no model of diffusers" in error and "does_not_exist" not in error


def test_a_network_that_takes_no_classes_is_trained_without(outside, tmp_path):
    with pytest.raises(ValueError, match="class_labels, which the forward of Blind doesn't take: pass --class_condit"):
        train_outside(tmp_path / "run", f"{outside}:Blind", "--max_train_steps", 1)
    options = ["--class_conditional", "false", "--on_existing_run", "set_aside"]
    train_outside(tmp_path / "run", f"{outside}:Blind", "--max_train_steps", 1, *options)


def test_the_names_of_the_package_look_nowhere_else(monkeypatch):
    before = list(sys.path)
    network_class("dit")
    assert sys.path == before
