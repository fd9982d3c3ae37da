"""Networks of signals and of videos: what attends to what, and what an image network becomes."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from networks import awake, call, randn, small_dit, tiny_adm, tiny_ncsnpp, tiny_unet
from torch.nn import functional as F

from score_sde import DiTModel, ScoreUNetModel


FRAMES = 4
VIDEO_DIT = {"sample_size": (FRAMES, 8, 8), "patch_size": (1, 4, 2), "factorized_attention": True}
VIDEO_UNET = {"sample_size": (FRAMES, 8, 8), "dimensions": 3}
IMAGE_NETWORKS = [
    pytest.param(build, options, id=f"{build.__name__}-{'-'.join(map(str, options.values()))}")
    for build, options in [
        (small_dit, {}),
        (small_dit, {"position_embedding": "rotary", "conditioning": "adaln", "qk_norm": True}),
        (small_dit, {"shared_adaln": True, "cross_attention_dim": 7, "sample_size": (8, 4), "two_times": True}),
        (tiny_unet, {"cross_attention_dim": 7}),
        (tiny_ncsnpp, {}),
        (tiny_ncsnpp, {"progressive_input": "residual"}),
        (tiny_adm, {}),
    ]
]
VIDEO_NETWORKS = [
    pytest.param(build, options, id=f"{build.__name__}-{'-'.join(map(str, options))}")
    for build, options in [
        (small_dit, VIDEO_DIT),
        (small_dit, VIDEO_DIT | {"shared_adaln": True, "patch_size": (2, 2, 2), "cross_attention_dim": 7}),
        (small_dit, VIDEO_DIT | {"num_classes": None, "time_conditioning": False, "position_embedding": "rotary"}),
        (tiny_unet, VIDEO_UNET),
        (tiny_ncsnpp, VIDEO_UNET | {"halve_frames": True}),
        (tiny_adm, VIDEO_UNET | {"halve_frames": True}),
    ]
]
SIGNAL_NETWORKS = [
    pytest.param(build, options, id=f"{build.__name__}-{'-'.join(map(str, options.values()))}")
    for build, options in [
        (tiny_unet, {}),
        (tiny_ncsnpp, {}),
        (tiny_ncsnpp, {"progressive_input": "residual"}),
        (tiny_ncsnpp, {"progressive_input": "residual", "fir": False}),
        (tiny_ncsnpp, {"progressive_combine": "cat", "fir": False}),
        (tiny_adm, {"two_times": True}),
    ]
]


def influence(model, frame=1, place=(2, 5)):
    """Which values of the output change with one value of the input, as (frames, height, width)."""
    size = model.config.sample_size
    with torch.no_grad():
        x = randn(1, 3, *size)
        moved = x.clone()
        moved[0, :, frame, place[0], place[1]] += 1
        time = torch.tensor([30.5])
        return (model(x, time).sample - model(moved, time).sample)[0].abs().amax(0) > 1e-7


# --- what sees what -----------------------------------------------------------------------------------------------


def test_attention_stays_within_a_frame_and_within_a_place():
    """Of a factorised DiT one kind of block left out shows where the other looks: all of a frame, or one patch of every
    frame."""
    model = awake(small_dit(**VIDEO_DIT, num_layers=1, num_classes=None))
    assert influence(model).all()

    def without(block):
        alone = awake(small_dit(**VIDEO_DIT, num_layers=1, num_classes=None))
        for layer in (block(alone).attn.to_out[0], block(alone).ff.net[2]):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        return influence(alone)

    of_frame = without(lambda model: model.temporal_transformer_blocks[0])
    assert of_frame[1].all() and not of_frame[[0, 2, 3]].any()
    of_place = without(lambda model: model.blocks[0])
    expected = torch.zeros(FRAMES, 8, 8, dtype=torch.bool)
    expected[:, 0:4, 4:6] = True  # the patch of 4 x 2 that holds (2, 5)
    assert torch.equal(of_place, expected)


def test_temporal_attention_by_hand():
    """The first temporal block's attention, of one place and head, from its weights."""
    model = awake(small_dit(**VIDEO_DIT, num_attention_heads=1))
    attn, tokens = model.temporal_transformer_blocks[0].attn, randn(2, FRAMES * 8, 48)
    cosines, sines = model.embed_positions("frames", (FRAMES,))
    own = tokens.unflatten(1, (FRAMES, 8))[1, :, 3]  # of the second sample the fourth place, (frames, D)

    def turned(x):
        swapped = torch.stack([-x[:, 1::2], x[:, ::2]], dim=-1).flatten(1)
        return x * cosines + swapped * sines

    query, key, value = (projection(own) for projection in (attn.to_q, attn.to_k, attn.to_v))
    scores = turned(query) @ turned(key).T / 48**0.5
    expected = attn.to_out[0](scores.softmax(-1) @ value)
    by_place = tokens.unflatten(1, (FRAMES, 8)).transpose(1, 2).flatten(1, 2)
    found = attn(by_place, rotary=(cosines, sines), span=FRAMES)
    assert (found.unflatten(1, (8, FRAMES))[1, 3] - expected).abs().max() < 1e-5


def test_layers_over_frames_of_a_unet_see_all_frames():
    """By attention every frame; with the convolution alone its neighbours, layer by layer."""
    assert influence(tiny_unet(**VIDEO_UNET, num_classes=None)).all()
    torch.manual_seed(0)
    model = ScoreUNetModel(4, 3, block_out_channels=(16,), layers_per_block=1, attention_resolutions=(), dimensions=3)
    model = awake(model.with_further(sample_size=(9, 4, 4)))
    layers = [module for module in model.modules() if type(module).__name__ == "FrameLayer"]
    # down, in the middle, up
    assert [layer.attention is not None for layer in layers] == [False, True, True, False, False]
    for layer in layers[1:3]:
        layer.attention.to_out[0].weight.data.zero_()
    for number, reach in enumerate((4, 4, 3, 2, 1, 0)):
        # each further convolution reaches one frame further
        for layer in layers[:number]:
            layer.conv.weight.data.zero_()
        seen = influence(model, frame=4, place=(1, 1)).flatten(1).any(1)
        assert seen.tolist() == [abs(frame - 4) <= reach for frame in range(9)]


@pytest.mark.parametrize(("build", "options"), VIDEO_NETWORKS)
def test_the_order_of_frames_counts(build, options):
    model = build(**options)
    x = randn(1, 3, *options["sample_size"]).clone()
    with torch.no_grad():
        forwards, backwards = (model(each, torch.tensor([30.5])).sample for each in (x, x.flip(2)))
    assert (forwards - backwards.flip(2)).abs().max() > 1e-4


# --- from images to videos ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "options"), IMAGE_NETWORKS)
def test_a_video_network_begins_as_the_image_network_of_every_frame(build, options, tmp_path):
    image = build(**options)
    video = image.with_frames(FRAMES)
    assert not video.training
    own = image.state_dict()
    assert all(torch.equal(value, video.state_dict()[name]) for name, value in own.items())
    size = image.config.sample_size
    size = (size, size) if isinstance(size, int) else size
    x, time = randn(2, 3, FRAMES, *size), torch.tensor([30.5, 700.25])
    told = {"class_labels": torch.tensor([1, 3])}
    if image.config.cross_attention_dim:
        told["encoder_hidden_states"] = randn(2, 6, 7, seed=2)
    with torch.no_grad():
        found = video(x, time, **told).sample
        frames = {name: value.repeat_interleave(FRAMES, dim=0) for name, value in {"timestep": time, **told}.items()}
        expected = image(x.transpose(1, 2).flatten(0, 1), **frames).sample.unflatten(0, (2, FRAMES)).transpose(1, 2)
    # the same products, in batches of another size
    assert (found - expected).abs().max() < 5e-6 * expected.abs().max()
    # it opens again, and learns of other frames
    video.save_pretrained(tmp_path)
    again = type(image).from_pretrained(tmp_path)
    assert torch.equal(again(x, time, **told).sample, found)
    again.train()(x, time, **told).sample.square().sum().backward()
    new = {name: each for name, each in again.named_parameters() if name not in own}
    last = [each for name, each in new.items() if "temporal_adaln" in name or ".conv." in name or "to_out" in name]
    assert last and any(each.grad.abs().max() > 0 for each in last)
    with pytest.raises(ValueError, match="with_frames is of a model of images"):
        video.with_frames(2)


@pytest.mark.parametrize(("build", "options"), VIDEO_NETWORKS)
def test_a_video_network_is_a_whole_model(build, options, tmp_path):
    model = build(**options)
    output = call(model)
    assert output.shape == (2, 3, *options["sample_size"])
    model.save_pretrained(tmp_path)
    assert torch.equal(call(type(model).from_pretrained(tmp_path)), output)
    # a sample doesn't depend on its neighbours
    assert (call(model, batch=3)[:1] - call(model, batch=1)).abs().max() < 1e-5 * output.abs().max()
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.enable_gradient_checkpointing()
        call(model).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    model.disable_gradient_checkpointing()
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    # other numbers of frames, and half precision
    assert call(model, size=(2 * FRAMES, 8, 16)).shape == (2, 3, 2 * FRAMES, 8, 16)
    half = call(model.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and (half - output).abs().mean() < 0.1 * output.abs().mean()


@pytest.mark.parametrize(("build", "options"), [(small_dit, VIDEO_DIT), (tiny_unet, VIDEO_UNET)])
def test_attention_backends_reach_every_attention(build, options):
    model = build(**options)
    expected = call(model)
    model.set_attention_backend("_native_math")
    processors = set(model.attn_processors.values()) | {
        module.processor for module in model.modules() if hasattr(module, "processor")
    }
    assert len({type(each) for each in processors}) == (1 if build is small_dit else 2)
    assert all(each._attention_backend is not None for each in processors)
    assert (call(model) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_feature_caches_know_the_blocks_of_frames():
    model = small_dit(**VIDEO_DIT, num_layers=3)
    with torch.no_grad():
        expected = call(model)
        model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        with model.cache_context("test"):
            first, second = call(model), call(model)
    assert (first - expected).abs().max() < 1e-5 and (second - expected).abs().max() < 1e-5


def test_what_a_fresh_network_of_videos_gives():
    torch.manual_seed(0)
    sizes = {"sample_size": (2, 4, 4), "in_channels": 1, "num_classes": None}
    dit = DiTModel(patch_size=(1, 2, 2), hidden_size=16, num_layers=1, num_attention_heads=2, **sizes,
                   factorized_attention=True)  # fmt: skip
    assert not call(dit).any()
    unet = ScoreUNetModel(block_out_channels=(8,), layers_per_block=1, attention_resolutions=(4,), dimensions=3,
                          architecture="adm", **sizes)  # fmt: skip
    assert not call(unet).any()


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (DiTModel, {"factorized_attention": True}, "factorized_attention is of videos, with 3 axes"),
        (DiTModel, VIDEO_DIT | {"conditioning": "in_context"}, "factorized_attention needs conditioning 'adaln_zero'"),
        (DiTModel, VIDEO_DIT | {"hidden_size": 12, "num_attention_heads": 4}, "rotary positions of frames need heads"),
        (ScoreUNetModel, {"dimensions": 4}, "dimensions 4 must be 1, 2 or 3"),
        (ScoreUNetModel, {"halve_frames": True}, "halve_frames is of videos, with dimensions 3, not 2"),
        (ScoreUNetModel, {"dimensions": 3, "sample_size": (8, 8)}, "one number, or frames, a height and a width"),
        (ScoreUNetModel, {"dimensions": 1, "sample_size": (8, 8)}, "must be one number, or a length"),
        (ScoreUNetModel, {"dimensions": 3, "sample_size": (5, 32, 32), "halve_frames": True}, "a multiple of 8"),
        (ScoreUNetModel, {"dimensions": 3, "sample_size": (5, 32, 36)}, "a multiple of 8 .* apart from the frames"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(network, options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)


@pytest.mark.parametrize(
    ("options", "shape", "words"),
    [
        (VIDEO_UNET, (2, 3, 8, 8), r"takes \(batch, 3, frames, height, width\) with height and width multiples of 2"),
        (VIDEO_UNET | {"halve_frames": True}, (2, 3, 3, 8, 8), "with frames and height and width multiples of 2"),
        ({"dimensions": 1}, (2, 3, 7), r"takes \(batch, 3, length\) with length multiples of 2"),
    ],
)
def test_samples_of_another_shape_are_refused(options, shape, words):
    with pytest.raises(ValueError, match=words):
        tiny_unet(**options)(torch.zeros(shape), 1.0)


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "options"), SIGNAL_NETWORKS)
def test_a_signal_network_is_an_image_network_that_sees_each_row_alone(build, options, tmp_path):
    """With weights of three values in the middle row of 3 x 3 and zeros above and below, an image whose rows are all
    the signal stays one, and each row becomes what the signal does. (The filter of `fir` mixes rows: it has a test of
    its own.)"""
    signal, image = build(**options, dimensions=1), build(**options)
    state = image.state_dict()
    for name, value in signal.state_dict().items():
        if value.shape != state[name].shape:
            value = F.pad(value, (0, 0, 1, 1))
        state[name] = value
    image.load_state_dict(state)
    x, time, labels = randn(2, 3, 8), torch.tensor([30.5, 700.25]), torch.tensor([1, 3])
    with torch.no_grad():
        found = signal(x, time, class_labels=labels).sample
        rows = image(x[:, :, None].expand(-1, -1, 4, -1), time, class_labels=labels).sample
    assert found.shape == (2, 3, 8)
    if not options.get("fir", build is tiny_ncsnpp):
        assert (rows - found[:, :, None]).abs().max() < 1e-5 * found.abs().max()
    signal.save_pretrained(tmp_path)
    assert torch.equal(ScoreUNetModel.from_pretrained(tmp_path)(x, time, class_labels=labels).sample, found)
    assert signal(randn(1, 3, 24), 3.0).sample.shape == (1, 3, 24)


@pytest.mark.parametrize("up", [False, True])
def test_signals_are_resampled_by_the_filter(up):
    from score_sde.models.unet_score import FIRResample

    x = randn(2, 3, 8)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / (4 if up else 8)
    kernel = taps.expand(3, 1, 4)
    convolve = F.conv_transpose1d if up else F.conv1d
    expected = convolve(x, kernel, stride=2, padding=1, groups=3)
    assert torch.equal(FIRResample(up=up, dimensions=1)(x[:, :, None])[:, :, 0], expected)


def test_configs_of_before_open_as_they_were():
    """Without the new arguments, a network is what it was: the same parameters, of the same shapes."""
    for build in (tiny_unet, tiny_ncsnpp, small_dit):
        model = build()
        config = {name: value for name, value in model.config.items() if not name.startswith("_")}
        new = {"dimensions", "halve_frames", "factorized_attention"}
        old = type(model).from_config({name: value for name, value in config.items() if name not in new})
        assert {n: p.shape for n, p in old.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
        assert not any("temporal" in name or "frame" in name for name, _ in old.named_parameters())
