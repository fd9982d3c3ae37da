"""Attacks on tokens: no request that fails, and no token that cannot be one, shows it anywhere.

Malformed tokens make the client itself fail, with an error that quotes them; so every way to the Hub is tried with one,
and every text and file that comes of it is searched: messages, tracebacks with all their causes, cards, files.
"""

import json
from pathlib import Path

import pytest
from places import files_of
from tiny import tiny_pipeline

from score_sde import save_bundle


SECRET = "hf_TheSecretPart"
MALFORMED = {
    "line feed": f"{SECRET}\nSecond",
    "return": f"{SECRET}\r",
    "letter": f"{SECRET}\u00fc",
    "space": f"{SECRET} {SECRET}",
    "null": f"{SECRET}\0",
    "bytes": f"{SECRET}\udcff",
}
CALLS = {
    "push": "from score_sde.sharing.hub import push_to_hub; push_to_hub(folder, 'me/new', token=token)",
    "push a model": "from tiny import random_dit; from score_sde.sharing.hub import push_to_hub\n"
    "push_to_hub(random_dit(), 'me/new', token=token)",
    "method": "from tiny import tiny_pipeline; tiny_pipeline().push_to_hub('me/new', token=token)",
    # a repo that no test has put into the cache
    "load": "from score_sde import load_bundle; load_bundle('me/unseen', token=token)",
    "pipeline": "from score_sde import ScoreSDEPipeline; ScoreSDEPipeline.from_pretrained('me/model', token=token)",
    "verify": "from score_sde.sharing.hub import verify; verify('me/model', token=token)",
    "space": "from score_sde.sharing.space import push_space; push_space('me/page', 'me/model', token=token)",
    "convert": "from score_sde.sharing.convert import *; pipeline_from_diffusers('me/m', token=token)",
}
# these take the token from where it is stored
BY_ENVIRONMENT = {
    "autoencoder": "from score_sde.sharing.opening import open_autoencoder; open_autoencoder('me/model')",
    "licence": "from score_sde.sharing.convert.from_diffusers import published_license; published_license('me/model')",
    "export": "from score_sde.sharing.convert import *; export_to_diffusers('me/model', folder + '/../x')",
    "latents": "from score_sde.training.parts.latents import fetch_latents; fetch_latents('me/latents')",
    "dataset": "from score_sde.training.parts.sources import open_split; open_split('me/photos', 'train')",
    "stream": "from score_sde.training.parts.sources import *; open_split('me/photos', 'train', streaming=True)",
    "features": "from score_sde.training.parts.metrics import open_features; open_features('me/vision', 'cpu')",
}
# everything that an error says: itself, all that led to it, and what a log would print
TRY = """
import json, sys, traceback
from contextlib import suppress
folder, token = sys.argv[1], json.loads(sys.argv[2])
try:
    exec(json.loads(sys.argv[3]))
except BaseException as error:
    traceback.print_exc()
    print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return save_bundle(tiny_pipeline(), tmp_path_factory.mktemp("tokens") / "bundle")


def attempt(local_hub, folder, code, token=None, environment=()):
    result = local_hub.run(TRY, folder, json.dumps(token), json.dumps(code), environment=environment)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    kind, message = json.loads(result.stdout.splitlines()[-1])
    files = files_of(Path(folder)) | files_of(Path(local_hub.home.name))
    assert SECRET not in said
    assert not any(SECRET.encode() in content for name, content in files.items() if not name.endswith(".safetensors"))
    return kind, message


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("malformed", ["line feed", "letter"])
def test_a_malformed_token_is_found_and_not_shown(local_hub, bundle, name, malformed):
    kind, message = attempt(local_hub, bundle, CALLS[name], MALFORMED[malformed])
    assert kind == "ValueError" and "the token of the Hub holds spaces, line feeds or other letters" in message
    assert local_hub.requests == []


@pytest.mark.parametrize("malformed", ["return", "space", "null", "bytes"])
def test_every_malformed_token_is_found(local_hub, bundle, malformed):
    kind, message = attempt(local_hub, bundle, CALLS["push"], MALFORMED[malformed])
    assert kind == "ValueError" and "the token of the Hub holds" in message


@pytest.mark.parametrize("name", BY_ENVIRONMENT)
def test_a_malformed_token_that_is_stored_is_found_and_not_shown(local_hub, bundle, name):
    code = f"import os; os.environ['HF_TOKEN'] = {MALFORMED['letter']!r}\n{BY_ENVIRONMENT[name]}"
    kind, message = attempt(local_hub, bundle, code)
    assert kind == "ValueError" and "the token of the Hub holds" in message


@pytest.mark.parametrize("name", ["push", "load", "space", "convert"])
@pytest.mark.parametrize("fault", [{"status": 401}, {"status": 500, "message": f"Bearer {SECRET}"}, {"drop": True}])
def test_a_request_that_failed_does_not_show_its_token(local_hub, bundle, name, fault):
    for method in ("GET", "POST", "HEAD"):
        local_hub.fail(method, "/", times=None, **fault)
    kind, message = attempt(local_hub, bundle, CALLS[name], SECRET)
    assert kind in ("OSError", "ValueError")
    assert any(word in message for word in ("no such repo", "no token", "status 500", "cannot be reached"))
