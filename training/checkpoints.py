"""Checkpoints: folders written under a temporary name, then renamed, and checked before they are read.

A run survives being killed at any moment, a full disk, and a damaged newest checkpoint: what was whole stays whole.
"""

import json
import os
import re
import shutil
from dataclasses import asdict

import torch


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
    "push_to_hub",
    "hub_private",
    "push_steps",
    "max_skipped_steps",
    "skip_corrupt_images",
    "peak_tflops",
    "compile",
    "evaluation_steps",
    "evaluation_images",
    "evaluation_features",
    "evaluation_split",
}


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not whole."""


def list_checkpoints(output_dir):
    """The finished checkpoints of a run, oldest first."""
    folder = os.path.join(output_dir, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in sorted(names) if re.fullmatch(r"step-\d{8}", name)]


def sizes_of_files(folder):
    return {
        os.path.relpath(os.path.join(parent, name), folder): os.path.getsize(os.path.join(parent, name))
        for parent, _, names in os.walk(folder)
        for name in names
    }


def save_checkpoint(config, accelerator, ema, lr_scheduler, progress):
    """Model, optimizer, loss scale, random state, EMA, learning rate and position in the data, as one folder.

    Where it cannot be written (a full disk), says so, leaves no half of it behind, and keeps the older ones. Returns
    whether it was written.
    """
    final = os.path.join(config.output_dir, "checkpoints", f"step-{progress['step']:08d}")
    partial = final + ".partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial, exist_ok=True)
    accelerator.wait_for_everyone()
    problem = ema.save(partial, accelerator)
    try:
        accelerator.save_state(partial)
    except Exception as error:  # torch and safetensors have their own for a full disk
        problem = problem or error
    if not any_process(problem, accelerator) and accelerator.is_main_process:
        try:
            state = {
                "progress": progress,
                "ema": ema.state(),
                "lr_scheduler": lr_scheduler.state_dict(),
                "config": asdict(config),
                "files": sizes_of_files(partial),
            }
            with open(os.path.join(partial, "state.json"), "w", encoding="utf-8") as file:
                json.dump(state, file, indent=2)
        except OSError as error:
            problem = error
    if any_process(problem, accelerator):
        if problem is not None:
            print(f"checkpoint {final} could not be written: {problem}; the older ones stay, training goes on")
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        return False
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in list_checkpoints(config.output_dir)[: -config.checkpoints_total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return True


def any_process(problem, accelerator):
    """Whether any of the processes has a problem; the same answer in all of them, and not before all have come here."""
    failed = torch.tensor(float(problem is not None), device=accelerator.device)
    return bool(accelerator.reduce(failed, reduction="sum") > 0)


def read_state(folder, config):
    """The state.json of a checkpoint.

    Raises DamagedCheckpoint where it is not whole, ValueError for one of a different configuration.
    """
    try:
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
            state = json.load(file)
    except (OSError, json.JSONDecodeError) as error:
        raise DamagedCheckpoint(f"{folder!r} is not a checkpoint of this script: {error}") from error
    found = sizes_of_files(folder)
    for name, size in state["files"].items():
        if found.get(name) != size:
            raise DamagedCheckpoint(f"{folder!r} is damaged: {name} has {found.get(name, 0):,} of {size:,} bytes")
    # an option that is newer than the checkpoint was at its default
    saved, now = asdict(type(config)()) | state["config"], asdict(config)
    changed = [name for name in now if name not in FREE_TO_CHANGE and saved[name] != now[name]]
    if changed:
        differences = ", ".join(f"{name} was {saved[name]!r}, is {now[name]!r}" for name in changed)
        raise ValueError(
            f"checkpoint {folder!r} is of a different run: {differences}. Pass the same values, or start anew"
        )
    return state


def resume(config, accelerator, ema, lr_scheduler):
    """Put everything back that `save_checkpoint` wrote, from the checkpoint that the config names or, for "latest", the
    newest whole one; return its progress, or None to start afresh.

    Raises ValueError for a folder that is no whole checkpoint, and for one of a different configuration.
    """
    if config.resume_from_checkpoint is None:
        return None
    latest = config.resume_from_checkpoint == "latest"
    folders = list_checkpoints(config.output_dir)[::-1] if latest else [config.resume_from_checkpoint]
    for folder in folders:
        try:
            state = read_state(folder, config)
        except DamagedCheckpoint as error:
            if not latest or folder == folders[-1]:
                raise
            accelerator.print(f"{error}; going back to the one before")
            continue
        accelerator.load_state(folder)
        ema.load(folder, state["ema"])
        lr_scheduler.load_state_dict(state["lr_scheduler"])
        progress = state["progress"]
        accelerator.print(f"resuming from {folder}: step {progress['step']}, {progress['images_seen']} images seen")
        return progress
    return None
