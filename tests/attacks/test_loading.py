"""Loading runs no code of a folder, asks nothing, reaches nothing, opens only what it has checked, and says what is
wrong by name: one row per attack."""

import json
import os
import shutil
import socket
import sys
import tracemalloc
from pathlib import Path

import diffusers
import pytest
import torch
from bundles import WEIGHTS, edit, retensor
from diffusers.models import autoencoders
from safetensors.torch import load_file, save_file
from tiny import draw, latent_pipeline, random_dit, tiny_pipeline

from score_sde import ScoreSDEPipeline, ScoreSDEScheduler, load_bundle, save_bundle
from score_sde.pipelines.bundle_files import LARGEST_CONFIG
from score_sde.sharing import bundle_checks, convert, opening, weight_checks
from score_sde.sharing.bundle_checks import AUTOENCODERS, NETWORKS
from score_sde.sharing.opening import open_autoencoder


INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture(scope="session")
def sound_bundle(tmp_path_factory):
    return Path(save_bundle(latent_pipeline(), tmp_path_factory.mktemp("sound") / "bundle"))


@pytest.fixture
def bundle(sound_bundle, tmp_path):
    return Path(shutil.copytree(sound_bundle, tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def canary(monkeypatch, tmp_path):
    """No attack reads stdin, opens a connection, or runs code that leaves a trace."""

    def refuse(*_, **__):
        raise AssertionError("loading asked, or reached out")

    class Stdin:
        read = readline = __iter__ = fileno = refuse

    monkeypatch.setattr(sys, "stdin", Stdin())
    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = set(sys.modules)
    yield
    assert not (tmp_path / "trace").exists()
    homes = [str(getattr(sys.modules[name], "__file__", None) or "") for name in sys.modules.keys() - before]
    assert not any(str(tmp_path) in home or "diffusers_modules" in home for home in homes)


def leave_trace(folder, file):
    """Code, or a pickle that is code, that leaves a trace where it is run."""
    path, trace = folder / file, str(folder.parent / "trace")
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".py":
        path.write_text(f"open({trace!r}, 'w')\nclass Evil:\n    pass\n")
    else:
        path.write_bytes(b"cposix\nmkdir\n(V" + trace.encode() + b"\ntR.")


def move_out(folder, file):
    """Replace a file or folder by a link to where it is now."""
    target = folder.parent / "elsewhere"
    shutil.move(folder / file, target)
    (folder / file).symlink_to(target)


def replace(folder, file, make):
    path = folder / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


def name_as_component(part, library, class_name, **config):
    """A component that is a class of transformers, with code of its own."""

    def attack(folder):
        edit(folder / "model_index.json", **{part: [library, class_name]})
        leave_trace(folder, f"{part}/evil.py")
        code = {"AutoTokenizer": ["evil.Evil", None], "AutoProcessor": "evil.Evil", "AutoConfig": "evil.Evil"}
        for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
            (folder / part / file).write_text(json.dumps({"auto_map": code, "model_type": "bert"} | config))

    return attack


def shard(folder, **index):
    weights = load_file(folder / "transformer" / WEIGHTS)
    whole = {"metadata": {}, "weight_map": dict.fromkeys(weights, WEIGHTS)}
    (folder / "transformer" / INDEX).write_text(json.dumps(whole | index))


def shard_to(file):
    def attack(folder):
        weights = load_file(folder / "transformer" / WEIGHTS)
        leave_trace(folder, "transformer/evil.bin")
        shard(folder, weight_map=dict.fromkeys(weights, file))

    return attack


def edits(file, **changes):
    return lambda folder: edit(folder / file, **changes)


def first(weights):
    return min(weights)


NET, VAE, SCHEDULER = "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"
BIAS = "proj_out.bias"
DEEP = json.loads("[" * 50 + "]" * 50)

ATTACKS = {
    # code
    "a tokenizer with code": (
        name_as_component("tokenizer", "transformers", "LlamaTokenizer"),
        "tokenizer/config.json has no place in a bundle",
    ),
    "a processor as vae": (name_as_component("vae", "transformers", "LayoutLMv2Processor"), "an autoencoder of diff"),
    "a processor as scheduler": (
        name_as_component("scheduler", "transformers", "AutoProcessor"),
        "a ScoreSDESched",
    ),
    "a model of transformers": (name_as_component("transformer", "transformers", "AutoModel"), "must be one of DiTMod"),
    "code of a second repo": (
        name_as_component("vae", "transformers", "AutoTokenizer", _name_or_path="you/other"),
        "must be an autoencoder",
    ),
    "a network of text": (
        edits("model_index.json", transformer=["diffusers", "FluxTransformer2DModel"]),
        "must be one",
    ),
    "a pipeline in a pipeline": (
        edits("model_index.json", vae=["diffusers", "DiffusionPipeline"]),
        "an autoencoder of",
    ),
    "a guider": (edits("model_index.json", scheduler=["diffusers", "ClassifierFreeGuidance"]), "a scheduler of diff"),
    "a module": (edits("model_index.json", scheduler=["diffusers", "schedulers"]), "a scheduler of diffusers"),
    "a vocoder as vae": (edits("model_index.json", vae=["diffusers", "MMAudioVocoder"]), "an autoencoder of diffusers"),
    "another library": (edits("model_index.json", vae=["os", "system"]), "component 'vae' is a system of 'os'"),
    "FlashPack": (
        edits("model_index.json", vae=["diffusers", "FlashPackAutoencoderKL"]),
        "an autoencoder of diffusers",
    ),
    "a pipeline of two repos": (edits("model_index.json", _class_name="KandinskyV22CombinedPipeline"), "holds a Kand"),
    "auto_map of the network": (
        edits(NET, auto_map={"AutoModel": "evil.Evil"}),
        "config.json: auto_map .* not",
    ),
    "auto_map of the vae": (edits(VAE, auto_map={"AutoModel": "you/other--evil.Evil"}), "auto_map .* is not allowed"),
    "auto_map deeper": (
        edits(SCHEDULER, calibration={"1": {"auto_map": 1}}),
        "calibration.1.auto_map 1 is not",
    ),
    "custom_pipeline": (edits("model_index.json", custom_pipeline="evil"), "custom_pipeline 'evil' is not allowed"),
    "quantised": (
        edits(VAE, quantization_config={"quant_method": "bitsandbytes"}),
        "quantization_config .* not",
    ),
    "None.py": (lambda folder: leave_trace(folder, "None.py"), "None.py would be taken for the installed code"),
    "a file like the package": (
        lambda folder: leave_trace(folder, "transformer/score_sde.py"),
        "score_sde.py would",
    ),
    "a file like diffusers": (
        lambda folder: leave_trace(folder, "vae/diffusers.py"),
        "diffusers.py would be taken",
    ),
    "values passed over": (edits("model_index.json", _use_default_values=3), "_use_default_values 3 is not allowed"),
    # places
    "index a link": (lambda folder: move_out(folder, "model_index.json"), "model_index.json is a link"),
    "config a link": (lambda folder: move_out(folder, NET), "config.json is a link: a bundle holds its own files"),
    "weights a link": (lambda folder: move_out(folder, f"vae/{WEIGHTS}"), f"{WEIGHTS} is a link"),
    "component a link": (lambda folder: move_out(folder, "vae"), "vae is a link: a bundle holds its own folders"),
    "endless config": (lambda folder: replace(folder, NET, lambda path: path.symlink_to("/dev/zero")), "is a link"),
    "endless index": (
        lambda folder: replace(folder, "model_index.json", lambda path: path.symlink_to("/dev/zero")),
        "is a link",
    ),
    "config a pipe": (lambda folder: replace(folder, NET, os.mkfifo), "transformer/config.json is no file"),
    "weights a pipe": (lambda folder: replace(folder, f"vae/{WEIGHTS}", os.mkfifo), f"{WEIGHTS} is no file"),
    "config a folder": (lambda folder: replace(folder, NET, os.mkdir), "transformer/config.json is no file"),
    "weights a folder": (lambda folder: replace(folder, f"vae/{WEIGHTS}", os.mkdir), f"vae/{WEIGHTS} is no file"),
    "component a file": (lambda folder: replace(folder, "vae", Path.touch), "vae holds no config.json"),
    "large config": (
        lambda folder: (folder / NET).write_bytes(b" " * (LARGEST_CONFIG + 1)),
        "no config: it has more",
    ),
    "only a pickle": (
        lambda folder: (leave_trace(folder, "vae/diffusion_pytorch_model.bin"), (folder / "vae" / WEIGHTS).unlink()),
        "weights are opened as safetensors only, never as pickles",
    ),
    "shard a pickle": (shard_to("evil.bin"), "'evil.bin' is no safetensors file beside it"),
    "shard elsewhere": (shard_to("../vae/" + WEIGHTS), "'../vae/.*' is no safetensors file beside it"),
    "shard from the root": (shard_to("/etc/passwd.safetensors"), "'/etc/passwd.safetensors' is no safetensors file"),
    "shard a number": (shard_to(3), "3 is no safetensors file beside it"),
    "shard absent": (shard_to("x.safetensors"), "holds no x.safetensors"),
    "no shards": (lambda folder: shard(folder, weight_map={}), "weight_map {} is no mapping, or there is no metadata"),
    "no metadata": (lambda folder: shard(folder, metadata=None), "there is no metadata"),
    "shards list others": (
        lambda folder: shard(folder, weight_map={"x": WEIGHTS}),
        "does not list what is in",
    ),
    # weights
    "a tensor missing": (
        lambda folder: retensor(folder, lambda w: w.pop(BIAS)),
        f"missing: {BIAS}",
    ),
    "a tensor renamed": (
        lambda folder: retensor(folder, lambda w: w.update(other=w.pop(BIAS))),
        f"missing: {BIAS}; unexpected: other",
    ),
    "a tensor too many": (
        lambda folder: retensor(folder, lambda w: w.update(x=torch.ones(2))),
        "unexpected: x",
    ),
    "a tensor misshapen": (
        lambda folder: retensor(folder, lambda w: w.update({BIAS: torch.zeros(13)})),
        rf"of another shape: {BIAS} \(13,\) for \(12,\)",
    ),
    "a tensor turned": (
        lambda folder: retensor(folder, lambda w: w.update({BIAS: torch.zeros(3, 4)})),
        rf"{BIAS} \(3, 4\) for \(12,\)",
    ),
    "all prefixed": (
        lambda folder: retensor(folder, lambda w: [w.update({f"module.{name}": w.pop(name)}) for name in list(w)]),
        "missing: .* and [0-9]+ more; unexpected: module.",
    ),
    "NaN": (
        lambda folder: retensor(folder, lambda w: w[BIAS].fill_(float("nan"))),
        f"{BIAS} holds values that are not",
    ),
    "infinite": (
        lambda folder: retensor(folder, lambda w: w[BIAS][3].fill_(-float("inf"))),
        f"{BIAS} holds values",
    ),
    "NaN in the vae": (
        lambda folder: retensor(folder, lambda w: w[first(w)].fill_(float("nan")), "vae"),
        f"vae/{WEIGHTS}: .* not finite",
    ),
    "NaN in half": (
        lambda folder: retensor(folder, lambda w: w.update({BIAS: torch.full((12,), float("nan")).half()})),
        f"{BIAS} holds values that are not finite",
    ),
    "NaN in eight bits": (
        lambda folder: retensor(
            folder, lambda w: w.update({BIAS: torch.full((12,), float("nan")).to(torch.float8_e4m3fn)})
        ),
        f"{BIAS} holds values that are not finite",
    ),
    "infinite once it is single": (
        lambda folder: retensor(folder, lambda w: w.update({BIAS: torch.full((12,), 1e300, dtype=torch.float64)})),
        f"{BIAS} holds values that are not finite",
    ),
    "whole numbers": (
        lambda folder: retensor(folder, lambda w: w.update({BIAS: w[BIAS].long()})),
        "holds torch.int64",
    ),
    "complex": (
        lambda folder: retensor(folder, lambda w: w.update({BIAS: w[BIAS] + 0j})),
        "holds torch.complex64, wh",
    ),
    "true and false": (
        lambda folder: retensor(folder, lambda w: w.update({BIAS: w[BIAS] > 0})),
        "holds torch.bool",
    ),
    "no weights": (lambda folder: (folder / "vae" / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is damaged"),
    "header of terabytes": (
        lambda folder: (folder / "vae" / WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + b"{}"),
        f"{WEIGHTS} is damaged",
    ),
    "half the weights": (lambda folder: os.truncate(folder / "vae" / WEIGHTS, 5000), f"{WEIGHTS} is damaged"),
    # values
    "NaN in a config": (edits(NET, mlp_ratio=float("nan")), "mlp_ratio nan must be finite"),
    "infinity in a config": (edits(VAE, scaling_factor=float("inf")), "scaling_factor inf must be finite"),
    "latents of no scale": (edits(VAE, scaling_factor=0), "scaling_factor 0 must be positive"),
    "latents turned around": (edits(VAE, scaling_factor=-1.0), "scaling_factor -1.0 must be positive"),
    "latents without spread": (edits(VAE, latents_std=[1.0, 0, 1.0]), r"latents_std \[1.0, 0, 1.0\] must be positive"),
    "NaN in the scheduler": (edits(SCHEDULER, beta_max=float("nan")), "beta_max nan must be finite"),
    "true as a number": (edits(NET, num_layers=True), "num_layers True must be of type int"),
    "number as text": (edits(VAE, latent_channels="3"), "latent_channels '3' must be of type int"),
    "object as a number": (edits(VAE, latent_channels={}), "latent_channels {} must be of type int"),
    "three sides": (edits(NET, sample_size=[4, None]), r"sample_size \[4, None\] must be of type"),
    "many levels": (
        edits(SCHEDULER, num_train_timesteps=10**6),
        "1,000,000 is more than the 100,000",
    ),
    "many betas": (edits(SCHEDULER, trained_betas=[0.1] * 100_001), "trained_betas has 100,001 entries"),
    "table of positions": (edits(NET, sample_size=[2000, 40_000]), "makes 20,000,000 tokens|larger than"),
    "nested deep": (edits(VAE, latents_mean=DEEP), "more than 32 deep"),
    "nested deeper": (
        lambda folder: (folder / NET).write_text('{"x": ' + "[" * 900 + "]" * 900 + "}"),
        "more than 32 deep",
    ),
    "long class name": (edits("model_index.json", _class_name="x" * 10**6), "holds a xxxxx"),
    "long library": (edits("model_index.json", vae=["x" * 10**6, "y" * 10**6]), "component 'vae' is a yyyy"),
    "long value": (edits(NET, conditioning="x" * 10**6), "conditioning"),
    "long key": (edits(NET, **{"x" * 10**6: 1}), "DiTModel has no argument 'xxxx"),
    "long list": (edits(VAE, down_block_types=["x" * 100] * 10**4), "down_block_types|xxxx"),
    "long shard": (shard_to("x" * 10**5 + ".safetensors"), "holds no xxx"),
    "label no number": (edits("model_index.json", id2label={"one": "x"}), "id2label 'one': 'x' must be the number"),
    "label negative": (edits("model_index.json", id2label={"-1": "x"}), "id2label '-1': 'x' must be the number"),
    "label of a list": (edits("model_index.json", id2label={"0": ["x"]}), r"id2label '0': \['x'\] must be the number"),
    "measurement unknown": (edits("model_index.json", condition_from="evil"), "condition_from 'evil' is unknown"),
    "measurement huge": (edits("model_index.json", condition_from="blur:1e9"), "blur needs a standard deviation"),
    "measurement a number": (edits("model_index.json", condition_from=4), "condition_from 4 must be of type"),
    "labels a list": (edits("model_index.json", id2label=["x"]), "'id2label' is no name of a component"),
    "component null": (edits("model_index.json", vae=None), "vae None must be a library and a class, or twice null"),
    "component half null": (
        edits("model_index.json", vae=[None, "AutoencoderKL"]),
        "must be a library and a class, or",
    ),
    "component null by half": (edits("model_index.json", vae=["diffusers", None]), "must be a library and a class, or"),
    "component of three": (edits("model_index.json", vae=["a", "b", "c"]), "must be a library and a class"),
    "component of numbers": (edits("model_index.json", vae=[1, 2]), "component 'vae' is a 2 of 1"),
    "component of lists": (edits("model_index.json", vae=[["a"], ["b"]]), "component 'vae' is a "),
    "component a text": (edits("model_index.json", vae="AutoencoderKL"), "vae 'AutoencoderKL' must be a library"),
    "no scheduler": (edits("model_index.json", scheduler=[None, None]), "there is no scheduler, which"),
    "two networks": (edits("model_index.json", unet=["diffusers", "UNet2DModel"]), "unet holds no config.json"),
    "format true": (edits("model_index.json", _bundle_format=True), "_bundle_format True is newer"),
    "format a text": (edits("model_index.json", _bundle_format="1"), "_bundle_format '1' is newer"),
    "class a number": (edits("model_index.json", _class_name=3), "_class_name 3 is no name of a class"),
    "class of lists": (edits("model_index.json", _class_name=[["x"], "ScoreSDEPipeline"]), "is no name of a class"),
    "no class": (edits("model_index.json", _class_name=None), "_class_name None is no name of a class"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_by_name(bundle, attack):
    make, message = ATTACKS[attack]
    make(bundle)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as error:
        load_bundle(bundle)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(error.value)) < 2000
    # configs themselves may have 16 MB; nothing is built
    assert peak < 200e6


@pytest.mark.parametrize(
    "arguments",
    [
        {"trust_remote_code": True},
        {"custom_pipeline": "evil"},
        {"custom_revision": "main"},
        {"use_safetensors": False},
        {"use_flashpack": True},
        {"use_onnx": True},
        {"load_connected_pipeline": True},
        {"revison": "v1"},
    ],
    ids=str,
)
def test_a_caller_cannot_make_the_loader_run_code(bundle, arguments):
    leave_trace(bundle, "evil.py")
    leave_trace(bundle, "pipeline.py")
    for load in (load_bundle, ScoreSDEPipeline.from_pretrained, convert.pipeline_from_diffusers):
        with pytest.raises(ValueError, match="cannot be given here|only DiTPipeline"):
            load(bundle, **arguments)


def test_carried_code_is_not_run(bundle):
    """Whatever it is called, and wherever the index says that it lies."""
    for path in bundle.rglob("*.py"):
        leave_trace(path.parent, path.name)
    leave_trace(bundle.parent, "evil.py")
    edit(
        bundle / "model_index.json", _class_name=["../evil", "ScoreSDEPipeline"], transformer=["../../evil", "DiTModel"]
    )
    load_bundle(bundle, trust_remote_code=False, use_safetensors=True)


# --- variants -------------------------------------------------------------------------------------------------------


def pickled_variant(folder):
    """The index that diffusers falls back to: it leads to a pickle."""
    leave_trace(folder, "transformer/evil.bin")
    names = load_file(folder / "transformer" / WEIGHTS)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "evil.bin")}
    legacy = Path(weight_checks.legacy_index(str(folder / "transformer"), "fp16"))
    legacy.parent.mkdir(parents=True, exist_ok=True)
    legacy.write_text(json.dumps(index))
    (folder / "vae" / WEIGHTS.replace(".saf", ".fp16.saf")).write_bytes((folder / "vae" / WEIGHTS).read_bytes())
    (folder / "transformer" / "x.fp16.txt").touch()


@pytest.mark.parametrize(
    ("attack", "variant", "message"),
    [
        (lambda folder: None, "fp16", "You are trying to load the model files of the `variant=fp16`, but no such"),
        (lambda folder: None, "../vae", "variant '../vae' is no name of a variant"),
        (lambda folder: None, 16, "variant 16 is no name of a variant"),
        (lambda folder: (folder / "vae" / "LICENSE").touch(), "fp16", "vae/LICENSE: diffusers finds no variant"),
        (pickled_variant, "fp16", "in a form that diffusers has given up"),
        (
            lambda folder: (folder / "vae" / "x.fp16.txt").touch(),
            "fp16",
            "vae holds no diffusion_pytorch_model.fp16.safetensors",
        ),
    ],
)
@pytest.mark.parametrize("place", ["bundle", "two.dots/bundle.1"])
def test_variants_are_found_where_diffusers_finds_them(sound_bundle, tmp_path, attack, variant, message, place):
    folder = Path(shutil.copytree(sound_bundle, tmp_path / place))
    attack(folder)
    with pytest.raises(ValueError, match=message):
        load_bundle(folder, variant=variant)


def test_the_legacy_index_is_where_diffusers_looks_for_it(tmp_path):
    from diffusers.models.model_loading_utils import _fetch_index_file_legacy

    names = "pretrained_model_name_or_path is_local subfolder use_safetensors cache_dir variant force_download proxies"
    arguments = dict.fromkeys([*names.split(), "local_files_only", "token", "revision", "user_agent", "commit_hash"])
    for place in ("plain", "a.b/c", "a.b/c.d", ".cache/x", ".cache/x.y"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        path = Path(weight_checks.legacy_index(str(folder), "fp16"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        given = {"pretrained_model_name_or_path": str(folder), "is_local": True, "use_safetensors": True}
        assert _fetch_index_file_legacy(**arguments | given | {"variant": "fp16"}) == path


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*AUTOENCODERS, *NETWORKS])
def test_no_class_takes_more_memory_than_its_weights(tmp_path, name):
    """Every class that a component may be, at its default size, with weights of one number."""
    import score_sde

    model_class = getattr(autoencoders, name, None) or getattr(score_sde, name, None) or getattr(diffusers, name)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    save_file({"x": torch.zeros(1)}, tmp_path / WEIGHTS)
    tracemalloc.start()
    with pytest.raises(ValueError, match="larger than its weights|missing [0-9]+ required"):
        bundle_checks.check_component(str(tmp_path), (), name, model_class, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


# --- what opens -----------------------------------------------------------------------------------------------------


def in_the_cache(folder, tmp_path, absolute=False, shared=False):
    """As huggingface_hub lays it out: snapshots of links into blobs, these links into a store that repos share."""
    storage = tmp_path / "models--me--tiny"
    snapshot = storage / "snapshots" / ("a" * 40)
    (storage / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(each for each in folder.rglob("*") if each.is_file())):
        blob, link = storage / "blobs" / f"{number:040}", snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob if absolute else os.path.relpath(blob, link.parent))
        if shared:
            kept = tmp_path / "blobs" / "ab" / f"{number:064}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            blob.symlink_to(os.path.relpath(kept, blob.parent))
            blob = kept
        shutil.copyfile(path, blob)
    return snapshot


@pytest.mark.parametrize("layout", [{}, {"absolute": True}, {"shared": True}], ids=str)
def test_links_of_the_cache_are_followed_and_no_others(sound_bundle, tmp_path, layout):
    snapshot = in_the_cache(sound_bundle, tmp_path, **layout)
    (tmp_path / "named").symlink_to(snapshot)
    assert torch.equal(draw(load_bundle(tmp_path / "named")), draw(load_bundle(sound_bundle)))
    outside = tmp_path / "config.json"
    config = snapshot / "transformer" / "config.json"
    shutil.copyfile(config, outside)
    config.unlink()
    config.symlink_to(outside)
    with pytest.raises(ValueError, match="config.json is a link"):
        load_bundle(snapshot)
    # a blob that leads out
    config.unlink()
    blob = tmp_path / "models--me--tiny" / "blobs" / "c"
    blob.symlink_to(outside)
    config.symlink_to(blob)
    with pytest.raises(ValueError, match="config.json is a link"):
        load_bundle(snapshot)


def test_weights_as_diffusers_wrote_them_before_open(bundle):
    """Other names of attention, tables that are computed now, half precision, shards beside which nothing else lies."""

    def old_names(weights):
        for place in ("encoder", "decoder"):
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                for end in ("weight", "bias"):
                    path = f"{place}.mid_block.attentions.0."
                    weights[f"{path}{old}.{end}"] = weights.pop(f"{path}{new}.{end}")

    expected = draw(load_bundle(bundle))
    retensor(bundle, old_names, "vae")
    retensor(
        bundle,
        lambda weights: weights.update({name: weights[name].double() for name in list(weights)}),
    )
    shard(bundle)
    assert (draw(load_bundle(bundle)) - expected).abs().max() < 1e-6


def test_a_model_without_the_variant_opens_as_it_is(bundle):
    narrow = load_file(bundle / "transformer" / WEIGHTS)
    save_file(
        {name: value.half() for name, value in narrow.items()},
        bundle / "transformer" / WEIGHTS.replace(".s", ".fp16.s"),
    )
    loaded = load_bundle(bundle, variant="fp16")
    assert loaded.transformer.proj_out.bias.equal(narrow[BIAS].half().float())
    assert loaded.vae.state_dict().keys() == load_file(bundle / "vae" / WEIGHTS).keys()


# --- autoencoders, stock pipelines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (edits("config.json", auto_map={"AutoModel": "evil.Evil"}), "auto_map .* is not allowed"),
        (edits("config.json", _class_name="DiTModel"), "DiTModel cannot be used: it is no autoencoder"),
        (edits("config.json", _class_name=["AutoencoderKL"]), "AutoencoderKL.* cannot be used: it is no autoencoder"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
            "None cannot be used: it is no autoencoder",
        ),
        (
            lambda folder: (folder / "model_index.json").write_text("{}"),
            "vae/vae holds no config.json",
        ),
        (lambda folder: replace(folder, "config.json", os.mkfifo), "config.json is no file"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin"), "never as pickles"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    ],
)
def test_autoencoders_by_themselves(sound_bundle, tmp_path, attack, message):
    folder = Path(shutil.copytree(sound_bundle / "vae", tmp_path / "vae"))
    assert type(open_autoencoder(folder, dtype=torch.float64)) is diffusers.AutoencoderKL
    attack(folder)
    leave_trace(folder, "evil.py")
    with pytest.raises(ValueError, match=message):
        open_autoencoder(folder)
    with pytest.raises(ValueError, match="is a file: give the folder"):
        open_autoencoder(tmp_path / "vae" / "evil.py")
    for argument in ("use_flashpack", "use_safetensors", "trust_remote_code", "quantization"):
        with pytest.raises(ValueError, match=f"{argument} cannot be given here"):
            open_autoencoder(folder, **{argument: True})


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (name_as_component("vae", "transformers", "LayoutLMv2Processor"), "'vae' is no name of a component"),
        (
            name_as_component("scheduler", "transformers", "AutoTokenizer"),
            "must be a ScoreSDEScheduler",
        ),
        (edits("model_index.json", _class_name=["evil", "DDPMPipeline"]), "is a .*evil.*: only DiTPipeline"),
        (edits("model_index.json", _class_name="KandinskyCombinedPipeline"), "is a KandinskyCombinedPipeline: only"),
        (edits("unet/config.json", auto_map={"AutoModel": "evil.Evil"}), "auto_map .* is not allowed"),
        (
            edits("scheduler/scheduler_config.json", num_train_timesteps=1e9),
            "num_train_timesteps 1000000000.0 must",
        ),
        (edits("scheduler/scheduler_config.json", num_train_timesteps=10**5), "100,000 is more than the 10,000"),
        (lambda folder: leave_trace(folder, "unet/diffusers.py"), "unet/diffusers.py would be taken"),
        (lambda folder: move_out(folder, "unet"), "unet is a link"),
    ],
)
def test_stock_pipelines_are_converted_only_where_they_are_sound(tmp_path, attack, message):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = diffusers.UNet2DModel(sample_size=8, norm_num_groups=4, layers_per_block=1, **blocks)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "stock")
    leave_trace(tmp_path / "stock", "evil.py")
    assert convert.pipeline_from_diffusers(tmp_path / "stock").unet.config.sample_size == 8
    attack(tmp_path / "stock")
    with pytest.raises(ValueError, match=message):
        convert.pipeline_from_diffusers(tmp_path / "stock")


# --- while somebody saves -------------------------------------------------------------------------------------------


def constant_pipeline(value):
    """All weights, and a number in the scheduler's config, are the same."""
    network = random_dit()
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, value)
    return tiny_pipeline(network=network, rho=value)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_bundle_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch, in_place):
    """Never one model's scheduler with another's weights."""
    one, two = (constant_pipeline(value) for value in (1.0, 2.0))
    save_bundle(one, tmp_path / "bundle")
    scheduler_opens, replaced = ScoreSDEScheduler.from_pretrained.__func__, []

    def replace_meanwhile(cls, *arguments, **options):
        opened = scheduler_opens(cls, *arguments, **options)
        if len(replaced) < 1:
            replaced.append(True)
            two.save_pretrained(tmp_path / "bundle") if in_place else save_bundle(two, tmp_path / "bundle")
        return opened

    monkeypatch.setattr(ScoreSDEScheduler, "from_pretrained", classmethod(replace_meanwhile))
    loaded = load_bundle(tmp_path / "bundle")
    assert replaced and loaded.scheduler.config.rho == 2.0
    assert all(bool((parameter == 2).all()) for parameter in loaded.transformer.parameters())


def test_a_bundle_that_never_rests_is_given_up(tmp_path):
    (tmp_path / "model_index.json").touch()
    reads = []

    def read():
        reads.append(True)
        (tmp_path / "model_index.json").unlink()
        (tmp_path / "model_index.json").touch()
        os.utime(tmp_path / "model_index.json", ns=(0, len(reads)))

    with pytest.raises(ValueError, match="was replaced 3 times while it was read"):
        opening.while_unchanged(tmp_path, read, attempts=3)
    assert len(reads) == 3
