"""A step of the training loop on a pretended CUDA device: the host waits for nothing, and sends the batch and a few
numbers of the times."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from pretended_cuda import CUDA, PretendedCuda, generator

from runs import TINY_DATA, TINY_DIT, forget_runs
from score_sde.training import train
from score_sde.training.parts import clean_data
from score_sde.training.parts.averages import Averages
from score_sde.training.parts.flops import FlopCounter
from score_sde.training.parts.loop import fit, make_accelerator
from score_sde.training.parts.options import parse
from score_sde.training.parts.run_folder import open_run


@pytest.fixture
def on_cuda(monkeypatch):
    """Training believes that it has a GPU, but for counting operations, which it does on a real "meta"."""
    monkeypatch.setattr(FlopCounter, "__init__", lambda self, model: None)
    monkeypatch.setattr(FlopCounter, "watching", lambda self, model: model)
    monkeypatch.setattr(FlopCounter, "flops", 1, raising=False)
    monkeypatch.setattr(Accelerator, "device", CUDA)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator() if device == CUDA else CPU_GENERATOR())
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    with PretendedCuda() as cuda:
        yield cuda


CPU_GENERATOR = torch.Generator
OPTIONS = ["--batch_size", 4, "--max_train_steps", 4, "--gradient_accumulation_steps", 2, "--logging_steps", 4]
OPTIONS += ["--lr_warmup_steps", 0, "--checkpointing_steps", 0, "--peak_tflops", 1, "--num_workers", 0]
OPTIONS += ["--network_kwargs", TINY_DIT, "--further_ema_decays", 0.9, "--random_flip"]


def work_of_micro_steps(cuda, folder, *more):
    """What the device is given to do from each loss to the next."""
    arguments = [*TINY_DATA, *OPTIONS, "--output_dir", folder, *more]
    forget_runs()
    config = parse(train.TrainConfig, [str(each) for each in arguments])
    accelerator, found = make_accelerator(config), []

    class Watched(train.DiffusionTask):
        def compute_loss(self, state, batch, draws):
            if found:
                found[-1][0].__exit__(None, None, None)
            watch = cuda.watched()
            found.append((watch, watch.__enter__()))
            return super().compute_loss(state, batch, draws)

    with open_run(config, accelerator) as run:
        fit(config, accelerator, run, Watched(config, accelerator))
    # the last ends with the log
    return [work for _, work in found[:-1]]


def of(work, file):
    """The kernels that a file of ours asked for."""
    return [kernel for kernel in work.kernels if f" at {file}:" in kernel]


LEARNED_VARIANCE = ["--sde_type", "discrete_vp", "--prediction_type", "epsilon", "--vlb_weight", 0.001]


@pytest.mark.parametrize("options", [[], LEARNED_VARIANCE], ids=["plain", "learned variance"])
def test_a_step_waits_for_nothing(options, on_cuda, tmp_path):
    inner, outer = work_of_micro_steps(on_cuda, tmp_path, *options)[2:4]
    for work in (inner, outer):
        assert work.waits == []
        # images and labels; who is mirrored, who has no label; what the times make
        assert len(work.transfers) == 2 + 2 + 1
        # noise by one block of rows, and the values to log
        drawn = [kernel for kernel in of(work, "parts/loop.py") if "randn" in kernel or "cat" in kernel]
        assert len(drawn) == 3
    # noise, the joining of its draws and of the log; and by what the loss is multiplied
    assert len(of(inner, "parts/loop.py")) == 5
    assert of(inner, "parts/averages.py") == []
    # one for each average
    assert len(of(outer, "parts/averages.py")) == 2


def test_latents_are_drawn_without_waiting(on_cuda, tmp_path, monkeypatch):
    vae = AutoencoderKL(1, 1, block_out_channels=[4], norm_num_groups=2, latent_channels=2, latents_mean=[0.1, 0.2])
    monkeypatch.setattr(clean_data, "load_vae", lambda path: vae.eval().requires_grad_(False))
    for work in work_of_micro_steps(on_cuda, tmp_path / "run", "--vae", "an autoencoder")[2:]:
        assert work.waits == []
        assert len(work.transfers) == 2 + 2 + 1


def test_a_grid_on_the_way_copies_no_weights(on_cuda, tmp_path):
    network = torch.nn.Linear(3, 2).to(CUDA)
    averages = Averages(train.TrainConfig(), network)
    averages.step(torch.zeros((), device=CUDA))
    with on_cuda.watched() as work, averages.averaged_network() as averaged:
        assert averaged is network
    assert work.counts == (0, 0, 0)


def test_float32_without_tf32_is_advised_against(on_cuda, tmp_path, capsys):
    for options, said in ((["--allow_tf32"], False), ([], True)):
        forget_runs()
        config = parse(train.TrainConfig, ["--output_dir", str(tmp_path), *options])
        make_accelerator(config)
        assert ("--mixed_precision bf16, or --allow_tf32 true, is several" in capsys.readouterr().out) == said
        assert torch.backends.cudnn.allow_tf32 == config.allow_tf32 == torch.backends.cuda.matmul.allow_tf32
