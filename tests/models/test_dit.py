"""DiTModel beyond its defaults: published costs, conditionings, options, axes, and diffusers' tools for models."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig
from dit_gflops import PUBLISHED, count
from networks import DIT_OPTIONS, call, parameters, randn, small_dit
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from score_sde import DiTModel
from score_sde.models import transformer_score_dit
from score_sde.models.transformer_score_dit import (
    CONDITIONINGS,
    HAS_ONEDNN,
    MAX_TABLES,
    POSITION_EMBEDDINGS,
    Linear,
    convolution_pays,
    explicit_attention,
    explicit_attention_pays,
    rotary_position_embedding,
    sincos_position_embedding,
)


every_option = pytest.mark.parametrize("options", DIT_OPTIONS, ids=lambda options: "-".join(map(str, options.values())))


# --- published facts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arguments"), PUBLISHED)
def test_published_gflops_and_parameters(name, arguments):
    gflops, millions = count(name, arguments)
    published_gflops, published_millions = PUBLISHED[name, arguments]
    # to 0.5 %, or the last digit of the table
    assert gflops == pytest.approx(published_gflops, rel=0.005, abs=0.005)
    assert millions == pytest.approx(published_millions, rel=0.005)


def test_swiglu_and_shared_modulation_have_the_parameters_they_should():
    plain = parameters(small_dit(hidden_size=96))
    assert parameters(small_dit(hidden_size=96, swiglu=True)) == pytest.approx(plain, rel=0.01)
    shared = small_dit(hidden_size=96, num_layers=10, shared_adaln=True)
    own = small_dit(hidden_size=96, num_layers=10)
    # nine matrices (6 D, D) and their biases less, an offset of 6 D for every block more
    assert parameters(own) - parameters(shared) == 9 * 6 * 96 * 97 - 10 * 6 * 96


@pytest.mark.parametrize(("mlp_ratio", "width"), [(4.0, 256), (2.0, 128), (1.01, 64)])
def test_swiglu_has_two_thirds_of_the_width(mlp_ratio, width):
    feed_forward = small_dit(hidden_size=96, swiglu=True, mlp_ratio=mlp_ratio).blocks[0].ff
    # a gate and a value for each channel
    assert feed_forward.net[0].proj.out_features == 2 * width
    assert feed_forward.net[2].in_features == width


WIDE = {"sample_size": 16, "patch_size": 1, "in_channels": 768, "hidden_size": 1152, "num_layers": 28}
WIDE |= {"num_attention_heads": 16, "swiglu": True, "position_embedding": "rotary", "head_hidden_size": 2048}


def test_the_published_wide_head_has_its_parameters():
    """DiT^DH-XL has 839 million (Zheng et al. 2025, Table 8)."""
    with torch.device("meta"):
        assert parameters(DiTModel(**WIDE)) == pytest.approx(839e6, rel=0.002)


def test_the_wide_head_costs_what_its_matrices_do():
    model = small_dit(head_hidden_size=64, head_num_layers=3)
    tokens, per_sample, per_token = 16, 0, 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(model.to("meta"), batch=1)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and name.startswith(("time_", "adaln.")):
            per_sample += weight.numel()
        elif weight.ndim == 2 and name != "class_embed.weight":
            per_token += weight.numel()
    attention = 2 * tokens**2 * (2 * 48 + 3 * 64)
    assert counter.get_total_flops() == 2 * (tokens * per_token + per_sample + attention)


def test_the_wide_head_by_hand():
    """Its last norm and its only block, as Wang et al. 2025 write them: each token has a modulation of its own."""
    model = small_dit(head_hidden_size=64, head_num_layers=1, num_classes=None)
    seen = {}
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.update(tokens=output))
    with torch.no_grad():
        output = call(model)
        time = model.time_embed(model.frequencies(torch.linspace(30.5, 900.25, 8)[:2], seen["tokens"]))
        s = F.silu(model.head_condition(F.silu(seen["tokens"] + time[:, None])))
        patches = model.patchify(randn(8, 3, 8, 8)[:2])
        x, block = model.head_patch_embed(patches), model.head_blocks[0]
        shift, scale, gate, shift_ff, scale_ff, gate_ff = block.adaln(s).chunk(6, dim=2)
        x = x + gate * block.attn(F.layer_norm(x, (64,), eps=1e-6) * (1 + scale) + shift)
        x = x + gate_ff * block.ff(F.layer_norm(x, (64,), eps=1e-6) * (1 + scale_ff) + shift_ff)
        shift, scale = model.head_adaln(s).chunk(2, dim=2)
        wanted = model.proj_out(F.layer_norm(x, (64,), eps=1e-6) * (1 + scale) + shift)
    assert (model.unpatchify(wanted, (4, 4)) - output).abs().max() < 1e-5 * output.abs().max()


def test_a_bottleneck_is_an_embedding_of_limited_rank():
    model, plain = small_dit(patch_bottleneck=4), small_dit()
    first, second = model.patch_embed
    assert model.state_dict().keys() - plain.state_dict().keys() == {
        *("patch_embed.0.weight", "patch_embed.1.weight", "patch_embed.1.bias"),
    }
    weights = model.state_dict() | {"patch_embed.weight": second.weight @ first.weight, "patch_embed.bias": second.bias}
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    assert torch.linalg.matrix_rank(plain.patch_embed.weight) == 4
    assert (call(model) - call(plain)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_bottleneck": 0}, "patch_bottleneck 0 must be a whole number, at least 1"),
        ({"patch_bottleneck": 4, "vocab_size": 9, "sample_size": 8}, "patch_bottleneck 4 is of patches, which tokens"),
    ],
)
def test_no_bottleneck_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        DiTModel(**options)


# --- token routing ------------------------------------------------------------------------------------------------


ROUTED = [
    {},
    {"position_embedding": "rotary", "cross_attention_dim": 7},
    {"shared_adaln": True, "conditioning": "adaln", "head_hidden_size": 64},
]


@pytest.mark.parametrize(
    ("depth", "blocks"), [(28, range(2, 24)), (12, range(2, 8)), (6, range(1, 4)), (3, range(1, 2))]
)
def test_the_routed_blocks_are_those_of_the_paper_or_a_share_of_them(depth, blocks):
    """DiT-XL and DiT-B of Krause et al. 2025: from the second block to the fourth from the end."""
    with torch.device("meta"):
        assert small_dit(num_layers=depth).routed_blocks == blocks
        assert not small_dit(num_layers=2).routed_blocks


@pytest.mark.parametrize("options", ROUTED, ids=str)
def test_all_tokens_in_any_order_are_the_plain_forward(options):
    model = small_dit(num_layers=6, **options).train()
    kept = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    plain = call(model)
    assert (call(model, kept_tokens=kept) - plain).abs().max() < 1e-4 * plain.abs().max()


@pytest.mark.parametrize("options", ROUTED, ids=str)
def test_tokens_that_are_not_kept_go_around_the_blocks_unchanged(options):
    model, found = small_dit(num_layers=6, **options).train(), {}
    kept, rows = torch.tensor([[1, 4, 5, 10], [0, 2, 3, 15]]), torch.arange(2)[:, None]

    def tokens_after(block, seen):
        forward = model.forward
        conditions = {"class_labels": torch.tensor([0, 1]), "hidden_states_of": block, "kept_tokens": seen}
        if model.config.cross_attention_dim:
            conditions["encoder_hidden_states"] = randn(2, 6, 7)
        return forward(randn(2, 3, 8, 8), torch.tensor([30.0, 900.0]), **conditions).hidden_states

    first, last = model.routed_blocks.start, model.routed_blocks.stop
    for block in range(first, last + 1):
        found[block] = tokens_after(block, kept)
    assert torch.equal(found[first], tokens_after(first, None))
    others = torch.ones(2, 16, dtype=torch.bool).scatter(1, kept, False)
    for block in range(first + 1, last + 1):
        assert torch.equal(found[block][others], found[first][others])
        assert (found[block] - found[block - 1])[rows, kept].abs().max() > 1e-3
    # the kept ones see each other alone: with one, its attention is its own value, whoever the others are
    after = tokens_after(last + 1, kept)
    assert ((after - found[last])[others].abs().amax(-1) > 0).all()
    with pytest.raises(ValueError, match="kept_tokens need a model of 3 blocks at least"):
        call(small_dit(), kept_tokens=kept)


@pytest.mark.parametrize("position_embedding", POSITION_EMBEDDINGS)
def test_kept_tokens_keep_their_places_and_see_each_other_alone(position_embedding):
    """Beside the same blocks run by hand on each sample's tokens, with the rows of the tables that are theirs."""
    model, calls = small_dit(num_layers=3, position_embedding=position_embedding, conditioning="adaln"), []
    kept = torch.tensor([[1, 4, 5, 10], [0, 2, 3, 15]])
    run = model.run
    model.run = lambda block, *inputs: calls.append((block, inputs, run(block, *inputs))) or calls[-1][2]
    call(model, kept_tokens=kept)
    (_, _, before), (block, (tokens, modulation, *_), found), _ = calls
    table = model.rotary_table if "rotary" in position_embedding else None
    for i in range(2):
        assert torch.equal(tokens[i], before[i, kept[i]])
        rotary = None if table is None else (table[0, kept[i]], table[1, kept[i]])
        alone = block(before[i : i + 1, kept[i]], modulation[i : i + 1], rotary)
        assert (alone[0] - found[i]).abs().max() < 1e-5


# --- every option -------------------------------------------------------------------------------------------------


@every_option
def test_an_option_is_a_whole_model(options, tmp_path):
    model = small_dit(**options)
    output = call(model)
    assert output.shape[:2] == (2, 3)
    # fresh models output zero
    torch.manual_seed(0)
    fresh = DiTModel(
        **{"sample_size": 8, "in_channels": 3, "hidden_size": 48, "num_layers": 2, "num_attention_heads": 4}
        | {"num_classes": 5}
        | options
    )
    assert call(fresh).abs().max() == 0
    # saved and loaded
    model.save_pretrained(tmp_path)
    assert torch.equal(call(DiTModel.from_pretrained(tmp_path)), output)
    # a sample doesn't depend on its neighbours
    assert (call(model, batch=3)[:1] - call(model, batch=1)).abs().max() < 1e-5
    # every parameter has a gradient, recomputed or not
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.enable_gradient_checkpointing()
        call(model).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    model.disable_gradient_checkpointing()
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    # one projection instead of three
    model.fuse_qkv_projections()
    assert (call(model) - output).abs().max() < 1e-5


@every_option
def test_options_take_bfloat16(options):
    model = small_dit(**options)
    exact = call(model)
    half = model.to(torch.bfloat16)
    arguments = {}
    if model.config.cross_attention_dim is not None:
        arguments["encoder_hidden_states"] = randn(8, 6, 7, seed=2)[:2].bfloat16()
    if model.config.pooled_projection_dim is not None:
        arguments["pooled_projections"] = randn(8, 5, seed=4)[:2].bfloat16()
    size = exact.shape[2:]
    with torch.no_grad():
        output = half(
            randn(8, 3, *size)[:2].bfloat16(),
            torch.linspace(30.5, 900.25, 8)[:2],
            class_labels=None if model.config.num_classes is None else torch.arange(2),
            **arguments,
        ).sample
    assert output.dtype == torch.bfloat16
    assert (output - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_the_parts_of_a_block_are_the_ones_of_the_paper():
    """adaLN has no gates; cross-attention and in-context use norms with parameters and no modulation."""
    names = {
        conditioning: dict(small_dit(conditioning=conditioning).named_parameters()) for conditioning in CONDITIONINGS
    }
    assert names["adaln_zero"]["adaln.weight"].shape == (14 * 48, 48)
    assert names["adaln"]["adaln.weight"].shape == (10 * 48, 48)
    for conditioning in ("cross_attention", "in_context"):
        assert "adaln.weight" not in names[conditioning]
        assert ("blocks.0.cross_attn.to_q.weight" in names[conditioning]) == (conditioning == "cross_attention")


@pytest.mark.parametrize(
    "options", [{}, {"conditioning": "adaln"}, {"shared_adaln": True}, {"shared_adaln": True, "conditioning": "adaln"}]
)
def test_every_block_has_its_own_modulation(options):
    """Its own vectors of the one matrix product, or the shared ones and its own offset; the last two are the output
    layer's."""
    model, seen = small_dit(num_layers=3, **options), []
    model.adaln.register_forward_hook(lambda _, given, output: seen.append(output.unflatten(1, (-1, 48))))
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, output: seen.append((given[1], output)))
    model.proj_out.register_forward_hook(lambda _, given, output: seen.append(given[0]))
    call(model)
    vectors, *blocks, last = seen
    count = CONDITIONINGS[model.config.conditioning]
    for index, (modulation, _) in enumerate(blocks):
        own = vectors[:, count * index : count * (index + 1)]
        if model.config.shared_adaln:
            own = vectors[:, :count] + model.block_offsets[index]
        assert torch.equal(modulation, own)
    shift, scale = vectors[:, -2:].unbind(1)
    normed = torch.nn.functional.layer_norm(blocks[-1][1], (48,), eps=1e-6)
    assert (last - (normed * (1 + scale[:, None]) + shift[:, None])).abs().max() < 1e-5


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_masked_elements_of_a_sequence_do_not_count(conditioning):
    model = small_dit(conditioning=conditioning, cross_attention_dim=7)
    text, mask = randn(2, 6, 7, seed=2), torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
    masked = call(model, encoder_hidden_states=text, encoder_attention_mask=mask)
    assert (masked - call(model, encoder_hidden_states=text[:, :4])).abs().max() < 1e-5
    changed = torch.cat([text[:, :4], 9 * text[:, 4:]], dim=1)
    assert (masked - call(model, encoder_hidden_states=changed, encoder_attention_mask=mask)).abs().max() < 1e-5
    assert (masked - call(model, encoder_hidden_states=text)).abs().max() > 1e-4


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_what_stands_for_no_text_is_learned(conditioning):
    """Zeros, whatever the length was, whose embeddings are biases, and what a missing text means."""
    model = small_dit(conditioning=conditioning, cross_attention_dim=7, pooled_projection_dim=5)
    told = {"encoder_hidden_states": randn(2, 6, 7, seed=2), "pooled_projections": randn(2, 5, seed=4)}
    told["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
    null = model.null_conditions(told)
    assert null.keys() == told.keys() and null["encoder_attention_mask"].tolist() == [[1, 0, 0, 0, 0, 0]] * 2
    without = call(model, **null)
    assert (without - call(model, encoder_hidden_states=None, pooled_projections=None)).abs().max() < 1e-5
    assert (without - call(model, **told)).abs().max() > 1e-3
    for name in ("encoder_hidden_states", "pooled_projections"):
        assert (call(model, **told) - call(model, **told | {name: null[name]})).abs().max() > 1e-4
    without.sum().backward()
    for layer in (model.context_embed, model.pooled_embed[0]):
        assert layer.bias.grad.abs().max() > 1e-5 and not layer.weight.grad.any()
    always = small_dit(conditioning=conditioning, cross_attention_dim=7, class_dropout_prob=0)
    assert always.null_conditions(told) == {}


def test_cross_attention_beside_modulation_by_hand():
    """As in PixArt-alpha, after the self-attention and without modulation; a fresh one adds nothing."""
    model = small_dit(cross_attention_dim=7, num_layers=1)
    block, text, seen = model.blocks[0], randn(2, 6, 7, seed=2), {}
    block.attn.register_forward_hook(lambda _, given, output: seen.update(attended=output))
    block.register_forward_hook(lambda _, given, output: seen.update(tokens=given[0], vectors=given[1], output=output))
    call(model, encoder_hidden_states=text)
    _, _, gate, shift, scale, gate_ff = seen["vectors"].unsqueeze(2).unbind(1)

    def normed(x):
        return torch.nn.functional.layer_norm(x, (48,), eps=1e-6)

    x = seen["tokens"] + gate * seen["attended"]
    attn, context = block.cross_attn, model.context_embed(text)
    heads = (
        project.unflatten(-1, (4, 12)).transpose(1, 2)
        for project in (attn.to_q(normed(x)), attn.to_k(context), attn.to_v(context))
    )
    told = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    x = x + attn.to_out[0](told)
    x = x + gate_ff * block.ff(normed(x) * (1 + scale) + shift)
    assert (seen["output"] - x).abs().max() < 1e-5
    fresh = DiTModel(8, hidden_size=48, num_layers=2, num_attention_heads=4, cross_attention_dim=7)
    assert not any(block.cross_attn.to_out[0].weight.any() for block in fresh.blocks)


# --- positions, patches, sizes ------------------------------------------------------------------------------------


def test_the_largest_frequency_shift_is_taken():
    assert call(small_dit(frequency_shift=127.0)).isfinite().all()


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_time_is_told_by_cosines_and_sines(shift):
    """In this order, as the original has it, of 128 frequencies from 1 down."""
    model, seen = small_dit(frequency_shift=shift), []
    model.time_embed.register_forward_hook(lambda _, given, output: seen.append(given[0]))
    timestep = torch.tensor([0.5, 40.0])
    call(model, timestep=timestep)
    angles = timestep[:, None] * 10000 ** (-torch.arange(128) / (128 - shift))
    assert (seen[0] - torch.cat([angles.cos(), angles.sin()], dim=1)).abs().max() < 1e-4


def test_the_positions_of_an_image_are_the_ones_of_the_original():
    """Columns in the first half of the channels, then rows, each as sines, then cosines."""
    table = sincos_position_embedding((3, 5), (3, 5), "resize", 16)
    for row, column in itertools.product(range(3), range(5)):
        expected = []
        for place in (column, row):
            angles = place / 10000 ** (torch.arange(4) / 4)
            expected += [angles.sin(), angles.cos()]
        assert (table[5 * row + column] - torch.cat(expected)).abs().max() < 1e-6


def test_positions_in_other_sizes():
    trained = sincos_position_embedding((4, 4), (4, 4), "resize", 16)
    longer = sincos_position_embedding((4, 8), (4, 4), "extrapolate", 16).unflatten(0, (4, 8))
    assert torch.equal(longer[:, :4].flatten(0, 1), trained)
    # twice the patches over the same extent: each old position is the middle of two new ones
    halves = rotary_position_embedding((8,), (4,), "resize", 2)[1].asin()[:4, 0]
    assert (halves - torch.tensor([-0.25, 0.25, 0.75, 1.25])).abs().max() < 1e-6


@pytest.mark.parametrize("position_embedding", ["sincos", "rotary"])
def test_positions_in_other_sizes_are_worked_out_once(position_embedding):
    """For every size, of which the last ones are kept; and such that training can use what sampling made."""
    model, made = small_dit(position_embedding=position_embedding), []
    work_out = model.position_table
    model.position_table = lambda *arguments: (made.append(arguments[1]), work_out(*arguments))[1]
    with torch.inference_mode():
        first = call(model, size=(8, 12))
    again = call(model, size=(8, 12))
    again.sum().backward()
    assert (again - first).abs().max() < 1e-6 and made == [(4, 6)]
    for width in range(5, 6 + MAX_TABLES):
        call(model, size=(8, 2 * width))
    assert len(made) == MAX_TABLES + 1 and len(model.other_positions) == MAX_TABLES
    call(model, size=(8, 8))
    model.double()
    assert call(model, size=(8, 12)).dtype == torch.float64
    assert len(made) == MAX_TABLES + 2
    kept = model.other_positions[position_embedding, (4, 6), torch.device("cpu"), torch.float64]
    assert (kept - work_out(position_embedding, (4, 6))).abs().max() == 0


def test_positions_of_tensors_without_values_are_not_kept():
    model = small_dit()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.randn(2, 3, 8, 12), torch.ones(2))
    assert not model.other_positions
    call(model, size=(8, 12))


@pytest.mark.parametrize("position_embedding", POSITION_EMBEDDINGS)
def test_other_sizes_break_no_graph(position_embedding):
    torch._dynamo.reset()
    model = small_dit(position_embedding=position_embedding, num_layers=1)
    expected = call(model, size=(8, 12))
    with torch.no_grad():
        found = call(model, size=(8, 12), run=torch.compile(model, fullgraph=True, backend="eager"))
    assert (found - expected).abs().max() < 1e-5


def test_rotary_positions_only_see_distances():
    """The product of a rotated query and key depends on the distance between their patches along each axis."""
    from diffusers.models.embeddings import apply_rotary_emb

    rotary = rotary_position_embedding((5, 6), (5, 6), "resize", 8)
    query, key = randn(8, seed=3), randn(8, seed=4)

    def product(i, j):
        places = [tuple(table[[place]] for table in rotary) for place in (i, j)]
        rotated = [
            apply_rotary_emb(x.reshape(1, 1, 1, 8), place) for x, place in zip((query, key), places, strict=True)
        ]
        return float((rotated[0] * rotated[1]).sum())

    # patches (1, 1) and (3, 2); then (0, 3) and (2, 4)
    assert product(7, 20) == pytest.approx(product(3, 16), abs=1e-5)
    assert product(7, 20) != pytest.approx(product(7, 21), abs=1e-3)


def test_further_tokens_are_not_rotated():
    model = small_dit(position_embedding="rotary")
    grid = model.trained_grid
    cosines, sines = model.rotary_positions(grid, 2)
    assert len(cosines) == len(sines) == math.prod(grid) + 2
    assert (cosines[-2:] == 1).all() and (sines[-2:] == 0).all() and (sines[1:-2].abs().amax(1) > 0).all()


@pytest.mark.parametrize(
    "options", [*({"position_embedding": each} for each in POSITION_EMBEDDINGS), {"position_scaling": "extrapolate"}]
)
def test_other_sizes_than_trained(options):
    model = small_dit(**options)
    for size in ((8, 8), (16, 8), (4, 12)):
        assert call(model, size=size).shape == (2, 3, *size)


@pytest.mark.parametrize(
    ("size", "patch"), [((12,), (4,)), ((6, 8), (2, 4)), ((4, 6, 8), (2, 3, 4)), ((4, 4, 4), (1, 2, 2))]
)
def test_patches_are_cut_row_by_row_and_put_back(size, patch):
    model = small_dit(sample_size=size, patch_size=patch)
    x = randn(2, 3, *size)
    patches = model.patchify(x)
    grid = [side // p for side, p in zip(size, patch, strict=True)]
    for index, corner in enumerate(itertools.product(*map(range, grid))):
        cut = [slice(c * p, (c + 1) * p) for c, p in zip(corner, patch, strict=True)]
        assert torch.equal(patches[:, index], x[:, :, *cut].flatten(1))
    # unpatchify expects the channels last within a patch
    tokens = patches.unflatten(2, (3, -1)).transpose(2, 3).flatten(2)
    assert torch.equal(model.unpatchify(tokens, tuple(grid)), x)


# --- diffusers' tools for models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["adaln_zero", "in_context"])
def test_blocks_compile_once_for_every_batch_and_timestep(conditioning):
    torch._dynamo.reset()
    model, counter = small_dit(conditioning=conditioning), CompileCounter()
    exact = [call(model, batch=batch) for batch in (2, 3)]
    model.compile_repeated_blocks(fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for batch, expected in zip((2, 3), exact, strict=True):
            assert (call(model, batch=batch) - expected).abs().max() < 1e-5
        compiled = counter.frame_count
        for batch in (4, 5):
            call(model, batch=batch, timestep=torch.rand(batch) * 1000)
    # one graph serves all blocks; no other batch or timestep asks for a new one
    assert compiled == counter.frame_count == 1


@pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("pays", [True, False])
def test_tokens_are_convolved_where_that_pays_unless_compiled(pays, monkeypatch):
    """float32 tokens on a CPU, for oneDNN; compiled they are a matrix product, to be fused with its neighbours."""
    torch._dynamo.reset()
    layer, tokens, asked = Linear(6, 4), randn(2, 5, 6), []
    monkeypatch.setattr(transformer_score_dit, "convolution_pays", lambda dtype: asked.append(dtype) or pays)

    def called(function):
        with torch.profiler.profile() as profile:
            output = function(tokens)
        assert (output.float() - tokens @ layer.weight.T - layer.bias).abs().max() < 2e-2
        return {event.name for event in profile.events()}

    assert ("aten::conv2d" in called(layer)) == pays
    with torch.autocast("cpu", torch.bfloat16):
        assert ("aten::conv2d" in called(layer)) == pays
    assert asked == [torch.float32, torch.bfloat16]
    assert "aten::conv2d" not in called(torch.compile(layer, backend="eager"))


def test_whether_convolving_pays_is_measured_once():
    convolution_pays.cache_clear()
    assert convolution_pays(torch.float32) is convolution_pays(torch.float32)
    assert convolution_pays.cache_info().misses == 1


@pytest.mark.parametrize("masked", [False, True])
def test_explicit_attention_is_attention(masked):
    query, key, value = randn(2, 5, 3, 8), randn(2, 7, 3, 8), randn(2, 7, 3, 8)
    mask = (torch.arange(7) < 4).expand(2, 1, 1, 7) if masked else None
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask)
    assert torch.allclose(explicit_attention(query, key, value, mask), expected.transpose(1, 2), atol=1e-6)


def test_attention_is_explicit_in_bfloat16_training_on_a_cpu_where_that_pays(monkeypatch):
    """Elsewhere, and where a backend was chosen, it is diffusers' dispatch that is called."""
    called = []
    for function in (explicit_attention, transformer_score_dit.dispatch_attention_fn):

        def noted(*args, name=function.__name__, function=function, **kwargs):
            called.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(transformer_score_dit, function.__name__, noted)
    monkeypatch.setattr(transformer_score_dit, "explicit_attention_pays", lambda: True)
    model = small_dit(num_layers=1)
    call(model)
    with torch.autocast("cpu", torch.bfloat16):
        call(model)
        with torch.no_grad():
            call(model)
        monkeypatch.setattr(transformer_score_dit, "MAX_EXPLICIT_KEYS", 8)
        call(model)
        monkeypatch.setattr(transformer_score_dit, "MAX_EXPLICIT_KEYS", 512)
        model.set_attention_backend("native")
        call(model)
    dispatched = "dispatch_attention_fn"
    assert called == [dispatched, "explicit_attention", dispatched, dispatched, dispatched]


def test_whether_explicit_attention_pays_is_measured_once():
    explicit_attention_pays.cache_clear()
    assert explicit_attention_pays() is explicit_attention_pays()
    assert explicit_attention_pays.cache_info().misses == 1


def test_the_gradient_of_the_modulation_is_put_together_at_once():
    """Nothing as large as all modulations is made for a single block."""
    model = small_dit(num_layers=4)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **kwargs or {})
            if isinstance(output, torch.Tensor) and output.ndim == 3 and output.shape[1] in (6 * 4, 6 * 4 + 2):
                made.append(str(function))
            return output

    output = call(model, batch=2)
    with Watch():
        output.sum().backward()
    assert made == ["aten.cat.default"]


@every_option
def test_the_whole_model_compiles_without_graph_breaks(options):
    torch._dynamo.reset()
    model = small_dit(**options)
    expected = call(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert (call(model, run=compiled) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_feature_caching(conditioning):
    """With a threshold that is always met, later steps reuse the first one's features."""
    model = small_dit(conditioning=conditioning, num_layers=4)
    plain = call(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    assert model.is_cache_enabled
    runs = []
    model.blocks[2].ff.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad(), model.cache_context("cond"):
        first, second = call(model), call(model)
    assert (first - plain).abs().max() < 1e-5
    assert (second - plain).abs().max() < 1e-4
    assert len(runs) == 1
    model.disable_cache()
    call(model)
    assert len(runs) == 2


def test_layerwise_casting_keeps_norms_positions_and_modulation():
    model = small_dit()
    exact = call(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    assert model.adaln.weight.dtype == model.patch_embed.weight.dtype == torch.float32
    with torch.no_grad():
        assert (call(model) - exact).abs().mean() < 0.2 * exact.abs().mean()


def test_group_offloading_gives_the_same_output():
    model = small_dit()
    exact = call(model)
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    with torch.no_grad():
        assert (call(model) - exact).abs().max() < 1e-6


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 2.0, math.nan, math.inf, True, "4"])
@pytest.mark.parametrize("name", ["in_channels", "hidden_size", "num_layers", "num_attention_heads", "num_classes"])
def test_sizes_are_whole_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} {value!r} must be a whole number, at least 1"):
        small_dit(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conditioning": "film"}, "conditioning 'film' is unknown; choose one of adaln_zero, adaln, cross_attention"),
        ({"position_embedding": "learned"}, "position_embedding 'learned' is unknown"),
        ({"position_scaling": "ntk"}, "position_scaling 'ntk' is unknown"),
        ({"shared_adaln": True, "conditioning": "in_context"}, "shared_adaln needs conditioning 'adaln_zero' or"),
        ({"patch_size": (2, 2, 2, 2)}, "must have 1, 2 or 3 axes"),
        ({"patch_size": (2, 0)}, r"patch_size \(2, 0\) must be a positive number, or 2 of them"),
        ({"patch_size": (2, 2), "sample_size": (8, 8, 8)}, r"sample_size \(8, 8, 8\) must be a positive number, or 2"),
        ({"patch_size": (3, 2)}, r"patch_size \(3, 2\) must divide sample_size 8"),
        ({"sample_size": (8, 8, 8), "hidden_size": 64}, "hidden_size 64 must be a multiple of .* 4 and of 6"),
        ({"position_embedding": "rotary", "num_attention_heads": 8}, "heads of a multiple of 4 channels; .* has 6"),
        ({"sample_size": 2**13, "patch_size": 2}, "sample_size 8192 with patch_size 2 makes 16,777,216 tokens, more"),
        ({"sample_size": (8.0, 8)}, r"sample_size \(8.0, 8\) must be a positive number, or 2 of them"),
        ({"patch_size": True}, "patch_size True must be a positive number"),
        *(
            ({"head_hidden_size": 64} | options, "head_hidden_size needs conditioning 'adaln_zero' or 'adaln', no")
            for options in (
                {"conditioning": "in_context"},
                {"sample_size": (2, 8, 8), "factorized_attention": True},
                {"vocab_size": 7, "sample_size": (8,), "in_channels": None},
            )
        ),
        ({"head_hidden_size": 50}, "head_hidden_size 50 must be a multiple of head_num_attention_heads 4$"),
        ({"head_hidden_size": 56, "position_embedding": "rotary"}, "4, and with rotary positions each head of 4"),
        ({"head_hidden_size": 0}, "head_hidden_size 0 must be a whole number"),
        ({"head_num_layers": 3}, "head_num_layers and head_num_attention_heads need head_hidden_size"),
        *(({"mlp_ratio": value}, f"mlp_ratio {value} of hidden_size 48") for value in (0.0, -4.0, math.nan, math.inf)),
        *(({"frequency_shift": value}, f"frequency_shift {value} must") for value in (-1.0, 128.0, math.nan)),
        *(({"class_dropout_prob": value}, f"class_dropout_prob {value} must lie") for value in (-0.1, math.nan)),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_dit(**arguments)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (
            {},
            {"size": (8, 7)},
            r"hidden_states has shape \(2, 3, 8, 7\); .* with 2 axes that are multiples of \(2, 2\)",
        ),
        ({}, {"size": (8, 8, 8)}, r"hidden_states has shape \(2, 3, 8, 8, 8\)"),
        ({}, {"encoder_hidden_states": torch.zeros(2, 3, 7)}, "given to a model without cross_attention_dim"),
        ({}, {"encoder_attention_mask": torch.ones(2, 3)}, "encoder_attention_mask was given without"),
        (
            {"cross_attention_dim": 7, "class_dropout_prob": 0.0},
            {"encoder_hidden_states": None},
            r"is missing: .* \(batch, sequence, 7\)",
        ),
        (
            {"pooled_projection_dim": 5, "class_dropout_prob": 0.0},
            {"pooled_projections": None},
            r"pooled_projections is missing: this model needs \(batch, 5\)",
        ),
        ({}, {"pooled_projections": torch.zeros(2, 5)}, "given to a model without pooled_projection_dim"),
        ({"pooled_projection_dim": 5}, {"pooled_projections": torch.zeros(2, 4)}, r"shape \(2, 4\); .* \(2, 5\)"),
        ({"cross_attention_dim": 7}, {"encoder_hidden_states": torch.zeros(2, 3, 8)}, r"shape \(2, 3, 8\); .* 7\)"),
        ({"cross_attention_dim": 7}, {"encoder_hidden_states": torch.zeros(3, 3, 7)}, r"shape \(3, 3, 7\)"),
        ({"cross_attention_dim": 7}, {"encoder_attention_mask": torch.ones(2, 5)}, r"needs \(2, 6\)"),
    ],
)
def test_bad_inputs_are_refused(options, arguments, message):
    options = {"conditioning": "in_context"} | options if options else options
    with pytest.raises(ValueError, match=message):
        call(small_dit(**options), **arguments)


def test_group_names_of_blocks_exist():
    options = [{"conditioning": conditioning} for conditioning in CONDITIONINGS]
    options += [{"sample_size": (2, 8, 8), "factorized_attention": True}, {"head_hidden_size": 64}]
    there = {type(module).__name__ for each in options for module in small_dit(**each).modules()}
    assert {*DiTModel._repeated_blocks, *DiTModel._no_split_modules} <= there
