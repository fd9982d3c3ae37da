"""The command `score-sde`: each of its subcommands calls what the package has.

    score-sde quick-start
    score-sde train quick_start/diffusion --latents runs/latents --output_dir runs/dit
    score-sde sample runs/dit/pipeline --classes Dress Bag
    score-sde sample somebody/emoji --prompt "a red apple" "a cat"

Training commands take the options of their script, and those of `accelerate launch`. What is slow to import is imported
inside the commands, so that help is quick.
"""

import json
import logging
import os
import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from score_sde import __version__
from score_sde.command_files import check_folder, check_png, check_samples_file, open_image, write_samples


PROGRAM = "score-sde"
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 120},
)

# --- scripts of training ------------------------------------------------------------------------------------------

# subcommand: (its module in score_sde.training, the class of its options)
LAUNCHED = {
    "train": ("train", "TrainConfig"),
    "distill": ("distill", "DistillConfig"),
    "train-autoencoder": ("train_autoencoder", "AutoencoderConfig"),
    "train-classifier": ("train_classifier", "ClassifierConfig"),
    "encode-latents": ("encode_latents", "EncodeConfig"),
    "evaluate": ("evaluate", "EvaluateConfig"),
}
HELP = {
    "quick-start": "From nothing to a measured model, in minutes.",
    "train": "Train a diffusion model.",
    "distill": "Distil one into a model of one to four evaluations.",
    "train-autoencoder": "Train an autoencoder, for diffusion in its latents.",
    "train-classifier": "Train a classifier of noisy samples, for guidance.",
    "encode-latents": "Encode a dataset into latents, once before training.",
    "evaluate": "Measure a pipeline, or images.",
    "reconstruct-ema": "Average the weights of a finished run anew.",
    "share-latents": "Push latents to the Hub, as a dataset.",
    "tokenizer": "Make a tokenizer from texts.",
}


def run_script(context: typer.Context):
    """A script of score_sde.training, with the rest of the command line."""
    command, arguments = str(context.command.name), context.args
    # what a script knows of its name and of the command that was typed
    sys.argv = [f"{PROGRAM} {command}", *arguments]
    if command not in LAUNCHED:
        import_module(f"score_sde.training.{command.replace('-', '_')}").main(arguments)
        return
    from score_sde.training.parts.launching import is_to_launch, launch, split_arguments
    from score_sde.training.parts.options import parse

    module, config_class = LAUNCHED[command]
    script = import_module(f"score_sde.training.{module}")
    options = getattr(script, config_class)
    own, launching = split_arguments(options, arguments)
    if is_to_launch(launching):
        parse(options, own)  # what is wrong is said here, once
        raise SystemExit(launch(launching, "score_sde.cli", [command, *arguments]))
    script.main(own)


for name, text in HELP.items():
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(name, help=text, context_settings=settings, add_help_option=False)(run_script)


# --- pipelines ----------------------------------------------------------------------------------------------------

Bundle = Annotated[str, typer.Argument(metavar="FOLDER_OR_REPO", help="A pipeline folder, or somebody/model.")]
Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="A pipeline folder.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repo.", show_default="main")]
Outside = Annotated[
    str | None, typer.Option(metavar="MODULE:CLASS", help="Class of a network from outside, which is imported.")
]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1.", show_default="the accelerator, or cpu")]


def open_pipeline(folder_or_repo, device, network=None, **arguments):
    """A pipeline on a device, by default the accelerator where there is one."""
    import torch

    from score_sde import load_bundle
    from score_sde.pipelines.bundling import BundleMixin
    from score_sde.training.parts.networks import outside_classes

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(device or accelerator)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {error}") from error
    pipeline = load_bundle(folder_or_repo, classes=outside_classes(network), **arguments)
    if not isinstance(pipeline, BundleMixin):
        raise ValueError(
            f"{str(folder_or_repo)!r} is a {type(pipeline).__name__} of diffusers, whose arguments this command "
            f"doesn't know: open it by score_sde.load_bundle and call it in Python"
        )
    return pipeline.to(device)


def class_numbers(classes, pipeline):
    """The classes that a command line names, by name or number, as numbers. Raises ValueError for others."""
    from score_sde.training.parts.options import nearest

    if pipeline.num_classes is None:
        raise ValueError("--classes: this model has no classes")
    names = {name: int(number) for number, name in (pipeline.config.id2label or {}).items()}
    numbers = {str(number): number for number in range(pipeline.num_classes)}
    for each in classes:
        if each not in names | numbers:
            known = ", ".join([*names, f"0 to {len(numbers) - 1}"])
            raise ValueError(f"class {each!r} is unknown; this model knows {known}{nearest(each, list(names))}")
    return [(numbers | names)[each] for each in classes]


# options of `sample` that mean something for images and signals alone, and for texts alone
OF_IMAGES = ("negative_prompt", "condition_image", "height", "width")
POINTS = 2000  # that a picture of points shows, unless said
OF_TEXTS = ("length", "block_length", "temperature", "top_p", "top_k", "stream", "complete")


def refuse(context, names, what):
    """Raise ValueError for options that were given and mean nothing for what a model makes."""
    found = [name for name in names if context.get_parameter_source(name).name == "COMMANDLINE"]
    if found:
        raise ValueError(f"--{found[0]} means nothing for this model, which makes {what}")


@app.command()
def sample(
    context: typer.Context,
    bundle: Bundle,
    classes: Annotated[list[str] | None, typer.Option(metavar="NAME ...", help="Names or numbers, in turn.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT ...", help="Words that an image follows, that a text begins with; in turn."),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative_prompt", help="Words that guidance leads away from.")
    ] = None,
    condition_image: Annotated[
        list[str] | None,
        typer.Option("--condition_image", metavar="FILE ...", help="Images that the model sees beside; in turn."),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option(
            *("--num_images", "--num_texts"),
            min=1,
            show_default="one per class, prompt or condition image, or 16 images, 1 text",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Time steps.", show_default="50, or what a few-step model was made for")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance: 1 is none.")] = 1.0,
    height: Annotated[int | None, typer.Option(help="In pixels.", show_default="the network's")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", show_default="the network's")] = None,
    length: Annotated[int | None, typer.Option(help="Of a text, in tokens.", show_default="the network's")] = None,
    block_length: Annotated[
        int | None, typer.Option("--block_length", help="Write texts block by block, of so many tokens each.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Below 1, likelier tokens.", show_default="the pipeline's")
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top_p", help="Draw from the fewest tokens with this share.")] = None,
    top_k: Annotated[int | None, typer.Option("--top_k", help="Draw from the so many likeliest tokens.")] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="Prompts are whole texts but for gaps, [MASK]: they end where they end.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Show a text while it forms.")] = False,
    predictor: Annotated[str | None, typer.Option(help="Solver, by its name.", show_default="the pipeline's")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Sample i is drawn from seed + i.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Samples drawn at once.")] = 64,
    output: Annotated[
        str | None,
        typer.Option(
            help="A .png, a .npy, of sounds also .wav, of videos .gif, of points .csv; of texts .txt or .jsonl.",
            show_default="samples.png; texts are printed",
        ),
    ] = None,
    revision: Revision = None,
    network: Outside = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
):
    """Draw a grid of samples, of sounds and videos also to be played, or texts."""
    import torch

    from score_sde import DiscreteScoreScheduler, ScoreSDEScheduler
    from score_sde.cli_texts import check_terminal, check_texts_file, draw_texts, print_texts, write_texts
    from score_sde.sharing.token_facts import makes_texts

    if output is not None:
        check_folder("--output", output)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype!r} is unknown; choose one of float32, bfloat16, float16")
    is_of_texts = makes_texts(bundle, **given(revision=revision))
    refuse(context, OF_IMAGES if is_of_texts else OF_TEXTS, "texts" if is_of_texts else "no texts")
    if is_of_texts:
        if output is not None:
            check_texts_file("--output", output)
        if stream:
            check_terminal("--stream")
        if complete and not prompt:
            raise ValueError("--complete is of prompts: pass --prompt, with [MASK] for each token to be filled in")
    else:
        output = output or "samples.png"
        check_samples_file("--output", output)
    pipeline = open_pipeline(bundle, device, network, dtype=getattr(torch, dtype), **given(revision=revision))
    if predictor is not None:
        scheduler_class = DiscreteScoreScheduler if is_of_texts else ScoreSDEScheduler
        pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, predictor=predictor)
    if is_of_texts:
        asked = class_numbers(classes, pipeline) if classes else None
        texts, evaluations = draw_texts(
            pipeline,
            number or max(len(classes or ()), len(prompt or ()), 1),
            seed,
            batch_size,
            asked,
            prompt,
            stream,
            **given(length=length, block_length=block_length, temperature=temperature, top_p=top_p, top_k=top_k),
            complete=complete,
            num_inference_steps=steps or 50,
            guidance_scale=guidance,
        )
        if output is None:
            print_texts(texts)
        else:
            write_texts(output, texts, seed)
            print(f"{len(texts)} texts, {evaluations} network evaluations: {output}")
        return
    check_samples_file("--output", output, pipeline.kind.name)
    asked = class_numbers(classes, pipeline) if classes else range(pipeline.num_classes or 0)
    if prompt and not pipeline.takes_prompts:
        raise ValueError("--prompt: this model has no text encoder")
    beside = [open_image("--condition_image", path) for path in condition_image or ()]
    size = given(height=height, width=width)
    if pipeline.takes_condition_image and not beside:
        pipeline.set_size(**size)
        _, high, wide = pipeline.condition_shape()
        raise ValueError(
            f"this model sees an image beside the sample: pass --condition_image, files of {wide} x {high} pixels"
        )
    told = pipeline.encode_condition(beside, **size)["condition_sample"] if beside else None
    of_points = pipeline.kind.name == "point"
    usual = POINTS if of_points else min(16, len(asked) or 16)
    count = number or max(0 if of_points else len(classes or ()), len(prompt or ()), len(beside)) or usual
    prompts = [prompt[i % len(prompt)] for i in range(count)] if prompt else None
    pipeline.set_progress_bar_config(desc="sampling", leave=False)
    images = []
    for first in range(0, count, batch_size):
        numbers = range(first, min(first + batch_size, count))
        drawn = pipeline(
            batch_size=len(numbers),
            class_labels=[asked[i % len(asked)] for i in numbers] if asked else None,
            prompt=prompts and [prompts[i] for i in numbers],
            negative_prompt=negative_prompt,
            conditions=None if told is None else {"condition_sample": told[[i % len(told) for i in numbers]]},
            guidance_scale=guidance,
            num_inference_steps=steps or "auto",
            generator=[torch.Generator("cpu").manual_seed(seed + i) for i in numbers],
            output_type="np" if str(output).lower().endswith(".npy") else None,
            **size,
        )
        images.extend(drawn.images)  # a list, or an array
    captions = prompts
    if of_points and asked:
        captions = [(pipeline.config.id2label or {}).get(str(label), str(label)) for label in asked]
        captions = [captions[i % len(asked)] for i in range(count)]
    written = write_samples(pipeline.kind, images, output, None if prompts else len(asked) or None, captions)
    print(f"{count} {pipeline.kind.name}s: {written}")


@app.command()
def info(
    bundle: Bundle,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    revision: Revision = None,
):
    """Path, network, data, figures and code of a pipeline, or of a LoRA adapter.

    No model is built, no weights are downloaded.
    """
    from score_sde.sharing.info import as_text, describe

    facts = describe(bundle, **given(revision=revision))
    print(json.dumps(facts, indent=2) if as_json else as_text(facts))


@app.command()
def calibrate(
    folder: Folder,
    nfe: Annotated[
        list[int] | None, typer.Option(metavar="N ...", min=2, show_default="5 8", help="Network evaluations.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="The guidance that will be used.")] = 1.0,
    num_samples: Annotated[int, typer.Option("--num_samples", min=1, help="Trajectories that are compared.")] = 16,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    network: Outside = None,
    device: Device = None,
):
    """Fit times of sampling to a model, in its folder."""
    import torch

    from score_sde import ScoreSDEScheduler
    from score_sde.sharing.bundles import save_scheduler
    from score_sde.sharing.downloading import NoPipelineFolder, is_adapter

    if not os.path.isdir(folder):
        raise ValueError(f"{folder!r} is no folder: a repo is calibrated where it is downloaded to")
    if is_adapter(folder):
        raise NoPipelineFolder(folder)
    pipeline = open_pipeline(folder, device, network)
    if not isinstance(pipeline.scheduler, ScoreSDEScheduler):
        raise ValueError(
            f"times are fitted for a ScoreSDEScheduler; that of {folder!r} is a {type(pipeline.scheduler).__name__}"
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    errors = pipeline.scheduler.calibrate(
        pipeline, nfe=nfe or [5, 8], num_samples=num_samples, guidance_scale=guidance, generator=generator
    )
    save_scheduler(pipeline.scheduler, folder)
    for n, (before, after) in errors.items():
        print(f"{n} network evaluations: error {before:.3g} before, {after:.3g} after")


@app.command()
def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="The output_dir of each training run.")],
    output: Annotated[str, typer.Option(help="The PNG that is written.")] = "plot.png",
):
    """Draw loss, gradient norm, speed and evaluation of runs."""
    from score_sde.training.parts.plots import plot_runs

    check_png("--output", output)
    print(plot_runs(runs, output))


# --- sharing ------------------------------------------------------------------------------------------------------

Private = Annotated[bool | None, typer.Option("--private", help="Make a new repo private.")]


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="Such as the pipeline folder of a training run.")],
    repo_id: Annotated[str, typer.Argument(help="somebody/model; made if it doesn't exist.")],
    private: Private = None,
    revision: Annotated[str | None, typer.Option(help="Made if it doesn't exist.", show_default="main")] = None,
    commit_message: Annotated[
        str | None, typer.Option("--commit_message", show_default="the name of the folder")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create_pr", help="Open a pull request instead of committing.")] = False,
    tag: Annotated[str | None, typer.Option(help="A tag for the new commit.")] = None,
):
    """Upload a pipeline, a model or a scheduler to the Hub."""
    from score_sde import push_to_hub

    print(
        push_to_hub(
            folder,
            repo_id,
            private=private,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            tag=tag,
        )
    )


@app.command()
def verify(bundle: Bundle, revision: Revision = None):
    """Compare the code in a pipeline with this release's.

    Exit status 1 where a file differs.
    """
    from score_sde.sharing.adapters import small_files_of
    from score_sde.sharing.hub import verify

    verdicts = verify(bundle, **given(revision=revision))
    for path, verdict in verdicts.items():
        # a file's name may hold what a terminal would obey
        print(f"{verdict:8} {''.join(each if each.isprintable() else repr(each)[1:-1] for each in path)}")
    others = sum(verdict != "same" for verdict in verdicts.values())
    if others:
        print(
            f"{others} of {len(verdicts)} files are not those of score-sde {__version__}: of another release, or "
            f"changed by somebody. Read them before you pass trust_remote_code=True; load_bundle runs none of them"
        )
        raise SystemExit(1)
    _, adapter = (None, None) if verdicts else small_files_of(bundle, **given(revision=revision))
    if adapter is not None:
        print(
            "it is a LoRA adapter: weights alone, no code. Verify the model that it is of, which `score-sde info` names"
        )
    elif verdicts:
        print(f"all {len(verdicts)} files are those of score-sde {__version__}")
    else:
        print("it carries no code: diffusers opens it where score-sde is installed, after `import score_sde`")


@app.command()
def card(
    folder: Folder,
    repo_id: Annotated[
        str | None, typer.Option("--repo_id", help="Where it is on the Hub, for the code on the card.")
    ] = None,
):
    """Write the card of a pipeline, or of a LoRA adapter, anew."""
    from score_sde.sharing.adapters import write_adapter_card
    from score_sde.sharing.downloading import is_adapter
    from score_sde.sharing.model_card import write_card

    if is_adapter(folder):
        write_adapter_card(folder, os.path.basename(os.path.abspath(folder)), repo_id)
    else:
        write_card(folder, repo_id)
    print(os.path.join(folder, "README.md"))


@app.command()
def space(
    model: Bundle,
    folder: Annotated[str | None, typer.Option(help="Write the Space there instead of opening the page.")] = None,
    push: Annotated[str | None, typer.Option(help="Push it to this Space, somebody/space, instead.")] = None,
    private: Private = None,
    port: Annotated[int | None, typer.Option(help="Of the page here.", show_default="the first free from 7860")] = None,
):
    """Open a page on which a model draws, or push a Space."""
    from score_sde.sharing.space import open_page, push_space, write_space

    if push:
        print(push_space(push, model, private))
    elif folder:
        print(write_space(folder, model))
    else:
        open_page(model, port)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="FOLDER_OR_REPO", help="Of a LoRA adapter.")],
    output: Annotated[str, typer.Argument(help="The folder that is written; it must not exist, or be empty.")],
    network: Outside = None,
):
    """Write a LoRA adapter and its model as one pipeline."""
    from score_sde.sharing.adapters import merge
    from score_sde.training.parts.networks import outside_classes

    print(f"pipeline: {merge(adapter, output, outside_classes(network))}")


convert = typer.Typer(rich_markup_mode=None, help="Convert other people's weights, or ours to diffusers'.")
app.add_typer(convert, name="convert")

Checkpoint = Annotated[str, typer.Argument(help="The file of the original.")]
Pipeline = Annotated[str, typer.Argument(metavar="FOLDER_OR_REPO", help="A pipeline.")]
Converted = Annotated[str, typer.Argument(help="The folder that is written; it must not exist, or be empty.")]
License = Annotated[str | None, typer.Option(help="Of the weights.", show_default="that of the released weights")]
Weights = Annotated[str, typer.Option(help="ema or model.")]
Network = Annotated[str | None, typer.Option(help="The published network.", show_default="the one that fits")]
NetworkArguments = Annotated[str, typer.Option("--network_kwargs", help="Arguments of the network that differ, JSON.")]


def write_converted(kind, source, output, network_kwargs="{}", **options):
    from score_sde.pipelines.wording import quoted
    from score_sde.sharing.convert import convert

    arguments = json.loads(network_kwargs)
    if not isinstance(arguments, dict):
        raise ValueError(f"--network_kwargs {quoted(arguments)} must be a JSON object")
    try:
        print(f"pipeline: {convert(kind, source, output, **given(**options), **arguments)}")
    except TypeError as error:  # an argument that the network doesn't have
        raise ValueError(str(error)) from error


@convert.command("dit")
def convert_dit(
    source: Checkpoint,
    output: Converted,
    vae: Annotated[str | None, typer.Option(help="Folder or repo; without, a model of pixels.")] = None,
    weights: Weights = "ema",
    num_attention_heads: Annotated[
        int | None, typer.Option("--num_attention_heads", help="For hidden sizes that are not published.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option("--num_classes", help="For a model that was trained without label dropout.")
    ] = None,
    license: License = None,
):
    """A checkpoint of facebookresearch/DiT.

    score-sde convert dit DiT-XL-2-256x256.pt converted --vae stabilityai/sd-vae-ft-ema
    """
    heads = {"num_attention_heads": num_attention_heads, "num_classes": num_classes}
    write_converted("dit", source, output, vae=vae, weights=weights, license=license, **heads)


@convert.command("score-sde")
def convert_score_sde(
    source: Checkpoint,
    output: Converted,
    sde_type: Annotated[str, typer.Option("--sde_type", help="vp, subvp or ve.")],
    network: Network = None,
    network_kwargs: NetworkArguments = "{}",
    weights: Weights = "ema",
    centered: Annotated[
        bool | None, typer.Option("--centered/--not_centered", help="Whether it saw images in [-1, 1] or [0, 1].")
    ] = None,
    license: License = None,
):
    """A checkpoint of score_sde_pytorch (continuous).

    score-sde convert score-sde checkpoint_24.pth converted --sde_type ve
    """
    options = {"sde_type": sde_type, "network": network, "weights": weights, "centered": centered, "license": license}
    write_converted("score-sde", source, output, network_kwargs, **options)


@convert.command("guided-diffusion")
def convert_guided_diffusion(
    source: Checkpoint,
    output: Converted,
    network: Annotated[str, typer.Option(help="The published network: ADM-64 to ADM-512.")],
    network_kwargs: NetworkArguments = "{}",
    beta_schedule: Annotated[
        str | None, typer.Option("--beta_schedule", help="linear or squaredcos_cap_v2.", show_default="the network's")
    ] = None,
    license: License = None,
):
    """A checkpoint of openai/guided-diffusion.

    score-sde convert guided-diffusion 256x256_diffusion.pt converted --network ADM-256
    """
    options = {"network": network, "beta_schedule": beta_schedule, "license": license}
    write_converted("guided-diffusion", source, output, network_kwargs, **options)


@convert.command("consistency-models")
def convert_consistency_models(
    source: Checkpoint,
    output: Converted,
    network: Annotated[str, typer.Option(help="The published network: imagenet64 or lsun256.")],
    network_kwargs: NetworkArguments = "{}",
    num_train_timesteps: Annotated[
        int, typer.Option("--num_train_timesteps", help="40 of cd, 201 of ct_imagenet64, 151 of ct on LSUN.")
    ] = 40,
    license: License = None,
):
    """A checkpoint of openai/consistency_models.

    score-sde convert consistency-models cd_imagenet64_lpips.pt converted --network imagenet64
    """
    options = {"network": network, "num_train_timesteps": num_train_timesteps, "license": license}
    write_converted("consistency-models", source, output, network_kwargs, **options)


@convert.command("from-diffusers")
def convert_from_diffusers(
    source: Pipeline,
    output: Converted,
    frequency_shift: Annotated[
        float | None, typer.Option("--frequency_shift", help="Of a DiT's embedding of time: 0 or 1.")
    ] = None,
    license: License = None,
):
    """A DiTPipeline, or a pipeline around a UNet2DModel.

    score-sde convert from-diffusers google/ddpm-cifar10-32 converted
    """
    write_converted("from-diffusers", source, output, frequency_shift=frequency_shift, license=license)


@convert.command("to-diffusers")
def convert_to_diffusers(source: Pipeline, output: Converted):
    """A DiT of this package as a stock DiTPipeline.

    score-sde convert to-diffusers runs/dit/pipeline converted
    """
    write_converted("to-diffusers", source, output)


# --- this machine -------------------------------------------------------------------------------------------------

# whose versions a report of a bug needs
PACKAGES = (
    *("score-sde", "torch", "diffusers", "transformers", "accelerate", "huggingface-hub", "safetensors", "datasets"),
    *("numpy", "pillow", "torchdiffeq", "torchmetrics", "torch-fidelity", "peft", "deepspeed", "gradio"),
)


@app.command()
def env():
    """Versions and platform for a bug report, as Markdown."""
    import torch

    rows = {"platform": f"{platform.system()} {platform.release()}, {platform.machine()}"}
    rows |= {"Python": platform.python_version(), "CPU cores": os.cpu_count()}
    for package in PACKAGES:
        try:
            rows[package] = version(package)
        except PackageNotFoundError:
            rows[package] = "not installed"
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    names = [str(kind)] * (torch.accelerator.device_count() if kind else 0)
    if kind and kind.type == "cuda":
        names = [
            f"{each.name}, {each.total_memory / 2**30:.0f} GiB"
            for each in map(torch.cuda.get_device_properties, range(len(names)))
        ]
        rows["CUDA"] = torch.version.cuda or f"ROCm {torch.version.hip}"
    rows["accelerators"] = "; ".join(names) or "none"
    print("\n".join(f"- {name}: {value}" for name, value in rows.items()))


# --- the command line ---------------------------------------------------------------------------------------------


def given(**arguments):
    """Those arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
):
    """Score-based diffusion models: train, sample, measure and share them."""


# options that take several values, and say so by the dots in their metavar
OF_SEVERAL = ("--classes", "--condition_image", "--nfe", "--prompt")


def spelled(argv):
    """A command line as typer has it: `--num-images` as `--num_images`, and `--classes Dress Bag` with the option
    before each value."""
    found, option = [], None
    for each in argv:
        if each.startswith("--"):
            name, equals, value = each.partition("=")
            each = "--" + name[2:].replace("-", "_") + equals + value
            option = each if each in OF_SEVERAL else None
        elif option and found[-1] != option:
            found.append(option)
        found.append(each)
    return found


# what libraries say that a user can do nothing about: (logger, words of the message)
NOTICES = [
    ("transformers.utils.import_utils", "requires torchvision"),
    ("transformers.models.auto.image_processing_auto", "`use_fast` parameter is deprecated"),
    # of an AutoencoderTiny that diffusers itself has saved, its block_out_channels
    ("diffusers.configuration_utils", "are not expected and will be ignored"),
]


def silence_notices():
    for logger, words in NOTICES:
        logging.getLogger(logger).addFilter(lambda record, words=words: words not in record.getMessage())


def main(argv=None):
    """Run a command line. Errors are one line on stderr, and exit status 2."""
    silence_notices()
    argv = list(sys.argv[1:] if argv is None else argv)
    # before or after the subcommand
    shows_traceback = "--traceback" in argv
    argv = [each for each in argv if each != "--traceback"]
    if argv and argv[0] not in HELP:
        argv = spelled(argv)
    try:
        status = app(argv or ["--help"], PROGRAM, standalone_mode=False)
    except Exception as error:
        # once a script has begun its work, a traceback is not to be had again soon
        began = getattr(sys.modules.get("score_sde.training.parts.options"), "WORK_BEGUN", None)
        expected = isinstance(error, (ValueError, OSError, FloatingPointError)) or hasattr(error, "format_message")
        if shows_traceback or (began is not None and began.is_set() and not isinstance(error, FloatingPointError)):
            raise
        context = getattr(error, "ctx", None)
        program = context.command_path if context else " ".join([PROGRAM, *argv[:1]])
        message = " ".join((error.format_message() if hasattr(error, "format_message") else str(error)).split())
        if not expected:
            message = f"{type(error).__name__}: {message} (--traceback shows where)"
        print(f"{program}: error: {message or type(error).__name__}", file=sys.stderr)
        status = 2
    raise SystemExit(status)


if __name__ == "__main__":
    main()
