"""Training on sound, videos and arrays, from the command to a pipeline: runs that go on bit for bit, bundles that open
with the package and without, samples in the units of the data."""

import json
import os
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_latents import OTHER_DATA
from test_signal_data import frames, noise, sounds, wav

from runs import equal, forget_runs, run
from score_sde import ScoreSDEPipeline, cli, load_bundle
from score_sde.training import encode_latents, evaluate, train
from score_sde.training.parts.sounds import read_sound


TINY = "{hidden_size: 12, num_layers: 1, num_attention_heads: 2, patch_size: %s}"
STEPS = ["--batch_size", 2, "--lr_warmup_steps", 0, "--num_workers", 0, "--checkpointing_steps", 2]
STEPS += ["--sample_num_images", 2, "--sample_num_inference_steps", 2, "--max_train_steps", 4]


def audio(folder):
    values = {f"{'ab'[i % 2]}__{i}": wav(noise(1, 20 + i, seed=i)) for i in range(6)}
    options = ["--length", 16, "--crop", "random", "--network_kwargs", TINY % "[4]"]
    return ["--dataset", sounds(folder, **values), *options]


def array(folder):
    for split, seed in (("train", 0), ("test", 1)):
        np.savez(folder / f"{split}.npz", array=100 + 20 * noise(6, 2, 4, 4, 4, seed=seed), label=np.arange(6) % 3)
    return ["--dataset", folder / "{split}.npz", "--network_kwargs", TINY % "[2, 2, 2]"]


def video(folder):
    for i in range(3):
        np.save(folder / f"{i}.npy", frames(seed=i))
    options = ["--frames", 4, "--resolution", 8, "--frame_rate", 5, "--network_kwargs", TINY % "[2, 4, 4]"]
    return ["--dataset", folder, *options]


KINDS = {"audio": audio, "array": array, "video": video}


@pytest.fixture(params=KINDS)
def data(request, tmp_path):
    """(the kind, the options of its data, the folder of its run), trained in one go."""
    (tmp_path / "data").mkdir()
    options = ["--data_kind", request.param, *KINDS[request.param](tmp_path / "data")]
    run(train.main, *options, *STEPS, "--output_dir", tmp_path / "whole")
    return request.param, options, tmp_path / "whole"


def weights(folder):
    return load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def drawn(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch_size=2, num_inference_steps=2, generator=generator, output_type="np").images


OPEN = """
import sys, torch
sys.modules["score_sde"] = None
from diffusers import DiffusionPipeline
import numpy as np
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
images = pipe(batch_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
np.save(sys.argv[2], images)
"""


def test_from_the_command_to_a_bundle(data, tmp_path):
    kind, options, folder = data
    # it goes on as if it had never stopped
    run(train.main, *options, *STEPS, "--max_train_steps", 2, "--output_dir", tmp_path / "parts")
    run(train.main, *options, *STEPS, "--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "parts")
    assert equal(weights(folder), weights(tmp_path / "parts"))
    facts = json.loads((folder / "pipeline" / "training.json").read_text(encoding="utf-8"))
    assert facts["data_kind"] == kind and (folder / "pipeline" / "samples.png").stat().st_size > 100
    # what it makes is in the units of the data, and of their kind
    pipeline = ScoreSDEPipeline.from_pretrained(folder / "pipeline")
    images = drawn(pipeline)
    if kind == "array":
        assert images.shape == (2, 2, 4, 4, 4) and pipeline.units["data_std"][0] == pytest.approx(20 / 12**0.5, rel=0.1)
        assert np.abs(pipeline.units["data_mean"][0] - 100) < 2 and np.abs(images.mean() - 100) < 30
    if kind == "audio":
        assert images.shape == (2, 1, 16) and pipeline.rates["sampling_rate"] == 8000
    if kind == "video":
        assert pipeline.rates["frame_rate"] == 5 and pipeline.kind.name == "video"


def test_a_run_begins_with_the_weights_of_another(data, tmp_path):
    """Whose network it takes; the statistics are those of its own data."""
    kind, options, folder = data
    options = options[: options.index("--network_kwargs")] + options[options.index("--network_kwargs") + 2 :]
    begun = ["--init_from", folder / "pipeline", "--learning_rate", 1e-12, "--output_dir", tmp_path / "begun"]
    run(train.main, *options, *STEPS, *begun)
    old, new = weights(folder), weights(tmp_path / "begun")
    assert old.keys() == new.keys() and all(torch.allclose(old[name], new[name], atol=1e-9) for name in old)
    first, second = (ScoreSDEPipeline.from_pretrained(each / "pipeline") for each in (folder, tmp_path / "begun"))
    assert first.units == second.units and first.rates == second.rates


def test_adapters_keep_the_units_and_the_rate_of_their_model(tmp_path):
    """In which they are opened: those of their own data would be lost."""
    pytest.importorskip("peft")
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    data = ["--data_kind", "audio", *audio(tmp_path / "data")]
    run(train.main, *data, *STEPS, "--max_train_steps", 1, "--output_dir", tmp_path / "run")
    files = {f"a__{i}": wav(0.1 * noise(1, 30, seed=i)) for i in range(2)}
    adapted = ["--dataset", sounds(tmp_path / "other", **files), "--length", 16, "--lora_rank", 2]
    adapted = ["--data_kind", "audio", "--init_from", tmp_path / "run" / "pipeline", *adapted, *STEPS]
    forget_runs()
    run(train.main, *adapted, "--max_train_steps", 2, "--output_dir", tmp_path / "lora")
    model, own = (load_bundle(tmp_path / name / "pipeline") for name in ("run", "lora"))
    assert model.units == own.units and model.units["data_std"][0] > 0.2
    run(train.main, *adapted, "--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "lora")
    with pytest.raises(ValueError, match="of sampling_rate 8000; the data have 4000: pass --sampling_rate 8000"):
        run(train.main, *adapted, "--sampling_rate", 4000, "--short_clips", "pad", "--output_dir", tmp_path / "slow")


def test_figures_of_held_out_data(tmp_path):
    options = ["--data_kind", "array", *array(tmp_path), *STEPS, "--evaluation_steps", 2, "--evaluation_images", 4]
    run(train.main, *options, "--output_dir", tmp_path / "run")
    folder = tmp_path / "run" / "pipeline"
    measured = ["--loss", 6, "--likelihood", 3, "--batch_size", 2, "--tolerance", "1e-3", "--num_workers", 0]
    run(evaluate.main, "--pipeline", folder, *measured)
    metrics = {each["name"]: each for each in json.loads((folder / "metrics.json").read_text(encoding="utf-8"))}
    whole = metrics.pop("loss on test data")
    parts = [each for name, each in metrics.items() if name.startswith("loss on test data, times ")]
    # those of the parts that have at least two rows
    assert whole["n"] == 6 and 0 < len(parts) <= 4 and all(0 < each["value"] < 10 for each in (whole, *parts))
    found = metrics["negative log-likelihood of the data, nats/dim"]
    pipeline = ScoreSDEPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    rows = torch.from_numpy(np.load(tmp_path / "test.npz")["array"][:3]).float()
    settings = {"rtol": 1e-3, "atol": 1e-3, "generator": [torch.Generator().manual_seed(i) for i in range(3)]}
    truth = pipeline.log_likelihood(images=rows, **settings).nats_per_dim()
    assert found["value"] == pytest.approx(float(truth.mean()), abs=0.02) and found["n"] == 3
    # of values of a standard deviation of 5.8, not of 1
    assert found["value"] > 2.5
    assert "nats/dim" in (folder / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "run" / "evaluation.jsonl").read_text(encoding="utf-8").count("held_out_loss") == 2


@pytest.mark.parametrize(("kind", "suffix"), [("audio", ".wav"), ("video", ".gif"), ("array", ".npy")])
def test_the_command_writes_what_the_data_are(kind, suffix, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    options = ["--data_kind", kind, *KINDS[kind](tmp_path / "data"), *STEPS, "--max_train_steps", 1]
    run(train.main, *options, "--output_dir", tmp_path / "run")
    arguments = ["sample", tmp_path / "run" / "pipeline", "--num_images", "2", "--steps", "2", "--output"]
    with pytest.raises(SystemExit, match="None"):
        cli.main([str(each) for each in (*arguments, tmp_path / f"out{suffix}")])
    if kind == "audio":
        with open(tmp_path / "out_01.wav", "rb") as file:
            assert read_sound(file)[0].shape == (1, 16)
    elif kind == "video":
        with Image.open(tmp_path / "out.gif") as image:
            assert image.n_frames == 4
    else:
        assert np.load(tmp_path / "out.npy").shape == (2, 2, 4, 4, 4)
    other = ".gif" if kind != "video" else ".wav"
    forget_runs()
    with pytest.raises(SystemExit):
        cli.main([str(each) for each in (*arguments, tmp_path / f"out{other}")])
    assert f"{other} is of" in capsys.readouterr().err


LATENTS = {"audio": ("AutoencoderOobleck", "[2]"), "video": ("AutoencoderKLWan", "[1, 4, 4]")}


@pytest.mark.parametrize("kind", LATENTS)
def test_training_in_the_latents_of_an_autoencoder(kind, tmp_path):
    (tmp_path / "data").mkdir()
    name, patch = LATENTS[kind]
    torch.manual_seed(0)
    vae = getattr(diffusers, name)(**OTHER_DATA[name][0])
    vae.save_pretrained(tmp_path / "vae")
    options = [str(each) for each in KINDS[kind](tmp_path / "data")]
    kept = options[: options.index("--network_kwargs")]
    kept = [each for each in kept if each not in ("--crop", "random")]
    if kind == "video":
        kept[kept.index("4")] = "5"  # frames that it gives back
    kept += ["--short_clips", "pad", "--vae", tmp_path / "vae", "--data_kind", kind]
    encoding = ["--shard_size", 4, "--num_workers", 0, "--output_dir", tmp_path / "latents"]
    run(encode_latents.main, *kept, *encoding)
    facts = json.loads((tmp_path / "latents" / "latents.json").read_text(encoding="utf-8"))
    network = ["--network_kwargs", TINY % patch]
    run(train.main, *kept, *network, *STEPS, "--output_dir", tmp_path / "on_the_fly")
    latents = ["--data_kind", kind, "--latents", tmp_path / "latents"]
    run(train.main, *latents, *network, *STEPS, "--output_dir", tmp_path / "encoded")
    # from the same moments
    assert equal(weights(tmp_path / "on_the_fly"), weights(tmp_path / "encoded"))
    pipeline = ScoreSDEPipeline.from_pretrained(tmp_path / "encoded" / "pipeline")
    assert pipeline.sample_shape(1)[1:] == tuple(facts["shape"]) and pipeline.kind.name == {"audio": "sound"}.get(
        kind, kind
    )
    shape = drawn(pipeline).shape
    assert shape == ((2, 1, 16) if kind == "audio" else (2, 5, 8, 8, 3))
    assert pipeline.rates == {"sampling_rate": None, "frame_rate": None} | facts["units"]
    with pytest.raises(ValueError, match=f"are of the kind {kind}: pass --data_kind {kind}"):
        run(train.main, "--latents", tmp_path / "latents", *STEPS, "--output_dir", tmp_path / "other")


@pytest.mark.slow
def test_a_bundle_opens_where_the_package_is_not_installed(data, tmp_path):
    _, _, folder = data
    images = drawn(ScoreSDEPipeline.from_pretrained(folder / "pipeline"))
    environment = dict(os.environ, PYTHONPATH="", HF_MODULES_CACHE=str(tmp_path / "modules"))
    command = [sys.executable, "-c", OPEN, str(folder / "pipeline"), str(tmp_path / "images.npy")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    assert np.allclose(np.load(tmp_path / "images.npy"), images, atol=1e-4 * np.abs(images).max())


def test_a_run_goes_on_with_the_same_data_alone(tmp_path):
    options = ["--data_kind", "array", *array(tmp_path), *STEPS, "--output_dir", tmp_path / "run"]
    run(train.main, *options, "--max_train_steps", 2)
    again = ["--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="normalize_data was True, is False"):
        run(train.main, *options, *again, "--normalize_data", "false")
    with pytest.raises(ValueError, match="was trained on other data"):
        run(train.main, *options, *again, "--dataset", tmp_path / "test.npz")
