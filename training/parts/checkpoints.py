"""Checkpoints: folders that are written whole, and checked before they are read.

state.json, written last, holds a hash of every other file and of itself. A run survives being killed at any moment, a
full disk, and a damaged newest checkpoint: what was whole stays whole. The hashes tell damage, not malice: whoever can
write a checkpoint can write its hashes, and a sharded one (FSDP) has a pickle in it, so trust a checkpoint that you
resume like code that you run.
"""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict

import torch
from accelerate.utils import broadcast_object_list

from score_sde.pipelines.writing import whole_folder

from .hashes import hash_of, hash_of_file
from .options import mapping
from .run_folder import surviving
from .schedule import follow_schedule
from .tasks import share_done


# options that what was trained hangs on: a run goes on with the same
FIXED = {
    *("optimizer", "optimizer_kwargs", "adam_beta1", "adam_beta2", "adam_weight_decay", "max_grad_norm"),
    *("random_flip", "crop", "seed"),
    *("ema_decay", "further_ema_decays", "ema_snapshot_steps", "ema_sigma_rel"),
    *(
        "resolution",
        "aspect_ratio_buckets",
        "image_channels",
        "background",
        "normalize_latents",
        "streaming",
        "shuffle_buffer",
    ),
    *("class_conditional", "network", "network_name", "network_kwargs", "latent_channels", "block_out_channels"),
    *("layers_per_block", "norm_num_groups", "sde_type", "prediction_type", "scheduler_kwargs", "time_density"),
    *("time_density_kwargs", "time_shift", "token_routing", "weighting", "weighting_kwargs", "vlb_weight", "kl_weight"),
    *("init_from", "init_revision", "freeze", "lora_rank", "lora_alpha", "lora_targets"),
    *("max_caption_tokens", "caption_layers", "pooled_captions", "condition_from", "condition_channels"),
    *("teacher", "teacher_revision", "method", "method_kwargs", "map_steps", "folded_guidance", "guidance_range"),
    *("data_kind", "length", "packing", "long_texts", "process", "noise", "loss"),
    *("domain", "units", "box_ranges", "missing"),
    *("align_block", "align_weight", "align_projection", "align_gamma"),
    *("audio_channels", "sampling_rate", "frames", "frame_rate", "channel_axis", "short_clips", "normalize_data"),
}
# where the data are: free as long as they are the same data
PLACES = {
    *("dataset", "split", "image_column", "label_column", "num_classes", "caption_column"),
    "condition_column",
    *("latents", "vae", "text_encoder", "pipeline", "align_to"),
    *("text_column", "label_bins", "tokenizer", "vocab_size"),
    *("audio_column", "video_column", "array_column", "columns"),
}
# of those what is read of the files, which their names and sizes don't tell
READ = {"image_column", "audio_column", "video_column", "array_column"}
# of a stream, whose rows nobody has read before, also these
READ_OF_STREAMS = READ | {"text_column", "label_column", "caption_column"}
# free to change, but it is said
SAID = {
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "batch_size", "gradient_accumulation_steps"),
    *("mixed_precision", "allow_tf32"),
}


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not whole."""


def facts_of_progress(progress):
    """What a card says of where a run stands: JSON-able."""
    return {
        "steps": progress["step"],
        "images_seen": progress["images_seen"],
        "final_loss": progress["loss"],
        "train_seconds": round(progress["seconds"], 1),
    }


def list_checkpoints(output_dir):
    """The finished checkpoints of a run, oldest first."""
    folder = os.path.join(output_dir, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in sorted(names) if re.fullmatch(r"step-\d{8}", name)]


def hashes(folder, names):
    """{name: SHA-256} of files in a folder."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: hash_of_file(os.path.join(folder, name)), names), strict=True))


def write_state(folder, state):
    """Write the state.json of a checkpoint whose other files are all there."""
    names = [
        os.path.relpath(os.path.join(parent, name), folder) for parent, _, found in os.walk(folder) for name in found
    ]
    sizes = {name: os.path.getsize(os.path.join(folder, name)) for name in names}
    state = json.loads(json.dumps(state | {"sizes": sizes, "hashes": hashes(folder, names)}))
    with open(os.path.join(folder, "state.json"), "w", encoding="utf-8") as file:
        json.dump(state | {"hash": hash_of(state)}, file, indent=2)


def read_state(folder):
    """The state.json of a checkpoint. Raises DamagedCheckpoint where it, or another file, is not as it was written."""
    path = os.path.join(folder, "state.json")
    try:
        if not os.path.isfile(path):
            raise ValueError("it has no state.json")
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        if not isinstance(state, dict) or state.pop("hash", None) != hash_of(state):
            raise ValueError("its state.json is damaged, or of an older release")
        sizes, hashed = state.get("sizes"), state.get("hashes")
        if not (isinstance(sizes, dict) and isinstance(hashed, dict) and sizes.keys() == hashed.keys()):
            raise ValueError("its state.json doesn't say what its files are")
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{folder!r} is not a checkpoint of this script: {error}") from error
    for name, size in state["sizes"].items():
        path = os.path.join(folder, name)
        found = os.path.getsize(path) if os.path.isfile(path) else 0
        if found != size:
            raise DamagedCheckpoint(f"{folder!r} is damaged: {name} has {found:,} of {size:,} bytes")
    try:
        found = hashes(folder, list(state["hashes"]))
    except OSError as error:
        raise DamagedCheckpoint(f"{folder!r} cannot be read: {error}") from error
    for name in found:
        if found[name] != state["hashes"][name]:
            raise DamagedCheckpoint(f"{folder!r} is damaged: {name} is not what was written")
    return state


def save_checkpoint(config, accelerator, run, state, lr_scheduler, data_fingerprint=None, origin=None):
    """Networks, optimizer, loss scale, random state, EMA, learning rate and position in the data, as one folder, of a
    `TrainingState`; with what its task says of its data and of the weights that it began with.

    Where it cannot be written (a full disk), says so, leaves no half of it behind, and keeps the older ones. Returns
    whether it was written, the same in every process.
    """
    final = os.path.join(config.output_dir, "checkpoints", f"step-{state.progress['step']:08d}")
    partial = problem = None
    try:
        with ExitStack() as stack:
            if accelerator.is_main_process:
                try:
                    partial = stack.enter_context(whole_folder(final))
                except OSError as error:
                    problem = error
            [partial] = broadcast_object_list([partial])
            if partial is not None:
                problem = state.averages.save(partial, accelerator)
                try:
                    accelerator.save_state(partial)
                except Exception as error:  # torch and safetensors have their own for a full disk
                    problem = problem or error
            if any_process(problem, accelerator):
                raise problem or OSError("another process could not write its part")
            if accelerator.is_main_process:
                written = {
                    "run_id": run.id,
                    "progress": state.progress,
                    "modules": list(state.modules),
                    "ema": state.averages.state(),
                    "lr_scheduler": lr_scheduler.state_dict(),
                    "config": asdict(config),
                    "data": data_fingerprint,
                    "origin": origin,
                }
                write_state(partial, written)
    except Exception as error:  # those above, and of the folder's last step, its renaming
        problem = error
    saved = not any_process(problem, accelerator)
    if accelerator.is_main_process and not saved:
        print(f"checkpoint {final} could not be written: {problem}; the older ones stay, the run goes on")
    if accelerator.is_main_process and saved:
        # newer ones are left from a future that the run didn't have
        past = [path for path in list_checkpoints(config.output_dir) if path <= final]
        for old in past[: -config.checkpoints_total_limit]:
            with surviving(f"the removal of {old}"):
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return saved


def any_process(problem, accelerator):
    """Whether any of the processes has a problem; the same answer in all of them, and not before all have come here."""
    failed = torch.tensor(float(problem is not None), device=accelerator.device)
    return bool(accelerator.reduce(failed, reduction="sum") > 0)


def differences(before, now, name=""):
    """What differs between two JSON values, as ["classes 0 was 'cat', is 'dog'", ...]."""
    if isinstance(before, list) and isinstance(now, list):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [each for key in keys for each in differences(before.get(key), now.get(key), f"{name} {key}".strip())]
    return [] if before == now else [f"{name} was {before!r:.100}, is {now!r:.100}"]


def options_of(config):
    """The options of a config, as JSON gives them back."""
    return json.loads(json.dumps(asdict(config)))


def check_same_run(folder, state, config, modules, data_fingerprint):
    """Raises ValueError where a checkpoint is of another configuration, of a task with other modules, of other data, or
    of a step that this run does not reach. Returns what else changed."""
    # an option that is newer than the checkpoint was at its default
    before, now = options_of(type(config)()) | state["config"], options_of(config)
    for options in (before, now):
        options |= {name: mapping(name, options[name]) for name in options if name.endswith("_kwargs")}
    known = state["data"] is not None and data_fingerprint is not None
    names = FIXED if known or config.allow_other_data else FIXED | PLACES
    changed = differences(*({name: options[name] for name in now if name in names} for options in (before, now)))
    changed += differences(state.get("modules", []), list(modules), "modules")
    if changed:
        raise ValueError(
            f"checkpoint {folder!r} is of a different run: {', '.join(changed)}. Pass the same values, or start anew"
        )
    if state["progress"]["step"] > config.max_train_steps:
        raise ValueError(
            f"checkpoint {folder!r} is of step {state['progress']['step']:,}, beyond max_train_steps "
            f"{config.max_train_steps:,}: pass more steps, or an older checkpoint by its folder"
        )
    other = differences(state["data"], json.loads(json.dumps(data_fingerprint))) if known else []
    if known and not now.get("latents"):
        read = READ_OF_STREAMS if now.get("streaming") else READ
        other += differences(*({name: options[name] for name in now if name in read} for options in (before, now)))
    if other and not config.allow_other_data:
        raise ValueError(
            f"checkpoint {folder!r} was trained on other data: {', '.join(other[:5])}{', ...' * (len(other) > 5)}. "
            f"Pass the same data, or --allow_other_data to go on with these"
        )
    said = differences(*({name: options[name] for name in now if name in SAID} for options in (before, now)))
    return said + [f"data: {each}" for each in other[:5]]


def resume(config, accelerator, run, averages, modules, lr_scheduler, data_fingerprint=None):
    """Put everything back that `save_checkpoint` wrote, from the checkpoint that the config names or, for "latest", the
    newest that can be read; return its progress, or None to start afresh. `modules`: those of the task, by name.

    Raises ValueError for a folder that is no whole checkpoint, and for one of a different configuration or other data.
    """
    if config.resume_from_checkpoint is None:
        return None
    latest = config.resume_from_checkpoint == "latest"
    folders = list_checkpoints(config.output_dir)[::-1] if latest else [config.resume_from_checkpoint]
    # one process looks, for all
    folders = broadcast_object_list([folders])[0]
    for folder in folders:
        state = problem = None
        if accelerator.is_main_process:
            try:
                state = read_state(folder)
            except DamagedCheckpoint as error:
                problem = str(error)
        state, problem = broadcast_object_list([state, problem])
        if problem is None:
            changed = check_same_run(folder, state, config, modules, data_fingerprint)
            problem = load(folder, state, accelerator, averages, lr_scheduler)
        if problem is not None:
            if folder == folders[-1]:
                anew = "; no older one is left: leave --resume_from_checkpoint out and begin anew" if latest else ""
                raise DamagedCheckpoint(problem + anew)
            accelerator.print(f"{problem}; going back to the one before")
            continue
        run.id, progress = state["run_id"], state["progress"]
        accelerator.print(f"resuming from {folder}: step {progress['step']}, {progress['images_seen']} images seen")
        if changed:
            accelerator.print(f"changed since then: {', '.join(changed)}")
        progress["share"] = share_done(
            progress, state["config"]["max_train_steps"], state["config"].get("max_train_seconds")
        )
        follow_schedule(config, accelerator, lr_scheduler, state)
        run.rewind(progress["step"])
        accelerator.wait_for_everyone()
        return progress
    return None


def load(folder, state, accelerator, averages, lr_scheduler):
    """Read a checkpoint whole. Returns what went wrong in any process, or None; then nothing is as it was, until
    another one is read."""
    problem, scaler = None, accelerator.scaler
    if "scaler.pt" not in state["sizes"]:  # of a run without a loss scale
        accelerator.scaler = None
    try:
        accelerator.load_state(folder)
        # a checkpoint is of a whole optimizer step, of however many micro-batches: the next begins with its first
        accelerator.step = 0
        lay_out(lr_scheduler.optimizer)
        averages.load(folder, state["ema"])
        lr_scheduler.load_state_dict(state["lr_scheduler"])
    except Exception as error:  # torch, accelerate and safetensors have their own
        problem = error
    accelerator.scaler = scaler
    if any_process(problem, accelerator):
        return f"{folder!r} cannot be read: {problem or 'by another process'}"
    return None


def lay_out(optimizer):
    """Give an optimizer's moments the memory layout of their parameters: that in which they were saved, on another
    device, may be another, and fused kernels take them for the same. Raises ValueError for moments of 8 bits, which are
    scaled by blocks of memory."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if (
                isinstance(value, torch.Tensor)
                and value.shape == parameter.shape
                and value.stride() != parameter.stride()
            ):
                if not value.is_floating_point():
                    raise ValueError(
                        f"{name} of {value.dtype} lies in memory by strides {value.stride()}, its weights by "
                        f"{parameter.stride()}: go on on a device of the kind that the run began on"
                    )
                state[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)
