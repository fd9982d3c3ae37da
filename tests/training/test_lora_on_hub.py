"""LoRA adapters on the Hub: pushed by training and by hand, opened, put on a pipeline, merged; cards."""

import json

import pytest
from commands import SCORE_SDE
from test_init_from import photographs
from test_lora import FILE, adapt, make_source

from score_sde import cli


# trained from a repo and pushed to another, then used from there: prints what was found
FROM_A_REPO = """
import json, sys
import torch
from score_sde import load_bundle, push_to_hub
from score_sde.training import train
source, data, output, *options = sys.argv[1:]
push_to_hub(source, "me/base")
pushed = ["--push_to_hub", "me/adapter", "--model_name", "Owls"]
train.main(["--init_from", "me/base", "--dataset", data, "--output_dir", output, *pushed, *options])

@torch.no_grad()
def output_of(pipeline):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipeline.denoiser(x, 500.0, class_labels=torch.tensor([1, 2])).sample

opened, loaded, here = load_bundle("me/adapter"), load_bundle("me/base"), load_bundle("me/base")
loaded.load_lora_weights("me/adapter")
here.load_lora_weights(output + "/pipeline")
print(json.dumps({
    "as here": torch.equal(output_of(opened), output_of(here)) and torch.equal(output_of(loaded), output_of(here)),
    "classes": [each.config.id2label for each in (opened, loaded)],
}))
"""


@pytest.mark.slow
def test_an_adapter_is_trained_from_the_hub_pushed_there_and_opened(local_hub, tmp_path):
    source, data = make_source(tmp_path / "source"), photographs(tmp_path / "data", "dog", "owl")
    options = ["--batch_size", "4", "--max_train_steps", "3", "--learning_rate", "1e-2", "--lr_warmup_steps", "0"]
    options += ["--lora_rank", "2", "--sample_num_images", "4", "--sample_num_inference_steps", "2"]
    result = local_hub.run(FROM_A_REPO, source, data, tmp_path / "run", *options, token="hf_writer")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == {"as here": True, "classes": [{"0": "cat", "1": "dog", "2": "owl"}] * 2}
    files = local_hub.files("me/adapter")
    assert set(files) == {".gitattributes", "README.md", FILE, "samples.png", "training.json"}
    card, facts = files["README.md"].decode(), json.loads(files["training.json"])
    assert 'pipe = load_bundle("me/adapter")' in card and 'pipe = load_bundle("me/base")' in card
    assert "base_model: me/base" in card and "# Owls" in card
    assert facts["started_from"]["source"] == "me/base" and len(facts["started_from"]["revision"]) == 40
    assert str(tmp_path) not in card + files["training.json"].decode()
    # said what it is, from there; and no Space can draw with it
    result = local_hub.run(SCORE_SDE, "info", "me/adapter", token="hf_reader")
    said = " ".join(result.stdout.split())
    assert "LoRA adapter rank 2, alpha 2, " in said and "of the model me/base" in said, result.stderr
    result = local_hub.run(SCORE_SDE, "verify", "me/adapter", token="hf_reader")
    assert "it is a LoRA adapter: weights alone" in result.stdout, result.stderr
    result = local_hub.run(SCORE_SDE, "space", "me/adapter", "--push", "me/page", token="hf_writer")
    assert result.returncode == 2 and "'me/adapter' is a LoRA adapter, and a Space draws with a pip" in result.stderr
    # merged from there, by the command
    result = local_hub.run(SCORE_SDE, "merge", "me/adapter", tmp_path / "merged", token="hf_reader")
    assert result.returncode == 0, result.stderr
    index = json.loads((tmp_path / "merged" / "model_index.json").read_text())
    assert index["id2label"] == {"0": "cat", "1": "dog", "2": "owl"}


OF_THIS_MACHINE = """
import sys
from score_sde import load_bundle, push_to_hub
push_to_hub(sys.argv[1], "me/adapter")
try:
    load_bundle("me/adapter")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_an_adapter_of_a_model_of_this_machine_says_so(local_hub, tmp_path):
    """Its paths are not published: elsewhere the model is to be opened first."""
    source, data = make_source(tmp_path / "source"), photographs(tmp_path / "data", "dog")
    adapter = adapt(source, tmp_path / "run", "--dataset", data)
    (adapter / "notes.txt").write_text("mine")
    result = local_hub.run(OF_THIS_MACHINE, adapter, token="hf_writer")
    assert result.returncode == 0, result.stderr
    assert "or open the model yourself, and pipe.load_lora_weights(" in result.stdout
    assert "not pushed, as it doesn't belong" in result.stderr and "notes.txt" in result.stderr
    files = local_hub.files("me/adapter")
    assert set(files) == {".gitattributes", "README.md", FILE, "samples.png", "training.json"}
    assert str(tmp_path).encode() not in b"".join(files.values())


def test_the_card_of_an_adapter_is_written_anew(tmp_path):
    source, data = make_source(tmp_path / "source"), photographs(tmp_path / "data", "dog")
    adapter = adapt(source, tmp_path / "run", "--dataset", data)
    assert "path/or/repo" in (adapter / "README.md").read_text()
    with pytest.raises(SystemExit) as end:
        cli.main(["card", str(adapter), "--repo_id", "me/adapter"])
    assert not end.value.code
    card = (adapter / "README.md").read_text()
    assert 'load_bundle("me/adapter")' in card and "path/or/repo" not in card
    with pytest.raises((SystemExit, ValueError)):
        cli.main(["card", str(adapter), "--repo_id", 'me/"x'])
