"""Bundles on their way to the Hub and back: with the real client, against the Hub on this machine (`hub.server`)."""

import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import diffusers
import pytest
from bundles import LOAD_BY_REMOTE_CODE, METRIC, edit
from commands import SCORE_SDE, score_sde
from places import FIXTURES, HELPERS, files_of
from safetensors.torch import load_file, save_file
from tiny import draw, latent_pipeline, tiny_pipeline

from runs import TINY_DIT, TINY_RUN
from score_sde import ScoreSDEPipeline, ScoreSDEScheduler, load_bundle, save_bundle
from score_sde.sharing import hub
from score_sde.sharing.hub import verify
from score_sde.training import train


def run(local_hub, code, *arguments, **kwargs):
    """What a program prints as JSON in its last line."""
    result = local_hub.run(code, *arguments, **kwargs)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# --- pushing ------------------------------------------------------------------------------------------------------

PUSH = """
import json, sys
from score_sde.sharing.hub import push_to_hub
print(json.dumps([push_to_hub(sys.argv[1], **arguments) for arguments in json.loads(sys.argv[2])]))
"""


def test_a_bundle_is_pushed_and_nothing_else(local_hub, tmp_path):
    folder = save_bundle(tiny_pipeline(), tmp_path / "bundle", metrics=[METRIC])
    for name in ("optimizer.bin", "notes.pt", ".env", ".secret.json", "events.out"):
        (tmp_path / "bundle" / name).write_text("secret")
    (tmp_path / "bundle" / "LICENSE").write_text("Free.")
    pushes = [
        {"repo_id": "lab/model", "private": True, "tag": "v1", "commit_message": "first"},
        {"repo_id": "lab/model", "revision": "next/one"},
        {"repo_id": "lab/model", "private": True},
    ]
    addresses = run(local_hub, PUSH, folder, json.dumps(pushes), token="hf_writer")
    repo = local_hub.repos["model", "lab/model"]
    assert repo.private
    # the branch and the second push hold the same files: no new commits
    assert list(repo.messages.values()) == ["initial commit", "first"]
    assert repo.tags["v1"] == repo.branches["main"] == repo.branches["next/one"]
    assert addresses == [f"{local_hub.url}/lab/model/commit/{repo.tags['v1']}"] * 3
    pushed = local_hub.files("lab/model")
    del pushed[".gitattributes"]
    assert pushed == {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*.*")
        if path.suffix in (".json", ".py", ".safetensors", ".md") and path.name != ".secret.json"
    } | {"LICENSE": b"Free."}
    assert b"| accuracy | 0.9 |" in pushed["README.md"]
    # somebody else's repo, by a pull request
    local_hub.repos["model", "lab/model"].private = False
    pushes = [{"repo_id": "lab/model", "create_pr": True, "commit_message": "mine"}]
    (tmp_path / "bundle" / "README.md").write_text("# Other\n")
    addresses = run(local_hub, PUSH, folder, json.dumps(pushes), token="hf_stranger")
    assert addresses == [f"{local_hub.url}/lab/model/discussions/1"]
    assert local_hub.files("lab/model", "refs/pr/1")["README.md"] == b"# Other\n"
    assert local_hub.files("lab/model")["README.md"] == pushed["README.md"]


def test_what_is_left_of_an_earlier_push_goes(local_hub, tmp_path):
    folder = save_bundle(tiny_pipeline(), tmp_path / "bundle")
    old = ["paths_0123456789.py", "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors"]
    old += ["transformer/diffusion_pytorch_model.safetensors.index.json", "metrics.json"]
    # of folders that are not pushed, everything
    kept = ["NOTES.md", "mine.py", "vae/config.json", "LICENSE", "vae/diffusion_pytorch_model.safetensors"]
    kept += ["old/paths_0123456789.py", "old/metrics.json"]
    local_hub.put("me/model", dict.fromkeys(old + kept, b"{}"))
    run(local_hub, PUSH, folder, json.dumps([{"repo_id": "me/model"}]), token="hf_writer")
    files = local_hub.files("me/model")
    assert not files.keys() & set(old)
    assert set(kept) | {"model_index.json"} <= files.keys()


PUSH_OBJECTS = """
import json, sys
from score_sde import DiTModel, ScoreSDEScheduler, load_bundle
from score_sde.sharing.hub import push_to_hub
from tiny import tiny_pipeline
pipeline = tiny_pipeline(predictor="heun")
pipeline.push_to_hub("me/pipeline", tag="v1", variant="fp16", max_shard_size="10KB")
push_to_hub(pipeline, "me/measured", metrics=[json.loads(sys.argv[1])])
push_to_hub(pipeline.transformer, "me/network", max_shard_size="20KB")
push_to_hub(pipeline.scheduler, "me/scheduler")
same = [parameter.equal(other) for parameter, other in zip(
    DiTModel.from_pretrained("me/network").parameters(), pipeline.transformer.parameters(), strict=True)]
narrow = load_bundle("me/pipeline", variant="fp16").transformer.parameters()
same += [parameter.half().float().equal(other) for parameter, other in zip(
    pipeline.transformer.parameters(), narrow, strict=True)]
print(json.dumps([all(same), ScoreSDEScheduler.from_pretrained("me/scheduler").config.predictor]))
"""


def test_pipelines_models_and_schedulers_are_pushed(local_hub):
    assert run(local_hub, PUSH_OBJECTS, json.dumps(METRIC), token="hf_writer") == [True, "heun"]
    files = local_hub.files("me/pipeline")
    indexes = {f"transformer/diffusion_pytorch_model.safetensors.index{infix}.json" for infix in ("", ".fp16")}
    assert indexes <= files.keys()
    assert files["README.md"].startswith(b"---")
    assert b"| accuracy | 0.9 |" in local_hub.files("me/measured")["README.md"]
    assert not any(b"More Information Needed" in content for content in files.values())
    # nothing tells where it lay before
    assert not any(b"_name_or_path" in content for name, content in files.items() if name.endswith(".json"))
    assert not any(name.endswith((".py", ".md")) for name in local_hub.files("me/network"))
    assert "scheduler_config.json" in local_hub.files("me/scheduler")
    # only the weights that were asked for are downloaded
    asked = [request.path for request in local_hub.requests if "me/pipeline/resolve" in request.path]
    assert any(".fp16-0000" in path for path in asked)
    assert not any("model-0000" in path or path.endswith(".py") for path in asked)


def test_a_push_that_was_killed_goes_on_where_it_stopped(local_hub, tmp_path):
    folder = save_bundle(latent_pipeline(), tmp_path / "bundle")
    arguments = (folder, json.dumps([{"repo_id": "me/model"}]))
    held = local_hub.fail("PUT", "/[0-9a-f]{64}", skip=1, hold=True)
    client = local_hub.run(PUSH, *arguments, token="hf_writer", background=True)
    assert held.reached.wait(30)
    for _ in range(1000):
        time.sleep(0 if local_hub.objects else 0.01)
    assert len(local_hub.objects) == 1
    os.kill(client.pid, 9)
    assert client.wait().returncode == -9
    # what is there is whole: nothing yet
    assert list(local_hub.files("me/model")) == [".gitattributes"]
    local_hub.requests.clear()
    run(local_hub, PUSH, *arguments, token="hf_writer")
    assert [request.method for request in local_hub.requests if request.in_storage] == ["PUT"]
    files = local_hub.files("me/model")
    for path in Path(folder).rglob("*.safetensors"):
        assert files[str(path.relative_to(folder))] == path.read_bytes()


TRY = """
import json, sys, traceback
from score_sde import load_bundle, push_to_hub
function, arguments, options = json.loads(sys.argv[1])
try:
    {"push": push_to_hub, "load": load_bundle}[function](*arguments, **options)
except Exception as error:
    traceback.print_exc()
    print(json.dumps([type(error).__name__, str(error)]))
"""


def try_with(local_hub, fault, path, call):
    """Run TRY while requests to a path fail, or all connections are refused."""
    if fault == "unplugged":
        local_hub.unplug()
    elif fault:
        local_hub.fail("POST" if "create" in path else "GET", path, **fault)
    result = local_hub.run(TRY, json.dumps(call))
    if fault == "unplugged":
        local_hub.plug()
    return result


@pytest.mark.parametrize(
    ("options", "fault", "kind", "message"),
    [
        ({"token": "hf_unknown"}, {}, "OSError", "no token, or the Hub doesn't know it: log in by `hf auth login`"),
        ({"token": False}, {}, "OSError", "no token, or the Hub doesn't know it"),
        ({"token": "hf_reader"}, {}, "OSError", "the token may not do that: log in by `hf auth login`"),
        ({"token": "hf_stranger"}, {}, "OSError", "open a pull request .create_pr."),
        ({}, {"status": 429}, "OSError", "limits the number of requests: wait some minutes"),
        ({}, {"status": 503}, "OSError", "answered with status 503: try again later"),
        ({}, {"drop": True}, "OSError", r"cannot be reached \(\w+\): check the network"),
        ({}, "unplugged", "OSError", r"cannot be reached \(ConnectError\): check the network"),
        ({"private": True}, {}, "ValueError", "exists and is public"),
        ({"tag": "v1"}, {}, "ValueError", "has a tag 'v1' already"),
        ({"tag": "v2", "revision": "v9", "create_pr": True}, {}, "ValueError", "a pull request is against main"),
    ],
    ids=str,
)
def test_what_the_hub_refuses_is_said_with_the_remedy_and_without_the_token(
    local_hub, tmp_path, options, fault, kind, message
):
    folder = save_bundle(tiny_pipeline(), tmp_path / "bundle")
    local_hub.put("me/model", {"NOTES.md": b""})
    local_hub.repos["model", "me/model"].tags["v1"] = local_hub.repos["model", "me/model"].branches["main"]
    options = {"token": "hf_writer"} | options
    result = try_with(local_hub, fault, "/api/models/me/model", ["push", [folder, "me/model"], options])
    found, text = json.loads(result.stdout.splitlines()[-1])
    assert found == kind
    assert re.search(message, text), text
    token = options["token"] or "hf_writer"
    assert token not in result.stdout + result.stderr
    assert not any(token.encode() in content for content in files_of(tmp_path).values())
    assert list(local_hub.files("me/model")) == ["NOTES.md"]


def test_what_cannot_be_pushed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be shared: it holds no model_index.json, config.json, scheduler_con"):
        hub.push_to_hub(tmp_path, "me/model")
    folder = save_bundle(tiny_pipeline(), tmp_path / "bundle")
    with pytest.raises(TypeError, match="metrics: only for a pipeline"):
        hub.push_to_hub(folder, "me/model", metrics=[METRIC])
    with pytest.raises(ValueError, match="variant 'fp8' is unknown; choose one of fp16, bf16"):
        save_bundle(tiny_pipeline(), folder, variant="fp8")
    with pytest.raises(ValueError, match="would upload no code"):
        tiny_pipeline().save_pretrained(tmp_path / "x", push_to_hub=True)


# --- loading ------------------------------------------------------------------------------------------------------

LOAD = """
import json, sys
from safetensors.torch import load_file
from score_sde import ScoreSDEPipeline, load_bundle
from tiny import draw
image, loads = load_file(sys.argv[1])["image"], json.loads(sys.argv[2])
loaders = [load_bundle, ScoreSDEPipeline.from_pretrained]
print(json.dumps([float((draw(load(*a, **k)) - image).abs().max()) for a, k in loads for load in loaders]))
"""


@pytest.mark.slow
def test_loading_from_the_hub_and_offline(local_hub, tmp_path):
    pipeline = latent_pipeline()
    save_file({"image": draw(pipeline)}, tmp_path / "image.safetensors")
    files = files_of(save_bundle(pipeline, tmp_path / "bundle", variant="bf16", max_shard_size="20KB"))
    trace = tmp_path / "trace"
    local_hub.put("me/model", files, private=True)
    traced = {name: f"open({str(trace)!r}, 'a')\n".encode() for name in files if name.endswith(".py")}
    local_hub.put("me/model", files | traced, revision="a/branch")
    # one download breaks off, and one is slow
    local_hub.fail("GET", "/[0-9a-f]{64}", keep=100)
    local_hub.fail("GET", "/[0-9a-f]{64}", delay=0.001)
    cache = {"cache_dir": str(tmp_path / "cache")}
    loads = [[["me/model"], cache], [["me/model"], cache | {"revision": "a/branch"}], [[str(tmp_path / "bundle")], {}]]
    arguments = (tmp_path / "image.safetensors", json.dumps(loads))
    assert max(run(local_hub, LOAD, *arguments, token="hf_reader")) < 1e-5
    assert not trace.exists()
    assert not any(request.path.endswith(".py") for request in local_hub.requests)

    # a narrower variant is another download, and close
    loads = [[["me/model"], cache | {"variant": "bf16"}]]
    differences = run(local_hub, LOAD, tmp_path / "image.safetensors", json.dumps(loads), token="hf_reader")
    assert 0 < max(differences) < 0.1

    difference, package = run(
        local_hub, LOAD_BY_REMOTE_CODE, arguments[0], "me/model", '{"class_labels": [1]}', token="hf_reader"
    )
    assert difference < 1e-5 and package == "diffusers_modules"

    # offline, in a process that was told so
    local_hub.requests.clear()
    environment = os.environ | local_hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HELPERS)}
    command = [sys.executable, "-c", LOAD, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert max(json.loads(result.stdout)) < 1e-5
    assert local_hub.requests == []


@pytest.mark.parametrize(
    ("options", "fault", "message"),
    [
        ({"token": False}, {}, "no such repo, or it is private: check its name, and log in by `hf auth login`"),
        ({"token": "hf_stranger"}, {}, "no such repo, or it is private"),
        ({"token": "hf_unknown"}, {}, "no token, or the Hub doesn't know it"),
        ({"revision": "v9"}, {}, "no such revision: check the name"),
        ({}, {"status": 429, "times": None}, "limits the number of requests"),
        ({}, {"drop": True, "times": None}, "cannot be reached .RemoteProtocolError.: check the network"),
        ({}, "unplugged", "cannot be reached .ConnectError.: check the network"),
        ({"local_files_only": True}, {}, "not in the cache: load it once without local_files_only"),
        ({"variant": "fp16"}, {}, "trying to load the model files of the `variant=fp16`, but no such"),
    ],
    ids=str,
)
def test_what_cannot_be_loaded_is_said_with_the_remedy_and_without_the_token(
    local_hub, tmp_path, options, fault, message
):
    local_hub.put("me/model", files_of(save_bundle(tiny_pipeline(), tmp_path / "bundle")), private=True)
    options = {"token": "hf_writer", "cache_dir": str(tmp_path / "cache")} | options
    result = try_with(local_hub, fault, "/api/models/me/model/revision/main", ["load", ["me/model"], options])
    kind, text = json.loads(result.stdout.splitlines()[-1])
    assert kind == "ValueError"
    assert re.search(message, text), text
    assert (options["token"] or "hf_writer") not in result.stdout + result.stderr


def test_file_names_of_a_repo_lead_nowhere_else(local_hub, tmp_path):
    files = files_of(save_bundle(tiny_pipeline(), tmp_path / "bundle"))
    local_hub.put("me/model", files | {"../../../../evil.json": b"{}"})
    result = local_hub.run(TRY, json.dumps(["load", ["me/model"], {"cache_dir": str(tmp_path / "a" / "b")}]))
    kind, text = json.loads(result.stdout.splitlines()[-1])
    assert kind == "ValueError"
    assert "evil.json" in text
    assert not list(tmp_path.rglob("evil.json"))


def test_a_bundle_of_the_first_format_opens(local_hub, tmp_path):
    """tests/fixtures/bundle_1.zip: a bundle as it was saved when there was format 1, and an image that it drew then."""
    with zipfile.ZipFile(FIXTURES / "bundle_1.zip") as archive:
        archive.extractall(tmp_path)
    image = load_file(tmp_path / "image.safetensors")["image"]
    assert (draw(load_bundle(tmp_path / "bundle")) - image).abs().max() < 1e-5
    found = run(
        local_hub, LOAD_BY_REMOTE_CODE, tmp_path / "image.safetensors", tmp_path / "bundle", '{"class_labels": [1]}'
    )
    assert found[0] < 1e-5


# --- what a folder from the Hub may hold ----------------------------------------------------------------------------


def sharded(value):
    return lambda index: {"weight_map": dict.fromkeys(index["weight_map"], value)}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"_bundle_format": 2}, "_bundle_format 2 is newer than this package.*pip install -U"),
        ("model_index.json", {"_class_name": [["x"], 3]}, "_class_name .* is no name of a class"),
        ("model_index.json", {"../../vae": ["diffusers", "AutoencoderKL"]}, "'../../vae' is no name of a component"),
        (
            "model_index.json",
            {"vae": ["diffusers", "DiffusionPipeline"]},
            "'vae', 'DiffusionPipeline' of diffusers, cannot be loaded: it must be an autoencoder of diffusers",
        ),
        ("model_index.json", {"vae": ["score_sde", "load_bundle"]}, "'load_bundle' of score_sde, cannot be loaded"),
        ("model_index.json", {"vae": ["os", "system"]}, "component 'vae' is a system of 'os'"),
        ("model_index.json", {"id2label": 5}, "id2label 5 must be of type"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "DDIMScheduler"},
            "'DDIMScheduler' is not ScoreSDEScheduler",
        ),
        (
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": 10**12},
            "num_train_timesteps 1,000,000,000,000 is m",
        ),
        ("scheduler/scheduler_config.json", {"sde_type": "vpp"}, "scheduler_config.json: sde_type 'vpp' is unknown"),
        ("scheduler/scheduler_config.json", {"predictor": ["euler"]}, "predictor .'euler'. must be of type str"),
        ("transformer/config.json", {"_class_name": "ScoreUNetModel"}, "'ScoreUNetModel' is not DiTModel"),
        ("transformer/config.json", {"hidden_size": 10**9}, "hidden_size 1,000,000,000 is more than"),
        ("transformer/config.json", {"num_layers": 10**9}, "num_layers 1,000,000,000 is more than"),
        ("transformer/config.json", {"hidden_size": 120_000}, "larger than its weights, which hold 10,252"),
        ("transformer/config.json", {"num_layers": 900_000}, "larger than its weights, which hold 10,252"),
        ("transformer/config.json", {"sample_size": 40_000}, "400,000,000 tokens, more than"),
        ("transformer/config.json", {"num_layers": 2}, "not those of its config: missing: blocks.1.*and [0-9]+ more"),
        ("transformer/config.json", {"hidden_size": "16"}, "hidden_size '16' must be of type int"),
        ("transformer/config.json", {"qk_norm": 1}, "qk_norm 1 must be of type bool"),
        ("transformer/config.json", {"patch_size": [2, "2"]}, "patch_size .2, '2'. must be of type"),
        ("transformer/config.json", {"patch_size": 3}, "config.json: patch_size 3 must divide"),
        ("transformer/config.json", {"wider": True}, "DiTModel has no argument 'wider' .here True."),
        ("vae/config.json", {"latent_channels": "many"}, "vae/config.json: "),
        ("vae/config.json", {"block_out_channels": [10**9]}, "block_out_channels.0 1,000,000,000 is more than"),
        ("vae/config.json", {"layers_per_block": 10**5}, "larger than its weights"),
        (
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            sharded("../../secret.safetensors"),
            "'../../secr",
        ),
        (
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            sharded("weights.bin"),
            "'weights.bin' is no safet",
        ),
        (
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            sharded("x.safetensors"),
            "holds no x.safetensors",
        ),
        ("transformer/diffusion_pytorch_model.safetensors.index.json", {"weight_map": 3}, "weight_map 3 is no mapping"),
    ],
)
def test_hostile_configs_are_refused_before_anything_is_built(tmp_path, file, change, message):
    save_bundle(latent_pipeline(), tmp_path / "bundle", max_shard_size="20KB")
    path = tmp_path / "bundle" / file
    edit(path, **(change(json.loads(path.read_text())) if callable(change) else change))
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as error:
        load_bundle(tmp_path / "bundle")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
    assert file.split("/")[0] in str(error.value)
    with pytest.raises(ValueError, match=message):
        ScoreSDEPipeline.from_pretrained(tmp_path / "bundle")


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000, "9" * 5000, "\ud800"], ids=range(5))
@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json"])
def test_files_that_are_no_configs_are_named(tmp_path, file, content):
    save_bundle(tiny_pipeline(), tmp_path / "bundle")
    (tmp_path / "bundle" / file).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=rf"{file} (is no config|holds no JSON object)"):
        load_bundle(tmp_path / "bundle")


def test_damaged_weights_are_named(tmp_path):
    save_bundle(tiny_pipeline(), tmp_path / "bundle")
    path = tmp_path / "bundle" / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors is damaged"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("network", ["DiTTransformer2DModel", "UNet2DModel"])
@pytest.mark.parametrize("autoencoder", ["AutoencoderTiny", "AutoencoderDC"])
def test_networks_and_autoencoders_of_diffusers_pass_the_checks(tmp_path, network, autoencoder):
    if network == "UNet2DModel":
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
        model = {"unet": diffusers.UNet2DModel(sample_size=8, norm_num_groups=4, layers_per_block=1, **blocks)}
    else:
        sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 8}
        model = {"transformer": diffusers.DiTTransformer2DModel(sample_size=4, out_channels=8, **sizes)}
    if autoencoder == "AutoencoderTiny":
        blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
        vae = diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), **blocks)
    else:
        blocks = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
        kinds = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
        channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        multiscales = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
        vae = diffusers.AutoencoderDC(latent_channels=4, **blocks, **kinds, **channels, **multiscales)
    save_bundle(ScoreSDEPipeline(ScoreSDEScheduler(), vae=vae, **model), tmp_path / "bundle")
    assert type(load_bundle(tmp_path / "bundle").vae) is type(vae)


# --- is the code this release's? ------------------------------------------------------------------------------------


def test_verify_says_file_by_file(local_hub, tmp_path, capsys):
    folder = Path(save_bundle(tiny_pipeline(), tmp_path / "bundle"))
    verdicts = verify(folder)
    assert set(verdicts.values()) == {"same"}
    assert len(verdicts) == len(list(folder.rglob("*.py")))
    assert score_sde("verify", folder) == 0
    assert f"all {len(verdicts)} files are those of score-sde" in capsys.readouterr().out

    changed = next(folder.glob("scheduler/paths_*.py"))
    changed.write_text(changed.read_text().replace("exp()", "exp() * 1.01"))
    next(folder.glob("likelihood_*.py")).unlink()
    trace = tmp_path / "trace"
    (folder / "vae.py").write_text(f"open({str(trace)!r}, 'w')")
    others = {path: verdict for path, verdict in verify(folder).items() if verdict != "same"}
    expected = {f"scheduler/{changed.name}": "differs", "likelihood.py": "missing", "vae.py": "unknown"}
    assert others == expected

    local_hub.put("me/model", files_of(folder))
    result = local_hub.run(SCORE_SDE, "verify", "me/model")
    assert result.returncode == 1
    for path, verdict in expected.items():
        assert f"{verdict:8} {path}\n" in result.stdout
    assert f"3 of {len(verdicts) + 1} files are not those of score-sde" in result.stdout
    assert not trace.exists()
    assert not any(request.path.endswith(".safetensors") for request in local_hub.requests)


# --- commands -----------------------------------------------------------------------------------------------------


def test_the_command_pushes(local_hub, tmp_path):
    folder = save_bundle(tiny_pipeline(), tmp_path / "bundle")
    arguments = ("me/model", "--private", "--revision", "next")
    result = local_hub.run(SCORE_SDE, "push", folder, *arguments, token="hf_writer")
    assert result.stdout.startswith(f"{local_hub.url}/me/model/commit/")
    assert "model_index.json" in local_hub.files("me/model", "next")
    result = local_hub.run(SCORE_SDE, "push", tmp_path, "me/model", token="hf_writer")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("score-sde push: error: ")


TRAIN = """
import sys
from score_sde.training import train
train.main(sys.argv[1:])
"""


def test_training_pushes_at_intervals_and_survives_a_network_that_fails(local_hub, tmp_path):
    arguments = [*TINY_RUN, "--network_kwargs", TINY_DIT, "--max_train_steps", 3, "--push_steps", 1]
    arguments += [
        "--push_to_hub",
        "me/model",
        "--hub_private",
        "--model_name",
        "Tiny",
        "--output_dir",
        tmp_path / "run",
    ]
    local_hub.fail("POST", "/api/repos/create", status=503)
    result = local_hub.run(TRAIN, *arguments, token="hf_writer")
    assert result.returncode == 0, result.stderr
    assert (
        "me/model was not pushed: the Hub answered with status 503: try again later; nothing is lost" in result.stdout
    )
    repo = local_hub.repos["model", "me/model"]
    assert repo.private
    messages = list(repo.messages.values())
    assert messages[0] == "initial commit"
    assert messages[-1] == "Tiny, 3 steps"
    # the last that was trained, and what it draws, is what is there, without the paths of this machine
    files, saved = local_hub.files("me/model"), files_of(tmp_path / "run" / "pipeline")
    assert {name: files[name] for name in saved if name != "training.json"} == {
        name: content for name, content in saved.items() if name != "training.json"
    }
    assert json.loads(files["training.json"])["config"]["output_dir"] == "run"
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert json.loads(saved["training.json"])["steps"] == 3
    assert "hf_writer" not in result.stdout + result.stderr
    assert not any(b"hf_writer" in content for content in files_of(tmp_path / "run").values())

    local_hub.unplug()
    result = local_hub.run(TRAIN, *arguments, "--output_dir", tmp_path / "other", token="hf_writer")
    local_hub.plug()
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "other" / "pipeline"
    assert f"nothing is lost: `score-sde push {folder} me/model` pushes it" in result.stdout
    assert "model_index.json" in files_of(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--push_steps", 5], "push_steps 5 must be at least 0, and needs push_to_hub"),
        (["--push_to_hub", "me//model"], "me//model"),
    ],
)
def test_bad_options_of_pushing_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        train.main([str(each) for each in [*TINY_RUN, *arguments]])
    assert message in capsys.readouterr().err
