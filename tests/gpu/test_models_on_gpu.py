"""Networks on a GPU: the CPU's outputs and gradients, half precision, compilation, weights across devices."""

import copy

import pytest
import torch
from device import DEVICE, ON_GPU, difference, on_device
from networks import DIT_OPTIONS, call, randn, small_dit, tiny_adm, tiny_dit, tiny_ncsnpp, tiny_unet
from torch._dynamo.testing import CompileCounter

from score_sde import NoiseConditionalClassifier


pytestmark = pytest.mark.gpu

# relative, in float32: of products and sums in another order; of convolutions by other algorithms, and of sinusoids
# of hundreds of radians
EXACT, OF_CONVOLUTIONS = 1e-4, 2e-3
# of random networks
HALF = {torch.float16: 0.01, torch.bfloat16: 0.06}

UNETS = {
    "ddpmpp": tiny_unet,
    "ncsnpp": tiny_ncsnpp,
    "adm": tiny_adm,
    "worded": lambda: tiny_unet(cross_attention_dim=7, pooled_projection_dim=5),
}
every_option = pytest.mark.parametrize("options", DIT_OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
every_unet = pytest.mark.parametrize("name", UNETS)
every_dtype = pytest.mark.parametrize("dtype", HALF, ids=str)


def gradients(model, **arguments):
    model.train()
    call(model, **arguments).square().sum().backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def compare(model, bound):
    """Output and gradients as on the CPU."""
    other = on_device(model)
    with torch.no_grad():
        found = call(other)
        assert found.device.type == DEVICE.type
        assert difference(found, call(model)) < bound
    expected, found = gradients(model), gradients(other)
    assert expected.keys() == found.keys()
    largest = max(each.abs().max() for each in expected.values())
    assert max((found[name].cpu() - expected[name]).abs().max() for name in expected) < bound * largest


@every_option
def test_a_dit_is_what_it_is_on_the_cpu(options):
    compare(small_dit(**options), EXACT)


@every_unet
def test_a_unet_is_what_it_is_on_the_cpu(name):
    compare(UNETS[name](), OF_CONVOLUTIONS)


def test_a_classifier_is_what_it_is_on_the_cpu():
    torch.manual_seed(0)
    model = NoiseConditionalClassifier(sample_size=8, block_out_channels=(16, 16), dropout=0.0).eval()
    x, level = randn(2, 3, 8, 8), torch.tensor([-1.5, 2.0])
    with torch.no_grad():
        found = on_device(model)(x.to(DEVICE), level).logits  # levels on the CPU are taken, too
        assert difference(found, model(x, level).logits) < OF_CONVOLUTIONS


@pytest.mark.parametrize("build", [tiny_dit, tiny_unet])
def test_what_it_is_told_may_be_on_the_cpu(build):
    model = build(cross_attention_dim=7, pooled_projection_dim=5)
    told = {
        "timestep": torch.tensor([30.0, 900.0]),
        "class_labels": torch.tensor([1, 3]),
        "encoder_hidden_states": randn(2, 6, 7, seed=2),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6]),
        "pooled_projections": randn(2, 5, seed=4),
    }
    x = randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x, **told).sample
        assert difference(on_device(model)(x.to(DEVICE), **told).sample, expected) < OF_CONVOLUTIONS
    null = on_device(model).null_conditions({name: each.to(DEVICE) for name, each in told.items()})
    assert {each.device.type for each in null.values()} == {DEVICE.type} and len(null) == 4


@pytest.mark.parametrize("position_embedding", ["sincos", "rotary"])
def test_samples_of_other_sizes(position_embedding):
    model = small_dit(position_embedding=position_embedding)
    other = on_device(model)
    with torch.no_grad():
        for size in ((8, 12), (12, 8), (8, 12)):
            assert difference(call(other, size=size), call(model, size=size)) < EXACT


@every_dtype
@every_option
def test_a_dit_in_half_precision(options, dtype):
    half(small_dit(**options), dtype)


@every_dtype
@every_unet
def test_a_unet_in_half_precision(name, dtype):
    half(UNETS[name](), dtype)


@torch.no_grad()
def half(model, dtype):
    expected = call(model)
    found = call(on_device(model).to(dtype))
    assert found.dtype == dtype
    assert difference(found, expected) < HALF[dtype]


@every_dtype
@pytest.mark.parametrize("build", [tiny_dit, tiny_unet])
def test_gradients_under_autocast(build, dtype):
    model = build()
    expected, other = gradients(model), on_device(model)
    with torch.autocast(DEVICE.type, dtype):
        found = gradients(other)
    assert {each.dtype for each in found.values()} == {torch.float32}
    largest = max(each.abs().max() for each in expected.values())
    assert max((found[name].cpu() - expected[name]).abs().max() for name in expected) < HALF[dtype] * largest


@pytest.mark.parametrize("build", [tiny_dit, tiny_unet])
def test_recomputed_activations_give_the_same_gradients(build):
    model = on_device(build())
    expected = {name: each.clone() for name, each in gradients(model).items()}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    found = gradients(model)
    assert max(difference(found[name], expected[name]) for name in expected if expected[name].abs().max() > 1e-3) < 1e-3


# what a GPU with CUDA's compiler offers; "flash" and "cudnn" take half precision alone
@pytest.mark.skipif(not ON_GPU, reason="kernels of CUDA")
@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_efficient", "_native_flash", "_native_cudnn"])
@pytest.mark.parametrize("build", [tiny_dit, tiny_adm])
def test_attention_backends(build, backend):
    model = build()
    if build is tiny_dit:  # heads that every kernel takes
        model = build(hidden_size=64, num_attention_heads=2)
    with torch.no_grad():
        expected = call(model)
        other = on_device(model).bfloat16()
        try:
            other.set_attention_backend(backend)
            assert difference(call(other), expected) < HALF[torch.bfloat16]
        finally:
            # diffusers makes it the backend of every model
            other.set_attention_backend("native")


@pytest.mark.parametrize("build", [tiny_dit, tiny_ncsnpp])
def test_weights_cross_devices(build, tmp_path):
    """Saved on the CPU and opened on the GPU, and back."""
    model = build()
    model.save_pretrained(tmp_path / "cpu")
    moved = type(model).from_pretrained(tmp_path / "cpu", device_map=str(DEVICE))
    assert {each.device.type for each in moved.parameters()} == {DEVICE.type}
    with torch.no_grad():
        assert difference(call(moved), call(model)) < OF_CONVOLUTIONS
    moved.save_pretrained(tmp_path / "gpu")
    back = type(model).from_pretrained(tmp_path / "gpu")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.state_dict().items())
    state = {name: value.to(DEVICE) for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "state.pt")
    back.load_state_dict(torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True))
    with torch.no_grad():
        assert torch.equal(call(back), call(model))


def test_an_adapter_of_peft():
    peft = pytest.importorskip("peft")
    model = tiny_dit()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    compare(model, EXACT)


# --- compilation --------------------------------------------------------------------------------------------------


def calls(model, run):
    """Timesteps and batches of a training and of a sampler, with what they should give."""
    others = copy.deepcopy(model).cpu()
    for batch, timestep in ((2, 30.0), (2, 900.25), (2, 0.5), (3, 7.0), (5, 999.0), (8, 1.0)):
        times = torch.linspace(timestep, timestep + 1, batch)
        with torch.no_grad():
            found, expected = call(model, batch, run=run, timestep=times), call(others, batch, timestep=times)
        yield difference(found, expected)


@pytest.mark.parametrize(
    "build",
    [
        small_dit,
        lambda: small_dit(conditioning="cross_attention", position_embedding="rotary", cross_attention_dim=7),
        lambda: small_dit(conditioning="in_context", position_embedding="rotary"),
        tiny_ncsnpp,
        UNETS["worded"],
    ],
    ids=["adaln_zero", "cross_attention", "in_context", "ncsnpp", "worded unet"],
)
def test_a_whole_model_is_one_graph_for_all_times_and_at_most_one_more_for_all_batches(build):
    """Timesteps as tensors; one of another size or batch makes the graph anew, with that as a variable, once."""
    model, counter = on_device(build()), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    for error in calls(model, compiled):
        assert error < OF_CONVOLUTIONS
        graphs.append(counter.frame_count)
    assert graphs[:3] == [1, 1, 1] and graphs[3:] == [2, 2, 2]


@pytest.mark.parametrize("conditioning", ["adaln_zero", "in_context"])
def test_repeated_blocks_are_one_graph(conditioning):
    model, counter = on_device(small_dit(conditioning=conditioning, num_layers=3)), CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter, dynamic=True)
    assert max(calls(model, None)) < EXACT
    assert counter.frame_count == 1


@pytest.mark.parametrize("position_embedding", ["sincos", "rotary"])
def test_other_sizes_break_no_graph(position_embedding):
    model = on_device(small_dit(position_embedding=position_embedding))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for size in ((8, 12), (16, 8)):
            assert difference(call(model, size=size, run=compiled), call(model, size=size)) < EXACT


@pytest.mark.parametrize(
    ("build", "dtype"),
    [(tiny_dit, torch.float32), (tiny_dit, torch.bfloat16), (tiny_unet, torch.float32)],
    ids=["dit", "dit in bfloat16", "unet"],
)
def test_compiled_for_the_device_it_computes_the_same(build, dtype):
    model = on_device(build()).to(dtype)
    compiled = torch.compile(model, fullgraph=True)
    bound = OF_CONVOLUTIONS if dtype == torch.float32 else HALF[dtype]
    with torch.no_grad():
        assert difference(call(model, run=compiled), call(model)) < bound
    # of the U-Net that takes a minute
    if dtype == torch.float32 and build is tiny_dit:
        call(model, run=compiled).square().sum().backward()
        found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
        model.zero_grad()
        expected = gradients(model.eval())
        largest = max(each.abs().max() for each in expected.values())
        assert max((found[name] - expected[name]).abs().max() for name in expected) < bound * largest


def test_compiled_blocks_compute_the_same():
    model = on_device(tiny_dit())
    with torch.no_grad():
        expected = call(model)
        model.compile_repeated_blocks(fullgraph=True)
        assert difference(call(model), expected) < EXACT
