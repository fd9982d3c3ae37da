"""Average the weights of a finished run anew: over another length, or by another of the decays that it kept.

    score-sde reconstruct-ema runs/dit --sigma_rel 0.12 --output runs/dit/pipeline-0.12
    score-sde reconstruct-ema runs/dit --decay 0.999 --output runs/dit/pipeline-0.999

`--sigma_rel` is the standard deviation of a power-function average as a share of the training time, of any size; the
run must have stored snapshots (`--ema_snapshot_steps`). `--decay` is one of its `--further_ema_decays`, from the newest
checkpoint. Writes a pipeline folder like that of the run, with a card; figures that were measured on the run's pipeline
are those of other weights and not carried over.
"""

import argparse
import json
import os
from contextlib import ExitStack

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from score_sde.ema import reconstruction_weights
from score_sde.sharing.bundles import load_bundle, save_bundle
from score_sde.training.parts.averages import file_of_decay, list_snapshots
from score_sde.training.parts.checkpoints import facts_of_progress, list_checkpoints, read_state
from score_sde.training.parts.networks import outside_classes
from score_sde.training.parts.options import OneLineParser


def reconstructed(run, run_id, sigma_rel, step=None):
    """The weights {name: tensor} of the average of this width at this step (None for the last snapshot's), the step,
    and the relative error of its profile.

    Raises ValueError where there are no snapshots, none that reach the step, or one damaged or not of the run `run_id`.
    """
    snapshots = list_snapshots(run)
    last = max((each for each, _, _ in snapshots), default=0)
    step = last if step is None else step
    if not 0 < step <= last:
        raise ValueError(
            f"{run!r} has snapshots up to step {last}, not {step}"
            if snapshots
            else f"{run!r} holds no ema_snapshots: train with --ema_snapshot_steps"
        )
    # later ones would bring in weights that the average doesn't hold
    steps, widths, paths = zip(*[each for each in snapshots if each[0] <= step], strict=True)
    weights, error = reconstruction_weights(steps, widths, step, sigma_rel)
    with ExitStack() as stack:
        files = []
        for path in paths:
            try:
                files.append(stack.enter_context(safe_open(path, framework="pt")))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"snapshot {path} is damaged ({error}): move it out of the way") from error
            check_run((files[-1].metadata() or {}).get("run_id"), run_id, path)
        found = {}
        for name in files[0].keys():  # noqa: SIM118
            stored = [file.get_tensor(name) for file in files]
            found[name] = sum(w * x.double() for w, x in zip(weights, stored, strict=True)).to(stored[0].dtype)
    return found, step, error


def check_run(found, run_id, path):
    if found != run_id:
        raise ValueError(f"{path} is of another run, {found}, than the pipeline, {run_id}: move it out of the way")


def main(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="output_dir of the run")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--sigma_rel", type=float, help="relative width of a power-function average, such as 0.1")
    kind.add_argument("--decay", type=float, help="one of the run's further_ema_decays")
    parser.add_argument("--step", type=int, help="with --sigma_rel: as if training had ended there (default: the last)")
    parser.add_argument("--output", required=True, help="folder for the new pipeline")
    parser.add_argument("--network", help="its class, where the run named one from outside: package.module:Class")
    options = parser.parse_args(argv)
    folder = os.path.join(options.run, "pipeline")
    try:
        classes = outside_classes(options.network)
        if not os.path.isfile(os.path.join(folder, "model_index.json")):
            raise ValueError(
                f"{options.run!r} holds no pipeline folder: the run must have come to its end, and not be one of LoRA"
            )
        with open(os.path.join(folder, "training.json"), encoding="utf-8") as file:
            facts = json.load(file)
        if options.decay is None:
            weights, step, error = reconstructed(options.run, facts.get("run_id"), options.sigma_rel, options.step)
            print(f"sigma_rel {options.sigma_rel:g} at step {step}; relative error of the profile {error:.2g}")
            facts["config"].pop("ema_decay")
            if step != facts["steps"]:
                for name in ("images_seen", "final_loss", "train_seconds"):  # of the whole run
                    facts.pop(name)
            facts |= {"steps": step, "ema_sigma_rel": options.sigma_rel}
        else:
            checkpoints = list_checkpoints(options.run)
            state = read_state(checkpoints[-1]) if checkpoints else facts
            kept = state["config"]["further_ema_decays"]
            if not checkpoints or options.decay not in kept:
                raise ValueError(f"no checkpoint of {options.run!r} holds the decay {options.decay}; it kept {kept}")
            check_run(state["run_id"], facts.get("run_id"), checkpoints[-1])
            weights = load_file(os.path.join(checkpoints[-1], file_of_decay(options.decay)))
            facts["config"]["ema_decay"] = options.decay
            # the run may have gone on since its pipeline was written, or have lost its last checkpoints
            facts |= facts_of_progress(state["progress"])
            print(f"decay {options.decay} at step {facts['steps']}")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")

    pipeline = load_bundle(folder, classes=classes)
    with torch.no_grad():
        parameters = dict(pipeline.denoiser.named_parameters())
        for name, average in weights.items():  # frozen weights have none
            parameters[name].copy_(average)
    print(f"pipeline: {save_bundle(pipeline, options.output, facts=facts)}")


if __name__ == "__main__":
    main()
