"""A step of the training loop on a pretended CUDA device: the host waits for nothing, and sends the batch and a few
numbers of the times."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from pretended_cuda import CUDA, PretendedCuda, generator
from vision import save_vision
from words import save_encoder

from runs import TINY_DATA, TINY_DIT, forget_runs
from score_sde import ScoreSDEScheduler
from score_sde.losses import FEW_STEP_METHODS
from score_sde.training import encode_latents, train, train_autoencoder, train_classifier
from score_sde.training.parts import clean_data
from score_sde.training.parts.averages import Averages
from score_sde.training.parts.data import ImageDataset
from score_sde.training.parts.flops import FlopCounter
from score_sde.training.parts.loop import fit, make_accelerator
from score_sde.training.parts.options import parse
from score_sde.training.parts.precision import choose_kernels
from score_sde.training.parts.run_folder import open_run


@pytest.fixture
def on_cuda(monkeypatch):
    """Training believes that it has a GPU, but for counting operations, which it does on a real "meta"."""
    monkeypatch.setattr(FlopCounter, "__init__", lambda self, model: None)
    monkeypatch.setattr(FlopCounter, "watching", lambda self, model: model)
    monkeypatch.setattr(FlopCounter, "flops", 1, raising=False)
    monkeypatch.setattr(Accelerator, "device", CUDA)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator() if device == CUDA else CPU_GENERATOR())
    monkeypatch.setattr(torch, "get_device_module", lambda device: RANDOM_NUMBERS)
    monkeypatch.setattr(torch.cuda, "get_rng_state", RANDOM_NUMBERS.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", RANDOM_NUMBERS.set_rng_state)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    with PretendedCuda() as cuda:
        yield cuda


# of one device: who asks for those of all, however many there are, is refused
RANDOM_NUMBERS = SimpleNamespace(
    manual_seed=lambda seed: None, get_rng_state=lambda device: torch.empty(0), set_rng_state=lambda state, device: None
)
CPU_GENERATOR = torch.Generator
OPTIONS = ["--batch_size", 4, "--max_train_steps", 4, "--gradient_accumulation_steps", 2, "--logging_steps", 4]
OPTIONS += ["--lr_warmup_steps", 0, "--checkpointing_steps", 0, "--peak_tflops", 1, "--num_workers", 0]
OPTIONS += ["--further_ema_decays", 0.9]
TINY_DATA = [*TINY_DATA, "--network_kwargs", TINY_DIT, "--random_flip"]


def make_task(task_class, config, accelerator):
    return task_class(config, accelerator)


def work_of_micro_steps(
    cuda, folder, *more, data=TINY_DATA, config_class=train.TrainConfig, task_class=None, make=make_task
):
    """What the device is given to do from each loss to the next."""
    arguments = [*data, *OPTIONS, "--output_dir", folder, *more]
    forget_runs()
    config = parse(config_class, [str(each) for each in arguments])
    accelerator, found = make_accelerator(config), []

    class Watched(task_class or train.TASKS[config.data_kind]):
        def compute_loss(self, state, batch, draws):
            if found:
                found[-1][0].__exit__(None, None, None)
            watch = cuda.watched()
            found.append((watch, watch.__enter__()))
            return super().compute_loss(state, batch, draws)

    with open_run(config, accelerator) as run:
        fit(config, accelerator, run, make(Watched, config, accelerator))
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
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert line["peak_memory_gb"] == 3.0


def tiny_dit(**more):
    return ["--network_kwargs", json.dumps(json.loads(TINY_DIT) | more)]


TINY_UNET = {"block_out_channels": [8, 8], "layers_per_block": 1, "attention_resolutions": [4]}
GUIDED = ["--guidance_range", 1, 3]
# ways to train on images
TRAININGS = {method: ["--method", method] for method in FEW_STEP_METHODS}
TRAININGS |= {f"{method}, told its guidance": ["--method", method, *GUIDED] for method in ("mean_flow", "flow_map")}
TRAININGS |= {
    "mean_flow, guidance folded in": ["--method", "mean_flow", "--folded_guidance", 2],
    "routing": [*tiny_dit(num_layers=3), "--token_routing", 0.5],
    "a wide head": tiny_dit(head_hidden_size=16, patch_bottleneck=2, position_embedding="rotary"),
    "a U-Net": ["--network", "unet", "--network_kwargs", json.dumps(TINY_UNET)],
    "Muon": ["--optimizer", "muon"],
    "a time shift": ["--sde_type", "linear", "--prediction_type", "flow_prediction", "--time_shift", 3],
    "power-function averages": ["--ema_snapshot_steps", 100],
    "images beside": ["--condition_from", "blur:1.0"],
}


def check_that_nothing_waits(works):
    for work in works[2:]:
        assert work.waits == []


@pytest.mark.parametrize("name", TRAININGS)
def test_every_way_to_train_waits_for_nothing(name, on_cuda, tmp_path):
    check_that_nothing_waits(work_of_micro_steps(on_cuda, tmp_path, *TRAININGS[name], "--max_train_steps", 3))


@pytest.fixture
def rows(tmp_path):
    """A file of rows with columns of every kind."""
    with_caption = datasets.Dataset.from_parquet("src/score_sde/data/fashion_mnist/train.parquet").select(range(12))
    words = [["a red shirt", "the blue bag"][row % 2] for row in range(12)]
    angles = [0.1 * row for row in range(12)]
    for name, values in (("caption", words), ("phi", angles), ("psi", angles[::-1])):
        with_caption = with_caption.add_column(name, values)
    with_caption.to_parquet(tmp_path / "train.parquet")
    return tmp_path / "train.parquet"


def test_captions_wait_for_their_encoder_alone(rows, on_cuda, tmp_path):
    """Whose library looks once whether a batch has padding at all."""
    told = ["--dataset", rows, "--caption_column", "caption", "--text_encoder", save_encoder(tmp_path / "encoder")]
    told += ["--max_caption_tokens", 8, "--pooled_captions", "--max_train_steps", 3]
    for work in work_of_micro_steps(on_cuda, tmp_path / "run", *told)[2:]:
        assert len(work.waits) <= 1 and all("transformers/masking_utils.py" in each for each in work.waits)


def test_alignment_waits_for_nothing(on_cuda, tmp_path):
    torch.manual_seed(0)
    told = ["--align_to", save_vision(tmp_path), "--align_block", 1, "--max_train_steps", 3]
    check_that_nothing_waits(work_of_micro_steps(on_cuda, tmp_path / "run", *told))


NETWORK = ["--network_kwargs", "{hidden_size: 16, num_layers: 1, num_attention_heads: 2}", "--max_train_steps", 3]


UNIFORM = ["--process", "uniform", "--prediction_type"]


@pytest.mark.parametrize("options", [[], [*UNIFORM, "score"], [*UNIFORM, "leave_one_out"]], ids=str)
def test_texts_wait_for_nothing(options, rows, on_cuda, tmp_path):
    data = ["--data_kind", "text", "--dataset", rows, "--text_column", "caption", "--packing", "false", "--length", 16]
    data += ["--label_column", "label", "--num_workers", 0, *options]
    check_that_nothing_waits(work_of_micro_steps(on_cuda, tmp_path / "run", *NETWORK, data=data))


@pytest.mark.parametrize("domain", ["torus", "box", "flat", "{torus: 1, flat: 1}"])
def test_points_wait_for_nothing(domain, rows, on_cuda, tmp_path):
    units = ["--box_ranges", "{phi: [0, 2], psi: [0, 2]}"] if domain == "box" else []
    data = ["--domain", domain, "--columns", "phi,psi", "--dataset", rows, "--num_workers", 0, *units]
    data += ["--label_column", "label"]
    check_that_nothing_waits(work_of_micro_steps(on_cuda, tmp_path / "run", *NETWORK, data=data))


def test_autoencoders_and_classifiers_wait_for_nothing(on_cuda, tmp_path):
    def autoencoder(task_class, config, accelerator):
        return task_class(config, ImageDataset(config), accelerator.device)

    def classifier(task_class, config, accelerator):
        return task_class(config, clean_data.CleanData(config, accelerator), ScoreSDEScheduler())

    small = ["--block_out_channels", 8, 8, "--norm_num_groups", 4]
    for module, name, make, options in (
        (train_autoencoder, "Autoencoder", autoencoder, small),
        (
            train_classifier,
            "Classifier",
            classifier,
            ["--pipeline", "a pipeline", "--network_kwargs", "{block_out_channels: [16, 32]}"],
        ),
    ):
        kind = {"config_class": getattr(module, f"{name}Config"), "task_class": getattr(module, f"{name}Task")}
        data = ["--resolution", 8, "--image_channels", 1, "--num_workers", 0, "--random_flip", *options]
        works = work_of_micro_steps(on_cuda, tmp_path / name, "--max_train_steps", 3, data=data, make=make, **kind)
        check_that_nothing_waits(works)


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


@pytest.mark.parametrize("config_class", [train.TrainConfig, encode_latents.EncodeConfig])
def test_float32_without_tf32_is_advised_against(config_class, on_cuda, tmp_path, monkeypatch, capsys):
    def chosen(options, major=9):
        forget_runs()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        more = ["--vae", "an autoencoder"] if config_class is encode_latents.EncodeConfig else []
        config = parse(config_class, ["--output_dir", str(tmp_path), *more, *options])
        choose_kernels(config, Accelerator())
        assert torch.backends.cudnn.allow_tf32 == config.allow_tf32 == torch.backends.cuda.matmul.allow_tf32
        return capsys.readouterr().out

    assert chosen(["--allow_tf32"]) == chosen(["--mixed_precision", "bf16"]) == chosen([], major=6) == ""
    assert "--mixed_precision bf16, or --allow_tf32 true, is several" in chosen([])
    # which encoding hasn't
    assert ("--mixed_precision fp16 is several" in chosen([], major=7)) == (config_class is train.TrainConfig)
