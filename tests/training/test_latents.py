"""Autoencoders: which classes of diffusers latents can be from; encoding again after something changed."""

import inspect
import json
import shutil
from pathlib import Path

import diffusers
import diffusers.models.autoencoders
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline
from tiny import tiny_vae as random_vae

from runs import TINY_DATA, encode, run, train_tiny
from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler
from score_sde.pipelines.latents import (
    AUTOENCODERS,
    REFUSED,
    autoencoder_of,
    decode_latents,
    denormalize_latents,
    encode_moments,
    normalize_latents,
    spatial_factor,
)
from score_sde.sharing.convert.to_diffusers import pipeline_to_diffusers
from score_sde.training import encode_latents
from score_sde.training.parts.clean_data import CleanData, CleanDataConfig, normalize_by
from score_sde.training.parts.config import ImageLoopConfig
from score_sde.training.parts.latent_shards import LatentDataset
from score_sde.training.parts.latents import fingerprint, latent_shape, latent_statistics, load_vae
from score_sde.training.parts.loop import make_accelerator


BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
KL = BLOCKS | {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 3}
TINY = {
    "AutoencoderKL": KL,
    "AsymmetricAutoencoderKL": BLOCKS
    | {"down_block_out_channels": (8, 8), "up_block_out_channels": (8, 8), "norm_num_groups": 4},
    "AutoencoderTiny": {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    | {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
    "AutoencoderDC": {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    | {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "latent_channels": 4}
    | {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    | {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())},
    "AutoencoderKLFlux2": KL,
    "AutoencoderKLHunyuanImage": {"in_channels": 3, "out_channels": 3, "latent_channels": 8, "sample_size": 8}
    | {"block_out_channels": (32, 32, 32), "layers_per_block": 1, "spatial_compression_ratio": 4},
    "AutoencoderKLKVAE": {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "ch_mult": (1, 2), "z_channels": 4},
    "VQModel": KL,
    "AutoencoderRAE": {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "encoder_input_size": 56}
    | {"patch_size": 4, "decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    | {
        "decoder_intermediate_size": 8,
        "latents_mean": [[[0.5]]] * 64,
        "latents_std": [[[2.0]]] * 64,
        "scaling_factor": 0.5,
    },
}
COGVIDEOX = {"in_channels": 3, "out_channels": 3, "latent_channels": 2, "layers_per_block": 1, "norm_num_groups": 2}
COGVIDEOX |= {"block_out_channels": (4,) * 4, "down_block_types": ("CogVideoXDownBlock3D",) * 4}
HUNYUAN = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 2}
MOCHI = {"latent_channels": 2, "layers_per_block": (1,) * 5, "latents_mean": (0.1, 0.2), "latents_std": (1.5, 2.0)}
WAN = {"base_dim": 4, "z_dim": 2, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]}
# those of other data than images: their arguments, and the shape of data that they take
OTHER_DATA = {
    "AutoencoderOobleck": (
        {"encoder_hidden_size": 4, "downsampling_ratios": [2, 2], "channel_multiples": [1, 2], "decoder_channels": 4}
        | {"decoder_input_channels": 2, "audio_channels": 1, "sampling_rate": 8000},
        (1, 32),
    ),
    "AutoencoderKLTemporalDecoder": (
        {"down_block_types": ("DownEncoderBlock2D",) * 2, "block_out_channels": (32, 32), "latent_channels": 2},
        (3, 4, 8, 8),
    ),
    "AutoencoderKLCogVideoX": (COGVIDEOX | {"up_block_types": ("CogVideoXUpBlock3D",) * 4}, (3, 9, 16, 16)),
    "AutoencoderKLHunyuanVideo": (HUNYUAN, (3, 5, 16, 16)),
    "AutoencoderKLMagvit": (
        {"block_out_channels": [4, 4], "latent_channels": 2, "layers_per_block": 1, "norm_num_groups": 2}
        | {"down_block_types": ["SpatialDownBlock3D", "SpatialTemporalDownBlock3D"]}
        | {"up_block_types": ["SpatialUpBlock3D", "SpatialTemporalUpBlock3D"]},
        (3, 5, 16, 16),
    ),
    "AutoencoderKLMochi": (
        MOCHI | {f"{side}_block_out_channels": (32,) * 4 for side in ("encoder", "decoder")},
        (3, 7, 16, 16),
    ),
    "AutoencoderKLWan": (WAN | {"latents_mean": [0.1, 0.2], "latents_std": [1.5, 2.0]}, (3, 5, 16, 16)),
}
# entries of configs that scale something else than the latents
OTHERS = {"scale_factor_temporal", "scale_factor_spatial", "attn_scales", "invert_scale_latents"}
OTHERS |= {"upsampling_scaling_factor", "latent_shift", "encoder_qkv_multiscales", "decoder_qkv_multiscales"}


def test_every_autoencoder_of_diffusers_is_known():
    """A new diffusers may bring more: then say here what they take and give."""
    names = {name for name, each in vars(diffusers.models.autoencoders).items() if inspect.isclass(each)}
    assert names == AUTOENCODERS.keys() | REFUSED.keys()
    assert not AUTOENCODERS.keys() & REFUSED.keys() and TINY.keys() | OTHER_DATA.keys() == AUTOENCODERS.keys()
    assert {name for name, row in AUTOENCODERS.items() if row.axes != 2} == OTHER_DATA.keys()


def honoured(vae):
    """Whether every entry of an autoencoder's config that could scale latents is one that its row names."""
    words, row = ("scal", "shift", "latents_"), AUTOENCODERS[type(vae).__name__]
    entries = {key for key in inspect.signature(type(vae)).parameters if any(word in key for word in words)}
    return entries - OTHERS == set(row.statistics)


@pytest.mark.parametrize("name", OTHER_DATA)
def test_an_autoencoder_of_sound_or_videos_does_what_its_row_says(name):
    torch.manual_seed(0)
    arguments, shape = OTHER_DATA[name]
    vae, data = getattr(diffusers, name)(**arguments).eval(), torch.rand(2, *shape) * 2 - 1
    with torch.no_grad():
        mean, std = encode_moments(vae, data)
        assert mean.shape == std.shape and std.min() > 0 and mean.ndim == data.ndim == 2 + AUTOENCODERS[name].axes
        found = decode_latents(vae, mean)
        assert found.shape == data.shape and latent_shape(vae, shape) == mean.shape[1:]
        # each row by itself, in its own place
        assert torch.allclose(decode_latents(vae, mean[1:])[0], found[1], atol=1e-4)
        assert torch.allclose(encode_moments(vae, data[1:])[0][0], mean[1], atol=1e-4)
        if name != "AutoencoderKLTemporalDecoder":  # which takes frames
            assert torch.equal(vae.encode(data).latent_dist.mean, mean)
        else:
            assert torch.allclose(
                vae.encode(data[1, :, 2:3].transpose(0, 1)).latent_dist.mean[0], mean[1, :, 2], atol=1e-5
            )
    assert honoured(vae)
    with pytest.raises(ValueError, match="an autoencoder of .*, not of data of shape"):
        latent_shape(vae, (3, 16, 16))
    with pytest.raises(ValueError, match=f"_channels 5: the autoencoder is one of {shape[0]} channels"):
        latent_shape(vae, (5, *shape[1:]))


def test_data_that_an_autoencoder_does_not_give_back_are_refused():
    vae = diffusers.AutoencoderOobleck(**OTHER_DATA["AutoencoderOobleck"][0])
    with pytest.raises(ValueError, match=r"gives data of shape \(1, 30\) back as \(1, 28\): choose another length"):
        latent_shape(vae, (1, 30))


@pytest.mark.parametrize("name", TINY)
def test_an_autoencoder_does_what_its_row_says(name):
    torch.manual_seed(0)
    vae, row = getattr(diffusers, name)(**TINY[name]).eval(), AUTOENCODERS[name]
    factor, images = spatial_factor(vae), torch.randn(2, 3, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        mean, std = encode_moments(vae, images)
        assert mean.shape == std.shape and mean.shape[2:] == (16 // factor, 16 // factor) and factor in (2, 4)
        assert decode_latents(vae, mean).shape == images.shape
        # its own way, with the parts taken out of the tuple
        (encoded,) = vae.encode((images + 1) / 2 if name == "AutoencoderRAE" else images, return_dict=False)
        if row.output == "latent_dist":
            assert torch.equal(encoded.mean, mean) and torch.equal(encoded.std, std) and std.min() > 0
        else:
            assert torch.equal(encoded, mean) and std.eq(0).all()
    assert honoured(vae)
    assert latent_shape(vae, (3, 16, 16)) == mean.shape[1:]
    with pytest.raises(ValueError, match=f"resolution {4 * factor + 1} is no multiple of {factor}, .*: use .* or "):
        latent_shape(vae, (3, 4 * factor + 1, 4 * factor + 1))
    with pytest.raises(ValueError, match="image_channels 1: the autoencoder is one of 3 channels"):
        latent_shape(vae, (1, 16, 16))


@pytest.mark.parametrize("name", [*REFUSED, "DiTTransformer2DModel", "", "None"])
def test_other_autoencoders_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"{name} cannot be used: .*; choose one of AutoencoderKL, "):
        autoencoder_of(name)


def test_the_nearest_good_sizes():
    vae = random_vae(channels=3)
    vae.register_to_config(block_out_channels=(8, 8, 8, 8))
    for size, good in ((36, "32 or 40"), (5, "8"), (100, "96 or 104")):
        with pytest.raises(ValueError, match=f"resolution {size} is no multiple of 8, .*: use {good}$"):
            latent_shape(vae, (3, size, size))


# --- an autoencoder that normalises itself ------------------------------------------------------------------------


def tiny_rae(**changes):
    torch.manual_seed(0)
    return diffusers.AutoencoderRAE(**TINY["AutoencoderRAE"] | changes).eval()


# published ones have those of every place
STATISTICS = {
    "none": {"latents_mean": None, "latents_std": None},
    "of channels": {"latents_mean": [[[0.3]]] * 64, "latents_std": [[[1.5]]] * 64},
    "of places": {"latents_mean": torch.randn(64, 2, 2), "latents_std": torch.rand(64, 2, 2) + 0.5},
}


@pytest.mark.parametrize("statistics", STATISTICS.values(), ids=STATISTICS)
# siglip2 cannot be built by diffusers 0.42 with this transformers
@pytest.mark.parametrize("kind", ["dinov2", "mae"])
def test_a_representation_autoencoder_normalises_once_and_takes_0_to_1(kind, statistics, tmp_path):
    rae = tiny_rae(encoder_type=kind, encoder_input_size=28, **statistics)
    rae.save_pretrained(tmp_path / "rae")
    vae = load_vae(str(tmp_path / "rae"))
    assert fingerprint(vae) == fingerprint(rae) and latent_shape(vae, (3, 8, 8)) == (64, 2, 2)
    zero_to_one = torch.rand(2, 3, 8, 8)
    transformer = DiTModel(
        sample_size=2, patch_size=1, in_channels=64, hidden_size=8, num_layers=1, num_attention_heads=2
    )
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(), transformer=transformer, vae=vae)
    with torch.no_grad():
        latents = rae.encode(zero_to_one).latent
        assert (pipeline.to_latents(2 * zero_to_one - 1) - latents).abs().max() < 1e-5
        assert torch.equal(pipeline.decode(latents), 2 * rae.decode(latents).sample - 1)
        assert torch.equal(normalize_latents(latents, vae.config), latents)
        assert torch.equal(denormalize_latents(latents, vae.config), latents)
    assert fingerprint(tiny_rae(encoder_type=kind, encoder_input_size=28, **statistics, scaling_factor=1.0)) != (
        fingerprint(rae)
    )


def test_what_a_representation_autoencoder_has_not_is_refused():
    vae = tiny_rae()
    with pytest.raises(ValueError, match="is one of images of 16 x 16 pixels, not of 32 x 32"):
        latent_shape(vae, (3, 32, 32))
    with pytest.raises(ValueError, match="is one of images of 16 x 16 pixels, not of 8 x 8"):
        decode_latents(vae, torch.zeros(1, 64, 2, 2))
    transformer = DiTModel(
        sample_size=4, patch_size=1, in_channels=64, hidden_size=8, num_layers=1, num_attention_heads=2
    )
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(), transformer=transformer, vae=vae)
    with pytest.raises(ValueError, match="is one of images of 16 x 16 pixels, not of 32 x 16"):
        pipeline(height=32)
    with pytest.raises(ValueError, match=r"gives images in \[0, 1\], and DiTPipeline takes them"):
        pipeline_to_diffusers(pipeline)
    with pytest.raises(ValueError, match="a AutoencoderRAE with reshape_to_2d false makes sequences"):
        latent_shape(tiny_rae(reshape_to_2d=False), (3, 16, 16))
    with pytest.raises(ValueError, match="normalize_latents: a AutoencoderRAE normalises its latents itself"):
        normalize_by(vae, {"mean": [0.0] * 64, "std": [1.0] * 64}, "latents")


def test_latents_of_a_representation_autoencoder_train_a_bundle(tmp_path):
    tiny_rae().save_pretrained(tmp_path / "rae")
    photos(tmp_path / "photos")
    options = "--resolution", 16, "--image_channels", 3
    encode(tmp_path / "photos", tmp_path / "rae", tmp_path / "latents", *options)
    moments = load_file(tmp_path / "latents" / "moments-00000.safetensors")
    run_options = "--latents", tmp_path / "latents", "--max_train_steps", 1, "--batch_size", 2
    train_tiny(tmp_path / "run", *run_options, "--sample_num_images", 1)
    pipeline = ScoreSDEPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    paths = sorted((tmp_path / "photos").rglob("*.png"))
    shown = pipeline.prepare_image([Image.open(path).convert("RGB").resize((16, 16)) for path in paths])
    assert (pipeline.to_latents(shown) - moments["mean"]).abs().max() < 1e-4 and not moments["std"].any()
    with pytest.raises(ValueError, match="normalises its latents itself"):
        train_tiny(tmp_path / "other", *run_options, "--normalize_latents")


def save_transformer(folder):
    tiny_pipeline().transformer.save_pretrained(folder)
    return folder


def save_cosmos(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLCosmos"}))
    return folder


def save_pickle(folder):
    random_vae().save_pretrained(folder, safe_serialization=False)
    return folder


def save_half(folder):
    random_vae().save_pretrained(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: x for name, x in load_file(path).items() if "decoder" not in name}, path)
    return folder


def save_broken(folder):
    random_vae().save_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    return folder


def a_file(folder):
    random_vae().save_pretrained(folder)
    return folder / "config.json"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (save_transformer, "DiTModel cannot be used: it is no autoencoder that is known"),
        (save_cosmos, "AutoencoderKLCosmos cannot be used: its statistics are of each frame"),
        (save_pickle, "cannot be opened: .*safetensors"),
        (save_half, "missing: decoder"),
        (save_broken, "cannot be opened"),
        (a_file, "is a file: give the folder that it lies in"),
        (lambda folder: random_vae().save_pretrained(folder) or folder.parent / "va", "is it '.*/vae'?"),
        (lambda folder: folder.parent, "cannot be opened: .*config.json"),
    ],
)
def test_what_is_no_autoencoder_is_refused_in_one_line(make, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        load_vae(str(make(tmp_path / "vae")))
    assert str(error.value).startswith(f"autoencoder '{tmp_path}") and "\n" not in str(error.value)


def test_the_autoencoder_of_a_pipeline_is_taken(tmp_path):
    vae = random_vae()
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    found = load_vae(str(tmp_path / "pipeline"))
    assert all(torch.equal(x, found.state_dict()[name]) for name, x in vae.state_dict().items())


def test_statistics_need_no_float64_on_a_device():
    """As on Apple's GPUs; here a device without values stands for one."""
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(2, 50, 3, 4, 4, generator=generator)
    statistics = latent_statistics([(mean[:30], std[:30]), (mean[30:], std[30:])])
    assert statistics["mean"] == pytest.approx(mean.double().mean((0, 2, 3)).tolist(), rel=1e-12)

    class NoDouble(torch.overrides.TorchFunctionMode):
        on_device = True

        def __torch_function__(self, function, types, arguments=(), keywords=None):
            name = getattr(function, "__name__", "")
            if name == "cpu":
                self.on_device = False
            assert not (self.on_device and name == "double"), "float64 on the device"
            return function(*arguments, **(keywords or {}))

    with NoDouble():
        latent_statistics([(mean, std)])


# --- encoding again -----------------------------------------------------------------------------------------------


def test_options_of_data_that_latents_contradict_are_refused(tiny_vae, small_data, tmp_path, monkeypatch):
    """What says the same is taken, what is not read and what says otherwise is refused by name."""
    encode(small_data, tiny_vae, tmp_path / "latents")
    monkeypatch.chdir(Path(small_data).parent)
    agreeing = "--resolution", 8, "--image_channels", 1, "--num_classes", 10, "--dataset", Path(small_data).name
    train_tiny(tmp_path / "run", "--latents", tmp_path / "latents", "--max_train_steps", 1, *agreeing)
    for name, value, message in (
        ("resolution", 16, "resolution 16 contradicts the latents in '.*/latents', of resolution 8: leave it out, or"),
        ("image_channels", 3, "image_channels 3 contradicts .*, of image_channels 1: leave it out"),
        ("dataset", "fashion_mnist_10k", "dataset 'fashion_mnist_10k' contradicts .*, of dataset '.*train.parquet'"),
        ("image_column", "picture", "image_column 'picture' is of data that are read, and .* are encoded: leave it"),
        ("label_column", "none", "label_column None is of data that are read"),
        ("skip_corrupt_images", "true", "skip_corrupt_images True is of data that are read"),
        ("save_text_encoder", "false", "save_text_encoder need captions, and the latents in .* hold none"),
        ("caption_layers", -2, "caption_layers need captions"),
    ):
        with pytest.raises(ValueError, match=message):
            train_tiny(tmp_path / "other", "--latents", tmp_path / "latents", f"--{name}", value)
    # held-out images are read by some of them
    held_out = "--evaluation_steps", 1, "--evaluation_split", "train", "--evaluation_images", 2
    reading = "--latents", tmp_path / "latents", "--max_train_steps", 1, *held_out
    with pytest.raises((KeyError, ValueError), match="picture"):
        train_tiny(tmp_path / "other", *reading, "--image_column", "picture")
    with pytest.raises(ValueError, match="resolution 16 contradicts"):
        train_tiny(tmp_path / "other", *reading, "--resolution", 16)


def photos(folder, count=8):
    for row in range(count):
        path = folder / "ab"[row % 2] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 30 * row).save(path)
    return folder


def shards(folder):
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("moments-*"))}


def test_repaired_and_changed_images_are_encoded_again(tiny_vae, tmp_path):
    data, folder = photos(tmp_path / "photos"), tmp_path / "latents"
    whole = (data / "a" / "4.png").read_bytes()
    (data / "a" / "4.png").write_bytes(whole[:45].ljust(len(whole), b"\0"))  # as large as it was
    options = ["--skip_corrupt_images", "--shard_size", 2, "--output_dir"]

    def encode_again():
        run(encode_latents.main, *TINY_DATA, "--dataset", data, "--vae", tiny_vae, *options, folder)
        return shards(folder)

    # rows 0 to 3 are a/0, a/2, a/4, a/6: the second shard has a copy of the last
    first = encode_again()
    facts = json.loads((folder / "latents.json").read_text())
    assert (facts["skipped_rows"], facts["class_counts"], facts["skipped_files"]) == ([2], {"a": 4, "b": 4}, 0)
    latents = LatentDataset(folder)
    assert torch.equal(latents[2]["mean"], latents[3]["mean"])
    assert latents.row_facts()["skipped_files"] == 1
    assert "of 1 that could not be decoded (rows 2) the next ones are taken" in latents.describe()
    before = latents.fingerprint()
    assert encode_again() == first and LatentDataset(folder).fingerprint() == before

    # repaired: its shard alone is encoded again, to what it should have been
    (data / "a" / "4.png").write_bytes(whole)
    second = encode_again()
    assert {name for name in first if first[name] != second[name]} == {"moments-00001.safetensors"}
    encode(data, tiny_vae, tmp_path / "fresh", "--shard_size", 2)
    every = [LatentDataset(each) for each in (folder, tmp_path / "fresh")]
    assert all(torch.equal(every[0][row]["mean"], every[1][row]["mean"]) for row in range(8))
    assert every[0].facts["skipped_rows"] == [] and every[0].fingerprint()["rows"] != before["rows"]

    # another image under the same name
    Image.effect_noise((9, 9), 50).save(data / "b" / "7.png")
    third = encode_again()
    assert {name for name in second if second[name] != third[name]} == {"moments-00003.safetensors"}
    # another class is other data
    (data / "b").rename(data / "c")
    with pytest.raises(ValueError, match="holds other latents .id2label was"):
        encode_again()


def test_latents_in_bfloat16_are_nearly_those_in_float32(tiny_vae, small_data, tmp_path):
    """And stored in float32; the folder says how they were encoded."""
    exact, rounded = (tmp_path / name for name in ("no", "bf16"))
    encode(small_data, tiny_vae, exact, "--both_flips")
    encode(small_data, tiny_vae, rounded, "--both_flips", "--mixed_precision", "bf16")
    for name, one in load_file(exact / "moments-00000.safetensors").items():
        other = load_file(rounded / "moments-00000.safetensors")[name]
        assert one.dtype == other.dtype
        if name != "labels":
            assert 0 < (one - other).square().mean() < (0.02 * one.std()) ** 2 + (0.01 * one.mean()) ** 2
    with pytest.raises(ValueError, match="holds other latents .mixed_precision was 'bf16', is 'no'"):
        encode(small_data, tiny_vae, rounded, "--both_flips")


def test_latents_from_before_shards_were_recorded_open(tiny_vae, small_data, tmp_path):
    folder = tmp_path / "latents"
    encode(small_data, tiny_vae, folder)
    facts = json.loads((folder / "latents.json").read_text())
    for key in ("shards", "skipped_rows", "skipped_files", "class_counts", "background"):
        del facts[key]
    (folder / "latents.json").write_text(json.dumps(facts))
    old = LatentDataset(folder)
    assert old[0].keys() == {"mean", "std", "labels"} and old.row_facts()["skipped_files"] == 0
    encode(small_data, tiny_vae, folder)
    assert sum(LatentDataset(folder).facts["class_counts"].values()) == 60


def test_the_data_of_a_run_are_described_and_told_from_others(tiny_vae, small_data, tmp_path, capsys):
    class Config(ImageLoopConfig, CleanDataConfig):
        pass

    def data(**changes):
        config = Config()
        for name, value in ({"resolution": 8, "image_channels": 1} | changes).items():
            setattr(config, name, value)
        return CleanData(config, make_accelerator(config)), config

    folder = photos(tmp_path / "photos")
    (folder / "cover.jpg").write_bytes((folder / "a" / "0.png").read_bytes())
    pixels, config = data(dataset=str(folder))
    assert "8 images of 2 classes: a 4, b 4; left out: cover.jpg (images beside" in capsys.readouterr().out
    facts = pixels.facts(config)
    assert (facts["rows"], facts["class_counts"], facts["skipped_files"]) == (8, {"a": 4, "b": 4}, 1)
    on_the_fly, _ = data(dataset=str(folder), vae=str(tiny_vae))
    assert pixels.fingerprint() == pixels.dataset.fingerprint() == json.loads(json.dumps(pixels.fingerprint()))
    assert on_the_fly.fingerprint() == pixels.fingerprint() | {"autoencoder": on_the_fly.fingerprint()["autoencoder"]}

    shutil.copytree(tiny_vae, tmp_path / "other")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "other")
    vae.encoder.conv_in.bias.data += 1
    vae.save_pretrained(tmp_path / "other")
    other, _ = data(dataset=str(folder), vae=str(tmp_path / "other"))
    assert other.fingerprint()["autoencoder"] != on_the_fly.fingerprint()["autoencoder"] is not None
    encode(folder, tiny_vae, tmp_path / "latents")
    latents, config = data(latents=str(tmp_path / "latents"))
    found = latents.fingerprint()
    assert (found["classes"], found["autoencoder"]) == (["a", "b"], on_the_fly.fingerprint()["autoencoder"])
    facts = latents.facts(config)
    assert (facts["rows"], facts["class_counts"], facts["skipped_files"]) == (8, {"a": 4, "b": 4}, 1)
    # the same again, where the same machine encodes it
    encode(folder, tiny_vae, tmp_path / "moved")
    assert data(latents=str(tmp_path / "moved"))[0].fingerprint() == found
