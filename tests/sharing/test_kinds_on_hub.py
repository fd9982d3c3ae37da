"""Bundles of sound, videos and points on the Hub of the tests: pushed with what plays, their cards, and back."""

import json
import math

import pytest
import torch
from bundles import LOAD_BY_REMOTE_CODE
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler, save_bundle


SIZE = {"hidden_size": 24, "num_layers": 1, "num_attention_heads": 2, "num_classes": 2}
NAMES = {0: "left", 1: "right"}
OF_TORUS = {"sde_type": "ve", "domain": "torus", "prediction_type": "score"}


def pipeline_of(kind):
    """(a pipeline of a kind of data, with two classes, and what its training says)."""
    torch.manual_seed(0)
    size, channels, more, told, scheduler = {
        "audio": ((64,), 1, {}, {"sampling_rate": 8000, "data_mean": [0.1], "data_std": [0.2]}, {}),
        "video": ((4, 8, 8), 3, {}, {"frame_rate": 5}, {}),
        "points": (
            *((1,), 2, {"domain": "torus"}),
            *({"columns": "phi,psi", "data_mean": [0.0] * 2, "data_std": [180 / math.pi] * 2}, OF_TORUS),
        ),
    }[kind]
    patch = 1 if kind == "points" else (2,) * len(size)
    network = DiTModel(size, patch, channels, **SIZE, **more)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(**scheduler), transformer=network.eval(), id2label=NAMES, **told)
    pipeline.set_progress_bar_config(disable=True)
    facts = {"data_kind": kind, "model_name": "Small", "license": "mit", "rows": 10, "config": {"data_kind": kind}}
    return pipeline, facts | ({"columns": ["phi", "psi"], "domain": "torus"} if kind == "points" else {})


BACK = """
import sys, torch
from score_sde import ScoreSDEPipeline
from safetensors.torch import save_file
pipeline = ScoreSDEPipeline.from_pretrained("me/model")
pipeline.set_progress_bar_config(disable=True)
drawn = pipeline(class_labels=["left", "right"], num_inference_steps=3, output_type="pt",
                 generator=torch.Generator().manual_seed(3)).images
save_file({"image": drawn.contiguous()}, sys.argv[1])
print(pipeline.kind.name, pipeline.kind.unit)
"""


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("audio", {"samples_00.wav", "samples_01.wav"}), ("video", {"samples.gif"}), ("points", set())],
)
@pytest.mark.slow
def test_a_bundle_goes_to_the_hub_and_back(kind, shown, local_hub, tmp_path):
    pipeline, facts = pipeline_of(kind)
    told = {"class_labels": ["left", "right"], "num_inference_steps": 3}
    drawn = pipeline(**told, generator=torch.Generator().manual_seed(3)).images
    pipeline.kind.save_grid(drawn, tmp_path / "grid.png", captions=["left", "right"])
    folder = save_bundle(pipeline, tmp_path / "bundle", facts=facts, sample_grid=tmp_path / "grid.png")
    result = local_hub.run(PUSH, folder, token="hf_writer")
    assert result.returncode == 0, result.stderr
    files = local_hub.files("me/model")
    assert {"samples.png", *shown} == {name for name in files if name.startswith("samples")}
    # the card shows what plays
    card = ModelCard(files["README.md"].decode())
    played = [name for name in shown if name in card.content]
    assert set(played) == shown and ("samples.png" in card.content) == (kind != "video")
    assert card.content.count("<audio controls") == (2 if kind == "audio" else 0)
    assert "[More Information Needed]" not in card.content and str(tmp_path) not in card.content
    assert card.data.pipeline_tag is None and (kind != "points" or "phi" in card.content)
    # and back, by the installed classes
    result = local_hub.run(BACK, tmp_path / "back", token="hf_reader")
    assert result.returncode == 0, result.stderr
    truth = pipeline(**told, output_type="pt", generator=torch.Generator().manual_seed(3)).images
    save_file({"image": truth.contiguous()}, tmp_path / "truth")
    assert (tmp_path / "truth").read_bytes() == (tmp_path / "back").read_bytes()
    # and by the code that the repo carries
    result = local_hub.run(LOAD_BY_REMOTE_CODE, tmp_path / "truth", "me/model", json.dumps(told), token="hf_reader")
    assert result.returncode == 0, result.stderr
    difference, module = json.loads(result.stdout.splitlines()[-1])
    assert difference < 1e-4 and module == "diffusers_modules"


PUSH = """
import sys
from score_sde import push_to_hub
print(push_to_hub(sys.argv[1], "me/model"))
"""
