"""The command `score-sde`: each of its subcommands calls what the package has.

    score-sde quick-start
    score-sde train quick_start/diffusion --latents runs/latents --output_dir runs/dit
    score-sde sample runs/dit/pipeline --classes Dress Bag

Training commands take the options of their script, and those of `accelerate launch`. What is slow to import is imported
inside the commands.
"""

import os
import sys
from importlib import import_module

import click
import typer


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

# subcommand: (module of score_sde.training, its config class, how its files in training/configs are called)
LAUNCHED = {
    "train": ("train", "TrainConfig", "diffusion"),
    "train-autoencoder": ("train_autoencoder", "AutoencoderConfig", "autoencoder"),
    "train-classifier": ("train_classifier", "ClassifierConfig", "classifier"),
    "encode-latents": ("encode_latents", "EncodeConfig", "latents"),
    "evaluate": ("evaluate", "EvaluateConfig", "evaluation"),
}
# those that run in one process: (subcommand, module)
SCRIPTS = {"quick-start": "quick_start", "reconstruct-ema": "reconstruct_ema", "share-latents": "share_latents"}
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.callback()
def options(traceback: bool = typer.Option(False, "--traceback", help="Show where an error comes from.")):
    """Score-based diffusion models: train, sample, measure and share them."""


def run_script(context):
    """A script of score_sde.training, with the rest of the command line."""
    command, arguments = context.command.name, context.args
    # what the script says about its name and its command
    sys.argv = [f"score-sde {command}", *arguments]
    if command in SCRIPTS:
        import_module(f"score_sde.training.{SCRIPTS[command]}").main(arguments)
        return
    from score_sde.training.parts import launching
    from score_sde.training.parts.options import installed_configs

    module, config_class, kind = LAUNCHED[command]
    if arguments == ["--list"]:
        for name, comment in installed_configs(kind).items():
            print(f"{name:24} {comment}")
        return
    script = import_module(f"score_sde.training.{module}")
    own, options = launching.split_arguments(getattr(script, config_class), arguments)
    if launching.is_to_launch(options):
        raise SystemExit(launching.launch(options, "score_sde.cli", [command, *arguments]))
    script.main(own)


for name, help in {
    "quick-start": "The whole way in minutes: autoencoder, latents, diffusion model, samples, card.",
    "train": "Train a diffusion model.",
    "train-autoencoder": "Train an autoencoder, for diffusion in its latents.",
    "train-classifier": "Train a classifier of noisy samples, for guidance.",
    "encode-latents": "Encode a dataset into latents, once before training.",
    "evaluate": "Measure a pipeline, or images: distances, classes, likelihood.",
    "reconstruct-ema": "Average the weights of a finished run anew.",
    "share-latents": "Push latents to the Hub, as a dataset.",
}.items():
    app.command(name, help=help, context_settings=PASSED_ON, add_help_option=False)(run_script)


def main(argv=None):
    """Run a command line; an error is a line on stderr and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # before or after the subcommand
    traceback = "--traceback" in argv
    argv = [each for each in argv if each != "--traceback"]
    program = " ".join(["score-sde", *argv[:1]])
    try:
        status = app(argv, "score-sde", standalone_mode=False)
    except click.ClickException as error:
        raise SystemExit(f"") from error
    except click.Abort: 
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
