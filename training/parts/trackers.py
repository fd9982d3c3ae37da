"""What accelerate's trackers are shown of a run: its options, values and pictures."""

import os
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
from PIL import Image

from .run_folder import surviving


def start_trackers(config, accelerator):
    # they take plain values only
    options = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in asdict(config).items()}
    accelerator.init_trackers(os.path.basename(os.path.normpath(config.output_dir)), options)


def show_picture(accelerator, name, path, step):
    """Show a PNG file to every tracker that takes images."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        elif tracker.name in ("aim", "clearml"):  # one image a name
            tracker.log_images({name: picture}, step=step)
        elif tracker.name == "trackio":  # of a class of its own
            import trackio

            tracker.log({name: trackio.Image(picture)}, step=step)
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: [picture]}, step=step)


def show_text(accelerator, name, path, step):
    """Show a text file to every tracker that takes texts."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            # as it is, not as Markdown
            tracker.writer.add_text(name, "    " + text.replace("\n", "\n    "), global_step=step)
        elif tracker.name in ("wandb", "trackio", "comet_ml"):
            tracker.log({name: text}, step=step)


@contextmanager
def main_process_goes_on(accelerator):
    """The end of a run, in which no other process waits for what the main one still does, and shows to trackers."""
    trackers, accelerator.trackers = accelerator.trackers, []
    accelerator.end_training()
    accelerator.trackers = trackers
    try:
        yield
    finally:
        for tracker in trackers:
            with surviving("the log"):
                tracker.finish()
