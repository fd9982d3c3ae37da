"""Training over several processes: Accelerate's configuration files, FSDP2, and the launchers of clusters."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from places import CONFIGS, HELPERS, TRAINING
from recording import recorded_run
from safetensors.torch import load_file
from test_tasks import Consistency, fit_task
from torch.nn.parallel import DistributedDataParallel

from runs import TINY_DIT, TINY_RUN, equal, run, train_tiny
from score_sde import DiTModel, load_bundle
from score_sde.training import train
from score_sde.training.parts.cores import warn_of_busy_cores
from score_sde.training.parts.loop import make_accelerator
from score_sde.training.parts.options import parse


ACCELERATE_CONFIGS = CONFIGS / "accelerate"
NO_DROPOUT = TINY_DIT.replace("}", ', "class_dropout_prob": 0.0}')


def launched(path):
    """What `accelerate launch` makes of a configuration: its arguments, and the environment of the processes."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "training/train.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return arguments, prepare_deepspeed_cmd_env(arguments)[1]
    if arguments.multi_gpu or arguments.use_fsdp:
        return arguments, prepare_multi_gpu_env(arguments)
    return arguments, prepare_simple_launcher_cmd_env(arguments)[1]


@pytest.mark.parametrize(
    ("name", "machines", "processes", "expected"),
    [
        ("one_gpu", 1, 1, {}),
        ("eight_gpus", 1, 8, {}),
        (
            "eight_gpus_fsdp2",
            1,
            8,
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
                "FSDP_RESHARD_AFTER_FORWARD": "true",
                "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            },
        ),
        ("eight_gpus_zero2", 1, 8, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        ("two_nodes", 2, 16, {}),
    ],
)
def test_accelerate_reads_the_configurations(name, machines, processes, expected):
    arguments, environment = launched(ACCELERATE_CONFIGS / f"{name}.yaml")
    assert (arguments.num_machines, arguments.num_processes) == (machines, processes)
    assert arguments.multi_gpu == (name in ("eight_gpus", "two_nodes"))
    assert {key: environment.get(key) for key in expected} == expected
    assert ("ACCELERATE_USE_FSDP" in environment) == ("ACCELERATE_USE_FSDP" in expected)


def test_every_configuration_is_tested():
    tested = {"one_gpu", "eight_gpus", "eight_gpus_fsdp2", "eight_gpus_zero2", "two_nodes"}
    assert {path.stem for path in ACCELERATE_CONFIGS.glob("*.yaml")} == tested


def start(command, **variables):
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def weights(run):
    [path] = (run / "pipeline").glob("*/diffusion_pytorch_model.safetensors")
    return load_file(path)


def difference(tensors, others):
    return max((tensors[name] - others[name]).abs().max() for name in tensors)


def train_sharded(output_dir, *arguments, **variables):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2]
    script = [HELPERS / "fsdp_on_cpu.py", "train"]
    start([*launcher, *script, *TINY_RUN, "--output_dir", output_dir, *arguments], **variables)


SHARDED = ["--network_kwargs", NO_DROPOUT, "--max_train_steps", 4, "--checkpointing_steps", 2, "--ema_decay", 0.9]
SHARDED += ["--ema_snapshot_steps", 2]


@pytest.mark.slow
def test_sharded_training_is_training(tmp_path):
    """FSDP2 with two processes: weights, averages and snapshots are those of one process with the same global batch."""
    arguments = [*SHARDED, "--sample_steps", 2, "--evaluation_steps", 2, "--evaluation_images", 10]
    train_sharded(tmp_path / "two", *arguments)
    one = train_tiny(tmp_path / "one", *arguments, "--batch_size", 8)
    assert difference(one, weights(tmp_path / "two")) < 1e-4
    for file in ("ema_snapshots/step-00000004-sigma_rel-0.1", "checkpoints/step-00000002/ema"):
        pair = [load_file(tmp_path / run / f"{file}.safetensors") for run in ("one", "two")]
        assert difference(*pair) < 1e-4
    # each process keeps its part of the optimizer's state
    assert len(list((tmp_path / "two" / "checkpoints" / "step-00000004" / "optimizer_0").glob("*.distcp"))) == 2
    for folder in ("samples", "ema_snapshots"):
        assert sorted(os.listdir(tmp_path / "two" / folder)) == sorted(os.listdir(tmp_path / "one" / folder))
    lines = [json.loads((tmp_path / run / "evaluation.jsonl").read_text().splitlines()[1]) for run in ("one", "two")]
    assert lines[1]["step"] == 4
    assert lines[1]["held_out_loss"] == pytest.approx(lines[0]["held_out_loss"], rel=0.5)  # of other noise


@pytest.mark.slow
def test_sharded_training_goes_on_bit_for_bit(tmp_path):
    train_sharded(tmp_path / "whole", *SHARDED)
    train_sharded(tmp_path / "parts", *SHARDED, "--max_train_steps", 2)
    train_sharded(tmp_path / "parts", *SHARDED, "--resume_from_checkpoint", "latest")
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    for path in (tmp_path / "whole" / "ema_snapshots").iterdir():
        assert equal(load_file(path), load_file(tmp_path / "parts" / "ema_snapshots" / path.name))


TINY_UNET = {"block_out_channels": [8, 8], "layers_per_block": 1, "attention_resolutions": [4]}
TINY_NCSNPP = {
    "block_out_channels": [16, 16],
    "layers_per_block": 1,
    "attention_resolutions": [4],
    "dropout": 0.0,
    "time_embedding_type": "fourier",
    "class_dropout_prob": 0.0,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        ["--network_kwargs", NO_DROPOUT],
        ["--network", "unet", "--network_kwargs", json.dumps(TINY_NCSNPP), "--sde_type", "ve"],
    ],
    ids=["dit", "unet"],
)
def test_sharded_mixed_precision_is_that_of_one_process(network, tmp_path):
    """bf16 of the launcher: the network is told the same times, to the last bit; its arithmetic is that of autocast;
    gradients are added up in float32. One process has the whole network, and only where it is sampled or saved."""
    arguments = [*network, "--max_train_steps", 3, "--ema_decay", 0.0, "--sample_steps", 2, "--checkpointing_steps", 0]
    train_sharded(tmp_path / "two", *arguments, ACCELERATE_MIXED_PRECISION="bf16", RECORD=str(tmp_path))
    two = [json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2)]
    files = {}
    for precision in ("bf16", "no"):
        with recorded_run() as record:
            folder = tmp_path / precision
            run(
                train.main,
                *TINY_RUN,
                *arguments,
                "--batch_size",
                8,
                "--output_dir",
                folder,
                "--mixed_precision",
                precision,
            )
        assert sorted(record["times"]) == sorted(two[0]["times"] + two[1]["times"])
        assert set(record["frequencies"]) == set(two[0]["frequencies"]) <= {"torch.float32"}
        files[precision] = weights(folder)
    assert all(record["reduced_in"] == "torch.float32" for record in two)
    assert two[0]["whole"] == [True, True] and two[1]["whole"] == [False, False]
    if "--network" not in network:  # a network whose gradients are not so small that Adam makes noise of them

        def distance(run, other):
            return sum((files[run][name] - files[other][name]).abs().mean() for name in files[run])

        files["two"] = weights(tmp_path / "two")
        assert distance("two", "bf16") < distance("bf16", "no") / 2


@pytest.mark.slow
def test_a_process_for_each_gpu_needs_no_launcher(tmp_path):
    """As `srun` starts them, with the variables of the README."""
    arguments = ["--network_kwargs", NO_DROPOUT, "--max_train_steps", 2, "--output_dir", tmp_path / "two"]
    command = [sys.executable, TRAINING / "train.py", *TINY_RUN, *arguments]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([str(part) for part in command], env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    one = train_tiny(tmp_path / "one", "--network_kwargs", NO_DROPOUT, "--batch_size", 8, "--max_train_steps", 2)
    assert difference(one, weights(tmp_path / "two")) < 1e-4


# --- how gradients are shared --------------------------------------------------------------------------------------


@pytest.fixture
def wrapped(monkeypatch):
    """The networks that DistributedDataParallel gets, of a group of this process alone: a parameter without a gradient
    is an error there, too."""
    found, prepare_model = [], Accelerator.prepare_model
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.MULTI_CPU)
    monkeypatch.setattr(Accelerator, "use_distributed", True)

    def note(self, model, *arguments, **options):
        found.append(prepare_model(self, model, *arguments, **options))
        return found[-1]

    monkeypatch.setattr(Accelerator, "prepare_model", note)
    yield found
    if torch.distributed.is_initialized():  # a run ends with its group
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("with_buffers", [True, False])
def test_gradients_are_shared_once_a_step_and_buffers_where_there_are_some(with_buffers, wrapped, tmp_path):
    shared = []

    class Watched(Consistency):
        def __init__(self, rows):
            super().__init__(rows)
            if not with_buffers:
                self.model.layers[1] = torch.nn.SiLU()

        def modules_to_save(self):
            return super().modules_to_save() if with_buffers else {"head": self.head}

        def compute_loss(self, state, batch, draws):
            shared.append([each.require_backward_grad_sync for each in wrapped])
            return super().compute_loss(state, batch, draws)

    fit_task(tmp_path, Watched, max_train_steps=2, gradient_accumulation_steps=3)
    networks = [each for each in wrapped if isinstance(each, DistributedDataParallel)]
    assert networks == wrapped and len(networks) == 2 + with_buffers
    for network in networks:
        assert network.gradient_as_bucket_view and network.broadcast_buffers == with_buffers
    assert shared == [[last] * len(networks) for last in (False, False, True)] * 2


LEARNED_VARIANCE = ["--sde_type", "discrete_vp", "--prediction_type", "epsilon", "--vlb_weight", 0.001]
# {name: (network_kwargs beside those of TINY_DIT, options)}
WITHOUT_UNUSED = {
    "plain": ({}, []),
    "no classes": ({}, ["--class_conditional", "false"]),
    "learned variance": ({}, LEARNED_VARIANCE),
    "in context": ({"conditioning": "in_context"}, []),
    "cross-attention": ({"conditioning": "cross_attention", "qk_norm": True}, []),
    "one modulation": ({"shared_adaln": True, "swiglu": True, "position_embedding": "sincos_rotary"}, []),
    "a wide head": ({"head_hidden_size": 16, "patch_bottleneck": 2}, []),
    "routing": ({"num_layers": 3}, ["--token_routing", 0.5]),
    "recomputed": ({}, ["--gradient_checkpointing"]),
    "a U-Net": (None, ["--network", "unet"]),
    "flow map": ({}, ["--method", "flow_map", "--guidance_range", 1, 3]),
    "consistency": ({}, ["--method", "consistency"]),
}


@pytest.mark.parametrize("name", WITHOUT_UNUSED)
def test_every_parameter_gets_a_gradient(name, wrapped, tmp_path):
    arguments, options = WITHOUT_UNUSED[name]
    kwargs = TINY_UNET if arguments is None else json.loads(TINY_DIT) | arguments
    run(
        train.main,
        *TINY_RUN,
        *("--network_kwargs", json.dumps(kwargs), "--output_dir", tmp_path, "--max_train_steps", 2, *options),
        *("--sample_num_images", 1, "--sample_num_inference_steps", 1, "--gradient_accumulation_steps", 2),
    )
    [network] = wrapped
    assert isinstance(network, DistributedDataParallel) and not network.find_unused_parameters


# --- what a launcher says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launched", "arguments", "expected"),
    [
        (None, [], "no"),
        ("bf16", [], "bf16"),
        ("bf16", ["--mixed_precision", "auto"], "bf16"),
        ("bf16", ["--mixed_precision", "bf16"], "bf16"),
        # what `accelerate launch` says where nothing was chosen
        ("no", ["--mixed_precision", "bf16"], "bf16"),
        ("bf16", ["--mixed_precision", "no"], "mixed_precision 'no' contradicts 'bf16' of accelerate launch"),
        ("fp8", [], "mixed_precision 'fp8' is unknown; choose one of no, fp16, bf16"),
    ],
)
def test_the_precision_of_a_launcher_is_the_default(launched, arguments, expected, tmp_path, monkeypatch, capsys):
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    if expected in ("no", "bf16"):
        config = parse(train.TrainConfig, [*arguments, "--output_dir", str(tmp_path)])
        assert make_accelerator(config).mixed_precision == config.mixed_precision == expected
    else:
        with pytest.raises(SystemExit):
            parse(train.TrainConfig, arguments)
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("load", "threads", "processes", "advice"),
    [(0.0, 4, 1, None), (0.5, 2, 1, None), (0.5, 4, 1, 2), (1.0, 4, 1, 1), (1.0, 1, 1, None), (0.0, 4, 2, 2)],
)
def test_busy_cores_are_said(load, threads, processes, advice, monkeypatch, capsys, tmp_path):
    """Of four cores: which of them other programs use, by the share of the machine's that is in use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 100 * load)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    warn_of_busy_cores(SimpleNamespace(device=torch.device("cpu"), is_local_main_process=True))
    said = capsys.readouterr().out
    assert f"OMP_NUM_THREADS={advice}" in said if advice else said == ""


def test_a_launcher_that_compiles_changes_no_file(tmp_path, monkeypatch):
    """Bundles and checkpoints with and without its backend are interchangeable."""
    run = ["--max_train_steps", 2, "--checkpointing_steps", 1]
    train_tiny(tmp_path / "plain", *run)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    launched = train_tiny(tmp_path / "launched", *run)
    facts = json.loads((tmp_path / "launched" / "pipeline" / "training.json").read_text())
    assert facts["config"]["compile"] is True
    assert difference(launched, weights(tmp_path / "plain")) < 1e-5
    assert type(load_bundle(tmp_path / "launched" / "pipeline").transformer) is DiTModel
    names = [
        set(load_file(tmp_path / name / "checkpoints" / "step-00000002" / "model.safetensors"))
        for name in ("plain", "launched")
    ]
    assert names[0] == names[1]
    # either way round
    run += ["--resume_from_checkpoint", "latest", "--max_train_steps", 3]
    compiled = train_tiny(tmp_path / "plain", *run)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    assert difference(train_tiny(tmp_path / "launched", *run), compiled) < 1e-5
