"""Latents on the Hub: push what encode_latents.py wrote as a dataset with its card, and fetch it for training.

    score-sde share-latents runs/latents somebody/latents --private
    score-sde train --latents somebody/latents --output_dir runs/dit

An autoencoder that is a folder here goes along, so that the dataset is enough to train and to sample; one from the Hub
is named.
"""

import json
import os
import sys
import tempfile

from huggingface_hub import CommitOperationAdd, DatasetCard, DatasetCardData, HfApi

from score_sde.pipelines.wording import one_line
from score_sde.pipelines.writing import write_json
from score_sde.sharing.downloading import hub_errors
from score_sde.sharing.facts import check_license, check_repo_id, dataset_name, writable
from score_sde.sharing.hub import repo_to_push_to
from score_sde.sharing.markdown import render
from score_sde.sharing.pushed_files import published
from score_sde.training.parts.latent_shards import LatentDataset, check_shard, shard_path
from score_sde.training.parts.latents import fingerprint, load_vae
from score_sde.training.parts.options import OneLineParser


SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")


def size_in_words(facts):
    """The size of the data of latents: "256 px" of images, the shape of others."""
    return f"{facts['resolution']} px" if "data_shape" not in facts else " x ".join(map(str, facts["data_shape"]))


def latents_card(facts, repo_id, license=None):
    """The card of latents on the Hub, from their latents.json."""
    facts = writable(facts)
    rows, name = facts["rows"], dataset_name(facts)
    data = DatasetCardData(
        license=license,
        pretty_name=one_line(
            f"Latents of {name}, {facts['split']}, "
            + ("several sizes" if facts.get("buckets") else size_in_words(facts))
        ),
        size_categories=[SIZES[max(0, len(str(rows)) - 3)]],
        source_datasets=[name] if facts.get("dataset_on_hub") else None,
        task_categories=["unconditional-image-generation"],
        tags=["score-sde", "latents"],
        # shards of tensors are nothing to look at
        viewer=False,
    )
    return DatasetCard(
        render("latents_template.md", data, facts=facts, name=name, repo=repo_id, title=data.pretty_name)
    )


def push_latents(folder, repo_id, private=None, license=None, token=None):
    """Upload the latents in a folder as a dataset, in one commit.

    Args:
        folder: as encode_latents.py wrote it, whole.
        repo_id: the dataset, somebody/latents; made if it doesn't exist.
        private: visibility of a new repo; None for the owner's default.
        license: of the latents, as the Hub calls it; None leaves it out of the card.
        token: None for the one that `hf auth login` stored.

    Returns:
        The address of the commit. Raises ValueError for latents that are not whole, or whose autoencoder is no longer
        the one that encoded them, OSError where the Hub cannot be reached or refuses, with what to do.
    """
    check_repo_id(repo_id)
    check_license(license)
    facts, vae = dict(LatentDataset(folder).facts), None
    for shard in range(facts["num_shards"]):
        check_shard(folder, shard, facts)
    if os.path.isabs(facts["vae"]):
        try:
            vae = load_vae(facts["vae"])
        except ValueError:
            vae = None
        if vae is None or fingerprint(vae) != facts["vae_fingerprint"]:
            raise ValueError(f"the autoencoder of {folder!r} is no longer in {facts['vae']!r}: encode the dataset anew")
        facts["vae"] = "vae"
    facts["dataset"] = dataset_name(facts)
    if os.path.isabs((facts.get("captions") or {}).get("text_encoder") or ""):
        # a folder of this machine: who trains on the latents says where it is
        facts["captions"] = facts["captions"] | {"text_encoder": None}
    if os.path.isabs((facts.get("features") or {}).get("model") or ""):
        facts["features"] = facts["features"] | {"model": os.path.basename(facts["features"]["model"])}
    texts = {
        "latents.json": json.dumps(facts, indent=2) + "\n",
        "README.md": str(latents_card(facts, repo_id, license)),
    }
    operations = [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
    for shard in range(facts["num_shards"]):
        path = shard_path(folder, shard)
        operations.append(CommitOperationAdd(os.path.basename(path), path))
    api = HfApi(token=token)
    # the autoencoder is written anew: what else lies in its folder is nobody's business
    with tempfile.TemporaryDirectory() as temporary:
        if vae is not None:
            vae.save_pretrained(temporary)
            config = json.loads(vae.to_json_string())
            config.pop("_name_or_path", None)  # a folder of this machine
            write_json(os.path.join(temporary, "config.json"), config)
            names = sorted(os.listdir(temporary))
            operations += [
                CommitOperationAdd(f"vae/{name}", published(os.path.join(temporary, name))) for name in names
            ]
        message = f"Upload {facts['rows']} latents"
        with hub_errors(OSError, f"{repo_id} was not pushed", token), repo_to_push_to(api, repo_id, private, "dataset"):
            return api.create_commit(repo_id, operations, commit_message=message, repo_type="dataset").commit_url


def main(argv=None):
    parser = OneLineParser(description="Push latents to the Hub, as a dataset.")
    parser.add_argument("folder", help="latents, as score-sde encode-latents wrote them")
    parser.add_argument("repo_id", help="somebody/latents; made if it doesn't exist")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repo private")
    parser.add_argument("--license", help="of the latents, as the Hub calls it")
    try:
        print(push_latents(**vars(parser.parse_args(argv))))
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
