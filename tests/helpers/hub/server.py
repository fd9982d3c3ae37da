"""A Hub on this machine, for tests: the part of huggingface.co that its client speaks to, kept in memory.

Repos of models, datasets and Spaces, with commits, branches, tags, pull requests, visibility and tokens. Large files go
to and come from a storage of another origin, as on the real Hub, which must never see a token. `LocalHub.fail` makes
requests fail as networks and servers do.
"""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


# token -> who it belongs to: "me" is a member of "lab"
USERS = {
    "hf_writer": SimpleNamespace(name="me", orgs=["lab"], writes=True),
    "hf_reader": SimpleNamespace(name="me", orgs=["lab"], writes=False),
    "hf_stranger": SimpleNamespace(name="you", orgs=[], writes=True),
}


class Refusal(Exception):
    def __init__(self, status, message, code=None, **body):
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass
class Blob:
    """A file of a repo: `oid` is what git would call it; a large one is known by its `sha256`, too."""

    content: bytes
    sha256: str | None = None

    @property
    def oid(self):
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool = False
    commits: dict = field(default_factory=dict)  # sha -> {path: Blob}
    messages: dict = field(default_factory=dict)  # sha -> commit message
    branches: dict = field(default_factory=dict)  # name -> sha
    tags: dict = field(default_factory=dict)
    pull_requests: list = field(default_factory=list)  # shas

    def sha(self, revision):
        references = self.branches | self.tags
        references |= {f"refs/pr/{number}": sha for number, sha in enumerate(self.pull_requests, 1)}
        return references.get(revision) or next((sha for sha in self.commits if sha == revision), None)

    def commit(self, files, parent, message):
        listing = sorted((path, blob.oid) for path, blob in files.items())
        sha = hashlib.sha1(json.dumps([listing, parent, message, len(self.commits)]).encode()).hexdigest()
        self.commits[sha], self.messages[sha] = files, message
        return sha


@dataclass
class Fault:
    """What happens to the requests that match; `LocalHub.fail` says what each field does."""

    method: str
    pattern: str
    times: int | None
    skip: int
    status: int | None
    headers: dict
    message: str
    drop: bool
    keep: int | None
    delay: float
    hold: bool
    reached: threading.Event = field(default_factory=threading.Event)


class LocalHub:
    """Serves on two free ports of 127.0.0.1, the Hub's and the storage's, between `__enter__` and `__exit__`."""

    def __enter__(self):
        self.reset()
        self.stopping = threading.Event()
        self.server, self.storage = self._serve(0), self._serve(0)
        self.url, self.storage_url = (f"http://127.0.0.1:{each.server_port}" for each in (self.server, self.storage))
        self.forks = None
        return self

    def __exit__(self, *_):
        self.stopping.set()
        if self.forks is not None:
            self.forks.kill()
            self.forks.communicate()
            self.home.cleanup()
        for server in (self.server, self.storage):
            server.shutdown()
            server.server_close()

    def _serve(self, port):
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        server.daemon_threads, server.hub = True, self
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def reset(self):
        """Forget all repos, requests and faults."""
        self.lock = threading.RLock()
        self.repos = {}  # (type, id) -> Repo
        self.objects = {}  # sha256 -> content, in the storage
        self.requests = []  # method, path, token and whether the storage was asked
        self.faults = []

    def put(self, repo_id, files, repo_type="model", private=False, revision="main"):
        """A commit of {path: bytes} to a repo, made if it doesn't exist, without any client."""
        repo = self.repos.setdefault((repo_type, repo_id), Repo(private))
        parent = repo.branches.get(revision) or repo.branches.get("main")
        blobs = dict(repo.commits.get(parent, {}))
        for path, content in files.items():
            blobs[path] = Blob(content, hashlib.sha256(content).hexdigest() if is_large(path, content) else None)
            self.objects |= {blobs[path].sha256: content} if blobs[path].sha256 else {}
        repo.branches[revision] = repo.commit(blobs, parent, "put")

    def files(self, repo_id, revision="main", repo_type="model"):
        """{path: content} of a repo."""
        repo = self.repos[repo_type, repo_id]
        return {path: blob.content for path, blob in repo.commits[repo.sha(revision)].items()}

    def fail(
        self,
        method,
        pattern,
        times=1,
        skip=0,
        status=None,
        headers=(),
        message="refused",
        drop=False,
        keep=None,
        delay=0.0,
        hold=False,
    ):
        """Let requests of a method whose path matches a regular expression fail.

        Args:
            times: how many of them, None for all; the first `skip` of them pass.
            status: is answered with these `headers` and this `message`.
            drop: the connection is closed without an answer.
            keep: it is closed after this many bytes of the answer's body.
            delay: seconds before each KiB of the answer's body.
            hold: the request's body is half read, and then nothing happens any more.

        Returns:
            A `Fault`, whose event `reached` is set at the first request that fails.
        """
        fault = Fault(method, pattern, times, skip, status, dict(headers), message, drop, keep, delay, hold)
        self.faults.append(fault)
        return fault

    def fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.pattern, path):
                    if fault.skip:
                        fault.skip -= 1
                    elif fault.times != 0:
                        fault.times = None if fault.times is None else fault.times - 1
                        fault.reached.set()
                        return fault
        return None

    def unplug(self):
        """Refuse all connections until `plug`."""
        self.server.shutdown()
        self.server.server_close()

    def plug(self):
        self.server = self._serve(self.server.server_port)

    def environment(self, home, token=None):
        """What a process needs to take this for the Hub; its cache and token files are in the folder `home`."""
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        addresses = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        return switches | addresses | {"HF_TOKEN": token or "", "OMP_NUM_THREADS": "1"}

    def run(self, code, *arguments, token=None, environment=(), background=False):
        """Run a Python program, with sys.argv[1:] = arguments, against this Hub.

        It runs in a process of its own, forked from one that has imported this package already; all of them share one
        cache of downloads. `environment` is set too late for what huggingface_hub reads when it is imported.

        Returns:
            Exit status (negative for a signal), stdout and stderr, as `subprocess.run` does; with `background` at once,
            an object with the process's id `pid` and with `wait()`, which returns them.
        """
        if self.forks is None:
            self.home = tempfile.TemporaryDirectory()
            self.forks = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("forks.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | self.environment(self.home.name),
            )
        output = Path(tempfile.mkdtemp(dir=self.home.name))
        job = {"code": code, "arguments": [str(each) for each in arguments], "output": str(output)}
        job["environment"] = dict(environment) | {"HF_TOKEN": token or ""}
        self.forks.stdin.write(json.dumps(job) + "\n")
        self.forks.stdin.flush()
        pid = int(self.forks.stdout.readline())

        def wait():
            returncode = int(self.forks.stdout.readline())
            texts = {name: (output / name).read_text(errors="replace") for name in ("stdout", "stderr")}
            return SimpleNamespace(returncode=returncode, **texts)

        return SimpleNamespace(pid=pid, wait=wait) if background else wait()


def is_large(path, sample, size=0):
    """Whether git would leave a file to the storage: by its kind, its size, or because it isn't text."""
    return Path(path).suffix in (".safetensors", ".bin", ".pt", ".parquet", ".arrow") or b"\0" in sample or size > 10e6


FOLDER = {"type": "directory", "oid": "0" * 40, "size": 0}


def described(path, blob):
    """A file as the Hub lists it."""
    entry = {"type": "file", "oid": blob.oid, "size": len(blob.content), "path": path}
    if blob.sha256:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
    return entry


def folders_of(files):
    return sorted({str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer_request(self):
        """One request of any kind: read it, find its route, answer."""
        hub, url = self.server.hub, urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        in_storage = self.server is hub.storage
        hub.requests.append(
            SimpleNamespace(method=self.command, path=self.path, token=self.token, in_storage=in_storage)
        )
        self.user = USERS.get(self.token)
        self.problem = fault = hub.fault(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault and fault.hold:
            self.rfile.read(length // 2)
            hub.stopping.wait(60)
        if fault and (fault.drop or fault.hold):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.body = self.rfile.read(length)
        try:
            if fault and fault.status:
                raise Refusal(fault.status, fault.message)
            if self.token is not None and self.user is None:
                raise Refusal(401, "Invalid credentials in Authorization header")
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if method in (self.command, "GET" if self.command == "HEAD" else None) and match:
                    with hub.lock:
                        answer = function(self, *(group and unquote(group) for group in match.groups()))
                    break
            else:
                raise Refusal(404, f"no route for {self.command} {url.path}")
            status, headers, body = answer if isinstance(answer, tuple) else (200, {}, answer)
        except Refusal as refusal:
            status, body = refusal.status, {"error": refusal.message} | refusal.body
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            headers |= fault.headers if fault and fault.status else {}
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer_request

    def send_body(self, body):
        fault = self.problem
        if fault and fault.keep is not None:
            body, self.close_connection = body[: fault.keep], True
        pieces = [body[i : i + 1024] for i in range(0, len(body), 1024)] if fault and fault.delay else [body]
        for piece in pieces:
            time.sleep(fault.delay if fault else 0)
            self.wfile.write(piece)

    @property
    def json(self):
        return json.loads(self.body)

    # --- who may do what ------------------------------------------------------------------------------------------

    def owns(self, namespace):
        return self.user is not None and namespace in (self.user.name, *self.user.orgs)

    def check_write(self, namespace, what):
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if not self.user.writes:
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        if not self.owns(namespace):
            raise Refusal(403, f'You don\'t have the rights to {what} under the namespace "{namespace}"')

    def repo(self, kind, repo_id, write=False):
        """The repo, or the answer that doesn't give away whether there is one."""
        repo = self.server.hub.repos.get(((kind or "models").removesuffix("s"), repo_id))
        namespace = repo_id.split("/")[0]
        if repo is None or (repo.private and not self.owns(namespace)):
            if self.user is None:
                # the real Hub sends no code here; the client infers it from 401, but on https addresses only
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write:
            self.check_write(namespace, "write")
        return repo

    def sha(self, repo, revision):
        sha = repo.sha(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # --- repos ----------------------------------------------------------------------------------------------------

    def whoami(self):
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if self.user.writes else "read"
        orgs = [{"name": name, "type": "org"} for name in self.user.orgs]
        return {
            "type": "user",
            "name": self.user.name,
            "orgs": orgs,
            "auth": {"accessToken": {"displayName": "token", "role": role}},
        }

    def create_repo(self):
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        namespace, kind = self.json.get("organization") or self.user.name, self.json.get("type") or "model"
        self.check_write(namespace, f"create a {kind}")
        repo_id = f"{namespace}/{self.json['name']}"
        address = f"{self.server.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if (kind, repo_id) in self.server.hub.repos:
            raise Refusal(409, f"You already created this {kind} repo: {repo_id}", url=address)
        if kind == "space" and not self.json.get("sdk"):
            raise Refusal(400, "sdk is required for a Space")
        repo = self.server.hub.repos[kind, repo_id] = Repo(self.json.get("visibility") == "private")
        attributes = Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        repo.branches["main"] = repo.commit({".gitattributes": attributes}, None, "initial commit")
        return {"url": address, "name": repo_id, "id": repo_id}

    def delete_repo(self):
        namespace, kind = self.json.get("organization") or self.user.name, self.json.get("type") or "model"
        repo_id = f"{namespace}/{self.json['name']}"
        self.repo(kind + "s", repo_id, write=True)
        del self.server.hub.repos[kind, repo_id]
        return {}

    def repo_info(self, kind, repo_id, revision=None):
        repo = self.repo(kind, repo_id)
        sha = self.sha(repo, revision or "main")
        return {
            "_id": "0",
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.split("/")[0],
            "sha": sha,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in sorted(repo.commits[sha])],
        }

    def refs(self, kind, repo_id):
        repo = self.repo(kind, repo_id)

        def listed(references, prefix):
            return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in references.items()]

        return {
            "branches": listed(repo.branches, "refs/heads/"),
            "tags": listed(repo.tags, "refs/tags/"),
            "converts": [],
            "pullRequests": listed({str(i): sha for i, sha in enumerate(repo.pull_requests, 1)}, "refs/pr/"),
        }

    def create_branch(self, kind, repo_id, branch):
        repo = self.repo(kind, repo_id, write=True)
        if branch in repo.branches:
            raise Refusal(409, "Reference already exists")
        repo.branches[branch] = self.sha(repo, self.json.get("startingPoint") or "main")
        return {}

    def create_tag(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id, write=True)
        if self.json["tag"] in repo.tags:
            raise Refusal(409, "Tag reference exists already")
        repo.tags[self.json["tag"]] = self.sha(repo, revision)
        return {}

    def delete_reference(self, kind, repo_id, which, name):
        repo = self.repo(kind, repo_id, write=True)
        references = repo.branches if which == "branch" else repo.tags
        self.sha(repo, name)
        del references[name]
        return {}

    # --- upload ---------------------------------------------------------------------------------------------------

    def validate_yaml(self):
        """The rules of the Hub on the head of a README.md that cards meet."""
        content, errors, warnings = self.json["content"], [], []
        match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            raise Refusal(400, "invalid", errors=[{"message": str(error)}], warnings=[]) from None
        if not data:
            warnings.append({"message": "empty or missing yaml metadata in repo card"})
        elif not isinstance(data, dict):
            errors.append('"yaml metadata" must be a mapping')
        else:
            for key in ("tags", "datasets", "language", "model-index"):
                if key in data and not isinstance(data[key], str if key == "language" else list):
                    errors.append(f'"{key}" must be a list')
            for model in data.get("model-index") or []:
                for result in model.get("results", [{}]):
                    dataset = result.get("dataset", {})
                    if not re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", str(dataset.get("type", ""))):
                        errors.append(
                            f'"dataset.type" with value "{dataset.get("type")}" fails to match the required pattern'
                        )
                    if not dataset.get("name") or not result.get("task", {}).get("type"):
                        errors.append('"dataset.name" and "task.type" are required')
                    if any("type" not in metric or "value" not in metric for metric in result.get("metrics", [{}])):
                        errors.append('"metrics.type" and "metrics.value" are required')
        if errors:
            raise Refusal(400, "invalid", errors=[{"message": error} for error in errors], warnings=warnings)
        return {"errors": [], "warnings": warnings}

    def preupload(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id, write="create_pr" not in self.query)
        known = repo.commits[self.sha(repo, revision)]
        answers = []
        for file in self.json["files"]:
            large = is_large(file["path"], base64.b64decode(file["sample"]), file["size"])
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in known:
                answer["oid"] = known[file["path"]].sha256 or known[file["path"]].oid
            answers.append(answer)
        return {"files": answers}

    def lfs_batch(self, kind, repo_id):
        self.repo(kind, repo_id)
        hub = self.server.hub
        objects = []
        for each in self.json["objects"]:
            upload = {"href": f"{hub.storage_url}/{each['oid']}?signature=1"}
            objects.append(each if each["oid"] in hub.objects else each | {"actions": {"upload": upload}})
        return {"transfer": "basic", "objects": objects}

    def commit(self, kind, repo_id, revision):
        as_pull_request = "create_pr" in self.query
        repo = self.repo(kind, repo_id, write=not as_pull_request)
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        hub, parent, header = self.server.hub, self.sha(repo, revision), {}
        files = dict(repo.commits[parent])
        for line in self.body.decode().splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                header = value
                if header.get("parentCommit") not in (None, parent):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in hub.objects:
                    raise Refusal(400, f"the large file {value['path']} was not uploaded")
                files[value["path"]] = Blob(hub.objects[value["oid"]], value["oid"])
            elif key == "deletedFile":
                if value["path"] not in files:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"].rstrip("/"))}
        sha = repo.commit(files, parent, header["summary"])
        address = f"{hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{address}/commit/{sha}", "hookOutput": ""}
        if as_pull_request:
            repo.pull_requests.append(sha)
            return answer | {"pullRequestUrl": f"{address}/discussions/{len(repo.pull_requests)}"}
        if revision.startswith("refs/pr/"):
            repo.pull_requests[int(revision.removeprefix("refs/pr/")) - 1] = sha
        else:
            repo.branches[revision] = sha
        return answer

    # --- download -------------------------------------------------------------------------------------------------

    def tree(self, kind, repo_id, revision, folder=None):
        repo = self.repo(kind, repo_id)
        files, prefix = repo.commits[self.sha(repo, revision)], f"{folder}/" if folder else ""
        entries = [described(path, blob) for path, blob in files.items()]
        entries += [FOLDER | {"path": path} for path in folders_of(files)]
        inside = [each for each in entries if each["path"].startswith(prefix)]
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        return [each for each in inside if recursive or "/" not in each["path"].removeprefix(prefix)]

    def paths_info(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id)
        files = repo.commits[self.sha(repo, revision)]
        entries = {path: described(path, blob) for path, blob in files.items()}
        entries |= {path: FOLDER | {"path": path} for path in folders_of(files)}
        return [entries[path] for path in parse_qs(self.body.decode()).get("paths", []) if path in entries]

    def commits(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id)
        self.sha(repo, revision)
        return [
            {"id": sha, "title": message, "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}
            for sha, message in reversed(repo.messages.items())
        ]

    def resolve(self, kind, repo_id, revision, path):
        repo = self.repo(kind, repo_id)
        sha = self.sha(repo, revision)
        blob = repo.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if blob is None:
            code = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return 404, headers | code, {"error": "Entry not found"}
        if blob.sha256:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
            return 302, headers | {"Location": f"{self.server.hub.storage_url}/{blob.sha256}?signature=1"}, b""
        return 200, headers | {"ETag": f'"{blob.oid}"', "Content-Type": "text/plain"}, blob.content

    # --- storage of large files -----------------------------------------------------------------------------------

    def put_object(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content is not what its name says")
        self.server.hub.objects[oid] = self.body
        return b""

    def get_object(self, oid):
        content = self.server.hub.objects.get(oid)
        if content is None:
            raise Refusal(404, "no such object")
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted is None:
            return 200, {"ETag": f'"{oid}"'}, content
        start = int(wanted[1])
        return 206, {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}, content[start:]


REPO = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"
FILES_OF_REPO = r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create_repo),
    ("DELETE", r"/api/repos/delete", Handler.delete_repo),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", REPO, Handler.repo_info),
    ("GET", rf"{REPO}/revision/([^/]+)", Handler.repo_info),
    ("GET", rf"{REPO}/refs", Handler.refs),
    ("POST", rf"{REPO}/branch/([^/]+)", Handler.create_branch),
    ("POST", rf"{REPO}/tag/([^/]+)", Handler.create_tag),
    ("DELETE", rf"{REPO}/(branch|tag)/([^/]+)", Handler.delete_reference),
    ("POST", rf"{REPO}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"{FILES_OF_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"{REPO}/commit/([^/]+)", Handler.commit),
    ("GET", rf"{REPO}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("POST", rf"{REPO}/paths-info/([^/]+)", Handler.paths_info),
    ("GET", rf"{REPO}/commits/([^/]+)", Handler.commits),
    ("GET", rf"{FILES_OF_REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("PUT", r"/([0-9a-f]{64})", Handler.put_object),
    ("GET", r"/([0-9a-f]{64})", Handler.get_object),
]
