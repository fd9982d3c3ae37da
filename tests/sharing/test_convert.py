"""Other people's checkpoints: the originals' outputs, stock pipelines both ways, and what is refused."""

import argparse
import json

import pytest
import torch
from commands import score_sde
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DanceDiffusionPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    UNet1DModel,
    UNet2DModel,
)
from huggingface_hub import ModelCard
from networks import awake
from places import FIXTURES
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_vae

from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler, ScoreUNetModel, load_bundle
from score_sde.sharing import convert
from score_sde.sharing.convert import from_diffusers, score_sde_pytorch, to_diffusers


SMALL_UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "attention_resolutions": (8,),
}
SMALL_ADM = {"sample_size": 64, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_resolutions": (32,)}


def recorded(name):
    """The output of an original implementation for some input, and the weights that it had: drawn in the order of its
    state dict, 0.1 times normal numbers, around 1 in tensors of one axis."""
    path = FIXTURES / f"original_{name}.safetensors"
    with safe_open(path, "pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
    generator = torch.Generator().manual_seed(0)
    weights = {key: 0.1 * torch.randn(shape, generator=generator) + (len(shape) == 1) for key, shape in shapes.items()}
    return load_file(path), weights


def saved(folder, content):
    path = str(folder / "checkpoint.pt")
    torch.save(content, path)
    return path


def score_sde_checkpoint(weights):
    """As score_sde_pytorch writes it; the trained weights are the averaged ones plus 1."""
    trained = [key for key in weights if not (key == "all_modules.0.W" and weights[key].ndim == 1)]
    model = {f"module.{key}": weights[key] + (key in trained) for key in weights}
    return {
        "model": model | {"module.sigmas": torch.tensor([50.0, 1.0, 0.01])},
        "ema": {"decay": 0.999, "num_updates": 7, "shadow_params": [weights[key] for key in trained]},
        "optimizer": {},
        "step": 7,
    }


def stock_dit(**overrides):
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "in_channels": 3}
    model = DiTTransformer2DModel(**config | {"out_channels": 6, "num_embeds_ada_norm": 5} | overrides)
    awake(model)
    share_embedders(model)
    return model.eval()


def share_embedders(model):
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())


# --- the originals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["released", "ema", "model"])
def test_the_original_dit(tmp_path, layout):
    found, weights = recorded("dit")
    weights["pos_embed"] = found["pos_embed"]
    other = {key: value + 1 for key, value in weights.items()}
    content = {"model": other, "ema": weights, "opt": {}, "args": argparse.Namespace(lr=1e-4)}
    if layout == "released":
        content = weights
    elif layout == "model":
        content["model"], content["ema"] = weights, other
    model = convert.dit_from_original(
        saved(tmp_path, content), weights="model" if layout == "model" else "ema", num_attention_heads=4
    )
    assert (model.config.num_classes, model.config.learn_sigma, model.config.frequency_shift) == (10, True, 0)
    with torch.no_grad():
        output = model(found["sample"], found["timestep"], found["class_labels"]).sample
    assert (output - found["output"]).abs().max() < 1e-5 * found["output"].abs().max().clamp_min(1)
    # as one that was trained without label dropout: all rows are classes, the null label has none of theirs
    model = convert.dit_from_original(
        saved(tmp_path, content), "model" if layout == "model" else "ema", num_attention_heads=4, num_classes=11
    )
    assert torch.equal(model.class_embed.weight[:11], weights["y_embedder.embedding_table.weight"])
    assert model.class_embed.weight[11:].tolist() == [[0.0] * model.config.hidden_size]


@pytest.mark.parametrize(
    ("name", "sde_type", "options"),
    [
        ("ddpmpp", "vp", {}),
        ("ncsnpp_vp", "subvp", {"fir": True, "progressive_input": "residual"}),
        ("ncsnpp_ve", "ve", {}),
        ("ncsnpp_skip", "ve", {"progressive_input": "input_skip", "progressive_output": "output_skip"}),
        ("ncsnpp_cat", "ve", {"progressive_input": "input_skip", "progressive_combine": "cat", "fir": False}),
    ],
)
@pytest.mark.parametrize("centered", [None, True])
def test_the_original_unets(tmp_path, name, sde_type, options, centered):
    found, weights = recorded(name)
    path = saved(tmp_path, score_sde_checkpoint(weights))
    network = "NCSN++" if sde_type == "ve" else "DDPM++"
    model, scheduler = convert.unet_from_score_sde(path, sde_type, network, centered=centered, **SMALL_UNET | options)
    # recorded for ve on images in [0, 1], which the original maps to [-1, 1] itself
    x = 2 * found["sample"] - 1 if sde_type == "ve" else found["sample"]
    with torch.no_grad():
        output = model(x, found["timestep"]).sample
    # the score by images in [-1, 1] is half of that by images in [0, 1]
    halved = sde_type == "ve" and not centered
    expected = found["output"] / 2 if halved else found["output"]
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max().clamp_min(1)

    config = scheduler.config
    if sde_type == "ve":
        doubled = 2 if halved else 1
        assert (config.sigma_min, config.sigma_max) == pytest.approx((0.01 * doubled, 50 * doubled))
        # what the network is told at our noise level 2 sigma is sigma
        t = torch.tensor(0.5, dtype=torch.float64)
        assert float(scheduler.timestep(t)) == pytest.approx(float(scheduler.path.sigma(t)) / doubled)
        assert config.prediction_type == "score"
    else:
        assert float(scheduler.timestep(torch.tensor(1.0, dtype=torch.float64))) == pytest.approx(999)
        assert (config.sde_type, config.prediction_type) == (sde_type, "epsilon")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adm", {"attention_head_dim": None, "num_attention_heads": 2}),
        ("adm_new_order", {"attention_head_dim": 16, "new_attention_order": True}),
    ],
)
def test_the_original_adm(tmp_path, name, options):
    found, weights = recorded(name)
    model, scheduler = convert.unet_from_guided_diffusion(
        saved(tmp_path, weights), "ADM-256", num_classes=4, **SMALL_ADM | options
    )
    with torch.no_grad():
        output = model(found["sample"], found["timestep"], found["class_labels"]).sample
    assert (output - found["output"]).abs().max() < 1e-5 * found["output"].abs().max().clamp_min(1)
    assert scheduler.config.beta_schedule == "linear"
    assert scheduler.config.variance_type == "learned_range"
    # it never saw the null label
    pipeline = ScoreSDEPipeline(scheduler, unet=model)
    assert pipeline.null_label is None
    with pytest.raises(ValueError, match="knows no null label"):
        pipeline(batch_size=1)


def test_the_original_adm_64(tmp_path):
    """The published ADM-64 has its rows of queries, keys and values in the newer order, and the cosine schedule."""
    found, weights = recorded("adm_new_order")
    path, sizes = saved(tmp_path, weights), SMALL_ADM | {"attention_head_dim": 16, "num_classes": 4}
    model, scheduler = convert.unet_from_guided_diffusion(path, "ADM-64", **sizes)
    with torch.no_grad():
        output = model(found["sample"], found["timestep"], found["class_labels"]).sample
    assert (output - found["output"]).abs().max() < 1e-5
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2"
    # the label that the original doesn't have is zeros, below the others as they were
    table = model.class_embed.weight.detach()
    assert table.shape[0] == 5 and (table[-1] == 0).all()
    assert table[:-1].equal(weights["label_emb.weight"])


def test_a_checkpoint_finds_its_published_network(tmp_path, monkeypatch):
    monkeypatch.setattr(score_sde_pytorch, "UNETS", {"DDPM++": {}, "NCSN++": {}})
    _, weights = recorded("ncsnpp_ve")
    path = saved(tmp_path, score_sde_checkpoint(weights))
    model, _ = convert.unet_from_score_sde(path, "ve", **SMALL_UNET)
    assert model.config.fir
    with pytest.raises(ValueError, match="fits none of the published networks DDPM"):
        convert.unet_from_score_sde(path, "ve", **SMALL_UNET | {"layers_per_block": 2})


def test_parameters_of_the_published_networks():
    """Of the originals' own code; ADM has no null label there."""
    published = {
        "DDPM++": 61_804_419,
        "DDPM++ deep": 106_632_579,
        "NCSN++": 62_758_915,
        "NCSN++ deep": 107_587_075,
        "ADM-64": 295_904_454,
        "ADM-128": 421_529_606,
        "ADM-256": 553_838_086,
        "ADM-512": 558_997_638,
    }
    with torch.device("meta"):
        for name, expected in published.items():
            model = ScoreUNetModel.from_name(name)
            null_label = 0 if model.class_embed is None else model.class_embed.embedding_dim
            assert sum(parameter.numel() for parameter in model.parameters()) - null_label == expected, name


# --- diffusers ----------------------------------------------------------------------------------------------------


def test_a_stock_dit_and_back():
    stock = stock_dit()
    model = convert.dit_from_diffusers(stock)
    assert model.config.frequency_shift == 1
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 5])
    with torch.no_grad():
        expected = stock(x, t, y).sample
        allowed = 1e-5 * expected.abs().max()
        assert (model(x, t, y).sample - expected).abs().max() < allowed
        assert (convert.dit_to_diffusers(model)(x, t, y).sample - expected).abs().max() < allowed
        # labels beyond the model's own are the null label
        more = convert.dit_to_diffusers(model, num_classes=9)
        assert (more(x, t, torch.tensor([0, 9])).sample - expected).abs().max() < allowed
        # the original's convention is another function of time
        other = convert.dit_from_diffusers(stock, frequency_shift=0.0)
        assert (other(x, t, y).sample - expected).abs().max() > 10 * allowed
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in stock.parameters())


def test_a_stock_dit_that_embeds_time_in_every_block_is_refused():
    stock = stock_dit()
    with torch.no_grad():
        stock.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"blocks\.1\.norm1\.emb\.class_embedder.* differs from that of block 0"):
        convert.dit_from_diffusers(stock)
    with pytest.raises(ValueError, match="DiTModel has no activation_fn='geglu'"):
        convert.dit_from_diffusers(stock_dit(activation_fn="geglu"))


@pytest.mark.parametrize(
    ("statistics", "plain"),
    [
        ({"shift_factor": 0.0}, True),
        ({"shift_factor": 0.0, "latents_mean": [0.0] * 3, "latents_std": [1.0] * 3, "scaling_factor": 0.3}, True),
        ({"shift_factor": 0.1}, False),
        ({"latents_mean": [0.0, 0.0, 0.1]}, False),
        ({"latents_std": [1.0, 1.0, 1.1]}, False),
    ],
)
def test_an_autoencoder_with_neutral_statistics_is_exported_as_it_is(statistics, plain):
    """AutoencoderTiny says shift_factor 0 and scaling_factor 1."""
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "latent_channels": 3}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae = AutoencoderTiny(**channels, **blocks)
    assert (vae.config.shift_factor, vae.config.scaling_factor) == (0.0, 1.0)
    vae.register_to_config(**statistics)
    model = convert.dit_from_diffusers(stock_dit())
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(sde_type="discrete_vp"), transformer=model, vae=vae)
    if plain:
        assert convert.pipeline_to_diffusers(pipeline).vae is vae
    else:
        with pytest.raises(ValueError, match="its AutoencoderTiny shifts or scales latents for each channel"):
            convert.pipeline_to_diffusers(pipeline)


def test_export_says_every_reason_why_not():
    model = DiTModel(8, hidden_size=16, num_layers=1, num_attention_heads=2, qk_norm=True, num_classes=None)
    with pytest.raises(
        ValueError, match="frequency_shift is 0.0, not 1.0; qk_norm is True, not False; it has no classes"
    ):
        convert.dit_to_diffusers(model)
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(sde_type="edm", prediction_type="edm"), transformer=model)
    with pytest.raises(
        ValueError, match="no autoencoder; its noise path edm is not .*; diffusers has no prediction type"
    ):
        convert.pipeline_to_diffusers(pipeline)


def images_of(pipeline, generator=0, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(generator)
    return torch.from_numpy(pipeline(generator=generator, output_type="np", **arguments).images)


def dit_vae():
    """As in tests of diffusers: an autoencoder without statistics of its own."""
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8,), latent_channels=3, norm_num_groups=4).eval()


def test_a_dit_pipeline_and_back(tmp_path):
    scheduler = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)
    id2label = {0: "tench, fish", 1: "crane", 2: "ostrich", 3: "jay", 4: "owl"}
    stock = DiTPipeline(stock_dit(num_embeds_ada_norm=1000), dit_vae(), scheduler, id2label=id2label)
    stock.register_to_config(id2label=id2label)  # as in the published repos
    stock.save_pretrained(tmp_path / "stock")
    pipeline = convert.pipeline_from_diffusers(tmp_path / "stock")
    assert pipeline.scheduler.config.variance_type == "learned_range"
    arguments = {"class_labels": [1, 4], "num_inference_steps": 4, "guidance_scale": 2.0}
    expected = images_of(stock, **arguments)

    pipeline.scheduler = ScoreSDEScheduler.from_config(pipeline.scheduler.config, predictor="ddim")
    latents = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    ours = images_of(pipeline, latents=latents, **arguments)
    assert (ours - expected).abs().max() < 1e-3

    exported = convert.pipeline_to_diffusers(pipeline)
    exported.save_pretrained(tmp_path / "exported")
    exported = DiffusionPipeline.from_pretrained(tmp_path / "exported")
    assert type(exported) is DiTPipeline
    assert exported.labels["crane"] == 1
    assert pipeline.config.id2label["0"] == "fish, tench"
    assert (images_of(exported, **arguments) - expected).abs().max() < 1e-3


def test_a_unet_pipeline_keeps_its_network(tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, 3, 3, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, **blocks).eval()
    stock = DDPMPipeline(awake(unet), DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False))
    stock.save_pretrained(tmp_path / "stock")
    pipeline = convert.pipeline_from_diffusers(tmp_path / "stock")
    assert type(pipeline.unet) is UNet2DModel
    pipeline.scheduler = ScoreSDEScheduler.from_config(
        pipeline.scheduler.config, predictor="ddim", timestep_spacing="leading"
    )
    expected = images_of(
        DDIMPipeline(stock.unet, DDIMScheduler.from_config(stock.scheduler.config)), batch_size=2, num_inference_steps=5
    )
    latents = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    assert (images_of(pipeline, latents=latents, num_inference_steps=5) - expected).abs().max() < 1e-4


def test_a_ve_pipeline_of_images_from_0_to_1(tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(
        8,
        3,
        3,
        center_input_sample=True,
        time_embedding_type="fourier",
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        **blocks,
    )
    stock = ScoreSdeVePipeline(awake(unet).eval(), ScoreSdeVeScheduler(sigma_max=50.0))
    stock.save_pretrained(tmp_path / "stock")
    pipeline = convert.pipeline_from_diffusers(tmp_path / "stock")
    config = pipeline.scheduler.config
    assert (config.sigma_min, config.sigma_max, config.prediction_type) == (0.02, 100.0, "score")
    # the same score at the same noisy image, as images in [0, 1] and in [-1, 1]
    path = pipeline.scheduler.path
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    sigma = path.sigma(t).float() / 2
    images = torch.rand(2, 3, 8, 8)
    noisy = images + sigma[:, None, None, None] * torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        score = stock.unet(noisy, sigma).sample
        ours = pipeline.unet(2 * noisy - 1, pipeline.scheduler.timestep(t).float()).sample
    assert (2 * ours - score).abs().max() < 1e-4 * score.abs().max()
    assert images_of(pipeline, num_inference_steps=3).shape == (1, 8, 8, 3)


def test_other_pipelines_are_refused(tmp_path):
    model = UNet1DModel(sample_size=16, in_channels=2, out_channels=2)
    DanceDiffusionPipeline(model, DDIMScheduler()).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="is a DanceDiffusionPipeline: only DiTPipeline and pipelines around"):
        convert.pipeline_from_diffusers(tmp_path / "stock")


# --- what is refused ----------------------------------------------------------------------------------------------


def change(weights, **changes):
    return {key: value for key, value in (weights | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.1.mlp.fc1.bias": None}, r"it lacks blocks\.1\.mlp\.fc1\.bias"),
        ({"blocks.0.extra": torch.zeros(1)}, r"it has the unexpected blocks\.0\.extra"),
        (
            {"blocks.1.mlp.fc1.bias": torch.zeros(5)},
            r"shapes: blocks\.1\.mlp\.fc1\.bias \(5,\) for blocks\.1\.ff",
        ),
        ({"blocks.1.attn.qkv.bias": torch.full((96,), float("nan"))}, r"not finite in blocks\.1\.attn\.qkv\.bias"),
        ({"pos_embed": torch.zeros(1, 16, 32)}, "pos_embed is not the fixed sine-cosine table"),
        ({"pos_embed": None}, "is no checkpoint of facebookresearch/DiT: it lacks pos_embed"),
        ({"x_embedder.proj.weight": None}, "is no checkpoint of facebookresearch/DiT: it holds blocks.0"),
    ],
)
def test_a_checkpoint_with_other_keys_is_refused(tmp_path, changes, message):
    found, weights = recorded("dit")
    path = saved(tmp_path, change(weights | {"pos_embed": found["pos_embed"]}, **changes))
    with pytest.raises(ValueError, match=message):
        convert.dit_from_original(path, num_attention_heads=4)


def test_heads_that_a_checkpoint_does_not_show_are_asked_for(tmp_path):
    found, weights = recorded("dit")
    path = saved(tmp_path, weights | {"pos_embed": found["pos_embed"]})
    with pytest.raises(ValueError, match="hidden size 32 of no published model: pass num_attention_heads"):
        convert.dit_from_original(path)


class Trace:
    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def test_files_that_are_no_weights_are_refused(tmp_path):
    trace = Trace()
    trace.path = str(tmp_path / "code_was_run")
    path = saved(tmp_path, {"x_embedder.proj.weight": trace})
    with pytest.raises(ValueError, match="hold code, which is never run"):
        convert.dit_from_original(path)
    assert not (tmp_path / "code_was_run").exists()

    found, weights = recorded("dit")
    path = saved(tmp_path, weights | {"pos_embed": found["pos_embed"]})
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="it may be damaged"):
        convert.dit_from_original(path)
    with pytest.raises(ValueError, match="'absent.pt' is not a file"):
        convert.dit_from_original("absent.pt")
    (tmp_path / "damaged.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="it may be damaged"):
        convert.dit_from_original(str(tmp_path / "damaged.safetensors"))


def test_checkpoints_of_score_sde_are_checked(tmp_path):
    _, weights = recorded("ncsnpp_ve")
    checkpoint = score_sde_checkpoint(weights)
    with pytest.raises(ValueError, match="sde_type 'edm' is unknown; choose one of ve, vp, subvp"):
        convert.unet_from_score_sde("checkpoint.pth", "edm")
    checkpoint["ema"]["shadow_params"].pop()
    with pytest.raises(ValueError, match="averaged tensors for"):
        convert.unet_from_score_sde(saved(tmp_path, checkpoint), "ve", "NCSN++", **SMALL_UNET)
    with pytest.raises(ValueError, match="is no checkpoint of score_sde_pytorch: it holds all_modules"):
        convert.unet_from_score_sde(saved(tmp_path, weights), "ve", "NCSN++", **SMALL_UNET)
    with pytest.raises(ValueError, match="doesn't divide its output by sigma"):
        convert.unet_from_score_sde(
            saved(tmp_path, score_sde_checkpoint(weights)), "ve", "NCSN++", **SMALL_UNET | {"scale_by_sigma": False}
        )


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_pipelines(tmp_path, capsys):
    found, weights = recorded("dit")
    source = saved(tmp_path, weights | {"pos_embed": found["pos_embed"]})
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    vae.save_pretrained(tmp_path / "vae")
    output = str(tmp_path / "converted")
    assert (
        score_sde("convert", "dit", source, output, "--vae", str(tmp_path / "vae"), "--num_attention_heads", "4") == 0
    )
    assert f"pipeline: {output}" in capsys.readouterr().out
    assert ModelCard.load(f"{output}/README.md").data.license == "cc-by-nc-4.0"
    pipeline = load_bundle(output)
    assert type(pipeline.transformer) is DiTModel
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert images_of(pipeline, class_labels=[1], num_inference_steps=2).shape == (1, 8, 8, 3)
    assert score_sde("convert", "dit", source, output) == 2
    assert "exists: choose another folder" in capsys.readouterr().err
    assert score_sde("convert", "to-diffusers", output, str(tmp_path / "stock")) == 2
    assert "frequency_shift is 0.0, not 1.0" in capsys.readouterr().err
    assert not (tmp_path / "stock").exists()


def test_the_command_converts_unets_and_exports(tmp_path):
    _, weights = recorded("ncsnpp_ve")
    source = saved(tmp_path, score_sde_checkpoint(weights))
    arguments = ["--sde_type", "ve", "--network", "NCSN++", "--network_kwargs", json.dumps(SMALL_UNET)]
    assert score_sde("convert", "score-sde", source, str(tmp_path / "ve"), *arguments) == 0
    assert load_bundle(tmp_path / "ve").scheduler.config.sigma_max == pytest.approx(100)
    _, weights = recorded("adm")
    kwargs = SMALL_ADM | {"num_classes": 4, "attention_head_dim": None, "num_attention_heads": 2}
    arguments = ["--network", "ADM-256", "--network_kwargs", json.dumps(kwargs)]
    assert score_sde("convert", "guided-diffusion", saved(tmp_path, weights), str(tmp_path / "adm"), *arguments) == 0
    assert load_bundle(tmp_path / "adm").num_classes == 4

    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    DiTPipeline(stock_dit(), tiny_vae(), scheduler).save_pretrained(tmp_path / "stock")
    (tmp_path / "stock" / "README.md").write_text("---\nlicense: openrail++\n---\n# Stock\n")
    assert score_sde("convert", "from-diffusers", str(tmp_path / "stock"), str(tmp_path / "ours")) == 0
    assert score_sde("convert", "to-diffusers", str(tmp_path / "ours"), str(tmp_path / "again")) == 0
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "again")) is DiTPipeline
    for name in ("ours", "again"):
        card = ModelCard.load(tmp_path / name / "README.md")
        assert card.data.license == "openrail++"
        assert "The weights are those of `stock`, converted." in card.text
    assert (
        score_sde("convert", "from-diffusers", str(tmp_path / "stock"), str(tmp_path / "mine"), "--license", "mit") == 0
    )
    assert ModelCard.load(tmp_path / "mine" / "README.md").data.license == "mit"


def test_licences_of_weights_that_others_published():
    assert from_diffusers.published_license("facebook/DiT-XL-2-256") == "cc-by-nc-4.0"
    assert from_diffusers.published_license("somebody/model-that-is-not-here") is None


def test_statistics_of_latents_become_part_of_the_exported_autoencoder():
    vae = tiny_vae()
    stock = to_diffusers.with_plain_statistics(vae)
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(), transformer=DiTModel(8, in_channels=3, num_layers=1), vae=vae)
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    latents = pipeline.to_latents(images)
    with torch.no_grad():
        encoded = stock.encode(images).latent_dist
        assert (encoded.mean - latents).abs().max() < 1e-5
        # the posterior's width in normalised units
        width = vae.encode(images).latent_dist.std * 0.8 / torch.tensor([2.0, 0.5, 1.0])[:, None, None]
        assert (encoded.std - width).abs().max() < 1e-5
        assert (stock.decode(latents).sample - pipeline.decode(latents)).abs().max() < 1e-5
    assert stock.config.scaling_factor == 1
