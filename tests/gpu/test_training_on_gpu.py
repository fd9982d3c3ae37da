"""Training on a GPU, in short runs: precisions, compilation, resumption, a process of its own under DDP, latents,
captions, adapters, classifiers, evaluation."""

import json
import os
import subprocess
import sys

import datasets
import pytest
import torch
from device import DEVICE, ON_GPU
from places import ROOT
from words import save_encoder

from runs import EMBEDDED_TRAIN, TINY_DATA, TINY_DIT, TINY_RUN, encode, equal, forget_runs, run, train_tiny
from score_sde import load_bundle
from score_sde.training import evaluate, train, train_autoencoder, train_classifier


pytestmark = pytest.mark.gpu

TINY_UNET = '{"block_out_channels": [16, 32], "layers_per_block": 1, "attention_resolutions": [4]}'


@pytest.fixture(autouse=True)
def repeatable(gpu, monkeypatch):
    """Kernels that sum in the same order each time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_data(tmp_path):
    """60 real images with a caption each."""
    data = datasets.Dataset.from_parquet(str(ROOT / EMBEDDED_TRAIN)).select(range(0, 10_000, 167))
    data = data.add_column("caption", [["a red shirt", "the blue dress"][label % 2] for label in data["label"]])
    data.to_parquet(tmp_path / "train.parquet")
    return str(tmp_path / "train.parquet")


def facts_of(output_dir):
    return json.loads((output_dir / "pipeline" / "training.json").read_text())


def train_once(output_dir, *arguments):
    forget_runs()
    return train_tiny(output_dir, *arguments)


def opened(output_dir, **arguments):
    """An image of a published pipeline, opened on the device."""
    pipeline = load_bundle(output_dir / "pipeline").to(DEVICE)
    image = pipeline(num_inference_steps=2, output_type="pt", **arguments).images
    assert image.device.type == DEVICE.type and torch.isfinite(image).all()


def test_a_run_is_repeated_and_resumed_bit_for_bit(tmp_path):
    """With deterministic algorithms, which no option asks for; without, up to the order of sums."""
    options = ["--checkpointing_steps", 3, "--gradient_accumulation_steps", 2, "--checkpoints_total_limit", 5]
    whole = train_once(tmp_path / "whole", *options, "--max_train_steps", 6)
    train_once(tmp_path / "parts", *options, "--max_train_steps", 3)
    resume = ["--max_train_steps", 6, "--resume_from_checkpoint", "latest"]
    resumed = train_once(tmp_path / "parts", *options, *resume)
    assert equal(whole, resumed)
    assert {each.device.type for each in whole.values()} == {"cpu"}
    opened(tmp_path / "parts", class_labels="Bag")


@pytest.mark.parametrize(
    "precision", ["bf16", pytest.param("fp16", marks=pytest.mark.skipif(not ON_GPU, reason="CUDA"))]
)
@pytest.mark.parametrize("network", [[], ["--network", "unet", "--network_kwargs", TINY_UNET]], ids=["dit", "unet"])
def test_mixed_precision_trains_nearly_as_float32_does(precision, network, tmp_path):
    component = "unet" if network else "transformer"

    def final_loss(name, *options):
        forget_runs()
        kwargs = network or ["--network_kwargs", TINY_DIT]
        run(train.main, *TINY_RUN, *kwargs, "--output_dir", tmp_path / name, "--max_train_steps", 4, *options)
        assert (tmp_path / name / "pipeline" / component).is_dir()
        opened(tmp_path / name, class_labels="Bag")
        return facts_of(tmp_path / name)["final_loss"]

    mixed = final_loss("mixed", "--mixed_precision", precision)
    assert mixed == pytest.approx(final_loss("plain"), rel=0.03)
    # and goes on from its checkpoint
    more = ["--max_train_steps", 5, "--resume_from_checkpoint", "latest", "--on_existing_run", "resume"]
    final_loss("mixed", "--mixed_precision", precision, *more[:4])


def test_a_compiled_network_trains_as_an_eager_one_does(tmp_path):
    arguments = ["--max_train_steps", 3, "--batch_size", 2]
    eager = train_once(tmp_path / "eager", *arguments)
    compiled = train_once(tmp_path / "compiled", *arguments, "--compile", "--sample_steps", 2)
    # a step of Adam is as long for the smallest gradient as for any
    assert max((compiled[name] - eager[name]).abs().max() for name in eager) < 1e-3
    opened(tmp_path / "compiled", class_labels="Bag")


def test_recomputed_activations_tf32_and_samples_on_the_way(tmp_path):
    plain = train_once(tmp_path / "plain", "--max_train_steps", 3)
    options = ["--gradient_checkpointing", "--sample_steps", 2, "--max_train_steps", 3]
    recomputed = train_once(tmp_path / "recomputed", *options)
    assert max((recomputed[name] - plain[name]).abs().max() for name in plain) < 1e-3
    train_once(tmp_path / "tf32", "--max_train_steps", 2, "--allow_tf32")
    torch.set_float32_matmul_precision("highest")


def test_one_process_under_ddp_trains_as_without(tmp_path):
    alone = train_once(tmp_path / "alone", "--max_train_steps", 3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1, "-m"]
    command += ["score_sde.training.train", *TINY_RUN, "--network_kwargs", TINY_DIT, "--max_train_steps", 3]
    command += ["--output_dir", tmp_path / "ddp"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    from safetensors.torch import load_file

    found = load_file(tmp_path / "ddp" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert max((found[name] - alone[name]).abs().max() for name in alone) < 1e-3


def test_an_autoencoder_its_latents_and_a_network_of_them(small_data, tmp_path):
    options = ["--block_out_channels", 8, 8, "--norm_num_groups", 4, "--lr_warmup_steps", 0, "--batch_size", 4]
    options += ["--dataset", small_data, "--max_train_steps", 3, "--output_dir", tmp_path / "autoencoder"]
    run(train_autoencoder.main, *TINY_DATA, *options)
    vae = tmp_path / "autoencoder" / "vae"
    forget_runs()
    encode(small_data, vae, tmp_path / "latents")
    train_once(tmp_path / "run", "--latents", tmp_path / "latents", "--max_train_steps", 2)
    opened(tmp_path / "run", class_labels="Bag")
    train_once(tmp_path / "on the fly", "--vae", vae, "--dataset", small_data, "--max_train_steps", 2)
    before, after = (facts_of(tmp_path / name)["final_loss"] for name in ("run", "on the fly"))
    assert before == pytest.approx(after, rel=0.3)


def test_captions(small_data, tmp_path):
    encoder = save_encoder(tmp_path / "encoder")
    options = ["--dataset", small_data, "--caption_column", "caption", "--text_encoder", encoder]
    options += ["--max_caption_tokens", 8, "--max_train_steps", 3]
    train_once(tmp_path / "run", *options)
    opened(tmp_path / "run", prompt="a red shirt", guidance_scale=2.0)


def test_an_adapter(tmp_path):
    pytest.importorskip("peft")
    train_once(tmp_path / "source", "--max_train_steps", 2)
    forget_runs()
    options = ["--init_from", tmp_path / "source" / "pipeline", "--lora_rank", 2, "--learning_rate", "1e-2"]
    options += ["--output_dir", tmp_path / "run", "--max_train_steps", 3, "--batch_size", 4]
    options += ["--lr_warmup_steps", 0, "--sample_num_images", 4, "--sample_num_inference_steps", 2]
    run(train.main, *options)
    opened(tmp_path / "run", class_labels="Bag")


def test_a_classifier_and_an_evaluation(small_data, tmp_path):
    train_once(tmp_path / "run", "--dataset", small_data, "--max_train_steps", 1)
    forget_runs()
    options = [*TINY_DATA, "--test_split", "train", "--test_images", 40, "--batch_size", 30, "--lr_warmup_steps", 0]
    options += ["--network_kwargs", '{"block_out_channels": [16, 32]}', "--max_train_steps", 5, "--dataset", small_data]
    options += ["--pipeline", tmp_path / "run" / "pipeline", "--output_dir", tmp_path / "classifier"]
    run(train_classifier.main, *options)
    facts = json.loads((tmp_path / "classifier" / "classifier" / "training.json").read_text())
    assert [row["n"] for row in facts["accuracy"]] == [40] * 5
    forget_runs()
    measured = ["--pipeline", tmp_path / "run" / "pipeline", "--num_images", 20]
    measured += ["--features", "classifier", "--test_split", "train", "--num_inference_steps", 2]
    run(evaluate.main, *measured)
    assert (tmp_path / "run" / "pipeline" / "metrics.json").exists()
