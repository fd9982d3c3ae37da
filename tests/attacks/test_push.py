"""Attacks on pushing: what lies about stays here, links are refused, a push that failed leaves nothing behind."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from bundles import METRIC
from tiny import tiny_pipeline

from score_sde import save_bundle
from score_sde.sharing import hub
from score_sde.sharing.pushed_files import files_to_push, left_out, published


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A bundle with everything that one has, in two precisions and shards; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "bundle"
    save_bundle(tiny_pipeline(), folder, {"steps": 3}, [METRIC], variant="fp16", max_shard_size="20KB")
    for name in ("samples.png", "more.png"):
        (folder / name).write_bytes(b"png")
    (folder / "samples.json").write_text("{}")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\n![more](more.png)\n")
    return folder


@pytest.fixture
def bundle(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def place(path, content="secret"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_what_the_index_names_is_pushed(bundle):
    names = files_to_push(bundle)
    assert left_out(bundle, names) == ["samples.json"]
    every = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert every - set(names) == {"samples.json"}
    shards = [name for name in names if re.search(r"(model|model\.fp16)-0000\d-of-0000\d\.safetensors$", name)]
    assert len(shards) > 2 and {"more.png", "samples.png", "metrics.json", "training.json"} <= set(names)


@pytest.mark.parametrize(
    "name",
    [
        "kaggle.json",
        "token.txt",
        "my_private.py",
        "ore.png",
        ".env",
        ".git/config",
        "transformer/notes.json",
        "transformer/my_private.py",
        "transformer/optimizer.safetensors",
        "transformer/diffusion_pytorch_model-00009-of-00009.safetensors",
        "transformer/diffusion_pytorch_model.bin",
        "scheduler/paths_0123456789.py",
        "vae/config.json",
    ],
)
def test_what_lies_about_is_left_out_and_named(bundle, name):
    before = files_to_push(bundle)
    place(bundle / name)
    assert files_to_push(bundle) == before
    said = left_out(bundle, before)
    assert any(name == each or each.endswith("/") and name.startswith(each) for each in said)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("README.md", "link outside"),
        ("model_index.json", "link outside"),
        ("metrics.json", "link outside"),
        ("more.png", "link outside"),
        ("scheduler/scheduler_config.json", "link outside"),
        ("transformer/diffusion_pytorch_model.safetensors.index.json", "link outside"),
        ("transformer/diffusion_pytorch_model-00001", "link outside"),
        ("pipeline_score_sde", "link outside"),
        ("scheduler", "link outside"),
        ("transformer/config.json", "link inside"),
        ("training.json", "pipe"),
        ("model_index.json", "pipe"),
    ],
)
def test_links_and_pipes_are_refused_by_name(bundle, tmp_path, name, kind):
    [path] = [path for path in bundle.rglob("*") if str(path.relative_to(bundle)).startswith(name)][:1]
    target = (tmp_path if kind == "link outside" else bundle) / "elsewhere"
    path.rename(target)
    path.symlink_to(target) if kind != "pipe" else os.mkfifo(path)
    with pytest.raises(
        ValueError, match=rf"{re.escape(name)}.*(is a link|is no file|is no config|holds no|is missing)"
    ):
        files_to_push(bundle)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, "unet holds no config"),
        (
            "model_index.json",
            {"../outside": ["diffusers", "UNet2DModel"]},
            "'../outside' is no component that can be shared",
        ),
        ("model_index.json", {"scheduler": ["../../x", "S"]}, "x.py' leads out of"),
        ("model_index.json", {"_class_name": ["absent", "ScoreSDEPipeline"]}, "holds no absent.py"),
        (
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            {"weight_map": {"a": "../../x.safetensors"}, "metadata": {}},
            "is no mapping, or|is no safetensors file",
        ),
        (
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            {"weight_map": {"a": "/etc/x.safetensors"}, "metadata": {}},
            "is no mapping, or|is no safetensors file",
        ),
        (
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            {"weight_map": 3},
            "is no mapping, or|is no safetensors file",
        ),
        (
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            {"weight_map": {"a": "x.safetensors"}, "metadata": {}},
            "holds no x.safetensors",
        ),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(bundle, tmp_path, file, change, message):
    place(tmp_path / "outside" / "config.json")
    path = bundle / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        files_to_push(bundle)


def test_a_snapshot_of_the_hubs_cache_is_pushed(bundle, tmp_path):
    """Its files are links to the blobs of the same repo; to the blobs of another they are not."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    names = files_to_push(bundle)
    for number, name in enumerate(names):
        shutil.copyfile(bundle / name, blobs / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    assert files_to_push(snapshot) == names
    (snapshot / "README.md").unlink()
    place(tmp_path / "models--c--d" / "blobs" / "0")
    (snapshot / "README.md").symlink_to(tmp_path / "models--c--d" / "blobs" / "0")
    with pytest.raises(ValueError, match="README.md is a link"):
        files_to_push(snapshot)


@pytest.mark.parametrize("kind", ["transformer", "scheduler"])
def test_single_models_and_schedulers_likewise(tmp_path, kind):
    component = getattr(tiny_pipeline(), kind)
    component.save_pretrained(tmp_path)
    before = files_to_push(tmp_path)
    for name in ("token.json", "notes.py", "deep/config.json"):
        place(tmp_path / name)
    assert files_to_push(tmp_path) == before
    assert left_out(tmp_path, before) == ["deep/", "notes.py", "token.json"]
    (tmp_path / "README.md").symlink_to(tmp_path / "token.json")
    with pytest.raises(ValueError, match="README.md is a link"):
        files_to_push(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "public"),
    [
        ("training.json", {"config": {"output_dir": "/home/me/runs/dit"}}, {"config": {"output_dir": "dit"}}),
        ("training.json", {"a": ["~/x/y", "../up/it", "C:\\Users\\me\\it"]}, {"a": ["y", "it", "it"]}),
        ("training.json", {"a": "file:///home/me/it", "b": "/home/me/my photos/"}, {"a": "it", "b": "my photos"}),
        (
            "training.json",
            {"command": "python /home/me/train.py --dataset='/home/me/my photos' --latents runs/it"},
            {"command": "python train.py --dataset='my photos' --latents runs/it"},
        ),
        (
            "training.json",
            {"command": "python '--dataset=/home/my name/photos' --init \"/srv/my data/w.pt\" --to /home/my\\ name/x"},
            {"command": "python '--dataset=photos' --init \"w.pt\" --to x"},
        ),
        (
            "training.json",
            {
                "a": "no file /Users/Ann Smith/data/x.png: skipped",
                "b": ["it is C:\\Users\\Ann Smith\\x", "of ~/my x/y"],
            },
            {"a": "no file x.png: skipped", "b": ["it is x", "of my x/y"]},
        ),
        ("training.json", {"kwargs": '{"init": "/home/me/w.pt"}'}, {"kwargs": '{"init": "w.pt"}'}),
        (
            "training.json",
            {"dataset": "alice/photos", "dataset_on_hub": False},
            {"dataset": "photos", "dataset_on_hub": False},
        ),
        ("metrics.json", [METRIC | {"dataset": "/home/me/photos"}], [METRIC | {"dataset": "photos"}]),
        ("transformer/config.json", {"_name_or_path": "/home/me/x", "a": 1}, {"a": 1}),
        # what is no path of this machine
        ("training.json", {"dataset": "me/photos", "dataset_on_hub": True, "a": "runs/dit"}, None),
        ("training.json", {"a": "https://huggingface.co/me/x", "b": "hf://datasets/me/x", "c": "T-shirt/top"}, None),
        ("training.json", {"a": "1 / 2, bits/dim, and/or", "b": "~", "c": "/"}, None),
        ("training.json", {"a": "it's a/b or 'c/d e/f', as \"g h/i\"", "b": "python x.py 'a b/c' home/a b/c"}, None),
    ],
)
def test_no_path_of_this_machine_is_published(tmp_path, name, value, public):
    place(tmp_path / name, json.dumps(value))
    content = published(str(tmp_path / name))
    assert json.loads(content) == (value if public is None else public)


TRY = """
import json, sys
from score_sde.sharing.hub import push_to_hub
try:
    print(json.dumps(push_to_hub(sys.argv[1], "me/model", **json.loads(sys.argv[2]))))
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def attempt(local_hub, folder, **options):
    result = local_hub.run(TRY, folder, json.dumps(options), token="hf_writer")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.mark.parametrize(
    ("method", "path", "fault"),
    [
        ("POST", "/api/models/me/model/preupload", {"status": 403}),
        ("PUT", "/[0-9a-f]{64}", {"status": 403}),
        ("POST", "/api/models/me/model/commit", {"status": 500, "message": "x" * 10**6}),
        ("POST", "/api/validate-yaml", {"status": 400, "message": "x" * 10**6}),
    ],
)
def test_a_push_that_failed_leaves_no_repo_behind(local_hub, bundle, method, path, fault):
    local_hub.fail(method, path, times=None, **fault)
    (kind, message), _ = attempt(local_hub, bundle)
    assert kind in ("OSError", "ValueError") and len(message) < 3000
    assert local_hub.repos == {}
    local_hub.faults.clear()
    address, stderr = attempt(local_hub, bundle)
    assert "/commit/" in address and "samples.json" in stderr
    assert set(local_hub.files("me/model")) == {".gitattributes", *files_to_push(bundle)}


def test_a_repo_into_which_something_came_stays(local_hub, bundle):
    local_hub.put("me/model", {"NOTES.md": b"mine"})
    local_hub.fail("POST", "/api/models/me/model/commit", status=500)
    assert attempt(local_hub, bundle)[0][0] == "OSError"
    assert local_hub.files("me/model") == {"NOTES.md": b"mine"}
    # the commit is there, and the answer to it is lost
    local_hub.repos.clear()
    local_hub.fail("POST", "/api/models/me/model/commit", keep=0)
    assert attempt(local_hub, bundle)[0][0] == "OSError"
    assert "model_index.json" in local_hub.files("me/model")
    # the commit is there, and the tag is not
    local_hub.repos.clear()
    local_hub.fail("POST", "/api/models/me/model/tag", status=403)
    (kind, message), _ = attempt(local_hub, bundle, tag="v1")
    assert kind == "OSError" and "me/model was pushed (" in message and "but without the tag 'v1'" in message
    assert "model_index.json" in local_hub.files("me/model")


def test_a_tag_is_on_the_commit_that_was_pushed(local_hub, bundle):
    attempt(local_hub, bundle)
    (bundle / "README.md").write_text("# Other\n")
    attempt(local_hub, bundle, revision="next", tag="v1")
    repo = local_hub.repos["model", "me/model"]
    assert repo.tags["v1"] == repo.branches["next"] != repo.branches["main"]


@pytest.mark.parametrize("repo_id", ["me//model", "me/model\n", 'me/x"y', 5, "x" * 10**7])
def test_ids_that_are_none_are_refused_before_anything_is_read(tmp_path, repo_id):
    with pytest.raises(ValueError, match="repo id .*must be like somebody/model") as error:
        hub.push_to_hub(tmp_path / "absent", repo_id)
    assert len(str(error.value)) < 1000
