<<<<<<< HEAD
"""One function for every kind of source, which `score-sde convert` calls."""
=======
"""Other people's checkpoints as pipelines of this package, and ours as stock diffusers pipelines.

    score-sde convert dit DiT-XL-2-256x256.pt converted --vae stabilityai/sd-vae-ft-ema
    score-sde convert score-sde checkpoint_24.pth converted --sde_type ve
    score-sde convert guided-diffusion 256x256_diffusion.pt converted --network ADM-256
    score-sde convert from-diffusers google/ddpm-cifar10-32 converted
    score-sde convert to-diffusers runs/dit/pipeline converted

A checkpoint whose keys or shapes are not those of the network is refused, with their names; pickles are read with
`weights_only=True` alone.
"""
>>>>>>> share

import os

from ...pipelines.wording import check_choice
from ..bundles import save_bundle
from ..facts import check_license
from ..opening import open_autoencoder
from . import guided_diffusion, original_dit, score_sde_pytorch
from .checkpoints import check_output
from .from_diffusers import pipeline_from_diffusers, published_license
from .guided_diffusion import pipeline_from_guided_diffusion
from .original_dit import pipeline_from_original_dit
from .score_sde_pytorch import pipeline_from_score_sde
from .to_diffusers import export_to_diffusers


# what makes a pipeline of every kind of source
KINDS = {
    "dit": pipeline_from_original_dit,
    "score-sde": pipeline_from_score_sde,
    "guided-diffusion": pipeline_from_guided_diffusion,
    "from-diffusers": pipeline_from_diffusers,
}
# of the weights that the originals' authors released
LICENSES = {
    "dit": original_dit.LICENSE,
    "score-sde": score_sde_pytorch.LICENSE,
    "guided-diffusion": guided_diffusion.LICENSE,
}


def convert(kind, source, output, license=None, **options):
    """Write a checkpoint, or a stock pipeline, as a bundle with its card; or a pipeline of ours as a stock one.

    Args:
        kind: one of `KINDS`, or "to-diffusers".
        source: a checkpoint; of "from-diffusers" and "to-diffusers" a folder or a repo on the Hub.
        output: the folder that is written; it must not exist, or be empty.
        license: of the weights, an identifier of the Hub; None for that of the released weights, or of the source's own
            card.
        options: arguments of the function in `KINDS`; `vae` may be a folder or repo.

    Returns:
        The folder, absolute. Raises ValueError, and TypeError for arguments that the network doesn't have, for what
        cannot be converted; nothing is written then.
    """
    check_choice("kind", kind, (*KINDS, "to-diffusers"))
    if kind == "to-diffusers":
        return export_to_diffusers(source, output, **options)
    if license is None:
        license = published_license(source) if kind == "from-diffusers" else LICENSES[kind]
    check_license(license)
    output = check_output(output)
    if isinstance(options.get("vae"), (str, os.PathLike)):
        options["vae"] = open_autoencoder(options["vae"])
    pipeline = KINDS[kind](source, **options)
    name = os.path.splitext(os.path.basename(str(source).rstrip("/")))[0]
    facts = {"model_name": name, "license": license, "converted_from": os.path.basename(source)}
    if kind == "from-diffusers" and not os.path.isdir(source):
        facts["base_model"] = source
    return save_bundle(pipeline, output, facts=facts)
<<<<<<< HEAD
=======


def parser_of_command():
    parser = argparse.ArgumentParser(
        "score-sde convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    def add(kind, help, source):
        command = kinds.add_parser(kind, help=help, description=help)
        command.add_argument("source", help=source)
        command.add_argument("output", help="the folder that is written; it must not exist, or be empty")
        if kind != "to-diffusers":
            license = f"(default: {LICENSES[kind]}, the released weights')" if kind in LICENSES else ""
            command.add_argument("--license", help=f"licence of the weights {license}")
        return command

    def add_network(command, required):
        command.add_argument("--network", required=required, choices=list(UNETS), help="the published network")
        command.add_argument("--network_kwargs", default="{}", help="arguments of the network that differ, JSON")

    command = add("dit", "a checkpoint of facebookresearch/DiT", "the .pt file")
    command.add_argument("--vae", help="folder or repo of the autoencoder; without, a model of pixels")
    command.add_argument("--weights", default="ema", choices=("ema", "model"))
    command.add_argument("--num_attention_heads", type=int, help="for hidden sizes that are not published")
    command.add_argument("--num_classes", type=int, help="for a model that was trained without label dropout")

    command = add("score-sde", "a checkpoint of score_sde_pytorch, with continuous times", "the .pth file")
    command.add_argument("--sde_type", required=True, choices=SCORE_SDE_TYPES)
    command.add_argument("--weights", default="ema", choices=("ema", "model"))
    command.add_argument("--centered", type=int, choices=(0, 1), help="1: it saw images in [-1, 1], 0: in [0, 1]")
    add_network(command, required=False)

    command = add("guided-diffusion", "a checkpoint of openai/guided-diffusion", "the .pt file")
    command.add_argument("--beta_schedule", choices=("linear", "squaredcos_cap_v2"))
    add_network(command, required=True)

    command = add("from-diffusers", "a DiTPipeline, or a pipeline around a UNet2DModel", "folder or repo")
    command.add_argument("--frequency_shift", type=float, choices=(0.0, 1.0), help="see dit_from_diffusers")

    add("to-diffusers", "a pipeline of this package with a DiT as a stock DiTPipeline", "folder or repo")
    return parser


def main(argv=None):
    parser = parser_of_command()
    options = vars(parser.parse_args(argv))
    try:
        network_kwargs = json.loads(options.pop("network_kwargs", "{}"))
        if not isinstance(network_kwargs, dict):
            raise ValueError(f"network_kwargs {quoted(network_kwargs)} must be a JSON object")
        if options.get("centered") is not None:
            options["centered"] = bool(options["centered"])
        output = convert(**options, **network_kwargs)
    except (TypeError, ValueError, OSError) as error:  # TypeError: an argument that the network doesn't have
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"pipeline: {output}")
>>>>>>> share
