"""The Hub of the tests does what the real one's client expects of it."""

import json
import os
import time

import pytest


KINDS = """
import json, sys
from huggingface_hub import CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
api, folder, found = HfApi(), sys.argv[1], {}
for kind in ("model", "dataset", "space"):
    where = {"repo_id": "lab/thing", "repo_type": kind}
    api.create_repo(**where, space_sdk="gradio" if kind == "space" else None, private=True, exist_ok=True)
    api.create_repo(**where, space_sdk="gradio" if kind == "space" else None, exist_ok=True)
    first = api.upload_folder(**where, folder_path=folder, commit_message="first")
    again = api.upload_folder(**where, folder_path=folder)
    api.create_branch(**where, branch="a/b")
    api.create_tag(**where, tag="v1", revision="a/b")
    api.create_commit(**where, operations=[CommitOperationDelete("sub/notes.txt")], commit_message="x", revision="a/b")
    request = api.upload_file(**where, path_or_fileobj=b"new", path_in_repo="new.txt", create_pr=True)
    download = snapshot_download("lab/thing", repo_type=kind)
    refs, info = api.list_repo_refs(**where), api.repo_info(**where)
    found[kind] = {
        "unchanged": first.oid == again.oid == info.sha,
        "private": info.private,
        "branches": sorted(ref.name for ref in refs.branches),
        "tag": refs.tags[0].target_commit == first.oid,
        "files": sorted(api.list_repo_files(**where)),
        "on the branch": sorted(api.list_repo_files(**where, revision="a/b")),
        "folders": [entry.path for entry in api.list_repo_tree(**where) if not hasattr(entry, "size")],
        "pull request": open(hf_hub_download(**where, filename="new.txt", revision=request.pr_revision)).read(),
        "large": open(download + "/weights.bin", "rb").read() == open(folder + "/weights.bin", "rb").read(),
        "title": [commit.title for commit in api.list_repo_commits(**where)][-1],
    }
print(json.dumps(found))
"""


def test_repos_of_every_kind(local_hub, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "notes.txt").write_text("notes")
    (tmp_path / "weights.bin").write_bytes(os.urandom(5000))
    result = local_hub.run(KINDS, tmp_path, token="hf_writer")
    assert result.returncode == 0, result.stderr
    files = [".gitattributes", "sub/notes.txt", "weights.bin"]
    expected = {
        "unchanged": True,
        "private": True,
        "branches": ["a/b", "main"],
        "tag": True,
        "files": files,
        "on the branch": [".gitattributes", "weights.bin"],
        "folders": ["sub"],
        "pull request": "new",
        "large": True,
        "title": "initial commit",
    }
    assert json.loads(result.stdout) == dict.fromkeys(("model", "dataset", "space"), expected)
    # the storage of large files was used, for each content once, and never saw the token
    stored = [request for request in local_hub.requests if request.in_storage]
    assert [request.method for request in stored].count("PUT") == 1
    assert all(request.token is None for request in stored)
    assert {request.token for request in local_hub.requests if not request.in_storage} == {"hf_writer"}


PROBLEMS = """
import json, sys
from huggingface_hub import HfApi, hf_hub_download
problems = []
for token, call, arguments in json.loads(sys.argv[1]):
    api = HfApi(token=token)
    try:
        hf_hub_download(*arguments, token=token) if call == "download" else getattr(api, call)(**arguments)
        problems.append("none")
    except Exception as error:
        problems.append([type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)])
print(json.dumps(problems))
"""
UPLOAD = {"path_or_fileobj": __file__, "path_in_repo": "a.py", "repo_id": "me/open"}


@pytest.mark.parametrize(
    ("token", "call", "arguments", "problem"),
    [
        (False, "model_info", {"repo_id": "me/open"}, "none"),
        (False, "model_info", {"repo_id": "me/secret"}, ["RepositoryNotFoundError", 401]),
        ("hf_stranger", "model_info", {"repo_id": "me/secret"}, ["RepositoryNotFoundError", 404]),
        ("hf_reader", "model_info", {"repo_id": "me/secret"}, "none"),
        ("hf_unknown", "model_info", {"repo_id": "me/open"}, ["HfHubHTTPError", 401]),
        (False, "model_info", {"repo_id": "me/open", "revision": "v9"}, ["RevisionNotFoundError", 404]),
        (False, "download", ["me/open", "b.txt"], ["RemoteEntryNotFoundError", 404]),
        (False, "create_repo", {"repo_id": "me/new"}, ["HfHubHTTPError", 401]),
        ("hf_reader", "create_repo", {"repo_id": "me/new"}, ["HfHubHTTPError", 403]),
        ("hf_stranger", "upload_file", UPLOAD, ["HfHubHTTPError", 403]),
        ("hf_stranger", "upload_file", UPLOAD | {"create_pr": True}, "none"),
        ("hf_writer", "upload_file", UPLOAD | {"repo_id": "me/none"}, ["RepositoryNotFoundError", 404]),
        ("hf_writer", "create_branch", {"repo_id": "me/open", "branch": "main"}, ["HfHubHTTPError", 409]),
    ],
)
def test_who_may_do_what(local_hub, token, call, arguments, problem):
    local_hub.put("me/open", {"a.txt": b"a"})
    local_hub.put("me/secret", {"a.txt": b"a"}, private=True)
    result = local_hub.run(PROBLEMS, json.dumps([[token, call, arguments]]))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [problem]


def test_failures_that_the_client_survives_and_not(local_hub):
    content = bytes(range(256)) * 200
    local_hub.put("me/open", {"a.bin": content})
    # cut in the middle and slow: the rest is asked for
    local_hub.fail("GET", r"/[0-9a-f]{64}", keep=20_000)
    local_hub.fail("GET", r"/[0-9a-f]{64}", delay=0.001)
    code = "import sys; from huggingface_hub import hf_hub_download as d; print(d('me/open', 'a.bin'))"
    path = local_hub.run(code).stdout.strip()
    with open(path, "rb") as file:
        assert file.read() == content
    calls = [["hf_writer", "create_repo", {"repo_id": f"me/{i}"}] for i in range(3)]
    local_hub.fail("POST", "/api/repos/create", status=429, headers={"RateLimit": '"api";r=0;t=9'}, message="slow down")
    local_hub.fail("POST", "/api/repos/create", drop=True)
    problems = json.loads(local_hub.run(PROBLEMS, json.dumps(calls)).stdout)
    assert problems == [["HfHubHTTPError", 429], ["RemoteProtocolError", None], "none"]
    local_hub.unplug()
    assert json.loads(local_hub.run(PROBLEMS, json.dumps(calls[2:])).stdout) == [["ConnectError", None]]
    local_hub.plug()
    assert local_hub.run(PROBLEMS, json.dumps(calls[2:])).stdout.strip() == '[["HfHubHTTPError", 409]]'


def test_a_process_is_killed_in_the_middle(local_hub):
    held = local_hub.fail("POST", "/api/repos/create", hold=True)
    client = local_hub.run(PROBLEMS, json.dumps([["hf_writer", "create_repo", {"repo_id": "me/a"}]]), background=True)
    assert held.reached.wait(20)
    os.kill(client.pid, 9)
    assert client.wait().returncode == -9
    time.sleep(0.1)
    assert local_hub.repos == {}
