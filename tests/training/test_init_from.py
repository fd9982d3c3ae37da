"""Training that starts from weights: what comes with them, which rows and channels are kept, what the card says."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
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
from safetensors.torch import load_file

from runs import equal, forget_runs, run
from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler, ScoreUNetModel, load_bundle, save_bundle
from score_sde.training import train
from score_sde.training.parts.starting import class_of_none, kept_classes, transfer


# one step so small that the weights stay what they are, in float32
STAND_STILL = ["--batch_size", 4, "--max_train_steps", 1, "--learning_rate", "1e-30", "--lr_warmup_steps", 0]
STAND_STILL += ["--sample_num_images", 4, "--sample_num_inference_steps", 2]
DIT = {"sample_size": 8, "in_channels": 1, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
UNET = {"sample_size": 8, "in_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1}
UNET |= {"attention_resolutions": (4,), "model_channels": 8, "dropout": 0.0}
STOCK_UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
STOCK_UNET |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
STOCK_UNET |= {"norm_num_groups": 4, "attention_head_dim": 8, "layers_per_block": 1}


def randomized(network, seed=0):
    """A network no weight of which is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def photographs(folder, *classes, mode="L", size=8):
    """A folder of small images by class, or of images alone."""
    for i, name in enumerate(classes or ("",)):
        (folder / name).mkdir(parents=True)
        for j in range(4):
            Image.new(mode, (size, size), (20 * i + 5 * j) if mode == "L" else (20 * i, 5 * j, 9)).save(
                folder / name / f"{j}.png"
            )
    return folder


@pytest.fixture
def cats_and_dogs(tmp_path):
    """A bundle of a DiT of two classes, on a path, with times and a prediction of its own."""
    scheduler = ScoreSDEScheduler(sde_type="edm", prediction_type="edm", sigma_max=20.0, time_scale=100.0)
    network = randomized(DiTModel(**DIT, num_classes=2))
    pipeline = ScoreSDEPipeline(scheduler, transformer=network, id2label={0: "cat", 1: "dog"})
    facts = {"model_name": "Cats and dogs", "license": "cc-by-4.0", "run_id": "abc", "base_model": "somebody/animals"}
    return save_bundle(pipeline, tmp_path / "source", facts=facts)


def start(source, output_dir, *arguments):
    forget_runs()
    run(train.main, "--init_from", source, "--output_dir", output_dir, *STAND_STILL, *arguments)
    return load_bundle(output_dir / "pipeline")


def refused(capsys, *arguments):
    forget_runs()
    with pytest.raises((SystemExit, ValueError)) as error:
        run(train.main, *arguments)
    return f"{error.value} {capsys.readouterr().err}"


# --- what comes with the weights --------------------------------------------------------------------------------------


def test_scheduler_size_and_classes_come_with_a_bundle(cats_and_dogs, tmp_path, capsys):
    data = photographs(tmp_path / "data", "bird", "cat")
    pipeline = start(cats_and_dogs, tmp_path / "run", "--dataset", data)
    out = capsys.readouterr().out
    assert "class bird  new" in out and "class cat   kept" in out
    assert "source, revision abc; licence cc-by-4.0" in out
    source = load_bundle(cats_and_dogs)
    assert dict(pipeline.scheduler.config) == dict(source.scheduler.config)
    assert pipeline.transformer.config.sample_size == 8 and pipeline.transformer.config.num_classes == 2
    old, new = source.transformer.class_embed.weight, pipeline.transformer.class_embed.weight
    assert torch.equal(new, old[[2, 0, 2]])  # a new class begins as no class
    others = [
        {name: value for name, value in each.transformer.state_dict().items() if name != "class_embed.weight"}
        for each in (source, pipeline)
    ]
    assert equal(*others)
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert "| started from | somebody/animals |" in card and "| its revision | abc |" in card
    assert "| its licence | cc-by-4.0 |" in card and "license: cc-by-4.0" in card
    assert "base_model: somebody/animals" in card
    assert "| classes whose weights were kept | cat |" in card and "| new classes | bird |" in card


def test_the_average_begins_with_the_weights_that_were_loaded(cats_and_dogs, tmp_path):
    data = photographs(tmp_path / "data", "cat", "dog")
    start(cats_and_dogs, tmp_path / "run", "--dataset", data, "--checkpointing_steps", 1)
    average = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "ema.safetensors")
    assert equal(average, load_bundle(cats_and_dogs).transformer.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sde_type", "vp"], "sde_type 'vp' contradicts 'edm' of"),
        (["--prediction_type", "epsilon"], "prediction_type 'epsilon' contradicts 'edm' of"),
        (["--scheduler_kwargs", "{sigma_max: 30}"], "scheduler_kwargs sigma_max 30 contradicts 20.0 of"),
        (["--scheduler_kwargs", "{sigma_min: 0.01}"], "scheduler_kwargs sigma_min 0.01 contradicts 0.002 of"),
        (["--scheduler_kwargs", "{time_scale: 1}"], "scheduler_kwargs time_scale 1 contradicts 100.0 of"),
        (["--network", "unet"], "network 'unet' contradicts 'dit' of"),
        (["--network_name", "DiT-S/2"], "network_name 'DiT-S/2': the network comes from"),
        (["--network_kwargs", "{hidden_size: 32}"], "network_kwargs hidden_size 32 contradicts 16 of"),
        (["--vlb_weight", "0.1"], "vlb_weight 0.1 contradicts 0.0 of"),
        (["--vae", "somewhere"], "vae 'somewhere' contradicts .*source', a model of pixels"),
        (["--init_revision", "main"], "revision 'main' is of a repo on the Hub"),
        (["--freeze", "nothing"], "freeze 'nothing' matches no weight; there are .*time_embed.0.weight"),
        (["--freeze", "*"], r"freeze \*: nothing is left to train"),
    ],
)
def test_what_contradicts_the_weights_is_refused_by_both_names(cats_and_dogs, tmp_path, capsys, arguments, message):
    found = refused(capsys, "--init_from", cats_and_dogs, "--output_dir", tmp_path / "run", *STAND_STILL, *arguments)
    assert re.search(message, found), found
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_what_agrees_with_the_weights_may_be_given(cats_and_dogs, tmp_path):
    data = photographs(tmp_path / "data", "cat", "dog")
    # what isn't said is the path's own
    same = "{sigma_max: 20, sigma_min: 0.002, num_train_timesteps: 1000, predictor: heun}"
    given = ["--sde_type", "edm", "--scheduler_kwargs", same]
    given += ["--network_kwargs", "{hidden_size: 16, class_dropout_prob: 0.3}"]
    pipeline = start(cats_and_dogs, tmp_path / "run", "--dataset", data, *given)
    assert pipeline.scheduler.config.predictor == "heun"  # of sampling
    assert pipeline.transformer.config.class_dropout_prob == 0.3


def test_a_ddpm_pipeline_keeps_its_network_and_path(tmp_path):
    unet = randomized(UNet2DModel(**STOCK_UNET))
    DDPMPipeline(unet, DDPMScheduler(beta_end=0.03)).save_pretrained(tmp_path / "ddpm")
    data = photographs(tmp_path / "data")
    pipeline = start(tmp_path / "ddpm", tmp_path / "run", "--dataset", data, "--label_column", "none")
    assert isinstance(pipeline.unet, UNet2DModel) and equal(pipeline.unet.state_dict(), unet.state_dict())
    config = pipeline.scheduler.config
    assert (config.sde_type, config.prediction_type, config.beta_end) == ("discrete_vp", "epsilon", 0.03)


def test_a_dit_pipeline_brings_its_variance_and_autoencoder_and_its_classes_by_synonyms(tmp_path):
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=2,
    )
    dit = DiTTransformer2DModel(2, 8, in_channels=2, out_channels=4, num_layers=1, sample_size=4, num_embeds_ada_norm=3)
    names = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 2: "crane"}
    stock = DiTPipeline(randomized(dit), vae, DDIMScheduler(), id2label=names)
    stock.register_to_config(id2label={str(label): name for label, name in names.items()})
    stock.save_pretrained(tmp_path / "stock")
    data = photographs(tmp_path / "data", "crane", "goldfish", "shark", mode="RGB")
    start(tmp_path / "stock", tmp_path / "run", "--dataset", data, "--checkpointing_steps", 1)
    pipeline = load_bundle(tmp_path / "run" / "pipeline")
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert equal(pipeline.vae.state_dict(), vae.state_dict())
    facts = json.loads((tmp_path / "run" / "pipeline" / "training.json").read_text())
    assert facts["config"]["vlb_weight"] == 0.001 and facts["config"]["resolution"] == 8
    kept = {"crane": "crane", "goldfish": "Carassius auratus, goldfish", "shark": None}
    assert facts["started_from"]["classes"] == kept
    # it goes on where neither is any more what it was
    shutil.rmtree(tmp_path / "stock")
    arguments = ["--dataset", data, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest"]
    start(tmp_path / "stock", tmp_path / "run", *arguments, "--max_train_steps", 2)


def test_a_network_alone_needs_its_path_from_the_user(tmp_path, capsys):
    unet = randomized(UNet2DModel(**STOCK_UNET))
    unet.save_pretrained(tmp_path / "unet")
    data = photographs(tmp_path / "data")
    arguments = ["--dataset", data, "--label_column", "none"]
    found = refused(capsys, "--init_from", tmp_path / "unet", "--output_dir", tmp_path / "run", *arguments)
    assert "a network alone" in found and "pass --sde_type and --prediction_type" in found
    more = ["--sde_type", "discrete_vp", "--prediction_type", "epsilon"]
    pipeline = start(tmp_path / "unet", tmp_path / "run", *arguments, *more)
    assert equal(pipeline.unet.state_dict(), unet.state_dict())


def test_pickled_weights_are_not_opened(cats_and_dogs, tmp_path, capsys):
    folder = tmp_path / "source" / "transformer"
    torch.save(load_file(folder / "diffusion_pytorch_model.safetensors"), folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert "safetensors only" in refused(capsys, "--init_from", cats_and_dogs, "--output_dir", tmp_path / "run")


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_needs_the_weights_no_more_and_repeats_the_run_bit_for_bit(cats_and_dogs, tmp_path, capsys):
    data = photographs(tmp_path / "data", "bird", "cat")
    arguments = ["--dataset", data, "--learning_rate", "1e-2", "--checkpointing_steps", 2, "--freeze", "time_embed"]
    whole = start(cats_and_dogs, tmp_path / "whole", *arguments, "--max_train_steps", 4)
    start(cats_and_dogs, tmp_path / "parts", *arguments, "--max_train_steps", 2)
    source = load_bundle(cats_and_dogs).transformer
    shutil.rmtree(cats_and_dogs)
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    parts = start(cats_and_dogs, tmp_path / "parts", *arguments, *more)
    assert equal(whole.transformer.state_dict(), parts.transformer.state_dict())
    for name, value in whole.transformer.state_dict().items():
        assert torch.equal(value, source.state_dict().get(name)) == name.startswith("time_embed"), name
    facts = [json.loads((tmp_path / each / "pipeline" / "training.json").read_text()) for each in ("whole", "parts")]
    assert facts[0]["started_from"] == facts[1]["started_from"]
    assert facts[0]["trained_parameters"] < facts[0]["parameters"]
    shutil.rmtree(tmp_path / "parts" / "pipeline")
    command = ["--output_dir", tmp_path / "parts", *STAND_STILL, *arguments, *more]
    assert "init_from was" in refused(capsys, *command, "--init_from", "elsewhere")
    assert "freeze 0 was 'time_embed', is None" in refused(capsys, *command[:-6], *more, "--init_from", cats_and_dogs)


# --- weights ----------------------------------------------------------------------------------------------------------


def call(network, x, labels=None):
    conditions = {} if labels is None else {"class_labels": torch.tensor(labels)}
    with torch.no_grad():
        return network(x, torch.tensor([3.0, 500.0]), **conditions).sample


def images(channels):
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))


NETWORKS = {
    "dit": (DiTModel, DIT),
    "dit, learned variance": (DiTModel, DIT | {"learn_sigma": True}),
    "ddpm++": (ScoreUNetModel, UNET),
    "ddpm++, learned variance": (ScoreUNetModel, UNET | {"learn_sigma": True}),
    "ncsn++": (ScoreUNetModel, UNET | {"progressive_input": "residual", "progressive_output": "output_skip"}),
    "stock": (UNet2DModel, STOCK_UNET),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_more_channels_and_new_classes_change_no_output_at_first(name):
    kind, config = NETWORKS[name]
    unconditional = {"num_classes": None} if kind is DiTModel else {}
    old = randomized(kind(**config, **unconditional))
    wider = {"in_channels": 3} | ({"out_channels": 3} if kind is UNet2DModel else {})
    classes = {"num_class_embeds" if kind is UNet2DModel else "num_classes": 5}
    new = randomized(kind(**(config | wider | classes)), seed=1)
    transfer(old, new, {})
    x, before = images(3), call(old, images(3)[:, :1])
    after = call(new, x, [4, 0]).unflatten(1, (-1, 3))  # (B, 1 or 2, channel, H, W)
    assert (after[:, :, 0] - before).abs().max() < 1e-5 * before.abs().max()
    assert (after[:, :, 1:] == 0).all()
    with pytest.raises(ValueError, match="takes 3 channels, the data have 1"):
        transfer(new, old, {})


@pytest.mark.parametrize("name", NETWORKS)
def test_kept_classes_give_what_they_gave_and_others_begin_as_none(name):
    kind, config = NETWORKS[name]
    key = "num_class_embeds" if kind is UNet2DModel else "num_classes"
    old, new, without = (randomized(kind(**config, **{key: count}), seed) for seed, count in enumerate((3, 4, None)))
    transfer(old, new, {0: 2, 3: 1})
    assert torch.equal(call(new, images(1), [0, 3]), call(old, images(1), [2, 1]))
    transfer(old, without, {})
    if kind is not UNet2DModel:  # which has no null label
        assert torch.equal(call(new, images(1), [1, 4]), call(old, images(1)))
        assert (call(without, images(1)) - call(old, images(1))).abs().max() < 1e-5
    else:
        assert torch.equal(new.class_embedding.weight[1], old.class_embedding.weight.mean(0))


def test_a_null_label_that_was_never_trained_is_not_what_a_new_class_begins_as():
    old = randomized(DiTModel(**DIT, num_classes=3, class_dropout_prob=0.0))
    assert torch.equal(class_of_none(old), old.class_embed.weight[:3].mean(0))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "stock"])
def test_a_second_time_that_is_new_changes_nothing_at_first(name):
    kind, config = NETWORKS[name]
    old, new = (randomized(kind(**config, two_times=two, num_classes=3), int(two)) for two in (False, True))
    transfer(old, new, {label: label for label in range(3)})
    told = new(images(1), torch.tensor([3.0, 500.0]), torch.tensor([2, 1]), timestep_to=torch.tensor([1.0, 2.0])).sample
    assert torch.equal(told, call(old, images(1), [2, 1]))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "stock"])
def test_words_that_are_new_change_no_output_at_first_and_are_learned(name):
    kind, config = NETWORKS[name]
    old = randomized(kind(**config, num_classes=3))
    new = randomized(kind(**config, num_classes=3, cross_attention_dim=5, pooled_projection_dim=6), seed=1)
    transfer(old, new, {label: label for label in range(3)})
    words = {"encoder_hidden_states": torch.ones(2, 4, 5), "pooled_projections": torch.ones(2, 6)}
    told = new(images(1), torch.tensor([3.0, 500.0]), class_labels=torch.tensor([2, 1]), **words).sample
    assert (told - call(old, images(1), [2, 1])).abs().max() < 1e-5
    told.square().sum().backward()
    joins = [each for name, each in new.named_parameters() if "cross_att" in name and "to_out.0.weight" in name]
    assert all(each.grad.any() for each in [*joins, new.pooled_embed[2].weight]) and joins


def test_classes_as_tokens_cannot_come_or_go():
    with_classes, without = (DiTModel(**DIT, conditioning="in_context", num_classes=n) for n in (3, None))
    with pytest.raises(ValueError, match="pass --class_conditional false"):
        transfer(without, with_classes, {})
    with pytest.raises(ValueError, match="train on data with classes"):
        transfer(with_classes, without, {})


@pytest.mark.parametrize("conditioning", ["in_context", "cross_attention"])
def test_words_as_tokens_cannot_come(conditioning):
    """As they would change the output; a pooled one, which joins the time, may."""
    kind = {"conditioning": conditioning, "num_classes": 3}
    old = randomized(DiTModel(**DIT, **kind))
    with pytest.raises(
        ValueError, match=f"with conditioning '{conditioning}' words are tokens .* leave the captions out"
    ):
        transfer(old, DiTModel(**DIT, **kind, cross_attention_dim=5), {})
    new = randomized(DiTModel(**DIT, **kind, pooled_projection_dim=6), seed=1)
    transfer(old, new, {label: label for label in range(3)})
    told = new(images(1), 500.0, class_labels=torch.tensor([2, 1]), pooled_projections=torch.ones(2, 6)).sample
    assert (told - old(images(1), 500.0, class_labels=torch.tensor([2, 1])).sample).abs().max() < 1e-5


def test_weights_of_another_network_are_refused():
    with pytest.raises(ValueError, match=r"is of shape .*, the network's of"):
        transfer(DiTModel(**DIT), DiTModel(**(DIT | {"hidden_size": 32})), {})
    with pytest.raises(ValueError, match="it has no blocks.1"):
        transfer(DiTModel(**DIT), DiTModel(**(DIT | {"num_layers": 2})), {})


def test_a_class_is_kept_by_its_whole_name_or_a_synonym_that_is_of_one_class_alone():
    before = {0: "crane", 1: "crane, bird", 2: "tench, Tinca tinca"}
    names = {0: "Tinca tinca", 1: "bird", 2: "crane", 3: "crane, bird", 4: "fish"}
    assert kept_classes(before, names) == {0: 2, 1: 1, 2: 0, 3: 1}


@pytest.mark.parametrize("network", ["dit", "unet"])
def test_a_video_model_begins_as_an_image_model(network, tmp_path):
    """Every frame is then what the image model makes of it, and the seed alone says what the new weights are."""
    image = DiTModel(**DIT, num_classes=None) if network == "dit" else ScoreUNetModel(**UNET)
    image = randomized(image)
    component = {"transformer" if network == "dit" else "unet": image}
    source = save_bundle(
        ScoreSDEPipeline(ScoreSDEScheduler(prediction_type="v_prediction"), **component), tmp_path / "source"
    )
    videos = np.random.default_rng(0).integers(0, 256, (8, 3, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "videos.npy", videos)
    arguments = ["--data_kind", "video", "--dataset", tmp_path / "videos.npy", "--frames", 3, "--frame_rate", 5]
    pipelines = [start(source, tmp_path / run, *arguments) for run in ("once", "again")]
    video = pipelines[0].denoiser
    assert pipelines[0].kind.name == "video" and video.config.sample_size == [3, 8, 8]
    assert equal(video.state_dict(), pipelines[1].denoiser.state_dict())
    x, time = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([30.0, 700.0])
    with torch.no_grad():
        expected = torch.stack([image(x[:, :, frame], time).sample for frame in range(3)], dim=2)
        assert (video(x, time).sample - expected).abs().max() < 1e-5 * expected.abs().max()


def made_of(axes):
    """A network of samples of so many axes."""
    size = {"hidden_size": 12, "num_layers": 1, "num_attention_heads": 2, "num_classes": None}
    return DiTModel((8,) * axes, (2,) * axes, 1, **size)


@pytest.mark.parametrize("before", [1, 3])
def test_samples_of_other_axes_are_refused_before_any_work(before, tmp_path, capsys):
    source = save_bundle(ScoreSDEPipeline(ScoreSDEScheduler(), transformer=made_of(before)), tmp_path / "source")
    data = photographs(tmp_path / "data")
    arguments = ["--dataset", data, "--output_dir", tmp_path / "run", *STAND_STILL]
    found = refused(capsys, "--init_from", source, *arguments)
    assert f"patch_size {[2] * before} of" in found and f"samples of {before} ax" in found and "have 2 beside" in found
    assert not (tmp_path / "run" / "log.jsonl").exists()
    # and so for what is given by hand
    found = refused(capsys, *arguments, "--resolution", 8, "--network_kwargs", f"{{patch_size: {[2] * before}}}")
    assert "of network_kwargs is of samples of" in found


def test_arrays_of_other_axes_are_refused_by_what_both_are(tmp_path, capsys):
    source = save_bundle(ScoreSDEPipeline(ScoreSDEScheduler(), transformer=made_of(2)), tmp_path / "source")
    np.save(tmp_path / "signals.npy", np.random.default_rng(0).normal(size=(8, 1, 8)))
    arguments = ["--dataset", tmp_path / "signals.npy", "--output_dir", tmp_path / "run", *STAND_STILL]
    found = refused(capsys, "--data_kind", "array", "--init_from", source, *arguments)
    assert (
        "is a network of images, or fields of two axes; these data are signals, of one axis, of shape (1, 8)" in found
    )
