"""The training loop that every task shares: resume, batch, loss, backward, step, EMA, log, sample, save.

Progress is counted in optimizer steps and images seen. What is random in a step is a function of (seed, images seen),
so a run that was stopped and resumed repeats, bit for bit on CPU, what it would have done. Nor does it depend on how
processes and micro-batches share the images of a step (`Draws`), but for dropout inside a network.

SIGTERM, or Ctrl-C, ends a run after the current step, with a checkpoint and the exit status 75: run it again with
`--resume_from_checkpoint latest`. A step whose loss or gradient is not finite changes nothing; it is written down in
nonfinite.jsonl, and the run stops after `max_skipped_steps` of them in a row. What cannot be written while training
goes on, for want of room or any other reason, is lost, and training goes on.

What is logged is a line of log.jsonl, too, and pictures are PNG files, too: trackers are another way to see them.
"""

import copy
import math
import multiprocessing
import os
import shlex
import signal
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    TorchDynamoPlugin,
    convert_outputs_to_fp32,
    gather_object,
)
from diffusers.optimization import get_scheduler
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm.auto import tqdm

from score_sde.pipelines.writing import whole_folder, write_json
from score_sde.schedulers.paths import moved

from .averages import Averages, gathered
from .batches import training_batches
from .checkpoints import facts_of_progress, resume, save_checkpoint
from .cores import warn_of_busy_cores
from .flops import FlopCounter, measured_peak
from .optimizers import check_optimizer, leave_out, make_optimizer
from .options import WORK_BEGUN
from .plots import plot_runs
from .precision import automatic_precision, choose_kernels
from .provenance import provenance, typed_command
from .run_folder import EVALUATIONS, surviving
from .schedule import position
from .seeds import mix_seeds
from .tasks import TrainingState, is_over
from .trackers import show_picture, show_text, start_trackers


# the exit status of a run that was told to stop and saved itself: run it again with --resume_from_checkpoint latest
EXIT_RESUME = 75
# steps between two looks, over several processes, at whether one was told to stop
STOP_INTERVAL = 10
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# what tells seeds apart that begin with the same numbers
NOISE, TIMES, DROPOUT = 1, 2, 3


def make_accelerator(config):
    if config.mixed_precision == "auto":
        config.mixed_precision = automatic_precision()
    wanted = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if AcceleratorState._shared_state.get("_mixed_precision", wanted) != wanted:
        # what ran in this process before: Accelerate would refuse another precision, or keep it
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        # several processes without a GPU: Accelerate would run them side by side, each alone, unless told
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        # `fit` compiles in place: Accelerate would wrap the network, under other names of its weights
        dynamo_backend="no",
        # as a number it would give way to the launcher's
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        # `fit` decides whether buffers are shared, too
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        log_with=config.log_with.split(",") if config.log_with else None,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision 'fp16' needs a GPU: use bf16 or no on a CPU")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("fsdp_version 1 is not supported: set fsdp_version: 2 in the configuration of accelerate")
    if accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "gradient_clipping": config.max_grad_norm,
        }
    check_optimizer(config, accelerator)
    # what is recorded is what was really used
    config.mixed_precision = accelerator.mixed_precision
    config.compile = config.compile or TorchDynamoPlugin().backend != DynamoBackend.NO
    warn_of_busy_cores(accelerator)
    os.makedirs(config.output_dir, exist_ok=True)
    choose_kernels(config, accelerator)
    torch.manual_seed(config.seed)
    return accelerator


class Draws:
    """Random numbers for one of the micro-batches of an optimizer step that begins after `images_seen` images. The rows
    of the whole step, of all its micro-batches on all processes, are parted into blocks, each with generators of its
    own; a process draws those blocks that its rows touch, and keeps its rows: training doesn't depend on how processes
    and micro-batches share the images of a step."""

    BLOCK = 32  # rows

    def __init__(self, seed, images_seen, accelerator, batch_size, micro_batch=0, micro_batches=1):
        self.rows, self.device = batch_size * accelerator.num_processes * micro_batches, accelerator.device
        first = (micro_batch * accelerator.num_processes + accelerator.process_index) * batch_size
        self.own = torch.arange(first, first + batch_size)
        begins = range(first // self.BLOCK * self.BLOCK, first + batch_size, self.BLOCK)
        # of each block: how many rows of the step are in it, which of them are kept
        sizes = [min(self.BLOCK, self.rows - begin) for begin in begins]
        kept = [slice(max(first - begin, 0), first + batch_size - begin) for begin in begins]
        self.blocks = list(zip(sizes, kept, strict=True))
        seeds = [images_seen + begin for begin in begins]
        self.generators = [torch.Generator(self.device).manual_seed(mix_seeds(seed, each, NOISE)) for each in seeds]
        # numbers that path times are made of: not every device has float64
        self.of_times = [torch.Generator().manual_seed(mix_seeds(seed, each, TIMES)) for each in seeds]
        self.times = None  # the path times of the micro-batch, for the record of a loss that is not finite

    def normal(self, shape):
        """Standard normal (batch_size, *shape)."""
        return torch.cat(
            [
                torch.randn((rows, *shape), generator=generator, device=self.device)[kept]
                for (rows, kept), generator in zip(self.blocks, self.generators, strict=True)
            ]
        )

    def uniforms(self, shape):
        """Uniform in [0, 1), (batch_size, *shape), float64 where the device has it."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.cat(
            [
                torch.rand((rows, *shape), generator=generator, device=self.device, dtype=dtype)[kept]
                for (rows, kept), generator in zip(self.blocks, self.generators, strict=True)
            ]
        )

    def _numbers(self):
        return torch.cat(
            [
                torch.rand(rows, generator=generator, dtype=torch.float64)[kept]
                for (rows, kept), generator in zip(self.blocks, self.of_times, strict=True)
            ]
        )

    def uniform(self):
        """Uniform in (0, 1), float64 on the CPU, (batch_size,)."""
        return self._numbers().clamp_min(2**-53)

    def stratified(self):
        """Uniform in (0, 1) like `uniform`, one number in each of as many equal parts as the step has images."""
        return ((self._numbers() + self.own) / self.rows).clamp(2**-53, 1 - 2**-53)

    def chance(self, probability):
        """True with this probability, (batch_size,) on the device."""
        return moved(self.uniform() < probability, self.device)


def fit(config, accelerator, run, task):
    """Train the network of a `Task` and leave its averaged weights in it; `run` is the `Run` of config.output_dir.

    Returns:
        The unwrapped network, of a sharded one a whole copy in the main process (None in others), and the facts of the
        run: identity, steps, images seen, loss, seconds, processes, machine.

    Raises ValueError for what cannot be trained or resumed so, FloatingPointError when too many steps in a row were not
    finite, SystemExit(EXIT_RESUME) after SIGTERM or Ctrl-C; checkpoints stay as they were.
    """
    model, modules = task.model, task.modules_to_save()
    if modules and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"this task trains {', '.join(modules)} beside its network, which {accelerator.distributed_type.value} "
            f"cannot: use plain processes (MULTI_GPU)"
        )
    if config.max_train_seconds and accelerator.num_processes > 1:
        raise ValueError(
            f"max_train_seconds {config.max_train_seconds:g} is for one process, whose clock is the run's; there are "
            f"{accelerator.num_processes}: pass max_train_steps alone"
        )
    model.train()
    counter = FlopCounter(model)
    whole = None
    if accelerator.is_fsdp2:
        # on the host, where it is sampled or saved: in the main process, and in all where all evaluate
        if accelerator.is_main_process or task.evaluation_steps:
            whole = copy.deepcopy(model)
        prepare_to_shard(model, accelerator)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.compile:
        launched = TorchDynamoPlugin()  # reads the launcher's variables
        options = {} if launched.backend == DynamoBackend.NO else launched.to_kwargs()
        if getattr(model, "_repeated_blocks", None):
            model.compile_repeated_blocks(**options)
        else:
            model.compile(**options)
    optimizer = make_optimizer(config, accelerator, trained_parameters(model, *modules.values()), model)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    if config.lr_warmup_steps >= config.max_train_steps and config.lr_scheduler != "constant":
        highest = config.learning_rate * (config.max_train_steps - 1) / config.lr_warmup_steps
        accelerator.print(
            f"lr_warmup_steps {config.lr_warmup_steps:,} are no fewer than max_train_steps {config.max_train_steps:,}: "
            f"the learning rate rises to {highest:.3g} and never gets to learning_rate {config.learning_rate:g}"
        )
    # what is no parameter but saved, such as a batch norm's statistics, is to be the same in all processes
    accelerator.ddp_handler.broadcast_buffers = any(has_saved_buffers(each) for each in (model, *modules.values()))
    model, optimizer, *prepared = accelerator.prepare(model, optimizer, *modules.values())
    network, modules = accelerator.unwrap_model(model), dict(zip(modules, prepared, strict=True))
    averages = Averages(config, network, whole)

    progress = resume(config, accelerator, run, averages, modules, lr_scheduler, task.data_fingerprint)
    if progress is None:
        # skipped: how many steps up to now were not finite, in a row
        progress = {"step": 0, "images_seen": 0, "seconds": 0.0, "loss": None, "skipped": 0}

    micro_batch = config.batch_size * accelerator.num_processes
    loader = batches(training_batches(task.dataset, config, accelerator, progress))
    if config.log_with:
        start_trackers(config, accelerator)

    WORK_BEGUN.set()
    bar = tqdm(
        total=config.max_train_steps,
        initial=progress["step"],
        desc=type(network).__name__,
        unit="step",
        disable=not accelerator.is_main_process,
    )
    dtype = DTYPES[accelerator.mixed_precision]
    peak = 1e12 * config.peak_tflops if config.peak_tflops else measured_peak(accelerator.device, dtype)
    state = TrainingState(counter.watching(model), network, modules, averages, progress)
    trained = [model, *modules.values()]
    parameters = trained_parameters(*trained)
    started = time.monotonic() - progress["seconds"]
    stop = StopSignal(accelerator)
    run.closing.callback(stop.restore)

    def is_done():
        return is_over(progress | {"seconds": time.monotonic() - started}, config)

    def look():
        """Sample, push and evaluate the averaged weights of a step that is one for it."""
        if config.sample_steps and progress["step"] % config.sample_steps == 0 and not done:
            with averages.averaged_network() as averaged:
                if accelerator.is_main_process:
                    with surviving(f"samples of step {progress['step']}"):
                        path = sample_path(config.output_dir, progress["step"], task.samples_suffix)
                        task.sample(averaged, path)
                        show_samples(accelerator, run, task, path, progress["step"])
            accelerator.wait_for_everyone()
        if task.push_steps and progress["step"] % task.push_steps == 0 and not done and not progress["skipped"]:
            with averages.averaged_network() as averaged:
                if accelerator.is_main_process:
                    with surviving(f"the bundle of step {progress['step']}"):
                        task.push(averaged, run_facts(config, accelerator, run, network, progress))
            accelerator.wait_for_everyone()
        if task.evaluation_steps and (progress["step"] % task.evaluation_steps == 0 or done):
            with averages.averaged_network() as averaged:
                values = task.evaluate(averaged)
            with surviving("the log"):
                accelerator.log(values, step=progress["step"])
            if accelerator.is_main_process:
                # that of a run that went on from this step takes the place of the one before
                with surviving("the log"):
                    run.rewind_record(EVALUATIONS, progress["step"] - 1)
                run.write_line(EVALUATIONS, {key: progress[key] for key in ("step", "images_seen")} | values)

    done, last_step = is_done(), None
    # what a run that was told to stop left for later; of one that is over already, what its card says of its weights
    if progress.pop("unseen", False) or done:
        look()
    window = Window(own_sums(progress.pop("unlogged", []), accelerator))
    while not done:
        # one optimizer step
        window.begin_step(progress)
        step_began = progress["images_seen"]
        for i in range(config.gradient_accumulation_steps):
            with accelerator.accumulate(*trained):
                with window.waiting():
                    batch = {name: moved(x, accelerator.device) for name, x in next(loader).items()}
                # train mode: dropout draws from the global generator
                seed_device(
                    mix_seeds(config.seed, progress["images_seen"], accelerator.process_index, DROPOUT), accelerator
                )
                draws = Draws(
                    config.seed, step_began, accelerator, config.batch_size, i, config.gradient_accumulation_steps
                )
                value, details = task.compute_loss(state, batch, draws)
                # times 1 - 0 * loss, which is nan unless the loss is finite: its step changes nothing, in any process
                accelerator.backward(value * torch.rsub(value.detach(), 1, alpha=0))
                if accelerator.sync_gradients:
                    norm = gathered(accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
                    norm = details["gradient_norm"] = torch.as_tensor(norm, device=accelerator.device)
                    skipped = (~torch.isfinite(norm)).float()
                    if accelerator.scaler is None:
                        leave_out(optimizer, skipped)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            progress["images_seen"] += micro_batch
            window.add({"loss": value, **details}, draws.times)
        # the first step of a process, which may have compiled the network, says nothing of the others
        now = time.monotonic()
        took, last_step = 0.0 if last_step is None else now - last_step, now
        lr_scheduler.last_epoch = position(lr_scheduler.last_epoch, progress | {"seconds": now - started}, config, took)
        lr_scheduler.step()
        averages.step(skipped)
        progress["step"] += 1
        task.after_step(state)
        bar.update()

        # log; before a checkpoint, too: none is written after a step that was not finite, but in the end
        done = is_done()
        stopped = stop.is_set(progress["step"])
        leaves = stopped and not done
        saves = config.checkpointing_steps and (progress["step"] % config.checkpointing_steps == 0 or done)
        logs = progress["step"] % config.logging_steps == 0 or saves or done
        if logs or leaves:
            values, finite = window.read(accelerator)
            progress["skipped"] = window.skipped_in_a_row(finite, progress["skipped"], config, accelerator, run)
        if logs:
            if math.isfinite(values["loss"]):
                progress["loss"] = values["loss"]
            speed = window.steps * micro_batch * config.gradient_accumulation_steps / window.seconds()
            waiting = window.seconds_of_waiting / window.seconds()
            shown = {"loss": f"{values['loss']:.4f}", f"{task.unit}_per_s": f"{speed:.0f}", "waiting": f"{waiting:.0%}"}
            bar.set_postfix(**shown)
            values |= {
                "learning_rate": lr_scheduler.get_last_lr()[0],
                "images_per_second": speed,
                "tflops_per_second": speed * counter.flops / accelerator.num_processes / 1e12,
                "mfu": speed * counter.flops / accelerator.num_processes / peak,
                "waiting_for_data": waiting,
                "images_seen": progress["images_seen"],
            } | peak_memory(accelerator.device)
            if accelerator.is_main_process:
                line = {name: value if math.isfinite(value) else None for name, value in values.items()}
                run.write_line("log.jsonl", {"step": progress["step"]} | line)
            with surviving("the log"):
                accelerator.log(values, step=progress["step"])
            if progress["skipped"] > config.max_skipped_steps or (done and progress["loss"] is None):
                raise FloatingPointError(
                    f"{progress['skipped']} steps in a row were not finite, up to step {progress['step']}: lower "
                    f"learning_rate (now {config.learning_rate:g}) or use mixed_precision bf16 or no. Their images, "
                    f"noise levels and seeds stand in nonfinite.jsonl; the checkpoints in {config.output_dir} are from "
                    f"before"
                )
            window = Window()

        # sample, evaluate and save; who is told to stop may have no time, and leaves all but the last for later
        progress["seconds"] = time.monotonic() - started
        if leaves:
            progress |= {"unseen": True, "unlogged": gather_object([window.sums])}
        else:
            look()
        if config.ema_snapshot_steps and progress["step"] % config.ema_snapshot_steps == 0:
            averages.save_snapshots(config, accelerator, run, progress["step"])
        saved = False
        if stopped or saves and (done or not progress["skipped"]):
            saved = save_checkpoint(config, accelerator, run, state, lr_scheduler, task.data_fingerprint, task.origin)
        if leaves:
            bar.close()
            command = typed_command()
            command += [] if config.resume_from_checkpoint == "latest" else ["--resume_from_checkpoint", "latest"]
            accelerator.print(
                f"told to stop: step {progress['step']}{'' if saved else ', which is not saved'}; go on by "
                f"`{shlex.join(command)}`"
            )
            with surviving("the log"):
                accelerator.end_training()
            raise SystemExit(EXIT_RESUME)
        # none of this is training
        window.started += time.monotonic() - started - progress["seconds"]
    stop.restore()
    bar.close()

    if progress["skipped"]:
        accelerator.print(f"the last {progress['skipped']} steps were not finite and changed nothing: nonfinite.jsonl")
    return averages.publish(), run_facts(config, accelerator, run, network, progress)


def has_saved_buffers(model):
    return not model.state_dict().keys() <= dict(model.named_parameters(remove_duplicate=False)).keys()


def peak_memory(device):
    """{"peak_memory_gb": the most that tensors took of a GPU's memory up to now, in 10^9 bytes}, {} elsewhere."""
    return {"peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}


def seed_device(seed, accelerator):
    """`torch.manual_seed` for the CPU and this process's device alone, at a hundredth of its time."""
    torch.default_generator.manual_seed(seed)
    if accelerator.device.type != "cpu":
        torch.get_device_module(accelerator.device).manual_seed(seed)


def trained_parameters(*modules):
    """The parameters of modules that are not frozen."""
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def prepare_to_shard(model, accelerator):
    """What FSDP2 is to do with a network: shard its blocks, and leave alone what stays in float32. Its mixed precision
    is that of one process: autocast of inputs as they are (the times!), and gradients that are added up in float32."""
    plugin = accelerator.state.fsdp_plugin
    # Accelerate wants no class that the model could have but hasn't
    there = {type(module).__name__ for module in model.modules()}
    plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or sorted(
        there.intersection(getattr(model, "_no_split_modules", None) or [])
    )
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or [])
    exact = [module for name, module in model.named_modules() if exact.intersection(name.split("."))]
    if exact and not plugin.ignored_modules:
        plugin.ignored_modules = [module.to(accelerator.device) for module in exact]
    if accelerator.mixed_precision != "no":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=DTYPES[accelerator.mixed_precision], reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        model.forward = convert_outputs_to_fp32(accelerator.autocast()(model.forward))


def run_facts(config, accelerator, run, network, progress):
    """What is known of a run: JSON-able."""
    return {
        "run_id": run.id,
        **facts_of_progress(progress),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        **peak_memory(accelerator.device),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in trained_parameters(network)),
        "config": asdict(config),
        "torch": torch.__version__,
    } | provenance(accelerator.device)


def batches(loader):
    """The batches of an endless data loader; the error names a process of its that died."""
    iterator, workers = iter(loader), []
    while True:
        try:
            batch = next(iterator)
        except (RuntimeError, OSError, EOFError) as error:  # what reading from it happens to meet
            for worker in workers:
                worker.join(0.1)  # what it held is closed before it is gone
            dead = [f"pid {worker.pid} (exit code {worker.exitcode})" for worker in workers if not worker.is_alive()]
            if not dead:
                raise
            raise RuntimeError(
                f"a process that loads data died: {', '.join(dead)}. Was it out of memory? Then lower num_workers. Go "
                f"on by --resume_from_checkpoint latest"
            ) from error
        workers = workers or multiprocessing.active_children()
        yield batch


class StopSignal:
    """Whether the run was told to stop by SIGTERM or Ctrl-C; until `restore`, the first of them does nothing else, and
    a second Ctrl-C interrupts at once."""

    def __init__(self, accelerator):
        self.accelerator, self.received, self.before = accelerator, False, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def receive(self, number, _):
        if number == signal.SIGINT:
            if self.received:
                raise KeyboardInterrupt
            with suppress(OSError):  # print is not for handlers
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again interrupts at once\n")
        self.received = True

    def is_set(self, step):
        """The same answer in every process; several agree on it every few steps."""
        if self.accelerator.num_processes == 1:
            return self.received
        if step % STOP_INTERVAL:
            return False
        if self.received:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def own_sums(unlogged, accelerator):
    """The `Window.sums` of this process, of those that the processes of a run left; the main one has them all where
    they were another number."""
    if len(unlogged) == accelerator.num_processes:
        return unlogged[accelerator.process_index]
    of_all = {name: [sum(each[name][i] for each in unlogged) for i in (0, 1)] for name in (unlogged or [{}])[0]}
    return of_all if accelerator.is_main_process else dict.fromkeys(of_all, [0.0, 0.0])


class Window:
    """The values of the steps since the last log. Nothing here waits for the device until they are asked for. `sums`:
    {name: [sum, how many were added]} of this process, of what was read and isn't logged."""

    def __init__(self, sums=None):
        self.sums, self.records, self.steps = sums or {}, [], 0
        self.started, self.seconds_of_waiting = time.monotonic(), 0.0

    def seconds(self):
        return time.monotonic() - self.started

    @contextmanager
    def waiting(self):
        began = time.monotonic()
        yield
        self.seconds_of_waiting += time.monotonic() - began

    def begin_step(self, progress):
        self.steps += 1
        self.records.append(
            {"step": progress["step"] + 1, "images_seen": progress["images_seen"], "values": [], "times": []}
        )

    def add(self, values, times):
        """The values of a micro-batch, as `Task.compute_loss` has them, joined by one kernel."""
        pairs = {name: value if isinstance(value, tuple) else (value, None) for name, value in values.items()}
        joined = torch.cat([value.detach().reshape(-1) for value, _ in pairs.values()])
        of_names = {name: (value.numel(), counted) for name, (value, counted) in pairs.items()}
        self.records[-1]["values"].append((joined, of_names))
        self.records[-1]["times"].append(times)

    def read(self, accelerator):
        """({name: mean} over the steps and processes, nan where there was nothing finite, [whether a step was finite in
        every process]). Here the device is waited for."""
        values = [each for record in self.records for each in record["values"]]
        numbers = torch.cat([joined for joined, _ in values]).float().cpu()
        pieces = iter(numbers.split([size for _, of_names in values for size, _ in of_names.values()]))
        sums, finite = self.sums, []
        for record in self.records:
            finite.append(1.0)
            for _, of_names in record["values"]:
                for name, (_, counted) in of_names.items():
                    piece, before = next(pieces), sums.setdefault(name, [0.0, 0.0])
                    if counted is not None:
                        piece = torch.stack([piece[counted].sum(), counted.sum()])
                    total, count = (*piece.tolist(), 1.0)[:2]
                    # what is not finite counts for nothing
                    if math.isfinite(total) and math.isfinite(count):
                        sums[name] = [before[0] + total, before[1] + count]
                    elif name in ("loss", "gradient_norm"):
                        finite[-1] = 0.0
        shared = moved(torch.tensor([*chain(*sums.values()), *finite]), accelerator.device)
        shared = accelerator.reduce(shared, reduction="sum").tolist()
        totals, good = shared[: 2 * len(sums)], shared[2 * len(sums) :]
        means = {
            name: total / count if count else math.nan
            for name, total, count in zip(sums, totals[::2], totals[1::2], strict=True)
        }
        return means, [each > accelerator.num_processes - 0.5 for each in good]

    def skipped_in_a_row(self, finite, before, config, accelerator, run):
        """How many steps up to now were not finite, in a row, of which `before` precede this window. They are written
        to the record."""
        count = before
        for record, good in zip(self.records, finite, strict=True):
            count = 0 if good else count + 1
            if not good and accelerator.is_main_process:
                rows = [None if times is None else [round(float(t), 6) for t in times] for times in record["times"]]
                line = {key: record[key] for key in ("step", "images_seen")} | {"seed": config.seed, "times": rows}
                run.write_line("nonfinite.jsonl", line)
        return count


def show_samples(accelerator, run, task, path, step):
    """Show trackers the picture, or the text, that a task has written, and the curves of the run up to now."""
    if accelerator.trackers and os.path.isfile(path):
        show = show_picture if task.samples_suffix == ".png" else show_text
        show(accelerator, task.pictures, path, step)
        curves = plot_runs([run.folder], os.path.join(run.folder, "samples", "curves.png"))
        show_picture(accelerator, "curves", curves, step)


def sample_path(output_dir, step, suffix=".png"):
    os.makedirs(os.path.join(output_dir, "samples"), exist_ok=True)
    return os.path.join(output_dir, "samples", f"step-{step:08d}{suffix}")


def save_model(model, folder, facts):
    """Write a model and the facts of its training (training.json) as one folder; return it."""
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        write_json(os.path.join(temporary, "training.json"), facts)
    return folder
