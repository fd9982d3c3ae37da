"""DiTModel and ScoreUNetModel: published sizes, the originals' outputs, saving, labels, inputs refused."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from networks import awake, tiny_adm, tiny_dit, tiny_ncsnpp, tiny_unet

from score_sde import DiTModel, NoiseConditionalClassifier, ScoreSDEScheduler, ScoreUNetModel
from score_sde.models.transformer_score_dit import CONDITIONINGS, POSITION_EMBEDDINGS, POSITION_SCALINGS
from score_sde.models.unet_score import ARCHITECTURES, UNETS, ResnetBlock
from score_sde.schedulers.paths import SDE_TYPES


every_model = pytest.mark.parametrize("build", [tiny_dit, tiny_unet, tiny_ncsnpp, tiny_adm])
every_unet = pytest.mark.parametrize("build", [tiny_unet, tiny_ncsnpp, tiny_adm])


def inputs(batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, 8, 8, generator=generator)
    return x, 999 * torch.rand(batch, generator=generator), torch.arange(batch) % 5


# --- published facts ----------------------------------------------------------------------------------------------


def test_fresh_dit_outputs_exactly_zero():
    model = DiTModel(sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=4)
    assert model(torch.randn(2, 4, 8, 8), 5, torch.tensor([1, 2])).sample.abs().max() == 0


def test_fresh_unet_outputs_almost_zero():
    model = ScoreUNetModel(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, attention_resolutions=())
    assert model(torch.randn(2, 3, 8, 8), 5).sample.abs().max() < 1e-3


def test_dit_is_initialised_like_the_original():
    model = DiTModel(hidden_size=384, num_layers=1)
    # uniform in +-bound has standard deviation bound / sqrt(3); fan-in plus fan-out of the original's layers
    for weight, fans in [
        (model.blocks[0].attn.to_q.weight, 384 + 3 * 384),
        (model.blocks[0].attn.to_out[0].weight, 384 + 384),
        (model.blocks[0].ff.net[0].proj.weight, 384 + 4 * 384),
        (model.patch_embed.weight, 16 + 384),
    ]:
        bound = (6 / fans) ** 0.5
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    for weight in (model.time_embed[0].weight, model.time_embed[2].weight, model.class_embed.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("options", [{}, {"conditioning": "adaln"}, {"shared_adaln": True}])
def test_a_fresh_dit_modulates_nothing(options):
    """adaLN-Zero: every block returns its tokens; adaLN has no gates, but no shift and no scale either."""
    model = DiTModel(sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=4, **options)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append((*inputs[:2], output)))
    model(torch.randn(2, 4, 8, 8), 5, torch.tensor([1, 2]))
    assert len(seen) == 2
    for tokens, modulation, output in seen:
        assert modulation.abs().max() == 0 and tokens.abs().max() > 0
        assert torch.equal(output, tokens) == (options.get("conditioning") != "adaln")


def fresh_unet(**options):
    config = {"sample_size": 8, "block_out_channels": (64, 128), "layers_per_block": 1, "attention_resolutions": (4,)}
    torch.manual_seed(0)
    return ScoreUNetModel(**config | {"num_classes": 100} | options)


def xavier_bound(weight, gain=1.0):
    receptive = weight[0, 0].numel()
    return gain * (6 / (receptive * (weight.shape[0] + weight.shape[1]))) ** 0.5


@pytest.mark.parametrize("architecture", ["ncsnpp", "adm"])
def test_a_unet_is_initialised_like_the_original(architecture):
    """DDPM's initialisation: Xavier uniform, of queries, keys and values with a tenth of the variance. ADM: PyTorch's.
    The last layer of every branch, and of the images of progressive output, is (almost) zero."""
    model = fresh_unet(architecture=architecture, progressive_output="output_skip")
    attention = model.mid_block.attentions[0]
    for weight, gain in [
        (model.conv_in.weight, 1.0),
        (model.time_embed[0].weight, 1.0),
        (model.mid_block.resnets[0].conv1.weight, 1.0),
        *((projection.weight, 0.1**0.5) for projection in (attention.to_q, attention.to_k, attention.to_v)),
    ]:
        fan_in = weight[0].numel()
        bound = xavier_bound(weight, gain) if architecture == "ncsnpp" else fan_in**-0.5
        assert weight.abs().max() <= bound * (1 + 1e-6)
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    last = [block.conv2 for block in model.modules() if isinstance(block, ResnetBlock)]
    last += [attention.to_out[0], model.conv_out]
    last += [level.progressive[-1] for level in model.up_blocks if level.progressive is not None]
    assert len(last) == 13  # ten residual blocks, one attention, two images
    for layer in last:
        assert layer.weight.abs().max() <= (1e-4 if architecture == "ncsnpp" else 0)
        assert layer.bias.abs().max() == 0
    assert model.class_embed.weight.std().item() == pytest.approx(0.02 if architecture == "ncsnpp" else 1, rel=0.05)
    norms = {module.eps for module in model.modules() if isinstance(module, torch.nn.GroupNorm)}
    assert norms == {1e-6 if architecture == "ncsnpp" else 1e-5}
    # whose sums with their inputs DDPM++ divides by sqrt(2)
    x, divisor = torch.randn(2, 128, 4, 4), 2**0.5 if architecture == "ncsnpp" else 1
    with torch.no_grad():
        branches = model.mid_block.resnets[0](x, torch.randn(2, 256)), attention(x)
    assert all((branch - x / divisor).abs().max() < 1e-2 for branch in branches)
    output = model(torch.randn(2, 3, 8, 8), 5).sample.abs().max()
    assert output < 1e-3 if architecture == "ncsnpp" else output == 0


# --- the classifier of noisy samples ------------------------------------------------------------------------------


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_a_classifier_sees_unit_variance_and_the_noise_level(sde_type):
    """x_t / sqrt(alpha^2 + sigma^2), which is unit variance for data of unit variance, and log(alpha / sigma)."""
    scheduler, t = ScoreSDEScheduler(sde_type=sde_type), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x, _, _ = inputs()
    alpha, sigma = scheduler.path.alpha(t), scheduler.path.sigma(t)
    shown, half_log_snr = scheduler.classifier_input(x, t)
    norm = (alpha**2 + sigma**2).sqrt().float()
    assert (shown * norm.reshape(-1, 1, 1, 1) - x).abs().max() < 1e-5
    assert (half_log_snr - (alpha / sigma).log()).abs().max() < 1e-4


def test_a_classifier_by_hand():
    """The noise level in hundredths as sinusoids; after the blocks norm, SiLU, mean over positions, linear."""
    classifier = awake(NoiseConditionalClassifier(sample_size=8, block_out_channels=(16, 16, 32), num_classes=5))
    seen = {}
    classifier.time_embed.register_forward_hook(lambda _, given, output: seen.update(features=given[0]))
    classifier.down_blocks[-1].register_forward_hook(lambda _, given, output: seen.update(last=output[0]))
    x, _, _ = inputs()
    half_log_snr = torch.tensor([-2.0, 0.5, 0.51])
    logits = classifier(x, half_log_snr).logits
    angles = 100 * half_log_snr[:, None] * 10000 ** (-torch.arange(8) / 7)
    assert (seen["features"] - torch.cat([angles.sin(), angles.cos()], dim=1)).abs().max() < 1e-3
    norm, linear = classifier.norm_out, classifier.head[1]
    normed = F.group_norm(seen["last"], 16, norm.weight, norm.bias)
    expected = F.silu(normed).mean((2, 3)) @ linear.weight.T + linear.bias
    assert (logits - expected).abs().max() < 1e-5


# --- labels -------------------------------------------------------------------------------------------------------


@every_model
def test_no_label_is_dropped_by_the_network_itself(build):
    model = build(class_dropout_prob=1.0)
    x, t, labels = inputs()
    with torch.no_grad():
        labelled, null = model.train()(x, t, labels).sample, model(x, t, None).sample
    assert ((labelled - null).abs().flatten(1).amax(1) > 1e-2).all()


@every_model
def test_null_conditions(build):
    labels = torch.tensor([[0, 3]])
    found = build().null_conditions({"class_labels": labels, "other": torch.zeros(2)})
    assert found.keys() == {"class_labels"}
    assert found["class_labels"].tolist() == [[5, 5]] and found["class_labels"].dtype == labels.dtype
    # of classes that training never left out, of none, and where none were given
    for model in (build(class_dropout_prob=0.0), build(num_classes=None)):
        assert model.null_conditions({"class_labels": labels}) == {}
    assert build().null_conditions({}) == {}


UNETS_TOLD = [{}, {"architecture": "adm", "num_attention_heads": 2, "block_out_channels": (32, 64)}]


def told_unet(**options):
    return tiny_unet(cross_attention_dim=7, pooled_projection_dim=6, num_classes=None, **options)


def words(**changes):
    generator = torch.Generator().manual_seed(3)
    text, pooled = torch.randn(2, 5, 7, generator=generator), torch.randn(2, 6, generator=generator)
    return {"encoder_hidden_states": text, "pooled_projections": pooled} | changes


@pytest.mark.parametrize("options", UNETS_TOLD)
def test_a_unet_attends_to_words(options):
    model, sample, time = told_unet(**options), inputs(2)[0], torch.tensor([20.0, 700.0])
    told = model(sample, time, **words()).sample
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    masked = model(sample, time, **words(encoder_attention_mask=mask)).sample
    short = words()["encoder_hidden_states"][:, :3]
    assert (masked - model(sample, time, **words(encoder_hidden_states=short)).sample).abs().max() < 1e-5
    assert (masked - told).abs().max() > 1e-4
    # every self-attention is followed by one to the words
    crossing = [module for module in model.modules() if getattr(module, "is_cross_attention", False)]
    own = [module for module in model.modules() if type(module).__name__ == "Attention"]
    assert len(crossing) == len(own) - len(crossing) > 0
    # none of them is zeros, of which biases are learned, or nothing given
    null = model.null_conditions(words())
    assert null.keys() == words().keys() and not any(value.any() for value in null.values())
    without = model(sample, time, **null).sample
    assert (without - model(sample, time).sample).abs().max() < 1e-5
    for name in null:
        assert (told - model(sample, time, **words(**{name: null[name]})).sample).abs().max() > 1e-4
    without.sum().backward()
    assert crossing[0].to_v.bias.grad.abs().max() > 1e-5 and not crossing[0].to_v.weight.grad.any()


@pytest.mark.parametrize("options", UNETS_TOLD)
def test_words_that_say_nothing_leave_a_unet_as_it_is(options):
    model, sample, time = told_unet(**options), inputs(2)[0], torch.tensor([20.0, 700.0])
    for name, parameter in model.named_parameters():
        if "cross_attentions" in name and "to_out" in name or "pooled_embed.2" in name:
            torch.nn.init.zeros_(parameter)
    plain = tiny_unet(num_classes=None, **options)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in plain.state_dict()})
    assert (model(sample, time, **words()).sample - plain(sample, time).sample).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (
            {},
            {"encoder_hidden_states": torch.zeros(2, 3, 8)},
            r"shape \(2, 3, 8\); this model takes \(2, sequence, 7\)",
        ),
        ({}, {"encoder_hidden_states": torch.zeros(3, 3, 7)}, r"shape \(3, 3, 7\)"),
        ({}, {"pooled_projections": torch.zeros(2, 5)}, r"pooled_projections has shape \(2, 5\); .* \(2, 6\)"),
        ({}, {"encoder_attention_mask": torch.ones(2, 3)}, "encoder_attention_mask was given without"),
        ({}, words(encoder_attention_mask=torch.ones(2, 4)), r"shape \(2, 4\); the sequence needs \(2, 5\)"),
        ({"class_dropout_prob": 0.0}, {}, "pooled_projections is missing: this model needs vectors of width 6"),
    ],
)
def test_words_that_a_unet_does_not_take(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        told_unet(**options)(inputs(2)[0], torch.tensor([20.0, 700.0]), **arguments)
    with pytest.raises(ValueError, match="were given to a model without cross_attention_dim"):
        tiny_unet()(inputs(2)[0], 3.0, encoder_hidden_states=torch.zeros(2, 3, 7))


@every_model
def test_no_label_means_the_null_label(build):
    model = build()
    x, t, _ = inputs()
    with torch.no_grad():
        assert torch.equal(model(x, t).sample, model(x, t, torch.full((3,), 5)).sample)


@every_model
def test_unconditional_model_refuses_labels(build):
    model = build(num_classes=None)
    x, t, labels = inputs()
    assert model(x, t).sample.shape == x.shape
    with pytest.raises(ValueError, match="without classes"):
        model(x, t, labels)


# --- forward ------------------------------------------------------------------------------------------------------


@every_model
def test_timestep_may_be_a_number_or_a_tensor(build):
    model = build()
    x, _, labels = inputs()
    with torch.no_grad():
        expected = model(x, torch.full((3,), 500.0), labels).sample
        for timestep in (500, 500.0, torch.tensor(500), torch.tensor([500, 500, 500])):
            assert torch.equal(model(x, timestep, labels).sample, expected)
        (as_tuple,) = model(x, 500, labels, return_dict=False)
    assert torch.equal(as_tuple, expected)


@every_model
def test_an_output_does_not_depend_on_its_neighbours(build):
    model = build()
    x, t, labels = inputs()
    with torch.no_grad():
        together = model(x, t, labels).sample
        for i in range(3):
            alone = model(x[i : i + 1], t[i : i + 1], labels[i : i + 1]).sample
            assert (together[i] - alone[0]).abs().max() < 1e-5


@every_model
def test_time_and_label_matter(build):
    model = build()
    x, t, labels = inputs()
    with torch.no_grad():
        output = model(x, t, labels).sample
        assert (model(x, t + 1, labels).sample - output).abs().max() > 1e-3
        assert (model(x, t, (labels + 1) % 5).sample - output).abs().max() > 1e-3


@every_model
def test_gradient_checkpointing_gives_the_same_gradients(build):
    x, t, labels = inputs()
    gradients = []
    for checkpointing in (False, True):
        model = build()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(x, t, labels).sample.square().sum().backward()
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        gradients.append({name: parameter.grad for name, parameter in trained})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert (gradient - gradients[1][name]).abs().max() <= 1e-5 * gradient.abs().max(), name


@every_model
def test_channels_last_gives_the_same_output(build):
    model = build()
    x, t, labels = inputs()
    with torch.no_grad():
        expected = model(x, t, labels).sample
        output = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, labels).sample
    assert (output - expected).abs().max() < 1e-5


def test_learned_sigma_doubles_the_output_channels():
    model = tiny_dit(learn_sigma=True)
    x, t, labels = inputs()
    assert model(x, t, labels).sample.shape == (3, 6, 8, 8)
    assert model.config.out_channels == 6


@every_unet
def test_unet_takes_other_sizes(build):
    model = build()
    assert model(torch.randn(1, 3, 12, 16), 3, torch.tensor([1])).sample.shape == (1, 3, 12, 16)


@every_model
def test_attention_backend_can_be_set(build):
    model = build()
    x, t, labels = inputs()
    with torch.no_grad():
        before = model(x, t, labels).sample
        model.set_attention_backend("native")
        assert len(model.attn_processors) > 0
        assert (model(x, t, labels).sample - before).abs().max() < 1e-6


def test_fused_projections_give_the_same_output():
    model = tiny_dit()
    x, t, labels = inputs()
    with torch.no_grad():
        before = model(x, t, labels).sample
        model.fuse_qkv_projections()
        assert model.blocks[0].attn.fused_projections
        assert (model(x, t, labels).sample - before).abs().max() < 1e-5


def test_lora_adapter_trains_alone():
    peft = pytest.importorskip("peft")
    model = tiny_dit()
    x, t, labels = inputs()
    with torch.no_grad():
        before = model(x, t, labels).sample
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        assert (model(x, t, labels).sample - before).abs().max() < 1e-5
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # two matrices for each of four projections in two blocks
    assert len(trained) == 16 and all("lora" in name for name in trained)


@pytest.mark.slow
def test_repeated_blocks_compile_without_graph_breaks():
    model = tiny_dit()
    x, t, labels = inputs()
    with torch.no_grad():
        before = model(x, t, labels).sample
        model.compile_repeated_blocks(fullgraph=True)
        assert (model(x, t, labels).sample - before).abs().max() < 1e-4


@every_model
def test_every_block_is_called_as_such(build):
    """By this diffusers brings its weights in, where groups of blocks are offloaded."""
    model, called = build(), []
    blocks = [block for child in model.children() if isinstance(child, torch.nn.ModuleList) for block in child]
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: called.append(block))
    model(*inputs())
    assert len(blocks) >= 2 and called == blocks


@every_unet
def test_unet_compiles_without_graph_breaks(build):
    model = build()
    x, t, labels = inputs()
    with torch.no_grad():
        before = model(x, t, labels).sample
        # this backend traces as all do, and runs the graph as it is
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert (compiled(x, t, labels).sample - before).abs().max() < 1e-5


# --- saving -------------------------------------------------------------------------------------------------------


def public_config(model):
    values = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return json.loads(json.dumps(values))


@every_model
@pytest.mark.parametrize("arguments", [{}, {"max_shard_size": "100KB"}, {"variant": "fp16"}], ids=str)
def test_save_and_load(build, arguments, tmp_path):
    model = build()
    model.save_pretrained(tmp_path, **arguments)
    assert not list(tmp_path.glob("*.bin"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or "max_shard_size" not in arguments
    variant = {key: value for key, value in arguments.items() if key == "variant"}
    loaded = type(model).from_pretrained(tmp_path, **variant)
    x, t, labels = inputs()
    with torch.no_grad():
        assert torch.equal(loaded(x, t, labels).sample, model(x, t, labels).sample)
    assert public_config(loaded) == public_config(model)


@every_model
def test_bfloat16_weights_keep_exact_positions_and_frequencies(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    x, t, labels = inputs()
    with torch.no_grad():
        output = loaded(x.bfloat16(), t, labels).sample
        expected = model(x, t, labels).sample
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()
    if build is tiny_dit:
        assert torch.equal(loaded.sincos_table, model.sincos_table)
    if build is tiny_ncsnpp:
        assert torch.equal(loaded.fourier.weight, model.fourier.weight)
        # cast later, too
        assert torch.equal(build().to(torch.bfloat16).fourier.weight, model.fourier.weight)


@every_model
def test_half_precision_and_device_maps(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    x, t, labels = inputs()
    with torch.no_grad():
        expected = model(x, t, labels).sample
        mapped = type(model).from_pretrained(tmp_path, device_map={"": "cpu"})
        assert torch.equal(mapped(x, t, labels).sample, expected)
        half = type(model).from_pretrained(tmp_path, dtype=torch.float16)
        output = half(x.half(), t, labels).sample
    assert output.dtype == torch.float16
    assert (output.float() - expected).abs().max() < 0.01 * expected.abs().max()


# --- refused ------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 7, 8)])
def test_wrong_input_shapes_are_refused_by_name(build, shape):
    with pytest.raises(ValueError, match=r"has shape \(" + ", ".join(map(str, shape))):
        build()(torch.zeros(shape), 1)


@pytest.mark.parametrize(("options", "heads"), [({"num_attention_heads": 2}, 2), ({"attention_head_dim": 8}, 4)])
def test_attention_heads_of_a_unet_by_their_number_or_size(options, heads):
    assert tiny_unet(**options).mid_block.attentions[0].heads == heads


@pytest.mark.parametrize(("options", "channels"), [({}, 3), ({"learn_sigma": True}, 6), ({"out_channels": 5}, 5)])
def test_output_channels_of_a_unet(options, channels):
    x, t, _ = inputs()
    assert tiny_unet(**options)(x, t).sample.shape[1] == channels


@every_model
def test_wrong_label_shapes_are_refused_by_name(build):
    x, t, _ = inputs()
    with pytest.raises(ValueError, match=r"class_labels has shape \(2,\)"):
        build()(x, t, torch.tensor([1, 2]))


@every_model
def test_labels_out_of_range_are_refused_by_name(build):
    x, t, _ = inputs()
    model = build()
    count = model.config.num_classes
    for label in (-1, count + 1):
        labels = torch.full((len(x),), 1)
        labels[0] = label
        with pytest.raises(ValueError, match=f"class label {label} is not among 0 to {count}, of which the last is no"):
            model(x, t, labels)
    model(x, t, torch.full((len(x),), count))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 3}, "patch_size 3 must divide sample_size 8: 8 could be 6 or 9"),
        ({"hidden_size": 30}, "hidden_size 30 must be a multiple"),
        ({"num_classes": 0}, "num_classes 0"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob 1.5"),
        ({"out_channels": 7}, "out_channels 7"),
    ],
)
def test_dit_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_dit(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_size": 9, "attention_resolutions": ()}, "sample_size 9 must .* resolutions: 9 could be 8 or"),
        ({"block_out_channels": (10, 20)}, r"block_out_channels \(10, 20\)"),
        ({"attention_resolutions": (5,)}, r"attention_resolutions \(5,\)"),
        ({"num_classes": 0}, "num_classes 0"),
        ({"class_dropout_prob": -1}, "class_dropout_prob -1"),
        ({"architecture": "vgg"}, "architecture 'vgg' is unknown; choose one of ncsnpp, adm"),
        ({"architecture": "adm"}, "group norm of 48 channels"),
        ({"time_embedding_type": "sine"}, "time_embedding_type 'sine' is unknown; choose one of positional, fourier"),
        ({"progressive_input": "skip"}, "progressive_input 'skip' is unknown"),
        ({"progressive_combine": "cat"}, "progressive_combine 'cat' needs progressive_input 'input_skip'"),
        ({"scale_by_sigma": True}, "scale_by_sigma needs a noise level as timestep"),
        ({"attention_head_dim": 5}, "attention_head_dim 5 must divide the 32 channels"),
        ({"attention_resolutions": (), "num_attention_heads": 3}, "num_attention_heads 3 must divide the 32 channels"),
        ({"attention_head_dim": 8, "num_attention_heads": 2}, "were both given"),
        ({"learn_sigma": True, "out_channels": 4}, "out_channels 4 contradicts in_channels 3"),
        ({"model_channels": 6}, "model_channels 6 must be a multiple of 4"),
        ({"block_out_channels": ()}, r"block_out_channels \(\) must be one or more multiples of 4"),
        ({"block_out_channels": (16.0, 32)}, r"block_out_channels \(16.0, 32\)"),
        *(({"dropout": value}, f"dropout {value} must lie in") for value in (-0.1, 1.0, math.nan)),
        ({"class_dropout_prob": math.nan}, "class_dropout_prob nan must lie"),
    ],
)
def test_unet_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet(**arguments)


@pytest.mark.parametrize("value", [0, -1, 2.0, math.nan, True])
@pytest.mark.parametrize(
    "name",
    ["sample_size", "in_channels", "out_channels", "layers_per_block", "num_classes", "model_channels"]
    + ["num_attention_heads", "attention_head_dim"],
)
def test_sizes_of_a_unet_are_whole_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} {value!r} must be a whole number, at least 1"):
        tiny_unet(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({name: 0}, f"{name} 0 must be a whole number") for name in ("sample_size", "in_channels", "num_classes")),
        *(({name: 1.5}, f"{name} 1.5 must be") for name in ("layers_per_block", "norm_num_groups")),
        ({"block_out_channels": ()}, r"block_out_channels \(\) must be"),
        ({"block_out_channels": (2, 16)}, r"block_out_channels \(2, 16\) must be"),
        ({"block_out_channels": (16.0,)}, r"block_out_channels \(16.0,\) must be"),
        ({"block_out_channels": (20,)}, r"norm_num_groups 16 must divide block_out_channels \(20,\)"),
        *(({"dropout": value}, f"dropout {value} must lie in") for value in (-0.1, 1.0, math.nan)),
    ],
)
def test_a_classifier_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseConditionalClassifier(**arguments)


def test_the_narrowest_classifier_is_one():
    classifier = awake(NoiseConditionalClassifier(sample_size=8, block_out_channels=(4, 4), norm_num_groups=2))
    x, _, _ = inputs()
    logits = classifier(x, torch.tensor([-2.0, 0.5, 0.6])).logits
    assert logits.shape == (3, 10)
    assert (logits.std(0) > 0).all()


def test_docstrings_name_every_choice():
    for model_class, tables in (
        (DiTModel, (CONDITIONINGS, POSITION_EMBEDDINGS, POSITION_SCALINGS)),
        (ScoreUNetModel, (ARCHITECTURES,)),
    ):
        assert [name for table in tables for name in table if name not in model_class.__doc__] == []
    names = {name.removesuffix(" deep") for name in UNETS}
    assert [name for name in names if f'"{name}"' not in ScoreUNetModel.from_name.__doc__] == []


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 8, 8)])
def test_a_classifier_refuses_other_samples(shape):
    with pytest.raises(ValueError, match=r"sample must be \(B, 3, H, W\); got"):
        NoiseConditionalClassifier(sample_size=8, block_out_channels=(16,))(torch.zeros(shape), torch.zeros(1))


@pytest.mark.parametrize("model_class", [DiTModel, ScoreUNetModel])
def test_unknown_names_are_refused_with_the_known_ones(model_class):
    with pytest.raises(ValueError, match="'nothing' is unknown; choose one of D"):
        model_class.from_name("nothing")
