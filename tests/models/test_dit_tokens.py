"""DiTModel of tokens: against a small network written out here, its heads, positions and time."""

import json
import math

import pytest
import torch
from networks import awake, parameters
from safetensors.torch import load_file
from torch.nn import functional as F

from score_sde import DiTModel
from score_sde.models.transformer_score_dit import CONDITIONINGS, POSITION_EMBEDDINGS


V, L, D, LAYERS, HEADS = 7, 10, 32, 2, 2


def fresh(**options):
    config = {
        "vocab_size": V,
        "sample_size": (L,),
        "hidden_size": D,
        "num_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    torch.manual_seed(0)
    return DiTModel(**(config | {"num_classes": None} | options))


def tokens(batch=2, length=L):
    return torch.randint(V + 1, (batch, length), generator=torch.Generator().manual_seed(1))


LABEL_ALONE = {"time_conditioning": False, "num_classes": 3}


def variants():
    for conditioning in CONDITIONINGS:
        for options in ({"tied_head": True}, LABEL_ALONE, {"num_classes": 3}):
            yield {"conditioning": conditioning, **options}
        if conditioning != "cross_attention":
            yield {"conditioning": conditioning, "time_conditioning": False}
    yield {"shared_adaln": True, "time_conditioning": False}
    yield {"shared_adaln": True, "qk_norm": True, "swiglu": True}


every_variant = pytest.mark.parametrize("options", list(variants()), ids=lambda each: "-".join(map(str, each.values())))


@every_variant
def test_a_variant_is_a_whole_model(options, tmp_path):
    assert fresh(**options)(tokens(), 3.0).sample.abs().max() == 0
    model = awake(fresh(**options))
    logits = model(tokens(), torch.tensor([3.0, 500.0])).sample
    assert logits.shape == (2, L, V)
    # a sequence doesn't depend on its neighbours, and is told its own time
    assert (model(tokens()[1:], 500.0).sample[0] - logits[1]).abs().max() < 1e-5
    # saved and loaded, in half precision too
    model.save_pretrained(tmp_path)
    assert torch.equal(DiTModel.from_pretrained(tmp_path)(tokens(), torch.tensor([3.0, 500.0])).sample, logits)
    half = DiTModel.from_pretrained(tmp_path, dtype=torch.bfloat16)(tokens(), torch.tensor([3.0, 500.0])).sample
    assert half.dtype == torch.bfloat16 and (half.float() - logits).abs().max() < 0.05 * logits.abs().max()
    # every parameter counts (attention to one label has no choice), and recomputing the blocks changes no gradient
    logits.pow(2).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    alone = "cross_attn" if options == {"conditioning": "cross_attention"} | LABEL_ALONE else "nothing"
    named = zip((name for name, _ in model.named_parameters()), gradients, strict=True)
    assert all(gradient.abs().max() > 0 for name, gradient in named if alone not in name)
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model.train()(tokens(), torch.tensor([3.0, 500.0])).sample.pow(2).sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, model.parameters(), strict=True))


def written_out(weights, ids, class_label):
    """adaLN-Zero with rotary positions and a tied head, in plain operations: logits (L, V) of one sequence."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def rotated(x):
        # pairs of channels as complex numbers, turned by place times frequency
        pairs = torch.complex(x[..., 0::2], x[..., 1::2])
        frequencies = 10000.0 ** (-torch.arange(pairs.shape[-1]).double() / pairs.shape[-1])
        turned = pairs * torch.exp(1j * torch.arange(len(x)).double()[:, None] * frequencies)
        return torch.stack([turned.real, turned.imag], dim=-1).flatten(-2)

    condition = w["class_embed.weight"][class_label]
    modulation = linear("adaln", condition * condition.sigmoid()).reshape(-1, D)
    x = w["token_embed.weight"][ids]
    for layer in range(LAYERS):
        name = f"blocks.{layer}"
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation[6 * layer : 6 * layer + 6]
        h = norm(x) * (1 + scale) + shift
        q, k, v = (linear(f"{name}.attn.to_{part}", h).unflatten(-1, (HEADS, -1)) for part in "qkv")
        heads = []
        for head in range(HEADS):
            products = rotated(q[:, head]) @ rotated(k[:, head]).T / math.sqrt(D / HEADS)
            heads.append(products.softmax(-1) @ v[:, head])
        x = x + gate * linear(f"{name}.attn.to_out.0", torch.cat(heads, dim=-1))
        h = linear(f"{name}.ff.net.0.proj", norm(x) * (1 + scale_ff) + shift_ff)
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + gate_ff * linear(f"{name}.ff.net.2", h)
    shift, scale = modulation[-2:]
    return linear("proj_out", norm(x) * (1 + scale) + shift) @ w["token_embed.weight"][:V].T


def test_it_is_the_network_written_out():
    model = awake(fresh(tied_head=True, time_conditioning=False, num_classes=3))
    ids = tokens(1, 23)
    logits = model(ids, None, class_labels=torch.tensor([2])).sample[0]
    expected = written_out(model.state_dict(), ids[0], 2)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_heads_and_tables_have_the_parameters_they_should():
    free, tied = parameters(fresh()), parameters(fresh(tied_head=True))
    assert free - tied == (D * V + V) - (D * D + D)
    # V + 1 rows, the mask's among them
    assert parameters(fresh(vocab_size=V + 1)) - free == D + (D + 1)
    # without a time, its embedding; with nothing to be told, too, the matrix of the modulation
    silent = parameters(fresh(time_conditioning=False))
    assert free - silent == (256 * D + D) + (D * D + D) + D * (6 * LAYERS + 2) * D
    assert parameters(fresh(time_conditioning=False, num_classes=3)) == silent + 4 * D + D * (6 * LAYERS + 2) * D


def test_a_tied_head_stays_tied_when_it_is_saved(tmp_path):
    awake(fresh(tied_head=True)).save_pretrained(tmp_path)
    # one table in the file
    shapes = [tuple(tensor.shape) for tensor in load_file(tmp_path / "diffusion_pytorch_model.safetensors").values()]
    assert shapes.count((V + 1, D)) == 1 and (V, D) not in shapes
    model = DiTModel.from_pretrained(tmp_path)
    ids = torch.full((1, L), V)  # of masks, so that the other rows are read by the head alone
    before = model(ids, 3.0).sample
    with torch.no_grad():
        model.token_embed.weight[2] *= 2
    ratio = model(ids, 3.0).sample / before
    assert torch.allclose(ratio, torch.ones(V).index_fill(0, torch.tensor(2), 2.0).expand_as(ratio), atol=1e-5)


def test_rotary_positions_see_distances_alone():
    model = awake(fresh(time_conditioning=False, conditioning="in_context"))
    ids = tokens(1)
    # without positions the logits of a permuted sequence would be permuted
    permuted = torch.randperm(L, generator=torch.Generator().manual_seed(2))
    assert (model(ids[:, permuted], None).sample - model(ids, None).sample[:, permuted]).abs().max() > 1e-2
    # turning all positions by as much changes nothing
    logits = model(ids, None).sample
    longer = model.rotary_positions((L + 5,))
    model.rotary_positions = lambda grid, extra=0: tuple(table[5:] for table in longer)
    assert (model(ids, None).sample - logits).abs().max() < 1e-5
    model.rotary_positions = lambda grid, extra=0: None
    assert (model(ids[:, permuted], None).sample - model(ids, None).sample[:, permuted]).abs().max() < 1e-5


def test_masks_alone_tell_no_place_from_another_by_rotary_positions():
    """Each attends to the same value everywhere, whatever the distances: what may stand first or last is not known.
    Added positions tell the places apart, and with both so do distances."""
    masks = torch.full((1, L), V)
    spread = {}
    for kind in POSITION_EMBEDDINGS:
        logits = awake(fresh(time_conditioning=False, position_embedding=kind))(masks, None).sample
        spread[kind] = float((logits - logits[:, :1]).abs().max())
    assert spread["rotary"] < 1e-5 and min(spread["sincos"], spread["sincos_rotary"]) > 1e-2
    # what sincos_rotary has beside the added positions: turning does something
    model = awake(fresh(time_conditioning=False, position_embedding="sincos_rotary"))
    before = model(tokens(1), None).sample
    model.rotary_positions = lambda grid, extra=0: None
    assert (model(tokens(1), None).sample - before).abs().max() > 1e-3


def test_other_conditions_are_as_those_of_samples_of_numbers():
    model = awake(fresh(cross_attention_dim=6, num_classes=3, pooled_projection_dim=5))
    told = {
        "class_labels": torch.tensor([0, 2]),
        "encoder_hidden_states": torch.randn(2, 4, 6),
        "pooled_projections": torch.randn(2, 5),
    }
    null = model.null_conditions(told)
    assert null.keys() == told.keys() and null["class_labels"].tolist() == [3, 3]
    unconditional = model(tokens(), 3.0).sample
    assert (model(tokens(), 3.0, **null).sample - unconditional).abs().max() < 1e-5
    for name, value in told.items():
        assert (model(tokens(), 3.0, **(null | {name: value})).sample - unconditional).abs().max() > 1e-3, name


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"in_channels": 3}, "in_channels 3 contradicts vocab_size 7"),
        ({"out_channels": 7}, "out_channels 7 contradicts"),
        ({"patch_size": 2}, "patch_size 2 contradicts"),
        ({"learn_sigma": True}, "learn_sigma True contradicts"),
        ({"condition_channels": 1}, "condition_channels 1 contradicts"),
        ({"sample_size": (8, 8)}, "number of tokens"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"conditioning": "cross_attention", "time_conditioning": False}, "nothing to attend to"),
    ],
)
def test_what_contradicts_tokens_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        fresh(**options)


def test_a_tied_head_needs_tokens():
    with pytest.raises(ValueError, match="tied_head needs a vocab_size"):
        DiTModel(tied_head=True)


@pytest.mark.parametrize("wrong", [-1, 8])
def test_token_ids_out_of_range_are_refused_by_name(wrong):
    """The mask, 7, is the last one that there is."""
    tokens = torch.full((2, L), 7)
    fresh()(tokens, 0.5)
    tokens[1, 2] = wrong
    with pytest.raises(ValueError, match=f"token id {wrong} is not among 0 to 7, of which 7 .vocab_size. is the mask"):
        fresh()(tokens, 0.5)


@pytest.mark.parametrize("given", [torch.zeros(2, L), torch.zeros(2, 1, L, dtype=torch.long), torch.zeros(2, 1, L)])
def test_what_are_no_token_ids_is_refused(given):
    with pytest.raises(ValueError, match="takes token ids"):
        fresh()(given, 3.0)


def test_samples_of_numbers_take_no_time_where_they_need_none():
    config = {"sample_size": 8, "in_channels": 3, "hidden_size": 48, "num_layers": 1, "num_attention_heads": 4}
    model = awake(DiTModel(**config, num_classes=None, time_conditioning=False))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x, None).sample, model(x, 900.0).sample)


def test_a_config_of_before_opens_as_it_was(tmp_path):
    """Entries that came later are absent from it, and stand for what there was."""
    model = awake(DiTModel(sample_size=8, hidden_size=48, num_layers=1, num_attention_heads=4))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["patch_size"] == 2 and config["in_channels"] == 4 and config["position_embedding"] == "sincos"
    for name in ("vocab_size", "tied_head", "time_conditioning"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(DiTModel.from_pretrained(tmp_path)(x, 3.0).sample, model(x, 3.0).sample)


@pytest.mark.parametrize("conditioning", ["adaln_zero", "in_context"])
def test_blocks_compile_and_take_adapters(conditioning):
    from peft import LoraConfig

    model = awake(fresh(conditioning=conditioning, time_conditioning=False))
    expected = model(tokens(), None).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    assert (model(tokens(), None).sample - expected).abs().max() < 1e-6
    model = awake(fresh(conditioning=conditioning, time_conditioning=False))
    model.set_attention_backend("native")
    model.compile_repeated_blocks(backend="eager")
    assert (model(tokens(), None).sample - expected).abs().max() < 1e-5


def test_the_uniform_distribution_is_where_training_begins():
    targets = torch.randint(V, (2, L), generator=torch.Generator().manual_seed(3))
    loss = F.cross_entropy(fresh(tied_head=True)(tokens(), 3.0).sample.mT, targets)
    assert loss.item() == pytest.approx(math.log(V))
