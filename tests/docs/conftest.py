"""Folders as the pages name them, each with something tiny and random in it: what the pages do with a trained model
works with any."""

import json
import math
import shutil

import diffusers
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny import seeded, text_unet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from score_sde import (
    DiscreteScoreScheduler,
    DiTModel,
    NoiseConditionalClassifier,
    ScoreSDEPipeline,
    ScoreSDEScheduler,
    ScoreSDETextPipeline,
    ScoreUNetModel,
    save_bundle,
)
from score_sde.training.parts.tokenizers import make_tokenizer


CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

MOLECULES = {"smiles": ["CCO", "C1CC1O", "c1ccccc1", "CC(=O)N", "C#N"], "qed": [0.4, 0.4, 0.4, 0.5, 0.3]}


def random_(network, std=0.02):
    """The network with small weights drawn anew, so that its output is smooth, and not 0 as that of some fresh ones."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=seeded(0))
    return network.eval()


def small_dit(hidden_size=16):
    return random_(DiTModel(8, 2, 4, hidden_size=hidden_size, num_layers=1, num_attention_heads=2, num_classes=10))


def autoencoder(channels, latent_channels):
    """With latents of a quarter of the size, as the quick start's."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=32,
    ).eval()


def save_quick_start(root):
    scheduler = ScoreSDEScheduler(prediction_type="v_prediction")
    names = dict(enumerate(CLASSES))
    whole = ScoreSDEPipeline(scheduler, transformer=small_dit(), vae=autoencoder(1, 4), id2label=names)
    save_bundle(whole, root / "runs/quick_start/diffusion/pipeline")
    whole.vae.save_pretrained(root / "runs/quick_start/autoencoder/vae")
    for name in ("dit", "photos"):
        shutil.copytree(root / "runs/quick_start/diffusion/pipeline", root / "runs" / name / "pipeline")
    weaker = ScoreSDEPipeline(scheduler, transformer=small_dit(8), vae=autoencoder(1, 4), id2label=names)
    save_bundle(weaker, root / "runs/weaker/pipeline")
    classifier = random_(NoiseConditionalClassifier(8, 4, 10, block_out_channels=(8,), norm_num_groups=4))
    classifier.save_pretrained(root / "runs/classifier/classifier")


def save_clothing(root):
    unet = random_(ScoreUNetModel(32, 3, block_out_channels=(8, 8), layers_per_block=1, attention_resolutions=()))
    scheduler = ScoreSDEScheduler(sde_type="edm", prediction_type="edm")
    save_bundle(ScoreSDEPipeline(scheduler, unet=unet), root / "runs/clothing32/pipeline")


def save_of_the_hub(root):
    """Under the names that they have on the Hub, where diffusers looks first."""
    unet = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    ddpm = diffusers.DDPMPipeline(unet=random_(unet), scheduler=diffusers.DDPMScheduler())
    ddpm.save_pretrained(root / "google/ddpm-cifar10-32")

    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{each}</w>" for each in "abcdefghijklmnopqrstuvwxyz")]
    words = {word: i for i, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    text = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(words),
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    unet = text_unet()
    chain = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    diffusers.StableDiffusionPipeline(
        unet=unet.eval(),
        vae=autoencoder(3, 4),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=CLIPTokenizer(vocab=words, merges=[], model_max_length=77),
        scheduler=diffusers.PNDMScheduler(**chain, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root / "stable-diffusion-v1-5/stable-diffusion-v1-5")


def save_texts(root):
    books = root / "books"
    books.mkdir()
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak! What say you?\n\n"
    for name in ("one", "two"):
        (books / f"{name}.txt").write_text(100 * text, encoding="utf-8")
    Dataset.from_dict(MOLECULES).to_parquet(root / "molecules.parquet")
    tokenizer = make_tokenizer("bpe", [100 * text], vocab_size=270, end_mark=True)
    tokenizer.save_pretrained(root / "runs/tokenizer")
    for run in ("books", "quick_start_text/diffusion"):
        save_bundle(text_pipeline(tokenizer, 64), root / "runs" / run / "pipeline")
    uniform = text_pipeline(tokenizer, 64)
    uniform.scheduler = DiscreteScoreScheduler(len(tokenizer), "uniform", prediction_type="leave_one_out")
    save_bundle(uniform, root / "runs/uniform_start")
    tokenizer = make_tokenizer("characters", MOLECULES["smiles"], end_mark=True)
    classes = {0: "0.1 to 0.3", 1: "0.3 to 0.6"}
    save_bundle(text_pipeline(tokenizer, 32, classes), root / "runs/molecules/pipeline")


def text_pipeline(tokenizer, length, id2label=None):
    config = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "num_classes": id2label and len(id2label)}
    network = random_(DiTModel(sample_size=(length,), vocab_size=len(tokenizer), **config))
    return ScoreSDETextPipeline(DiscreteScoreScheduler(len(tokenizer)), network, tokenizer, id2label)


def save_points(root):
    size = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
    network = random_(DiTModel((1,), 1, 2, num_classes=4, domain="torus", **size))
    scheduler = ScoreSDEScheduler(sde_type="ve", domain="torus", prediction_type="score")
    names = dict(enumerate(("general", "glycine", "proline", "pre-proline")))
    units = {"columns": "phi,psi", "data_mean": [0.0, 0.0], "data_std": [180 / math.pi] * 2}
    pipeline = ScoreSDEPipeline(scheduler, transformer=network, id2label=names, **units)
    save_bundle(pipeline, root / "runs/torsions/pipeline")


def save_signals(root):
    names = ("zero", "one", "two", "three")
    sound = random_(DiTModel((64,), 8, 1, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=4))
    units = {"data_mean": [0.0], "data_std": [0.1], "sampling_rate": 8000}
    whole = ScoreSDEPipeline(ScoreSDEScheduler(), transformer=sound, id2label=dict(enumerate(names)), **units)
    save_bundle(whole, root / "runs/digits/pipeline")
    facts = {"data_kind": "audio", "config": {"data_kind": "audio"}}
    (root / "runs/digits/pipeline/training.json").write_text(json.dumps(facts), encoding="utf-8")


def save_photos(root):
    for split in ("train", "test"):
        for name, colour in (("cat", "orange"), ("dog", "brown")):
            folder = root / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40 + i, 36), colour).save(folder / f"{i}.png")


@pytest.fixture(scope="session")
def whole_workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    makers = (save_quick_start, save_clothing, save_of_the_hub, save_photos, save_texts, save_points, save_signals)
    for save in makers:
        save(root)
    return root


@pytest.fixture
def workplace(whole_workplace, tmp_path, monkeypatch):
    """The folder, for one test, which works in it."""
    shutil.copytree(whole_workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
