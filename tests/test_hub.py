"""Pushing bundles, with a Hub that only writes down what it is asked."""

import os
from types import SimpleNamespace

import pytest
import train
from huggingface_hub.errors import HfHubHTTPError
from test_training import TINY_DIT, TINY_RUN, fresh_accelerate_state, run  # noqa: F401
from tiny import tiny_pipeline

from score_sde import hub


class FakeHub:
    """Takes the place of HfApi; keeps the calls, and the files that an upload would take."""

    problem = None

    def __init__(self):
        self.calls = []

    def __call__(self, token=None):
        self.token = token
        return self

    def __getattr__(self, name):
        def call(*arguments, **kwargs):
            if self.problem is not None:
                raise self.problem
            self.calls.append((name, arguments, kwargs))
            if name == "upload_folder":
                from huggingface_hub.utils import filter_repo_objects

                names = [
                    os.path.relpath(os.path.join(parent, file), kwargs["folder_path"])
                    for parent, _, files in os.walk(kwargs["folder_path"])
                    for file in files
                ]
                self.files = set(filter_repo_objects(names, allow_patterns=kwargs["allow_patterns"]))
            return SimpleNamespace(oid="abc", pr_url=None, commit_url="https://hub/commit/abc")

        return call


@pytest.fixture
def fake(monkeypatch):
    api = FakeHub()
    monkeypatch.setattr(hub, "HfApi", api)
    return api


def test_a_bundle_is_pushed_and_nothing_else(tmp_path, fake):
    folder = hub.save_bundle(tiny_pipeline(), tmp_path / "bundle")
    for name in ("optimizer.bin", "notes.pt", ".env", "events.out"):
        (tmp_path / "bundle" / name).write_text("secret")
    address = hub.push_bundle(folder, "me/model", private=True, revision="next", tag="v1", commit_message="first")
    assert address == "https://hub/commit/abc"
    assert [name for name, _, _ in fake.calls] == ["create_repo", "create_branch", "upload_folder", "create_tag"]
    assert fake.calls[0][2] == {"private": True, "exist_ok": True}
    upload = fake.calls[2][2]
    assert (upload["repo_id"], upload["revision"], upload["commit_message"]) == ("me/model", "next", "first")
    assert {"model_index.json", "README.md", "transformer/diffusion_pytorch_model.safetensors"} <= fake.files
    assert any(name.endswith(".py") for name in fake.files)
    assert not fake.files & {"optimizer.bin", "notes.pt", ".env", "events.out"}


def test_what_the_hub_refuses_is_said_with_the_remedy(tmp_path, fake):
    folder = hub.save_bundle(tiny_pipeline(), tmp_path / "bundle")
    with pytest.raises(ValueError, match="is not a bundle: it holds no model_index.json"):
        hub.push_bundle(tmp_path, "me/model")
    fake.problem = HfHubHTTPError(
        "Bearer hf_secret", response=SimpleNamespace(status_code=403, headers={}, request=None)
    )
    with pytest.raises(
        OSError, match=r"me/model could not be pushed \(status 403\): log in by `hf auth login`"
    ) as error:
        hub.push_bundle(folder, "me/model", token="hf_secret")
    assert "hf_secret" not in str(error.value)
    fake.problem = ConnectionError("no route")
    with pytest.raises(OSError, match="the Hub cannot be reached .ConnectionError.; .* stays as it is"):
        hub.push_bundle(folder, "me/model")


def test_the_command_pushes(tmp_path, fake, capsys):
    folder = hub.save_bundle(tiny_pipeline(), tmp_path / "bundle")
    hub.main([folder, "me/model", "--create_pr", "--revision", "next"])
    assert capsys.readouterr().out.strip() == "https://hub/commit/abc"
    # a pull request goes to a branch that exists
    assert [name for name, _, _ in fake.calls] == ["create_repo", "upload_folder"]
    assert fake.calls[1][2]["create_pr"]
    with pytest.raises(SystemExit):
        hub.main([str(tmp_path), "me/model"])
    assert "is not a bundle" in capsys.readouterr().err


def test_training_pushes_at_its_end_and_does_not_fail_without_network(tmp_path, fake, capsys):
    arguments = [*TINY_RUN, "--network_kwargs", TINY_DIT, "--max_train_steps", 1, "--push_to_hub", "me/model"]
    run(train.main, *arguments, "--hub_private", "--output_dir", tmp_path / "one")
    assert "pushed: https://hub/commit/abc" in capsys.readouterr().out
    assert fake.calls[0][2]["private"]
    fake.problem = ConnectionError("no route")
    run(train.main, *arguments, "--output_dir", tmp_path / "two")
    out = capsys.readouterr().out
    assert "the Hub cannot be reached" in out
    assert "python -m score_sde.hub" in out
    assert (tmp_path / "two" / "pipeline" / "model_index.json").is_file()
