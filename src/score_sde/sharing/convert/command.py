"""One function for every kind of source, which `score-sde convert` calls."""

import os

from ...pipelines.wording import check_choice
from ..bundles import save_bundle
from ..facts import check_license
from ..opening import open_autoencoder
from . import consistency_models, guided_diffusion, original_dit, score_sde_pytorch
from .checkpoints import check_output
from .consistency_models import pipeline_from_consistency_models
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
    "consistency-models": pipeline_from_consistency_models,
    "from-diffusers": pipeline_from_diffusers,
}
# of the weights that the originals' authors released
LICENSES = {
    "dit": original_dit.LICENSE,
    "score-sde": score_sde_pytorch.LICENSE,
    "guided-diffusion": guided_diffusion.LICENSE,
    "consistency-models": consistency_models.LICENSE,
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
