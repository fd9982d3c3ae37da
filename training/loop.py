"""The training loop that every script shares: resume, batch, loss, backward, step, EMA, log, sample, save.

Progress is counted in optimizer steps and images seen. What is random in a step is a function of (seed, images seen),
so a run that was stopped and resumed repeats, bit for bit on CPU, what it would have done.

SIGTERM ends a run after the current step, with a checkpoint and the exit status 75: run it again with
`--resume_from_checkpoint latest`. A step whose loss or gradient is not finite changes nothing; it is written down in
nonfinite.jsonl, and the run stops after `max_skipped_steps` of them in a row.
"""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from checkpoints import resume, save_checkpoint
from data import GlobalBatchSampler, mix_seeds
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from provenance import provenance
from tqdm.auto import tqdm


# the exit status of a run that was told to stop and saved itself: run it again with --resume_from_checkpoint latest
EXIT_RESUME = 75
# steps between two looks, over several processes, at whether one was told to stop
STOP_INTERVAL = 10


def make_accelerator(config):
    accelerator = Accelerator(
        # several processes without a GPU: Accelerate would run them side by side, each alone, unless told
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.log_with.split(",") if config.log_with else None,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir),
    )
    os.makedirs(config.output_dir, exist_ok=True)
    torch.manual_seed(config.seed)
    return accelerator


class Draws:
    """Random numbers for one micro-batch. They are drawn for the micro-batches of all processes together, and each
    process keeps its own rows: training doesn't depend on how many processes share a global batch."""

    def __init__(self, seed, images_seen, accelerator, batch_size):
        self.rows, self.device = batch_size * accelerator.num_processes, accelerator.device
        self.own = slice(accelerator.process_index * batch_size, (accelerator.process_index + 1) * batch_size)
        self.generator = torch.Generator(self.device).manual_seed(mix_seeds(seed, images_seen))
        self.times = None  # the path times of the micro-batch, for the record of a loss that is not finite

    def normal(self, shape):
        """Standard normal (batch_size, *shape)."""
        return torch.randn((self.rows, *shape), generator=self.generator, device=self.device)[self.own]

    def uniform(self):
        """Uniform in (0, 1), float64, (batch_size,)."""
        numbers = torch.rand(self.rows, generator=self.generator, device=self.device, dtype=torch.float64)
        return numbers[self.own].clamp_min(2**-53)

    def stratified(self):
        """Uniform in (0, 1) like `uniform`, one number in each of as many equal parts as the global batch has rows."""
        parts = torch.rand(self.rows, generator=self.generator, device=self.device, dtype=torch.float64)
        parts = parts + torch.arange(self.rows, device=self.device)
        return (parts / self.rows)[self.own].clamp(2**-53, 1 - 2**-53)


def fit(config, accelerator, model, dataset, compute_loss, on_sample=None, on_push=None, push_steps=0):
    """Train `model` and leave its averaged weights in it.

    Args:
        compute_loss: f(model, batch, draws) -> (scalar loss, details to log beside it: {name: scalar tensor}, or a
            tensor (sum, count) whose mean is logged).
        on_sample: f(model, path of a PNG), called with the averaged weights every `sample_steps`.
        on_push: f(model, facts of the run so far), called with the averaged weights every `push_steps`, if not 0.

    Returns:
        The unwrapped model and the facts of the run: steps, images seen, loss, seconds, processes, machine.

    Raises FloatingPointError when too many steps in a row were not finite, SystemExit(EXIT_RESUME) after SIGTERM;
    checkpoints stay as they were.
    """
    model.train()
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        fused=True,
    )
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    network = accelerator.unwrap_model(model)
    ema = EMAModel(network.parameters(), decay=config.ema_decay, foreach=True)
    ema.to(accelerator.device)

    progress = resume(config, accelerator, ema, lr_scheduler)
    if progress is None:
        progress = {"step": 0, "images_seen": 0, "seconds": 0.0, "loss": None}

    micro_batch = config.batch_size * accelerator.num_processes
    sampler = GlobalBatchSampler(
        len(dataset),
        config.batch_size,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
        progress["images_seen"],
    )
    loader = iter(torch.utils.data.DataLoader(dataset, batch_sampler=sampler, num_workers=config.num_workers))
    if config.log_with:
        # trackers take plain values only
        options = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in asdict(config).items()}
        accelerator.init_trackers(os.path.basename(os.path.normpath(config.output_dir)), options)

    bar = tqdm(
        total=config.max_train_steps,
        initial=progress["step"],
        desc=type(network).__name__,
        unit="step",
        disable=not accelerator.is_main_process,
    )
    started = time.monotonic() - progress["seconds"]
    window, skipped = Window(), 0
    stop = StopSignal(accelerator)
    while progress["step"] < config.max_train_steps:
        # one optimizer step
        window.begin_step(progress)
        for _ in range(config.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                with window.waiting():
                    batch = {name: value.to(accelerator.device) for name, value in next(loader).items()}
                # train mode: label dropout and dropout draw from the global generator
                torch.manual_seed(mix_seeds(config.seed, progress["images_seen"], accelerator.process_index))
                draws = Draws(config.seed, progress["images_seen"], accelerator, config.batch_size)
                value, details = compute_loss(model, batch, draws)
                accelerator.backward(value)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                    details["gradient_norm"] = norm
                    if accelerator.scaler is None:
                        # the fused optimizer leaves everything as it is where this is 1, without a look from the host
                        optimizer.optimizer.found_inf = (~torch.isfinite(norm)).float()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            progress["images_seen"] += micro_batch
            window.add({"loss": value, **details}, draws.times)
        lr_scheduler.step()
        ema.step(network.parameters())
        progress["step"] += 1
        bar.update()

        # log; before a checkpoint, too: none is written after a step that was not finite
        done = progress["step"] == config.max_train_steps
        stopped = stop.is_set(progress["step"])
        saves = stopped or config.checkpointing_steps and (progress["step"] % config.checkpointing_steps == 0 or done)
        if progress["step"] % config.logging_steps == 0 or saves or done:
            skipped = window.skipped_in_a_row(skipped, config, accelerator)
            values = window.means(accelerator)
            progress["loss"] = values["loss"]
            speed = window.steps * micro_batch * config.gradient_accumulation_steps / window.seconds()
            bar.set_postfix(loss=f"{values['loss']:.4f}", images_per_s=f"{speed:.0f}")
            values |= {
                "learning_rate": lr_scheduler.get_last_lr()[0],
                "images_per_second": speed,
                "waiting_for_data": window.seconds_of_waiting / window.seconds(),
                "images_seen": progress["images_seen"],
            }
            accelerator.log(values, step=progress["step"])
            if skipped > config.max_skipped_steps or (done and skipped):
                raise FloatingPointError(
                    f"{skipped} steps in a row were not finite, up to step {progress['step']}: lower learning_rate "
                    f"(now {config.learning_rate:g}) or use mixed_precision bf16 or no. Their images, noise levels and "
                    f"seeds stand in {record_path(config)}; the checkpoints in {config.output_dir} are from before"
                )
            window = Window()

        # sample and save
        progress["seconds"] = time.monotonic() - started
        if on_sample and config.sample_steps and progress["step"] % config.sample_steps == 0 and not done:
            if accelerator.is_main_process:
                with_averaged_weights(ema, network, on_sample, sample_path(config.output_dir, progress["step"]))
            accelerator.wait_for_everyone()
        if push_steps and progress["step"] % push_steps == 0 and not done and not skipped:
            if accelerator.is_main_process:
                with_averaged_weights(ema, network, on_push, run_facts(config, accelerator, network, progress))
            accelerator.wait_for_everyone()
        if saves and not skipped:
            saved = save_checkpoint(config, accelerator, ema, lr_scheduler, progress)
            if not saved and done:
                raise OSError(
                    f"the last checkpoint could not be written to {config.output_dir}: make room, run it again"
                )
        if stopped and not done:
            bar.close()
            accelerator.print(f"told to stop: step {progress['step']}; go on by --resume_from_checkpoint latest")
            accelerator.end_training()
            raise SystemExit(EXIT_RESUME)
    stop.restore()
    bar.close()

    ema.copy_to(network.parameters())
    network.eval()
    return network, run_facts(config, accelerator, network, progress)


def run_facts(config, accelerator, network, progress):
    """What is known of a run: JSON-able."""
    return {
        "steps": progress["step"],
        "images_seen": progress["images_seen"],
        "final_loss": progress["loss"],
        "train_seconds": round(progress["seconds"], 1),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "config": asdict(config),
        "torch": torch.__version__,
    } | provenance(accelerator.device)


def record_path(config):
    """Where steps that were not finite are written down."""
    return os.path.join(config.output_dir, "nonfinite.jsonl")


class StopSignal:
    """Whether the run was told to stop by SIGTERM; until `restore`, the signal does nothing else."""

    def __init__(self, accelerator):
        self.accelerator, self.received, self.before = accelerator, False, None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self.receive)

    def receive(self, *_):
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
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)


class Window:
    """The values of the steps since the last log. Nothing here waits for the device until they are asked for."""

    def __init__(self):
        self.sums, self.records, self.steps = {}, [], 0
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
            {"step": progress["step"] + 1, "images_seen": progress["images_seen"], "finite": [], "times": []}
        )

    def add(self, values, times):
        """The values of a micro-batch: scalars, or (sum, count)."""
        finite = torch.stack(
            [values[name].detach().isfinite().all() for name in ("loss", "gradient_norm") if name in values]
        )
        self.records[-1]["finite"].append(finite.all())
        self.records[-1]["times"].append(times)
        for name, value in values.items():
            value = value.detach().double()
            pair = value if value.ndim else torch.stack([value, torch.ones_like(value)])
            # what is not finite counts for nothing
            pair = torch.where(pair.isfinite().all(), pair, torch.zeros_like(pair))
            self.sums[name] = self.sums.get(name, 0) + pair

    def means(self, accelerator):
        """{name: mean} over the steps and processes, nan where there was nothing finite."""
        sums = accelerator.reduce(torch.stack(list(self.sums.values())).float(), reduction="sum").tolist()
        return {
            name: total / count if count else float("nan") for name, (total, count) in zip(self.sums, sums, strict=True)
        }

    def skipped_in_a_row(self, before, config, accelerator):
        """How many steps up to now were not finite, in a row, of which `before` precede this window. They are written
        to the record."""
        finite = torch.stack([torch.stack(record["finite"]).all() for record in self.records]).float()
        finite = accelerator.reduce(finite, reduction="sum") >= accelerator.num_processes - 0.5
        count = before
        for record, good in zip(self.records, finite.tolist(), strict=True):
            count = 0 if good else count + 1
            if not good and accelerator.is_main_process:
                self.write(record, config)
        return count

    def write(self, record, config):
        rows = [None if times is None else [round(float(t), 6) for t in times] for times in record["times"]]
        line = {"step": record["step"], "images_seen": record["images_seen"], "seed": config.seed, "times": rows}
        with open(record_path(config), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def sample_path(output_dir, step):
    os.makedirs(os.path.join(output_dir, "samples"), exist_ok=True)
    return os.path.join(output_dir, "samples", f"step-{step:08d}.png")


def save_grid(images, path, columns=None):
    """Write PIL images as a PNG grid, small ones enlarged; under a temporary name first."""
    if columns is None or columns > 16:
        columns = max(1, int(len(images) ** 0.5))
    columns = min(columns, len(images))
    zoom = max(1, 64 // images[0].width)
    size = (zoom * images[0].width, zoom * images[0].height)
    images = [image.resize(size, Image.Resampling.NEAREST).convert("RGB") for image in images]
    rows = -(-len(images) // columns)
    images += [Image.new("RGB", size)] * (rows * columns - len(images))
    make_image_grid(images, rows, columns).save(path + ".partial", format="PNG")
    os.replace(path + ".partial", path)


def save_model(model, folder, facts):
    """Write a model and the facts of its training (training.json) as one folder, under a temporary name first; return
    the folder."""
    partial = folder + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    with open(os.path.join(partial, "training.json"), "w", encoding="utf-8") as file:
        json.dump(facts, file, indent=2)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


def with_averaged_weights(ema, network, function, *args):
    """Call function(network, *args) in evaluation mode with the averaged weights, then put the trained ones back."""
    ema.store(network.parameters())
    ema.copy_to(network.parameters())
    network.eval()
    function(network, *args)
    network.train()
    ema.restore(network.parameters())
