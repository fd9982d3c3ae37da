"""The training loop that every script shares: resume, batch, loss, backward, step, EMA, log, sample, save.

Progress is counted in optimizer steps and images seen. What is random in a step is a function of (seed, images seen),
so a run that was stopped and resumed repeats, bit for bit on CPU, what it would have done.
"""

import json
import os
import platform
import re
import shutil
import sys
import time
from dataclasses import asdict

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from data import GlobalBatchSampler, mix_seeds
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm


# what may differ between a checkpoint and the run that resumes it
FREE_TO_CHANGE = {
    "output_dir",
    "max_train_steps",
    "batch_size",
    "gradient_accumulation_steps",
    "num_workers",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "sample_steps",
    "logging_steps",
    "log_with",
}


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


def fit(config, accelerator, model, dataset, compute_loss, on_sample=None):
    """Train `model` and leave its averaged weights in it.

    Args:
        compute_loss: f(model, batch, draws) -> (scalar loss, {name: scalar tensor} to log beside it).
        on_sample: f(model, path of a PNG), called with the averaged weights every `sample_steps`.

    Returns:
        The unwrapped model and the facts of the run: steps, images seen, loss, seconds, processes, machine.

    Raises FloatingPointError when the loss is no longer finite; checkpoints stay as they were.
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

    # resume
    progress = {"step": 0, "images_seen": 0, "seconds": 0.0, "loss": None}
    checkpoint = find_checkpoint(config)
    if checkpoint:
        progress = load_checkpoint(checkpoint, config, accelerator, ema, lr_scheduler)
        accelerator.print(f"resuming from {checkpoint}: step {progress['step']}, {progress['images_seen']} images seen")

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
    window, window_started = {}, time.monotonic()
    while progress["step"] < config.max_train_steps:
        # one optimizer step
        step_values = {}
        for _ in range(config.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                batch = {name: value.to(accelerator.device) for name, value in next(loader).items()}
                # train mode: label dropout and dropout draw from the global generator
                torch.manual_seed(mix_seeds(config.seed, progress["images_seen"], accelerator.process_index))
                draws = Draws(config.seed, progress["images_seen"], accelerator, config.batch_size)
                value, details = compute_loss(model, batch, draws)
                accelerator.backward(value)
                if accelerator.sync_gradients:
                    details["gradient_norm"] = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            progress["images_seen"] += micro_batch
            for name, number in {"loss": value, **details}.items():
                step_values.setdefault(name, []).append(number.detach())
        lr_scheduler.step()
        ema.step(network.parameters())
        progress["step"] += 1
        bar.update()
        for name, numbers in step_values.items():
            window.setdefault(name, []).append(torch.stack(numbers).mean())

        # log; before a checkpoint, too: none is written once the loss is not finite
        done = progress["step"] == config.max_train_steps
        saves = config.checkpointing_steps and (progress["step"] % config.checkpointing_steps == 0 or done)
        if progress["step"] % config.logging_steps == 0 or saves or done:
            steps = len(window["loss"])
            means = torch.stack([torch.stack(numbers).mean().float() for numbers in window.values()])
            values = dict(zip(window, accelerator.reduce(means, reduction="mean").tolist(), strict=True))
            loss = progress["loss"] = values["loss"]
            if not torch.isfinite(torch.tensor(loss)):
                raise FloatingPointError(
                    f"the loss became {loss} between steps {progress['step'] - steps} and {progress['step']}: lower "
                    f"learning_rate (now {config.learning_rate:g}) or use mixed_precision bf16 or no; the checkpoints "
                    f"in {config.output_dir} are from before"
                )
            speed = steps * micro_batch * config.gradient_accumulation_steps / (time.monotonic() - window_started)
            bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed:.0f}")
            learning_rate = lr_scheduler.get_last_lr()[0]
            values |= {
                "learning_rate": learning_rate,
                "images_per_second": speed,
                "images_seen": progress["images_seen"],
            }
            accelerator.log(values, step=progress["step"])
            window, window_started = {}, time.monotonic()

        # sample and save
        progress["seconds"] = time.monotonic() - started
        if on_sample and config.sample_steps and progress["step"] % config.sample_steps == 0 and not done:
            if accelerator.is_main_process:
                with_averaged_weights(ema, network, on_sample, sample_path(config.output_dir, progress["step"]))
            accelerator.wait_for_everyone()
        if saves:
            save_checkpoint(config, accelerator, ema, lr_scheduler, progress)
    bar.close()

    ema.copy_to(network.parameters())
    network.eval()
    facts = {
        "steps": progress["step"],
        "images_seen": progress["images_seen"],
        "final_loss": progress["loss"],
        "train_seconds": round(progress["seconds"], 1),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "config": asdict(config),
        "command": " ".join([os.path.basename(sys.executable), *sys.argv]),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
        + (f", {torch.cuda.get_device_name()}" if accelerator.device.type == "cuda" else ""),
        "torch": torch.__version__,
    }
    return network, facts


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


# --- checkpoints: written under a temporary name, then renamed ----------------------------------------------------


def list_checkpoints(output_dir):
    """The whole checkpoints of a run, oldest first."""
    folder = os.path.join(output_dir, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in sorted(names) if re.fullmatch(r"step-\d{8}", name)]


def find_checkpoint(config):
    """The checkpoint to resume from, or None to start afresh."""
    if config.resume_from_checkpoint != "latest":
        return config.resume_from_checkpoint
    checkpoints = list_checkpoints(config.output_dir)
    return checkpoints[-1] if checkpoints else None


def save_checkpoint(config, accelerator, ema, lr_scheduler, progress):
    """Model, optimizer, loss scale, random state, EMA, learning rate and position in the data, as one folder."""
    final = os.path.join(config.output_dir, "checkpoints", f"step-{progress['step']:08d}")
    partial = final + ".partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(partial)
    if accelerator.is_main_process:
        state = ema.state_dict()
        averaged = {str(i): tensor.contiguous() for i, tensor in enumerate(state.pop("shadow_params"))}
        save_file(averaged, os.path.join(partial, "ema.safetensors"))
        state = {
            "progress": progress,
            "ema": state,
            "lr_scheduler": lr_scheduler.state_dict(),
            "config": asdict(config),
        }
        with open(os.path.join(partial, "state.json"), "w", encoding="utf-8") as file:
            json.dump(state, file, indent=2)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in list_checkpoints(config.output_dir)[: -config.checkpoints_total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(folder, config, accelerator, ema, lr_scheduler):
    """Put everything back that `save_checkpoint` wrote; return the progress.

    Raises ValueError for a folder that is no whole checkpoint, and for one of a different configuration.
    """
    try:
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
            state = json.load(file)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder!r} is not a checkpoint of this script: {error}") from error
    saved, now = state["config"], asdict(config)
    changed = [name for name in now if name not in FREE_TO_CHANGE and saved.get(name) != now[name]]
    if changed:
        differences = ", ".join(f"{name} was {saved.get(name)!r}, is {now[name]!r}" for name in changed)
        raise ValueError(
            f"checkpoint {folder!r} is of a different run: {differences}. Pass the same values, or start anew"
        )
    accelerator.load_state(folder)
    averaged = load_file(os.path.join(folder, "ema.safetensors"))
    shadow_params = [averaged[str(i)] for i in range(len(averaged))]
    ema.load_state_dict({**state["ema"], "shadow_params": shadow_params})
    ema.to(accelerator.device)
    lr_scheduler.load_state_dict(state["lr_scheduler"])
    return state["progress"]
