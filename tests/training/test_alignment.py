"""Representation alignment: features of a frozen vision model, the loss, training by it in pixels and in latents."""

import json

import pytest
import torch
import transformers
from networks import call, small_dit
from PIL import Image
from safetensors.torch import load_file
from vision import MODELS, save_vision

from runs import encode, equal, train_tiny
from score_sde import ScoreSDEPipeline
from score_sde.models.transformer_score_dit import CONDITIONINGS
from score_sde.training.parts.alignment import (
    PROJECTION_WIDTH,
    Projection,
    VisionModel,
    alignment_loss,
)
from score_sde.training.parts.clean_samples import CleanSamples


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return save_vision(tmp_path_factory.mktemp("vision"))


def photos(folder, count=12, size=16):
    generator = torch.Generator().manual_seed(0)
    for row in range(count):
        path = folder / "ab"[row % 2] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return folder


# --- features -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, (_, shape) in MODELS.items() if shape])
def test_features_are_those_of_the_patches_as_its_processor_shows_images(name, tmp_path):
    folder = save_vision(tmp_path / "vision", name)
    vision, shape = VisionModel(str(folder)), MODELS[name][1]
    pixels = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    shown = transformers.AutoImageProcessor.from_pretrained(folder)(list(pixels), return_tensors="pt").pixel_values
    model = transformers.AutoModel.from_pretrained(folder)
    model = model.vision_model if name == "CLIP" else model
    with torch.no_grad():
        tokens = model(pixel_values=shown).last_hidden_state
    features = vision.features(pixels / 127.5 - 1)
    assert tuple(features.shape[1:]) == vision.shape == shape
    if tokens.ndim == 3:
        # row by row, the last of all tokens
        tokens = tokens[:, -shape[1] * shape[2] :].reshape(2, *shape[1:], shape[0]).permute(0, 3, 1, 2)
    assert (features - tokens).abs().max() < 1e-5
    # a grey image is one of three equal channels; another size is resized
    grey = torch.rand(1, 1, 9, 12) * 2 - 1
    assert torch.equal(vision.features(grey), vision.features(grey.expand(-1, 3, -1, -1)))


def test_an_encoder_is_told_from_others(dinov2, tmp_path):
    other, shown = save_vision(tmp_path / "other", seed=1), save_vision(tmp_path / "shown", image_mean=[0.0] * 3)
    assert len({VisionModel(str(folder)).fingerprint for folder in (dinov2, other, shown)}) == 3
    assert VisionModel(str(save_vision(tmp_path / "same"))).fingerprint == VisionModel(str(dinov2)).fingerprint


def save_pickled(folder):
    save_vision(folder)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def save_with_code(folder):
    save_vision(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('ran')")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: save_vision(folder, "ViTMAE"), "which are not the tokens of its patches: choose a model"),
        (lambda folder: save_vision(folder, "Swin"), "which are not the tokens of its patches: choose a model"),
        (lambda folder: (save_vision(folder) / "preprocessor_config.json").unlink(), "cannot be opened: .*processor"),
        (lambda folder: folder.mkdir(), "cannot be opened"),
        (
            lambda folder: save_vision(folder, image_processor_type="EfficientNetImageProcessor", include_top=True),
            "EfficientNetImageProcessor.* does more with images than to resize and to normalise them",
        ),
        (lambda folder: save_vision(folder, rescale_factor=1.0), "does more with images than to resize"),
        (save_pickled, "cannot be opened: .*safetensors"),
        (save_with_code, "cannot be opened"),
    ],
)
def test_what_has_no_features_of_patches_is_refused(make, message, tmp_path):
    make(tmp_path / "vision")
    with pytest.raises(ValueError, match=message) as error:
        VisionModel(str(tmp_path / "vision"))
    assert "align_to" in str(error.value)


# --- the loss -----------------------------------------------------------------------------------------------------


def test_the_loss_is_minus_the_cosine_at_every_place():
    features = torch.zeros(3, 2, 2, 2)
    features[:, 0] = 2.0
    # the angle to (1, 0) at the four places, in each sample
    angles = torch.tensor([[0.0, 0, 0, 0], [90, 90, 90, 90], [0, 60, 90, 180]]).deg2rad().reshape(3, 2, 2)
    projected = 7 * torch.stack([angles.cos(), angles.sin()], dim=1)
    assert torch.allclose(alignment_loss(projected, features), torch.tensor([-1.0, 0.0, -0.125]), atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_features_are_normalised_over_places(gamma):
    torch.manual_seed(0)
    features, projected = torch.randn(2, 5, 3, 4) + 2, torch.randn(2, 5, 3, 4)
    wanted = torch.zeros(2)
    for b in range(2):
        x = features[b].flatten(1)  # (C, T)
        x = (x - gamma * x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
        p = projected[b].flatten(1)
        wanted[b] = -((x * p).sum(0) / (x.norm(dim=0) * p.norm(dim=0))).mean()
    assert torch.allclose(alignment_loss(projected, features, gamma), wanted, atol=1e-5)


def test_features_of_another_grid_are_interpolated():
    ramp = torch.linspace(-1, 1, 8).expand(1, 1, 8, 8)
    features = torch.cat([torch.ones_like(ramp), ramp], dim=1)
    for side in (4, 16):
        place = (torch.arange(side) + 0.5) * 8 / side - 0.5
        own = torch.stack([torch.ones(side, side), (2 * place / 7 - 1).expand(side, side)])[None]
        # but for the borders, which have no neighbour
        error = alignment_loss(own, features) + 1
        assert 0 <= error < 2e-3


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_a_projection_sees_its_token_or_its_neighbours(kind):
    torch.manual_seed(0)
    projection, tokens = Projection(kind, 6, 5), torch.randn(2, 12, 6, requires_grad=True)
    found = projection(tokens, (3, 4))
    assert found.shape == (2, 5, 3, 4)
    (gradient,) = torch.autograd.grad(found[0, :, 1, 1].sum(), tokens)
    seen = gradient[0].abs().sum(1).reshape(3, 4) > 0
    wanted = torch.zeros(3, 4, dtype=torch.bool)
    wanted[1, 1] = True
    if kind == "conv":
        wanted[:, :3] = True
        assert found.shape[1] * (9 * 6 + 1) == sum(x.numel() for x in projection.parameters())
    assert torch.equal(seen, wanted) and not gradient[1].any()
    assert kind == "conv" or projection.layers[2].weight.shape == (PROJECTION_WIDTH, PROJECTION_WIDTH)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_tokens_after_a_block(conditioning, recompute):
    model, seen = small_dit(conditioning=conditioning, num_layers=3), {}
    hook = model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.update(tokens=output))
    plain = call(model)
    hook.remove()
    if recompute:
        model.enable_gradient_checkpointing()
    wrapped = model.forward
    outputs = []
    sample = call(model, run=lambda *a, **k: outputs.append(wrapped(*a, **k, hidden_states_of=2)) or outputs[0])
    tokens = outputs[0].hidden_states
    assert torch.equal(sample, plain) and torch.equal(tokens, seen["tokens"][:, :16])
    tokens.sum().backward()
    assert all((x.grad is not None and x.grad.any()) for x in model.blocks[1].ff.parameters())
    assert all(x.grad is None or not x.grad.any() for x in model.blocks[2].parameters())
    with pytest.raises(ValueError, match="hidden_states_of 4: this model has blocks 1 to 3"):
        call(model, hidden_states_of=4)


# --- training -----------------------------------------------------------------------------------------------------


OPTIONS = "--resolution", 16, "--image_channels", 3, "--align_block", 1, "--random_flip", "true"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("data") / "photos")


def alignment_of(output_dir):
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [line["alignment_loss"] for line in lines]


def test_an_aligned_run_is_resumed_bit_for_bit_and_its_projection_is_left_behind(data, dinov2, tmp_path):
    steps = "--dataset", data, *OPTIONS, "--align_to", dinov2, "--checkpointing_steps", 2, "--logging_steps", 1
    whole = train_tiny(tmp_path / "whole", *steps, "--max_train_steps", 4)
    train_tiny(tmp_path / "parts", *steps, "--max_train_steps", 2)
    resumed = train_tiny(tmp_path / "parts", *steps, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert equal(whole, resumed) and not [name for name in whole if "align" in name]
    assert alignment_of(tmp_path / "whole") == alignment_of(tmp_path / "parts")
    saved = [
        load_file(tmp_path / name / "checkpoints" / "step-00000004" / "model_1.safetensors")
        for name in ("whole", "parts")
    ]
    assert equal(*saved) and saved[0]["layers.4.weight"].shape == (8, PROJECTION_WIDTH)
    # it learns, and what it learns changes the network
    assert alignment_of(tmp_path / "whole")[-1] < alignment_of(tmp_path / "whole")[0]
    plain = train_tiny(tmp_path / "plain", "--dataset", data, *OPTIONS[:4], *OPTIONS[6:], "--max_train_steps", 4)
    assert not equal(whole, plain)
    card = (tmp_path / "whole" / "pipeline" / "README.md").read_text()
    assert f"| aligned to | {dinov2.name} (Dinov2Model) after block 1, weight 0.5, projection mlp |" in card
    ScoreSDEPipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    with pytest.raises(ValueError, match="is of a different run: align_block was 1|was 0.5, is 0.25"):
        train_tiny(tmp_path / "parts", *steps, "--align_weight", 0.25, "--resume_from_checkpoint", "latest")
    other = save_vision(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="was trained on other data: aligned_to was"):
        train_tiny(tmp_path / "parts", *steps[:-5], other, *steps[-4:], "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("irepa", [False, True])
def test_features_beside_latents_are_those_of_the_images_and_mirror_images(data, dinov2, irepa, tmp_path, tiny_vae):
    vision, size = VisionModel(str(dinov2)), ("--resolution", 16, "--image_channels", 1)
    encode(data, tiny_vae, tmp_path / "latents", *size, "--align_to", dinov2, "--both_flips", "true")
    shard = load_file(tmp_path / "latents" / "moments-00000.safetensors")
    paths = sorted(data.rglob("*.png"))
    pixels = torch.stack([torch.tensor(list(Image.open(path).convert("L").getdata())) for path in paths])
    images = pixels.reshape(-1, 1, 16, 16) / 127.5 - 1
    for name, shown in (("features", images), ("features_flipped", images.flip(-1))):
        assert shard[name].dtype == torch.bfloat16 and torch.equal(shard[name], vision.features(shown).bfloat16())
    # a mirrored row has the mirror image's
    batch, chosen = {name: shard[name] for name in shard}, torch.arange(12) % 3 == 0
    draws = type("Draws", (), {"chance": staticmethod(lambda probability: chosen)})
    mirrored = CleanSamples(random_flip=True).mirrored(batch, draws)
    expected = [shard["features_flipped" if flip else "features"][row] for row, flip in enumerate(chosen)]
    assert torch.equal(vision.of(mirrored), torch.stack(expected).float())
    options = ("--align_projection", "conv", "--align_gamma", 0.6) if irepa else ()
    steps = "--latents", tmp_path / "latents", *OPTIONS[4:], *options, "--max_train_steps", 2, "--logging_steps", 1
    train_tiny(tmp_path / "run", *steps, "--align_to", dinov2)
    assert len(alignment_of(tmp_path / "run")) == 2
    # without it, features are not even read
    train_tiny(tmp_path / "plain", "--latents", tmp_path / "latents", *OPTIONS[6:], "--max_train_steps", 1)
    # the model may move, and another is refused
    train_tiny(tmp_path / "moved", *steps, "--align_to", save_vision(tmp_path / "moved_model"))
    with pytest.raises(ValueError, match="are of another vision model, .* pass --align_to with the one they are of"):
        train_tiny(tmp_path / "other", *steps, "--align_to", save_vision(tmp_path / "other_model", seed=1))
    encode(data, tiny_vae, tmp_path / "plain_latents", *size, "--both_flips", "true")
    with pytest.raises(ValueError, match="hold no features of a vision model: encode them anew by"):
        train_tiny(tmp_path / "other", "--latents", tmp_path / "plain_latents", *OPTIONS[4:], "--align_to", dinov2)
    with pytest.raises(ValueError, match="features to align to were there"):
        encode(data, tiny_vae, tmp_path / "latents", *size, "--both_flips", "true")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--align_block", 2], "align_block 2: the network has 1 blocks"),
        (["--align_block", 0], "align_block 0 must be at least 1"),
        (["--align_weight", 0], "align_weight 0.0 positive"),
        (["--align_projection", "linear"], "align_projection 'linear' is unknown; choose one of mlp, conv"),
        (["--align_gamma", 2], "align_gamma 2.0 must lie in [0, 1]"),
        (["--network", "unet", "--network_kwargs", "{}"], "a ScoreUNetModel gives none"),
        (["--method", "flow_map"], "align_to is of denoising, and not of method flow_map"),
    ],
)
def test_what_cannot_be_aligned_is_refused_before_any_work(arguments, message, data, dinov2, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_tiny(tmp_path / "run", "--dataset", data, *OPTIONS, "--align_to", dinov2, *arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_options_of_alignment_need_a_model(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_tiny(tmp_path / "run", "--dataset", data, *OPTIONS, "--align_block", 2)
    assert "align_block need align_to, the vision model" in capsys.readouterr().err
