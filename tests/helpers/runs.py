"""Small runs of the training commands, in this process or launched."""

import dataclasses
import os
import subprocess
import sys

import diffusers
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from places import TRAINING
from safetensors.torch import load_file

from score_sde.training import distill, encode_latents, evaluate, train, train_autoencoder, train_classifier
from score_sde.training.parts import (
    point_evaluation,
    point_task,
    signal_config,
    signal_evaluation,
    text_evaluation,
    text_task,
)
from score_sde.training.parts.options import WORK_BEGUN


# of the commands that take a YAML file
CONFIG_CLASSES = [
    train.TrainConfig,
    distill.DistillConfig,
    train_autoencoder.AutoencoderConfig,
    train_classifier.ClassifierConfig,
    encode_latents.EncodeConfig,
    evaluate.EvaluateConfig,
    text_task.TextTrainConfig,
    text_evaluation.TextEvaluateConfig,
    point_task.PointTrainConfig,
    point_evaluation.PointEvaluateConfig,
    *signal_config.SIGNAL_KINDS.values(),
    encode_latents.AudioEncodeConfig,
    encode_latents.VideoEncodeConfig,
    signal_evaluation.SignalEvaluateConfig,
]
TINY_DIT = '{"patch_size": 2, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}'
TINY_RUN = [
    *("--resolution", "8", "--image_channels", "1", "--batch_size", "4", "--lr_warmup_steps", "0"),
    *("--sample_num_images", "10", "--sample_num_inference_steps", "2", "--learning_rate", "1e-2"),
    *("--num_workers", "0"),  # on a GPU, too: starting them takes longer than these runs
]
EMBEDDED_TRAIN = "src/score_sde/data/fashion_mnist/train.parquet"
TINY_DATA = ["--resolution", 8, "--image_channels", 1, "--num_workers", 0]


def forget_runs():
    """What a process knows of the runs in it."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    WORK_BEGUN.clear()


def run(main, *arguments):
    main([str(argument) for argument in arguments])


def train_tiny(output_dir, *arguments):
    """Weights of a network trained on tiny images, or on latents, which know their size and channels."""
    common = TINY_RUN[4:] if "--latents" in arguments else TINY_RUN
    run(train.main, *common, "--network_kwargs", TINY_DIT, "--output_dir", output_dir, *arguments)
    return load_file(output_dir / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def equal(tensors, others):
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def data_config(**changes):
    return dataclasses.replace(train.TrainConfig(image_channels=1), **changes)


def encode(small_data, vae, output_dir, *arguments):
    run(
        encode_latents.main,
        *TINY_DATA,
        *("--dataset", small_data, "--vae", vae, "--output_dir", output_dir, "--shard_size", 16, *arguments),
    )


def launch(script, *arguments, processes):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes]
    command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", TRAINING / script, *arguments]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    result = subprocess.run([str(each) for each in command], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]


def tiny_dc(folder):
    blocks = {"block_types": "ResBlock", "block_out_channels": (8, 8), "layers_per_block": (1, 1)}
    blocks |= {"qkv_multiscales": ((), ())}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()}
    diffusers.AutoencoderDC(in_channels=1, latent_channels=4, scaling_factor=0.5, **sides).save_pretrained(folder)
