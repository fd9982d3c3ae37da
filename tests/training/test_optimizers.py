"""Optimizers by name: what each is told and refuses, steps that are left out, resuming; Muon beside AdamW: which
weights it takes, and its step beside torch's."""

import copy
import importlib.util
import inspect
import io
import json
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from helpers.runs import equal, train_tiny
from safetensors.torch import load_file
from torch import nn

from score_sde import DiTModel, ScoreUNetModel
from score_sde.training.parts.checkpoints import lay_out
from score_sde.training.parts.config import LoopConfig
from score_sde.training.parts.optimizers import (
    UNFIT,
    Muon,
    check_optimizer,
    further_arguments,
    hidden_matrices,
    leave_out,
    make_optimizer,
    optimizer_class,
    optimizers,
    orthogonalized,
    square_parts,
)
from score_sde.training.parts.options import parse


OPTIONS = {"lr": 0.02, "betas": (0.9, 0.999), "weight_decay": 0.1}
MOMENTUM = "{momentum: 0.9}"
# name: further arguments; of some with moments that their defaults don't have
NAMED = dict.fromkeys(optimizers(), "{}") | {"sgd": MOMENTUM, "rmsprop": "{momentum: 0.9, centered: true}"}
IN_8_BITS = {"adamw8bit": "{}", "pagedadamw8bit": "{}", "lion8bit": "{}", "ademamix8bit": "{}", "sgd8bit": MOMENTUM}
if importlib.util.find_spec("bitsandbytes"):
    NAMED |= IN_8_BITS


@dataclass
class Options(LoopConfig):
    """Options of a loop."""

    configs = "none"


def options(name, *more):
    return parse(Options, ["--optimizer", name, *more])


def on(kind=DistributedType.NO, device="cpu"):
    """What an optimizer is told of where it runs."""
    return SimpleNamespace(distributed_type=kind, mixed_precision="no", device=torch.device(device))


def made(name, network, *more):
    config = options(name, "--optimizer_kwargs", NAMED[name], "--learning_rate", "0.01", *more)
    return make_optimizer(config, on(), list(network.parameters()), network)


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(64, 80))


def learn(network, seed):
    """Give every parameter a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def saved(optimizer):
    """The state of an optimizer as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", NAMED)
def test_every_optimizer_is_told_the_options_and_goes_on_from_its_state(name):
    network = small_network()
    before = copy.deepcopy(network.state_dict())
    takes_betas = name not in ("adadelta", "adafactor", "adagrad", "asgd", "rmsprop", "sgd", "sgd8bit")
    betas = ["--adam_beta1", "0.8", "--adam_beta2", "0.95"] if takes_betas else []
    optimizer = made(name, network, *betas, "--adam_weight_decay", "0.1")
    for group in optimizer.param_groups:
        assert (group["lr"], group["weight_decay"]) == (0.01, 0.1)
        assert not takes_betas or group["betas"][:2] == (0.8, 0.95)
        assert name not in ("sgd", "rmsprop") or group["momentum"] == 0.9
    for seed in range(2):
        learn(network, seed)
        optimizer.step()
    assert not any(torch.equal(before[key], value) for key, value in network.state_dict().items())
    other = copy.deepcopy(network)
    again = made(name, other, *betas, "--adam_weight_decay", "0.1")
    again.load_state_dict(saved(optimizer))
    lay_out(again)
    for each, its in ((network, optimizer), (other, again)):
        learn(each, 2)
        its.step()
    assert equal(network.state_dict(), other.state_dict())


# values that differ from the defaults: of what has no numbers a switch, else this, or 0.5
OTHERS = {"eps": 1e-2, "d": 2.0, "beta2_decay": -0.3, "min_8bit_size": 10_000, "max_unorm": 1e-3}
OTHERS |= {"t_alpha": 9, "t_beta3": 9}


@pytest.mark.parametrize("name", NAMED)
def test_whatever_an_optimizer_can_be_told_makes_a_difference(name):
    found = optimizer_class(name)
    # with some of which others show
    told = yaml.safe_load(NAMED[name]) | {"asgd": {"lambd": 0.1}, "adafactor": {"eps": [1e-3, 1e-3]}}.get(name, {})

    def trained(**more):
        network = small_network()
        config = options(name, "--optimizer_kwargs", json.dumps(told | more), "--adam_weight_decay", "0.1")
        optimizer = make_optimizer(config, on(), list(network.parameters()), network)
        for seed in range(8):  # RAdam begins without its second moment
            learn(network, seed)
            optimizer.step()
        return network.state_dict()

    plain = trained()
    for argument in further_arguments(found):
        default = inspect.signature(found).parameters[argument].default
        other = not told.get(argument, default) if isinstance(default, bool) else OTHERS.get(argument, 0.5)
        other = [1e-1, 1e-1] if (name, argument) == ("adafactor", "eps") else other
        assert not equal(trained(**{argument: other}), plain), argument


@pytest.fixture
def nan_in_new_memory():
    """Of tensors that nothing was written to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss scale"])
@pytest.mark.parametrize("name", NAMED)
def test_a_step_that_is_left_out_changes_neither_weights_nor_state(name, scaled, nan_in_new_memory):
    """The first one, and one between others: what comes out is what the others alone give."""
    Accelerator(cpu=True)
    found = []
    for seeds in ([None, 1, None, 2], [1, 2]):
        network = small_network()
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
        prepared = AcceleratedOptimizer(made(name, network), device_placement=False, scaler=scaler)
        for seed in seeds:
            learn(network, seed or 0)
            if seed is None:
                network[1].weight.grad[0, 0] = float("nan")
            if scaled:  # by powers of two; the clipping takes the scale off
                for parameter in network.parameters():
                    parameter.grad = scaler.scale(parameter.grad)
                scaler.unscale_(prepared.optimizer)
            else:
                leave_out(prepared, torch.tensor(float(seed is None)))
            prepared.step()
        found.append((network.state_dict(), saved(prepared.optimizer)["state"]))
    (weights, state), (expected, its_state) = found
    assert equal(weights, expected)
    assert state.keys() == its_state.keys()
    for number, values in its_state.items():
        for key, value in values.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda one, other: str(one) == str(other)
            assert same(state[number][key], value), key


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--optimizer", "sdg"], "optimizer 'sdg' is none of adamw, muon, .*, sgd.*, did you mean sgd?"),
        (["--optimizer", "lbfgs"], "optimizer 'lbfgs' evaluates the loss several times a step"),
        (["--optimizer", "sparseadam"], "optimizer 'sparseadam' is for sparse gradients"),
        (["--optimizer", "rprop"], "optimizer 'rprop' compares gradients of all data"),
        (["--optimizer", "optimizer"], "optimizer 'optimizer' is none of"),
        (
            ["--optimizer", "sgd", "--adam_beta2", "0.9", "--adam_beta1", "0.9"],
            "adam_beta1, adam_beta2: optimizer 'sgd' doesn't have that: leave it out, or say null where a YAML file "
            "has it; optimizer_kwargs takes momentum, dampening, nesterov",
        ),
        (
            ["--optimizer", "sgd", "--optimizer_kwargs", "{momentun: 0.9}"],
            "optimizer_kwargs: 'momentun' is none of what optimizer 'sgd' has, momentum, dampening, nesterov, did you "
            "mean momentum?",
        ),
        (["--optimizer_kwargs", "{momentum: 0.9}"], "'momentum' is none of what optimizer 'adamw' has, eps, amsgrad"),
        (["--optimizer_kwargs", "{lr: 1}"], "optimizer_kwargs: lr is said by learning_rate: leave it out"),
        (["--optimizer_kwargs", "{betas: [0.9, 0.9]}"], "betas is said by adam_beta1 and adam_beta2: leave it out"),
        (["--optimizer_kwargs", "{maximize: true}"], "'maximize' is none of what optimizer 'adamw' has"),
        (["--optimizer_kwargs", "{eps: -1}"], "optimizer 'adamw' with optimizer_kwargs {eps: -1}: Invalid epsilon"),
        (["--optimizer_kwargs", "{eps: small}"], "optimizer 'adamw' with optimizer_kwargs {eps: small}: "),
        (["--optimizer_kwargs", "eps"], "optimizer_kwargs 'eps' must be a mapping"),
        (
            ["--optimizer", "sgd", "--optimizer_kwargs", "{nesterov: true}"],
            "optimizer 'sgd' with optimizer_kwargs {nesterov: true}: Nesterov momentum requires a momentum",
        ),
        (["--optimizer", "muon", "--optimizer_kwargs", "{momentum: 1}"], "momentum 1 must lie in [0, 1)"),
        (["--optimizer", "muon", "--optimizer_kwargs", "{dtype: x}"], "optimizer 'muon' has, eps, momentum"),
    ],
)
def test_what_an_optimizer_does_not_have_is_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        parse(Options, arguments)
    error = capsys.readouterr().err
    assert all(part in error for part in said.split(".*")), error


def test_the_decays_that_are_recorded_are_those_that_are_used():
    recorded = [(each.adam_beta1, each.adam_beta2) for each in map(options, ("adamw", "sgd"))]
    assert recorded == [(0.9, 0.999), (None, None)]
    config = options("nadam", "--adam_beta1", "0.7")
    assert (config.adam_beta1, config.adam_beta2) == (0.7, 0.999)


def test_every_class_of_torch_is_known_or_has_a_reason():
    of_torch = {name.lower() for name in torch.optim.__all__ if isinstance(getattr(torch.optim, name), type)}
    assert of_torch - {"optimizer"} == (optimizers().keys() | UNFIT.keys())


def test_a_package_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SystemExit):
        options("adamw8bit")
    assert "bitsandbytes, which has others (adamw8bit, lion8bit, ...), is not installed: pip install" in (
        capsys.readouterr().err
    )


def test_what_a_device_cannot_run_is_refused_before_work(monkeypatch, capsys):
    class Undecayed8bit(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        def step(self, closure=None):
            raise NotImplementedError("no kernel for this device")

    package = SimpleNamespace(optim=SimpleNamespace(Undecayed8bit=Undecayed8bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    config = options("undecayed8bit")
    with pytest.raises(
        ValueError, match="'undecayed8bit' of bitsandbytes doesn't run on the device 'cpu': no kernel for"
    ):
        check_optimizer(config, on())
    with pytest.raises(ValueError, match="'undecayed8bit' needs whole matrices, which FSDP shards"):
        check_optimizer(config, on(DistributedType.FSDP))
    with pytest.raises(SystemExit):
        options("undecayed8bit", "--adam_weight_decay", "0.1")
    assert "adam_weight_decay: optimizer 'undecayed8bit' doesn't have that" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_what_needs_whole_matrices_is_refused_where_they_are_sharded(kind):
    for name in ("muon", "adafactor"):
        check_optimizer(options(name), on())
        with pytest.raises(ValueError, match=f"optimizer '{name}' needs whole matrices, which {kind.value} shards"):
            check_optimizer(options(name), on(kind))
    check_optimizer(options("sgd"), on(kind))


def test_moments_take_the_layout_of_their_weights():
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    optimizer = torch.optim.RMSprop([weight], momentum=0.9)
    moment, row = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 1)
    optimizer.state[weight] = {"step": torch.tensor(3.0), "momentum_buffer": moment, "row_var": row}
    lay_out(optimizer)
    state = optimizer.state[weight]
    assert torch.equal(state["momentum_buffer"], moment) and state["momentum_buffer"].stride() == weight.stride()
    assert state["row_var"] is row
    # quantised by blocks of memory
    optimizer.state[weight] = {"state1": torch.zeros(4, 3, 2, 2, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="state1 of torch.uint8 lies in memory by strides"):
        lay_out(optimizer)


def test_the_step_of_a_matrix_is_that_of_torch():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in [(8, 8), (8, 8), (24, 8), (8, 24), (8,)]]
    theirs = [nn.Parameter(each.detach().clone()) for each in ours]
    muon = Muon(ours, ours[:4], torch.bfloat16, **OPTIONS)
    beside = [
        torch.optim.Muon(theirs[:4], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[4:], **OPTIONS, fused=True),
    ]
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in (muon, *beside):
            optimizer.step()
        for mine, other in zip(ours, theirs, strict=True):
            # of another order of sums in bfloat16
            assert torch.allclose(mine, other, atol=0.02 * 0.2 * 24**0.5 * 0.1)


def test_singular_values_come_near_one_in_each_part_of_a_stack():
    torch.manual_seed(0)
    gradient = torch.randn(40, 8) * torch.logspace(-2, 2, 5).repeat_interleave(8)[:, None]
    parts = square_parts(gradient)
    assert torch.equal(parts.reshape(40, 8), gradient) and parts.shape == (5, 8, 8)
    assert square_parts(torch.ones(32, 8)).shape == (1, 32, 8) and square_parts(torch.ones(42, 8)).shape == (1, 42, 8)
    for matrix in (parts, torch.randn(3, 8, 20), torch.randn(3, 20, 8)):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        found = torch.linalg.svdvals(orthogonalized(matrix))
        assert found.min() > 0.3 and found.max() < 1.3
        # the same directions
        assert torch.allclose(u.mT @ orthogonalized(matrix) @ vh.mT, torch.diag_embed(found), atol=0.5)


def test_what_is_not_finite_changes_nothing():
    matrix, vector = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
    optimizer = Muon([matrix, vector], [matrix], torch.float32, **OPTIONS)
    before = matrix.detach().clone(), vector.detach().clone()
    for gradient, found in ((float("nan"), 1.0), (1.0, 0.0)):
        unchanged = torch.equal(matrix, before[0]), torch.equal(vector, before[1])
        assert unchanged == (True, True)
        matrix.grad, vector.grad = torch.full_like(matrix, gradient), torch.full_like(vector, gradient)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
        if found:
            assert not optimizer.state[matrix]["momentum_buffer"].any()
    assert not torch.equal(matrix, before[0]) and not torch.equal(vector, before[1])
    assert matrix.isfinite().all()


@pytest.mark.parametrize(
    ("network", "first", "last"),
    [
        (DiTModel(8, 2, 1, 24, 2, 2), "patch_embed", "proj_out"),
        (
            ScoreUNetModel(8, 1, block_out_channels=(8, 16), layers_per_block=1, attention_resolutions=()),
            "conv_in",
            "conv_out",
        ),
    ],
)
def test_the_layers_that_meet_the_data_are_left_to_adamw(network, first, last):
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    taken = {names[id(each)] for each in hidden_matrices(network)}
    assert taken and not any(name.startswith((first, last)) for name in taken)
    assert {
        name for name in names.values() if name.endswith(".weight") and network.get_parameter(name).ndim > 1
    } > taken
    network.requires_grad_(False)
    assert not hidden_matrices(network)


@pytest.mark.parametrize(
    ("name", "further", "other"),
    [
        ("muon", "{}", ["--optimizer", "adamw"]),
        ("sgd", MOMENTUM, ["--optimizer_kwargs", "{momentum: 0.8}"]),
        ("adafactor", "{}", ["--adam_weight_decay", 0.1]),
        pytest.param(
            *("adamw8bit", "{min_8bit_size: 64}", ["--optimizer_kwargs", "{}"]),
            marks=pytest.mark.skipif("adamw8bit" not in NAMED, reason="bitsandbytes is not installed"),
        ),
    ],
)
def test_a_run_goes_on_bit_for_bit(name, further, other, tmp_path):
    options = ["--optimizer", name, "--optimizer_kwargs", further, "--checkpointing_steps", 2]
    whole = train_tiny(tmp_path / "whole", *options, "--max_train_steps", 4)
    train_tiny(tmp_path / "parts", *options, "--max_train_steps", 2)
    again = ["--resume_from_checkpoint", "latest"]
    resumed = train_tiny(tmp_path / "parts", *options, "--max_train_steps", 4, *again)
    assert equal(whole, resumed)
    last = tmp_path / "parts" / "checkpoints" / "step-00000004"
    averages = [
        load_file(tmp_path / each / "checkpoints" / last.name / "ema.safetensors") for each in ("whole", "parts")
    ]
    assert equal(*averages)
    state = torch.load(last / "optimizer.bin", weights_only=True)
    if name == "muon":
        matrices = {index for index, each in state["state"].items() if "momentum_buffer" in each}
        assert matrices == set(state["param_groups"][1]["params"]) and load_file(last / "model.safetensors")
    with pytest.raises(ValueError, match=f"of a different run: {other[0][2:]}"):
        train_tiny(tmp_path / "parts", *options, *other, "--max_train_steps", 5, *again)
