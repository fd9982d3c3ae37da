"""Latents as a dataset on the Hub: pushed, described, and trained on from there."""

import json

import pytest
import yaml
from huggingface_hub import DatasetCard
from safetensors.torch import load_file

from runs import TINY_DIT, TINY_RUN, encode, equal, train_tiny
from score_sde.training import share_latents


PUSH = """
import sys
from score_sde.training import share_latents
share_latents.main(sys.argv[1:])
"""
TRAIN = """
import sys
from score_sde.training import train
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_training_on_latents_from_the_hub_is_training_on_the_folder(tiny_vae, small_data, tmp_path, local_hub):
    encode(small_data, tiny_vae, tmp_path / "latents")
    # what lies about stays here
    for folder in (tmp_path / "latents", tiny_vae):
        for name in ("kaggle.json", "moments-00004.safetensors", "notes.safetensors", "token.txt"):
            (folder / name).write_text("secret")
    result = local_hub.run(PUSH, tmp_path / "latents", "me/latents", "--license", "mit", token="hf_writer")
    assert result.returncode == 0, result.stderr
    assert "/datasets/me/latents/commit/" in result.stdout
    files = local_hub.files("me/latents", repo_type="dataset")
    assert files.keys() - {".gitattributes"} == {
        *(f"moments-{shard:05d}.safetensors" for shard in range(4)),
        *("README.md", "latents.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
    }
    facts = json.loads(files["latents.json"])
    assert (facts["vae"], facts["dataset"], facts["rows"]) == ("vae", "train.parquet", 60)
    # nothing of this machine but the latents
    assert str(tmp_path).encode() not in b"".join(files.values())

    arguments = [*TINY_RUN, "--network_kwargs", TINY_DIT, "--max_train_steps", "2"]
    output = tmp_path / "from_hub"
    result = local_hub.run(TRAIN, *arguments, "--latents", "me/latents", "--output_dir", output)
    assert result.returncode == 0, result.stderr
    here = train_tiny(tmp_path / "from_folder", "--latents", tmp_path / "latents", "--max_train_steps", 2)
    weights = output / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert equal(load_file(weights), here)
    # what the rows are is said by the latents, not by options that were not read
    said = json.loads((output / "pipeline" / "training.json").read_text())
    assert (said["dataset"], said["resolution"], said["rows"]) == (facts["dataset"], facts["resolution"], 60)
    assert not said["config"].keys() & {"dataset", "split", "resolution", "image_column", "label_column"}
    assert said["config"]["latents"] == "me/latents"

    result = local_hub.run(TRAIN, *arguments, "--latents", "me/absent", "--output_dir", tmp_path / "absent")
    assert result.returncode != 0
    assert "latents 'me/absent' are no folder here and cannot be had from the Hub: there is no such" in result.stderr


def test_the_card_of_latents_states_their_facts():
    facts = {"dataset": "me/photos", "dataset_on_hub": True, "split": "train", "resolution": 64, "rows": 1000}
    facts |= {"num_classes": 2, "id2label": {"0": "cat", "1": "dog"}, "vae": "me/vae", "vae_fingerprint": "0123"}
    facts |= {"shape": [4, 8, 8], "shard_size": 2048, "num_shards": 1}
    facts |= {"statistics": {"mean": [0.12345, 1.0], "std": [2.0, 0.5]}}
    card = share_latents.latents_card(facts, "me/latents", license="cc-by-4.0")
    data = yaml.safe_load(card.content.split("---")[1])
    assert (data["license"], data["size_categories"]) == ("cc-by-4.0", ["1K<n<10K"])
    assert data["source_datasets"] == ["me/photos"]
    assert isinstance(card, DatasetCard)
    for fact in ("1,000 images of `me/photos`", "4 x 8 x 8", "`me/vae`", "`0123`", "0.1235, 1.0", "cat, dog"):
        assert fact in card.text
    bare = share_latents.latents_card(facts | {"num_classes": None, "id2label": None, "statistics": None}, "me/latents")
    for absent in ("labels", "Classes", "standard deviation per channel", "None", "license"):
        assert absent not in bare.content


def test_latents_that_cannot_be_shared_are_refused(tiny_vae, small_data, tmp_path, capsys):
    encode(small_data, tiny_vae, tmp_path / "latents")
    with pytest.raises(ValueError, match="repo id 'me//latents': it must be like somebody/model"):
        share_latents.push_latents(tmp_path / "latents", "me//latents")
    tiny_vae.rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="the autoencoder of .* is no longer in"):
        share_latents.push_latents(tmp_path / "latents", "me/latents")
    path = tmp_path / "latents" / "moments-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit):
        share_latents.main([str(tmp_path / "latents"), "me/latents"])
    assert "moments-00001.safetensors' is missing or damaged" in capsys.readouterr().err
