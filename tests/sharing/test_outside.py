"""Networks from outside the package: a bundle of one is saved, pushed, compared, and opened by a class that the caller
holds; of the folder nothing is imported, and all its checks apply."""

import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from bundles import LOAD_BY_REMOTE_CODE, WEIGHTS, edit, retensor
from outside_network import OutsideNetwork, drawn
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline

from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler, load_bundle, save_bundle
from score_sde.sharing.hub import verify
from score_sde.sharing.pushed_files import files_to_push


@pytest.fixture(scope="module")
def saved_bundle(tmp_path_factory):
    torch.manual_seed(0)
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(), transformer=OutsideNetwork())
    return Path(save_bundle(pipeline, tmp_path_factory.mktemp("outside") / "bundle", variant="fp16"))


@pytest.fixture
def bundle(saved_bundle, tmp_path):
    return Path(shutil.copytree(saved_bundle, tmp_path / "bundle"))


LOAD = """
import json, sys
from score_sde import ScoreSDEPipeline, ScoreSDEInversePipeline, load_bundle
from score_sde.sharing.hub import verify
folder, = sys.argv[1:]
errors = []
for load in (load_bundle, ScoreSDEPipeline.from_pretrained):
    try:
        load(folder)
    except ValueError as error:
        errors.append(str(error))
unknown = verify(folder)
assert "outside_network" not in sys.modules and "diffusers_modules" not in sys.modules
from outside_network import OutsideNetwork, drawn
assert type(ScoreSDEInversePipeline.from_pretrained(folder, classes=[OutsideNetwork]).denoiser) is OutsideNetwork
pipelines = [load(folder, classes=[OutsideNetwork]) for load in (load_bundle, ScoreSDEPipeline.from_pretrained)]
network = OutsideNetwork.from_pretrained(folder + "/transformer")
pipelines.append(ScoreSDEPipeline.from_pretrained(folder, transformer=network))
assert not any("diffusers_modules" in name or folder in str(getattr(module, "__file__", None))
               for name, module in list(sys.modules.items()))
images = [drawn(each).flatten().tolist() for each in pipelines]
print(json.dumps([errors, unknown, verify(folder, classes=[OutsideNetwork]), images]))
"""


def test_a_fresh_process_opens_it_by_the_class_and_says_how_without(local_hub, bundle):
    expected = drawn(load_bundle(bundle, classes=[OutsideNetwork]))
    result = local_hub.run(LOAD, bundle)
    assert result.returncode == 0, result.stderr
    errors, unknown, known, images = json.loads(result.stdout.splitlines()[-1])
    for error in errors:
        assert "'transformer' is a OutsideNetwork of 'outside_network_" in error
        assert "classes=[OutsideNetwork]" in error and "trust_remote_code=True" in error
    [code] = [name for name in unknown if "outside_network" in name]
    assert unknown[code] == "unknown" and {*unknown.values()} == {"same", "unknown"}
    assert known[code] == "same" and {*known.values()} == {"same"}
    assert all(torch.equal(torch.tensor(image), expected.flatten()) for image in images)


def test_its_code_is_pushed_and_opens_where_neither_it_nor_the_package_is(local_hub, bundle, tmp_path):
    image = load_bundle(bundle, classes=[OutsideNetwork])
    save_file({"image": drawn(image)}, tmp_path / "image.safetensors")
    names = files_to_push(bundle)
    assert any(name.startswith("transformer/outside_network_") for name in names)
    local_hub.put("me/model", {name: (bundle / name).read_bytes() for name in names})
    result = local_hub.run(LOAD_BY_REMOTE_CODE, tmp_path / "image.safetensors", "me/model", "{}")
    assert result.returncode == 0, result.stderr
    difference, package = json.loads(result.stdout.splitlines()[-1])
    assert difference < 1e-5 and package == "diffusers_modules"


def test_a_pipeline_that_was_opened_by_a_class_is_saved_again(bundle, tmp_path):
    pipeline = load_bundle(bundle, classes=[OutsideNetwork])
    again = load_bundle(save_bundle(pipeline, tmp_path / "again"), classes=[DiTModel, OutsideNetwork])
    torch.testing.assert_close(drawn(again), drawn(pipeline), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, {"default": torch.float64}, {"transformer": torch.float64}])
def test_precision_and_variant_are_those_asked_for(bundle, dtype):
    loaded = load_bundle(bundle, classes=[OutsideNetwork], dtype=dtype, variant="fp16")
    narrow = load_file(bundle / "transformer" / WEIGHTS.replace(".s", ".fp16.s"))
    assert torch.equal(loaded.transformer.conv_in.weight, narrow["conv_in.weight"].double())


def changed_code(folder):
    [path] = folder.glob("transformer/outside_network_*.py")
    path.write_text(path.read_text().replace(".tanh()", ".sin()"))


def test_changed_code_is_seen_and_not_run(bundle):
    before = drawn(load_bundle(bundle, classes=[OutsideNetwork]))
    changed_code(bundle)
    verdicts = verify(bundle, classes=[OutsideNetwork])
    assert [name.split("_")[0] for name, verdict in verdicts.items() if verdict != "same"] == ["transformer/outside"]
    assert {*verdicts.values()} == {"same", "differs"}
    torch.testing.assert_close(drawn(load_bundle(bundle, classes=[OutsideNetwork])), before, rtol=0, atol=1e-5)


def weights(change):
    return lambda folder: retensor(folder, change)


def reconfigure(**changes):
    return lambda folder: edit(folder / "transformer/config.json", **changes)


def index(**changes):
    return lambda folder: edit(folder / "model_index.json", **changes)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (weights(lambda each: each.pop("conv_in.bias")), "missing: conv_in.bias"),
        (weights(lambda each: each.update(x=torch.ones(1))), "unexpected: x"),
        (weights(lambda each: each["conv_in.bias"].fill_(torch.nan)), "not finite"),
        (lambda folder: (folder / "transformer" / WEIGHTS).unlink(), "weights are opened as safetensors only"),
        (reconfigure(width=10**9), "width 1,000,000,000 is more than"),
        (reconfigure(width=900_000), "larger than its weights"),
        (reconfigure(width="8"), "width '8' must be of type int"),
        (reconfigure(depth=2), "OutsideNetwork has no argument 'depth'"),
        (reconfigure(auto_map={"AutoModel": "evil.Evil"}), "auto_map .* is not allowed"),
        (reconfigure(_class_name="DiTModel"), "_class_name 'DiTModel' is not OutsideNetwork"),
        (index(scheduler=["x", "OutsideNetwork"]), "component 'scheduler' is a OutsideNetwork of 'x'"),
        (index(vae=["x", "OutsideNetwork"]), "component 'vae' is a OutsideNetwork of 'x'"),
        (index(transformer=["os", "system"]), "component 'transformer' is a system of 'os'"),
        (lambda folder: (folder / "transformer/diffusers.py").touch(), "diffusers.py would be taken for"),
    ],
)
def test_all_checks_of_bundles_apply(bundle, attack, message):
    attack(bundle)
    for load in (load_bundle, ScoreSDEPipeline.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(bundle, classes=[OutsideNetwork])


@pytest.mark.parametrize("classes", [[torch.nn.Linear], [ScoreSDEScheduler], ["OutsideNetwork"], [OutsideNetwork()]])
def test_what_is_no_class_of_a_network_is_refused(bundle, classes):
    for function in (load_bundle, verify):
        with pytest.raises(ValueError, match="must be a class of networks: a ModelMixin and a ConfigMixin"):
            function(bundle, classes=classes)


def test_places_are_left_to_who_opens_the_network(bundle):
    with pytest.raises(ValueError, match="device_map cannot be given with classes: open the network yourself, Outside"):
        load_bundle(bundle, classes=[OutsideNetwork], device_map="cpu")


def test_a_component_that_is_given_is_not_looked_up(bundle, tmp_path):
    """Of whatever library its entry says that it is."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\nclass OutsideNetwork:\n    pass\n")
    edit(bundle / "model_index.json", transformer=["evil", "OutsideNetwork"])
    sys.path.insert(0, str(tmp_path))
    try:
        network = OutsideNetwork()
        assert ScoreSDEPipeline.from_pretrained(bundle, transformer=network).transformer is network
        load_bundle(bundle, classes=[OutsideNetwork])
    finally:
        sys.path.remove(str(tmp_path))
    assert not (tmp_path / "trace").exists() and "evil" not in sys.modules


def test_a_class_of_the_callers_goes_before_one_of_the_package_of_the_same_name(tmp_path):
    class Narrower(DiTModel):
        pass

    Narrower.__name__ = "DiTModel"
    save_bundle(tiny_pipeline(), tmp_path / "bundle")
    assert type(load_bundle(tmp_path / "bundle", classes=[Narrower]).transformer) is Narrower


def test_a_class_without_a_file_is_refused(tmp_path, monkeypatch):
    class Typed(OutsideNetwork):
        """As in a notebook."""

        __module__ = "notebook"

    monkeypatch.setitem(sys.modules, "notebook", types.ModuleType("notebook"))
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(), transformer=Typed())
    with pytest.raises(ValueError, match="the code of Typed is in no file: define it in a file of its own"):
        pipeline.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == []
