"""Tasks beyond those of the commands: what the loop offers them, and what a checkpoint holds of them."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from places import HELPERS
from safetensors.torch import load_file

from runs import equal, forget_runs
from score_sde.training.parts import loop
from score_sde.training.parts.config import LoopConfig
from score_sde.training.parts.loop import fit, make_accelerator
from score_sde.training.parts.run_folder import EVALUATIONS, open_run
from score_sde.training.parts.tasks import Task, share_done


class Denoiser(torch.nn.Module):
    """x_t (B, 4) and its noise level (B, 1) to x0, with an average over batches in its buffers."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 4))

    def forward(self, x, sigma):
        return self.layers(torch.cat([x, sigma], dim=1))


class Consistency(Task):
    """A consistency objective: at a noise level the network is to return what its average returns at the next lower
    one, weighed by a learned head (Karras et al. 2024, section 3.1); a module beside them counts the steps."""

    def __init__(self, rows):
        super().__init__(Denoiser(), rows)
        self.head, self.counter, self.teachers = torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1), []

    def modules_to_save(self):
        return {"head": self.head, "counter": self.counter}

    def compute_loss(self, state, batch, draws):
        x0, noise = batch["x"], draws.normal((4,))
        sigma = draws.stratified().float()[:, None] + 0.1
        teacher = state.averages.teacher
        self.teachers.append(teacher)
        target = teacher(x0 + 0.5 * sigma * noise, 0.5 * sigma)
        error = (state.model(x0 + sigma * noise, sigma) - target).square().mean(1, keepdim=True)
        uncertainty = state.modules["head"](sigma)
        return (error / uncertainty.exp() + uncertainty).mean(), {"error": error.mean()}

    def after_step(self, state):
        with torch.no_grad():
            self.counter.running_mean += state.progress["step"]


ROWS = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(i))} for i in range(12)]


def fit_task(folder, make_task=Consistency, **options):
    forget_runs()
    options = {"batch_size": 4, "lr_warmup_steps": 0, "learning_rate": 0.05, "ema_decay": 0.9} | options
    config = LoopConfig(output_dir=str(folder), **options)
    accelerator = make_accelerator(config)
    task = make_task(ROWS)
    with open_run(config, accelerator) as run:
        network, facts = fit(config, accelerator, run, task)
    return task, network, facts


def test_a_task_with_a_teacher_and_a_learned_module_goes_on_bit_for_bit(tmp_path):
    options = {"checkpointing_steps": 3, "gradient_accumulation_steps": 2}
    whole, network, _ = fit_task(tmp_path / "whole", max_train_steps=6, **options)
    fit_task(tmp_path / "parts", max_train_steps=3, **options)
    parts, resumed, facts = fit_task(tmp_path / "parts", max_train_steps=6, resume_from_checkpoint="latest", **options)
    assert facts["steps"] == 6
    for one, other in ((network, resumed), (whole.head, parts.head), (whole.counter, parts.counter)):
        assert equal(one.state_dict(), other.state_dict())
    checkpoints = [tmp_path / name / "checkpoints" / "step-00000006" for name in ("whole", "parts")]
    for name in ("model", "model_1", "model_2", "ema"):
        assert equal(*(load_file(folder / f"{name}.safetensors") for folder in checkpoints))
    # all of it moved: the head learned, the hook was called once a step
    assert float(whole.counter.running_mean) == 1 + 2 + 3 + 4 + 5 + 6
    before = load_file(tmp_path / "whole" / "checkpoints" / "step-00000003" / "model_1.safetensors")
    assert not equal(before, whole.head.state_dict())


def test_the_teacher_is_the_average_of_the_steps_before(tmp_path):
    """It is one module, whose weights are the average that is written into checkpoints, and whose buffers are the
    network's."""
    found = []

    class Watching(Consistency):
        def after_step(self, state):
            teacher = state.averages.teacher
            found.append({name: value.clone() for name, value in teacher.named_parameters()})
            assert not teacher.training and state.network.training
            assert not any(parameter.requires_grad for parameter in teacher.parameters())
            assert equal(dict(teacher.named_buffers()), dict(state.network.named_buffers()))

    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 9}
    task, network, _ = fit_task(tmp_path, Watching, max_train_steps=4, **options)
    assert len({id(teacher) for teacher in task.teachers}) == 1
    for step, weights in enumerate(found, start=1):
        assert equal(weights, load_file(tmp_path / "checkpoints" / f"step-{step:08d}" / "ema.safetensors"))
    assert not equal(found[0], found[3])
    assert equal(found[3], dict(network.named_parameters()))


def test_a_checkpoint_of_a_task_with_other_modules_is_refused(tmp_path):
    class Without(Consistency):
        def modules_to_save(self):
            return {"counter": self.counter}

        def compute_loss(self, state, batch, draws):
            state.modules["head"] = self.head
            return super().compute_loss(state, batch, draws)

    fit_task(tmp_path, max_train_steps=1)
    with pytest.raises(ValueError, match="of a different run: modules 0 was 'head', is 'counter', modules 1 was"):
        fit_task(tmp_path, Without, max_train_steps=2, resume_from_checkpoint="latest")


def test_modules_beside_the_network_are_refused_where_it_is_sharded(tmp_path, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    with pytest.raises(ValueError, match="this task trains head, counter beside its network, which FSDP cannot"):
        fit_task(tmp_path, max_train_steps=1)


class Smooth(Consistency):
    """Whose output is not one of the batch."""

    def __init__(self, rows):
        super().__init__(rows)
        self.model.layers[1] = torch.nn.SiLU()


SHARED_RUN = """
import sys
import torch
from test_tasks import LoopConfig, ROWS, Smooth, fit, make_accelerator, open_run

folder, processes, steps, resumed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
options = {"lr_warmup_steps": 0, "learning_rate": 0.05, "ema_decay": 0.9, "checkpointing_steps": 2}
options |= {"resume_from_checkpoint": "latest"} if resumed else {}
config = LoopConfig(output_dir=folder, batch_size=4 // processes, max_train_steps=steps, **options)
accelerator, task = make_accelerator(config), Smooth(ROWS)
with open_run(config, accelerator) as run:
    network, _ = fit(config, accelerator, run, task)
if accelerator.is_main_process:
    torch.save(network.state_dict() | {f"head {k}": v for k, v in task.head.state_dict().items()}, folder + "/end.pt")
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_share_a_task_with_modules(tmp_path):
    """They train as one, and go on bit for bit."""
    script = tmp_path / "shared.py"
    script.write_text(SHARED_RUN)
    here = os.pathsep.join([str(HELPERS), os.path.dirname(__file__)])
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=here)
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]

    def end_of(name, processes, *steps):
        for number, each in enumerate(steps):
            command = [sys.executable, *(launcher if processes > 1 else []), script, tmp_path / name, processes, each]
            command += ["resumed"] * bool(number)
            subprocess.run([str(part) for part in command], check=True, env=environment, capture_output=True)
        return torch.load(tmp_path / name / "end.pt", weights_only=True)

    one, two, parts = end_of("one", 1, 4), end_of("two", 2, 4), end_of("parts", 2, 2, 4)
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    assert equal(two, parts)


# --- records ------------------------------------------------------------------------------------------------------


def records(folder, name="log.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_every_logged_step_has_a_line_and_no_step_two(tmp_path):
    """Over a run that went beyond its last checkpoint, was killed there as it wrote a line, and went on."""
    options = {"logging_steps": 2, "checkpointing_steps": 4}
    fit_task(tmp_path / "whole", max_train_steps=8, **options)
    fit_task(tmp_path / "parts", max_train_steps=4, **options)
    line = records(tmp_path / "parts")[-1]
    with open(tmp_path / "parts" / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line | {"step": 6, "loss": -1.0}) + "\n" + json.dumps(line)[:20])
    fit_task(tmp_path / "parts", max_train_steps=8, resume_from_checkpoint="latest", **options)
    lines, others = records(tmp_path / "whole"), records(tmp_path / "parts")
    assert [line["step"] for line in others] == [2, 4, 6, 8]
    for name in ("step", "images_seen", "loss", "error", "gradient_norm", "learning_rate"):
        assert [line[name] for line in lines] == [line[name] for line in others]
    assert {"images_per_second", "waiting_for_data"} <= others[0].keys()


class Watched(Consistency):
    """One that is sampled, evaluated and pushed on the way."""

    evaluation_steps, push_steps, samples_suffix = 2, 4, ".txt"

    def __init__(self, rows):
        super().__init__(rows)
        self.pushed = []

    def size(self, network):
        return sum(float(weight.detach().double().square().sum()) for weight in network.parameters())

    def sample(self, network, path):
        Path(path).write_text(str(self.size(network)))

    def evaluate(self, network):
        return {"size": self.size(network)}

    def push(self, network, facts):
        self.pushed.append((facts["steps"], self.size(network)))


def stopping(at, number=signal.SIGTERM):
    """A `Watched` that is told to stop in these steps."""

    class Stopping(Watched):
        def compute_loss(self, state, batch, draws):
            if state.progress["step"] + 1 in at:
                os.kill(os.getpid(), number)
            return super().compute_loss(state, batch, draws)

    return Stopping


def written(folder):
    """What a run has logged, without what hangs on the clock, evaluated and sampled."""
    names = ("step", "images_seen", "loss", "error", "gradient_norm", "learning_rate")
    log = [[line[name] for name in names] for line in records(folder)]
    evaluations = [[line[name] for name in ("step", "images_seen", "size")] for line in records(folder, EVALUATIONS)]
    return log, evaluations, {path.name: path.read_text() for path in (folder / "samples").iterdir()}


@pytest.mark.parametrize("at", [1, 4, 5, 8])
def test_a_run_that_is_told_to_stop_writes_in_the_end_what_another_does(tmp_path, at):
    """At any step, one at which an evaluation, samples and a push are due, and the last, too."""
    options = {"logging_steps": 3, "sample_steps": 2, "checkpointing_steps": 5, "max_train_steps": 8}
    whole, network, _ = fit_task(tmp_path / "whole", Watched, **options)
    parts = []
    with pytest.raises(SystemExit) if at < 8 else nullcontext():
        fit_task(tmp_path / "parts", lambda rows: parts.append(stopping({at})(rows)) or parts[0], **options)
    if at < 8:
        # what may take long is not done before the end
        assert not (tmp_path / "parts" / "samples" / f"step-{at:08d}.txt").exists()
        assert at not in dict(parts[0].pushed)
    task, resumed, _ = fit_task(tmp_path / "parts", Watched, resume_from_checkpoint="latest", **options)
    assert equal(network.state_dict(), resumed.state_dict())
    log, evaluations, samples = written(tmp_path / "whole")
    assert [line[0] for line in log] == [3, 5, 6, 8]
    assert [line[0] for line in evaluations] == [2, 4, 6, 8] and len(samples) == 3
    assert written(tmp_path / "parts") == (log, evaluations, samples)
    assert parts[0].pushed + task.pushed == whole.pushed and len(whole.pushed) == 1


@pytest.mark.parametrize(
    ("now", "rank", "expected"), [(2, 1, [2.0, 5]), (3, 0, [3.0, 9]), (1, 0, [3.0, 9]), (3, 2, [0.0, 0.0])]
)
def test_what_was_not_logged_is_of_the_process_that_had_it_or_of_the_main_one(now, rank, expected):
    left = [{"loss": [1.0, 4]}, {"loss": [2.0, 5]}]
    accelerator = SimpleNamespace(num_processes=now, process_index=rank, is_main_process=rank == 0)
    assert loop.own_sums(left, accelerator) == {"loss": expected}
    assert loop.own_sums([], accelerator) == {}


def test_what_was_left_for_later_is_written_once_however_often_it_is_done(tmp_path):
    """Told to stop in step 4, then killed after step 7, before a checkpoint, it goes on from step 4 again."""
    options = {"logging_steps": 3, "sample_steps": 2, "checkpointing_steps": 0, "max_train_steps": 8}
    fit_task(tmp_path / "whole", Watched, **options)
    with pytest.raises(SystemExit):
        fit_task(tmp_path / "parts", stopping({4}), **options)

    class Killed(Watched):
        def compute_loss(self, state, batch, draws):
            if state.progress["step"] == 7:
                raise RuntimeError("killed")
            return super().compute_loss(state, batch, draws)

    with pytest.raises(RuntimeError, match="killed"):
        fit_task(tmp_path / "parts", Killed, resume_from_checkpoint="latest", **options)
    assert [line["step"] for line in records(tmp_path / "parts", EVALUATIONS)] == [2, 4, 6]
    fit_task(tmp_path / "parts", Watched, resume_from_checkpoint="latest", **options)
    assert written(tmp_path / "parts") == written(tmp_path / "whole")


@pytest.mark.parametrize(
    ("lr_scheduler", "lr_warmup_steps", "highest"), [("linear", 5, 0.02), ("linear", 2, None), ("constant", 5, None)]
)
def test_a_warm_up_that_the_run_is_too_short_for_is_named(tmp_path, lr_scheduler, lr_warmup_steps, highest, capsys):
    """With the learning rate of the last step, which is the highest."""
    options = {"lr_scheduler": lr_scheduler, "lr_warmup_steps": lr_warmup_steps, "logging_steps": 2}
    fit_task(tmp_path, max_train_steps=3, **options)
    message = "lr_warmup_steps 5 are no fewer than max_train_steps 3: the learning rate rises to 0.02 and never gets to"
    assert (message + " learning_rate 0.05" in capsys.readouterr().out) == (highest is not None)
    if highest:  # of the step that is next
        assert records(tmp_path)[0]["learning_rate"] == pytest.approx(highest)


def test_the_share_of_a_run_is_never_less_than_it_was(tmp_path):
    """Where its end moves away, it stays until the steps have come up to it."""
    shares = []

    class Staged(Consistency):
        def compute_loss(self, state, batch, draws):
            shares.append(share_done(state.progress, self.steps))
            return super().compute_loss(state, batch, draws)

    def staged(steps):
        shares.clear()
        with pytest.raises(SystemExit) if steps in stops else nullcontext():
            make = type("Stopping", (Staged,), {"steps": steps, "after_step": lambda self, state: stop(state, steps)})
            fit_task(tmp_path, make, max_train_steps=steps, resume_from_checkpoint="latest")
        return list(shares)

    stops = {4: 2, 5: 3}

    def stop(state, steps):
        if state.progress["step"] == stops.get(steps):
            os.kill(os.getpid(), signal.SIGTERM)

    assert staged(4) == [0, 1 / 4]
    assert staged(5) == [1 / 2]  # not 2 / 5
    assert staged(10) == [3 / 5] * 4 + [7 / 10, 8 / 10, 9 / 10]  # not 3 / 10, ...
    assert share_done({"step": 1, "seconds": 30.0}, 10, 60.0) == 0.5
    assert share_done({"step": 1, "seconds": 90.0}, 10, 60.0) == 1.0
    assert share_done({"step": 1, "seconds": 3.0, "share": 0.3}, 10, 60.0) == 0.3


def test_what_is_not_finite_is_null_in_the_log(tmp_path):
    class Broken(Consistency):
        def compute_loss(self, state, batch, draws):
            value, details = super().compute_loss(state, batch, draws)
            return value * (float("nan") if state.progress["step"] == 1 else 1), details

    fit_task(tmp_path, Broken, max_train_steps=3, logging_steps=1)
    assert [line["loss"] is None for line in records(tmp_path)] == [False, True, False]


class Convolution(Task):
    """A convolution to 0, in a memory layout."""

    layout = torch.contiguous_format

    def __init__(self, rows):
        torch.manual_seed(0)
        super().__init__(torch.nn.Conv2d(3, 4, 3).to(memory_format=self.layout), rows)

    def compute_loss(self, state, batch, draws):
        return state.model(batch["x"]).square().mean(), {}


class ChannelsLast(Convolution):
    layout = torch.channels_last


def test_a_run_goes_on_in_another_memory_layout(tmp_path, monkeypatch):
    """As on a GPU, what was begun on a CPU."""
    monkeypatch.setitem(globals(), "ROWS", [{"x": torch.randn(3, 5, 5)} for _ in range(8)])
    _, whole, _ = fit_task(tmp_path / "whole", Convolution, max_train_steps=6)
    for first, then in ((Convolution, ChannelsLast), (ChannelsLast, Convolution)):
        folder = tmp_path / first.__name__
        fit_task(folder, first, max_train_steps=3)
        _, network, _ = fit_task(folder, then, max_train_steps=6, resume_from_checkpoint="latest")
        assert network.weight.is_contiguous(memory_format=then.layout)
        assert (network.weight - whole.weight).abs().max() < 1e-5 < (network.weight).abs().max()


def test_an_overflow_of_half_precision_costs_its_step_alone(tmp_path, monkeypatch, capsys):
    """Also at the end of the run, which goes on from there: as on a GPU, by PyTorch's scaler of the loss."""
    original = loop.make_accelerator

    def with_scaler(config):
        accelerator = original(config)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        return accelerator

    monkeypatch.setitem(globals(), "make_accelerator", with_scaler)

    class Overflowing(Smooth):
        def compute_loss(self, state, batch, draws):
            loss, details = super().compute_loss(state, batch, draws)
            return loss * (1e9 if state.progress["step"] == 2 else 1), details

    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 9, "logging_steps": 1}
    _, network, facts = fit_task(tmp_path, Overflowing, max_train_steps=3, **options)
    assert facts["steps"] == 3 and facts["final_loss"] < 1e12
    assert "the last 1 steps were not finite and changed nothing" in capsys.readouterr().out
    before, after = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (2, 3))
    for name in ("model", "model_1", "ema"):
        assert equal(*(load_file(folder / f"{name}.safetensors") for folder in (before, after)))
    scales = [torch.load(folder / "scaler.pt", weights_only=True)["scale"] for folder in (before, after)]
    assert scales == [256.0, 128.0]
    _, resumed, facts = fit_task(tmp_path, Overflowing, max_train_steps=4, resume_from_checkpoint="latest", **options)
    assert facts["steps"] == 4 and not equal(resumed.state_dict(), network.state_dict())


def test_half_precision_is_refused_where_it_would_be_ignored(tmp_path):
    with pytest.raises(ValueError, match="mixed_precision 'fp16' needs a GPU: use bf16 or no on a CPU"):
        fit_task(tmp_path, mixed_precision="fp16", max_train_steps=1)
