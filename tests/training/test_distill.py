"""Training for one to four evaluations: whole runs of every method, from a teacher and from nothing, and what is
refused before any work."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from PIL import Image
from places import TRAINING
from safetensors.torch import load_file

from runs import TINY_DIT, TINY_RUN, equal, forget_runs, run
from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler, cli, load_bundle, save_bundle
from score_sde.losses import FEW_STEP_METHODS
from score_sde.losses.few_step_objectives import Consistency
from score_sde.training import distill, evaluate, train
from score_sde.training.parts.options import parse


DIT = {"sample_size": 8, "in_channels": 1, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
SHORT = ["--batch_size", 4, "--lr_warmup_steps", 0, "--learning_rate", "1e-3", "--sample_num_images", 4]
SHORT += ["--checkpointing_steps", 1, "--max_train_steps", 2]
STOCK_UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
STOCK_UNET |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
STOCK_UNET |= {"norm_num_groups": 4, "attention_head_dim": 8, "layers_per_block": 1}


def randomized(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.fixture
def photographs(tmp_path):
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for j in range(4):
            Image.new("L", (8, 8), 90 * i + 20 * j).save(tmp_path / "data" / name / f"{j}.png")
    return tmp_path / "data"


def make_teacher(folder, **scheduler):
    scheduler = ScoreSDEScheduler(**{"sde_type": "linear", "prediction_type": "flow_prediction"} | scheduler)
    network = randomized(DiTModel(**DIT, num_classes=2))
    pipeline = ScoreSDEPipeline(scheduler, transformer=network, id2label={0: "dog", 1: "cat"})
    return Path(save_bundle(pipeline, folder, facts={"model_name": "Cats and dogs", "license": "cc-by-4.0"}))


@pytest.fixture
def teacher(tmp_path):
    return make_teacher(tmp_path / "teacher", predictor="heun")


def distilled(teacher, output_dir, *arguments):
    forget_runs()
    run(distill.main, "--teacher", teacher, "--output_dir", output_dir, *SHORT, *arguments)
    return output_dir / "pipeline"


def weights(pipeline, part="transformer"):
    return load_file(pipeline / part / "diffusion_pytorch_model.safetensors")


def draws(folder, **arguments):
    """Images of 1, 2 and 4 steps, and of as many as the pipeline itself takes."""
    pipeline = load_bundle(folder)
    pipeline.set_progress_bar_config(disable=True)
    labels = {"class_labels": [0, 1]} if pipeline.num_classes else {"batch_size": 2}
    for steps in (1, 2, 4, None):
        found = pipeline(num_inference_steps=steps, output_type="pt", **labels, **arguments)
        assert torch.isfinite(found.images).all() and found.nfe == (steps or pipeline.scheduler.config.map_steps)
    return pipeline


# one of each kind of map always
SLOW_METHODS = {"consistency", "ect", "mean_flow"}


@pytest.mark.parametrize(
    "method", [pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW_METHODS)) for each in FEW_STEP_METHODS]
)
def test_each_method_distils_resumes_and_samples(method, teacher, photographs, tmp_path, capsys):
    arguments = ["--dataset", photographs, "--method", method, "--folded_guidance", 2, "--map_steps", 3]
    arguments += ["--method_kwargs", "{step: 0}"] if method == "scm" else []
    whole = distilled(teacher, tmp_path / "whole", *arguments)
    distilled(teacher, tmp_path / "parts", *arguments, "--max_train_steps", 1)
    shutil.rmtree(tmp_path / "parts" / "pipeline")
    more = ["--resume_from_checkpoint", "latest"]
    assert equal(weights(distilled(teacher, tmp_path / "parts", *arguments, *more)), weights(whole))
    pipeline = draws(whole, guidance_scale=2)
    # the teacher's classes in its order, and its path
    assert pipeline.config.id2label == {"0": "dog", "1": "cat"} or pipeline.config.id2label == {0: "dog", 1: "cat"}
    kind, config = FEW_STEP_METHODS[method], pipeline.scheduler.config
    assert (config.network_map, config.map_steps, config.sde_type) == (kind.network_map, 3, "linear")
    assert config.predictor == "auto"
    assert pipeline.transformer.config.two_times == kind.told and pipeline.transformer.config.folded_guidance == 2
    facts = json.loads((whole / "training.json").read_text())
    assert facts["few_step"] == {"method": method, "teacher": "Cats and dogs", "map_steps": 3, "guidance": 2.0}
    card = (whole / "README.md").read_text()
    assert f"| objective | {method} |" in card and "| distilled from | Cats and dogs |" in card
    assert ("derivatives along the ODE: jvp" in capsys.readouterr().out) == (method == "scm")
    assert all(torch.isfinite(value).all() for value in weights(whole).values())


def test_the_student_begins_with_its_teacher(teacher, photographs, tmp_path):
    stand_still = ["--dataset", photographs, "--learning_rate", "1e-30", "--method", "flow_map"]
    found = weights(distilled(teacher, tmp_path / "run", *stand_still))
    before = weights(teacher)
    assert equal({name: found[name] for name in before}, before)
    assert found["time_to_embed.2.weight"].abs().max() < 1e-20


def test_the_preset_fits_its_script(teacher):
    path = TRAINING / "configs" / "quick_start" / "distillation.yaml"
    config = dataclasses.asdict(parse(distill.DistillConfig, [str(path), "--teacher", str(teacher)]))
    stated = yaml.safe_load(path.read_text())
    assert {name: config[name] for name in stated} == stated and config["sample_num_inference_steps"] == 2


def test_guidance_that_is_told(teacher, photographs, tmp_path):
    arguments = ["--dataset", photographs, "--method", "flow_map", "--guidance_range", 1, 4]
    pipeline = draws(distilled(teacher, tmp_path / "run", *arguments), guidance_scale=3)
    assert pipeline.transformer.config.guidance_embeds and pipeline.transformer.config.folded_guidance is None


@pytest.mark.parametrize("method", ["mean_flow", "consistency"])
def test_the_same_objectives_from_nothing(method, small_data, tmp_path):
    forget_runs()
    arguments = [*TINY_RUN, "--dataset", small_data, "--network_kwargs", TINY_DIT, "--max_train_steps", 2]
    guided = ["--folded_guidance", 3, "--method_kwargs", "{kappa: 0.5}"] if method == "mean_flow" else []
    run(train.main, *arguments, "--output_dir", tmp_path, "--method", method, *guided)
    pipeline = draws(tmp_path / "pipeline")
    assert pipeline.transformer.config.two_times == (method == "mean_flow")
    facts = json.loads((tmp_path / "pipeline" / "training.json").read_text())
    assert facts["few_step"]["teacher"] is None and facts["config"]["time_density"] == "log_normal"


def test_a_stock_unet_becomes_a_consistency_model(photographs, tmp_path, capsys):
    unet = randomized(UNet2DModel(**STOCK_UNET))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    arguments = ["--dataset", photographs, "--label_column", "none"]
    pipeline = draws(distilled(tmp_path / "ddpm", tmp_path / "run", *arguments, "--method", "consistency"))
    assert isinstance(pipeline.unet, UNet2DModel) and pipeline.scheduler.config.network_map == "consistency"
    found = refused(capsys, "--teacher", tmp_path / "ddpm", *arguments, "--method", "mean_flow")
    assert "a UNet2DModel cannot be told the second time of method mean_flow" in found
    # a scale of 0 is one, too
    found = refused(capsys, "--teacher", tmp_path / "ddpm", *arguments, "--method", "ect", "--folded_guidance", 0)
    assert "a UNet2DModel cannot say in its config which guidance it has folded in" in found


def test_a_derivative_by_a_difference_needs_float32(photographs, tmp_path, capsys):
    DDPMPipeline(randomized(UNet2DModel(**STOCK_UNET)), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    arguments = ["--dataset", photographs, "--label_column", "none", "--method", "scm"]
    arguments += ["--mixed_precision", "bf16", "--method_kwargs"]
    draws(distilled(tmp_path / "ddpm", tmp_path / "run", *arguments, "{step: 0.5}"))
    with pytest.raises(ValueError, match="step 0 of method_kwargs: this network has no torch.func.jvp"):
        distilled(tmp_path / "ddpm", tmp_path / "other", *arguments, "{step: 0}")


def test_a_converted_dit_becomes_a_flow_map(tmp_path):
    """In its latents, whose variance it learned, which a map has no use for."""
    for name in ("cat", "dog"):
        (tmp_path / "rgb" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (90, 20, 50)).save(tmp_path / "rgb" / name / "0.png")
    size = {"in_channels": 2, "out_channels": 4, "num_layers": 1, "sample_size": 4, "num_embeds_ada_norm": 2}
    names = {0: "cat", 1: "dog"}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2, **blocks)
    stock = DiTPipeline(randomized(DiTTransformer2DModel(2, 8, **size)), vae, DDIMScheduler(), id2label=names)
    stock.register_to_config(id2label={str(label): name for label, name in names.items()})
    stock.save_pretrained(tmp_path / "stock")
    arguments = ["--dataset", tmp_path / "rgb", "--method", "flow_map", "--batch_size", 2, "--sample_num_images", 2]
    pipeline = draws(distilled(tmp_path / "stock", tmp_path / "run", *arguments))
    assert pipeline.transformer.config.two_times and pipeline.scheduler.config.sde_type == "discrete_vp"


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    forget_runs()
    with pytest.raises((SystemExit, ValueError)) as error:
        run(distill.main, *arguments, *SHORT)
    return f"{error.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sde_type", "vp"], "sde_type 'vp' contradicts 'linear' of"),
        (["--vae", "somewhere"], "vae 'somewhere' contradicts .*, a model of pixels"),
        (["--latents", "somewhere"], "latents 'somewhere' contradicts .*, a model of pixels"),
        (["--network_kwargs", "{hidden_size: 32}"], "network_kwargs hidden_size 32 contradicts 16 of"),
        (["--init_from", "elsewhere"], "init_from: a student begins with the weights of its teacher"),
        (["--method", "denoising"], "method denoising follows no teacher: choose one of consistency, ect"),
        (["--method", "lcm"], "method 'lcm' is unknown; choose one of consistency, ect"),
        (["--method", "magic"], "method 'magic' is unknown"),
        (["--method_kwargs", "{kapa: 1}"], "flow_map has no number kapa; it has moving, levels"),
        (["--weighting", "edm"], "weighting is of denoising; method flow_map has its own weights"),
        (["--lora_rank", 4], "lora_rank trains adapters of a denoiser"),
        (["--folded_guidance", 2, "--guidance_range", 1, 4], "leave one of them out"),
        (["--guidance_range", 4, 1], "guidance_range .* must rise"),
        (["--guidance_range", 4], "guidance_range .* must be two scales"),
        (["--data_kind", "text"], "data_kind 'text' is not distilled, images are"),
        (["--map_steps", 0], "map_steps 0 must be at least 1"),
    ],
)
def test_what_contradicts_a_teacher_is_refused_by_name(teacher, photographs, tmp_path, capsys, arguments, message):
    where = ["--teacher", teacher, "--dataset", photographs, "--output_dir", tmp_path / "run"]
    found = refused(capsys, *where, *arguments)
    assert re.search(message, found), found
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_teacher_is_needed(capsys):
    assert "say which model is distilled" in refused(capsys)


GUIDED = ["--folded_guidance", 2]


@pytest.mark.parametrize(
    ("network", "scheduler", "arguments", "message"),
    [
        ({}, {"network_map": "consistency"}, GUIDED, "it is a consistency model, which has no ODE to follow"),
        ({"guidance_embeds": True}, {}, GUIDED, "it is guidance-distilled, told a scale"),
        ({"folded_guidance": 3.0}, {}, GUIDED, "it has guidance 3.0 folded in"),
        ({"folded_guidance": 3.0}, {}, ["--method", "ect"], "method ect follows the data, which have none"),
        (
            {"class_dropout_prob": 0.0},
            {},
            GUIDED,
            "needs a teacher that was trained without its conditions",
        ),
    ],
)
def test_teachers_that_cannot_teach(network, scheduler, arguments, message, photographs, tmp_path, capsys):
    scheduler = ScoreSDEScheduler(**scheduler)
    pipeline = ScoreSDEPipeline(scheduler, transformer=randomized(DiTModel(**DIT, num_classes=2, **network)))
    pipeline.register_to_config(id2label={"0": "cat", "1": "dog"})
    source = save_bundle(pipeline, tmp_path / "teacher")
    where = ["--teacher", source, "--dataset", photographs, "--output_dir", tmp_path / "run"]
    assert re.search(message, refused(capsys, *where, *arguments))


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_weights_with_guidance_folded_in_lose_it_by_the_data(scale, photographs, tmp_path):
    network = randomized(DiTModel(**DIT, num_classes=2, folded_guidance=scale))
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(), transformer=network, id2label={0: "cat", 1: "dog"})
    source = save_bundle(pipeline, tmp_path / "source")
    forget_runs()
    run(train.main, "--init_from", source, "--dataset", photographs, "--output_dir", tmp_path / "run", *SHORT)
    assert load_bundle(tmp_path / "run" / "pipeline").transformer.config.folded_guidance is None


def test_data_that_the_teacher_does_not_know(teacher, photographs, tmp_path, capsys):
    (photographs / "dog").rename(photographs / "zebra")
    where = ["--teacher", teacher, "--dataset", photographs, "--output_dir", tmp_path / "run"]
    assert "the teacher doesn't know the classes zebra; it knows dog, cat" in refused(capsys, *where)
    found = refused(capsys, *where, "--class_conditional", "false", "--resolution", 16)
    assert "the teacher's samples are of shape (1, 8, 8), those of the data of (1, 16, 16)" in found


def test_a_stage_that_was_reached_is_not_left_where_the_end_moves_away(teacher, photographs, tmp_path, monkeypatch):
    seen, original = [], Consistency.levels

    def levels(self, progress):
        seen.append(progress)
        return original(self, progress)

    monkeypatch.setattr(Consistency, "levels", levels)
    arguments = ["--dataset", photographs, "--method", "consistency", "--resume_from_checkpoint", "latest"]
    for steps in (2, 4):
        distilled(teacher, tmp_path / "run", *arguments, "--max_train_steps", steps)
    assert seen == [0, 0.5, 1, 1]


def test_a_resumed_run_needs_its_teacher(teacher, photographs, tmp_path, capsys):
    arguments = ["--dataset", photographs, "--method", "consistency"]
    distilled(teacher, tmp_path / "run", *arguments, "--max_train_steps", 1)
    where = ["--teacher", teacher, "--output_dir", tmp_path / "run", *arguments, "--resume_from_checkpoint", "latest"]
    network = load_bundle(teacher).transformer
    with torch.no_grad():
        network.proj_out.bias += 1
    network.save_pretrained(teacher / "transformer")
    assert "its weights are not those that the run began with" in refused(capsys, *where)
    shutil.rmtree(teacher)
    assert "teacher" in refused(capsys, *where)


def test_a_map_goes_on_as_a_map_and_its_loss_is_not_of_denoising(teacher, photographs, tmp_path, capsys):
    student = distilled(teacher, tmp_path / "run", "--dataset", photographs, "--method", "flow_map")
    forget_runs()
    arguments = ["--init_from", student, "--dataset", photographs, "--output_dir", tmp_path / "more", *SHORT]
    with pytest.raises(SystemExit):
        run(train.main, *arguments)
    assert "network_map 'flow_map': such a network goes on by --method" in capsys.readouterr().err
    forget_runs()
    with pytest.raises(ValueError, match="was trained by flow_map"):
        run(evaluate.main, "--pipeline", student, "--num_images", 0, "--loss", 4)


def test_commands_take_the_steps_that_a_student_was_made_for(teacher, photographs, tmp_path):
    arguments = ["--dataset", photographs, "--method", "flow_map", "--map_steps", 3]
    student = distilled(teacher, tmp_path / "run", *arguments)
    for given, steps in (([], 3), (["--num_inference_steps", "5"], 5)):
        config = parse(evaluate.EvaluateConfig, ["--pipeline", str(student), *given])
        evaluate.open_pipeline(config, "cpu")
        assert config.num_inference_steps == steps
    with pytest.raises(SystemExit):
        cli.main(["sample", str(student), "--num_images", "1", "--output", str(tmp_path / "x.npy")])
    pipeline = load_bundle(student)
    wanted = pipeline(class_labels=[0], generator=[torch.Generator().manual_seed(0)], output_type="np").images
    assert abs(np.load(tmp_path / "x.npy") - wanted).max() < 1e-4
