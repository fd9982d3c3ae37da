"""Stock pipelines of diffusers with our scheduler: saved by diffusers or as a bundle, and opened, with and without this
package."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from bundles import LOAD_BY_REMOTE_CODE, edit
from commands import score_sde
from safetensors.torch import load_file, save_file
from tiny import flux_transformer, seeded, stable_diffusion

from score_sde import ScoreSDEPipeline, ScoreSDEScheduler, load_bundle, save_bundle
from score_sde.sharing.hub import verify
from score_sde.sharing.info import describe


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
STOCK = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False)
CALL = {"prompt": "a dog", "height": 16, "width": 16, "num_inference_steps": 3, "output_type": "pt"}


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**CALL, generator=seeded(3)).images


def flux():
    """Without text encoders, which the caller leaves out again to open it."""
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.FluxPipeline(ScoreSDEScheduler.from_config(stock.config), transformer=flux_transformer(), **absent)


@pytest.fixture(scope="module")
def pipeline():
    return stable_diffusion(ScoreSDEScheduler.from_config(STOCK.config))


@pytest.fixture(scope="module")
def image(pipeline):
    return draw(pipeline)


@pytest.fixture(scope="module")
def saved_bundle(pipeline, tmp_path_factory):
    return save_bundle(pipeline, tmp_path_factory.mktemp("stock") / "bundle", variant="fp16", max_shard_size="50KB")


@pytest.fixture
def bundle(saved_bundle, tmp_path):
    return Path(shutil.copytree(saved_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def plain(pipeline, tmp_path_factory):
    """As diffusers saves it."""
    folder = tmp_path_factory.mktemp("plain") / "folder"
    pipeline.save_pretrained(folder)
    pipeline.save_pretrained(folder, variant="fp16")
    return folder


# --- as diffusers saves it --------------------------------------------------------------------------------------------

OPEN_AFTER_A_BARE_IMPORT = """
import sys, json
for name in [name for name in sys.modules if name.split(".")[0] == "score_sde"]:
    del sys.modules[name]
import score_sde
assert "score_sde.schedulers" not in sys.modules
import diffusers
folder, shards, flux = sys.argv[1:]
absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
opened = [
    cls.from_pretrained(where, **arguments)
    for cls in (diffusers.DiffusionPipeline, diffusers.StableDiffusionPipeline)
    for where, arguments in ((folder, {}), (folder, {"variant": "fp16"}), (shards, {}))
]
opened += [cls.from_pretrained(flux, **absent) for cls in (diffusers.DiffusionPipeline, diffusers.FluxPipeline)]
assert all(type(each.scheduler) is score_sde.ScoreSDEScheduler for each in opened)
print(json.dumps([[type(each).__name__, each.scheduler.config.sde_type] for each in opened]))
"""


def test_a_fresh_process_opens_it_after_the_import_of_the_package(local_hub, pipeline, plain, tmp_path):
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len([*tmp_path.glob("shards/unet/*.safetensors")]) > 1
    flux().save_pretrained(tmp_path / "flux")
    result = local_hub.run(OPEN_AFTER_A_BARE_IMPORT, plain, tmp_path / "shards", tmp_path / "flux")
    assert result.returncode == 0, result.stderr
    expected = [["StableDiffusionPipeline", "discrete_vp"]] * 6 + [["FluxPipeline", "linear"]] * 2
    assert json.loads(result.stdout.splitlines()[-1]) == expected


OPEN_WITHOUT_THE_IMPORT = LOAD_BY_REMOTE_CODE.replace(", trust_remote_code=True", "")


def test_without_the_package_diffusers_says_what_to_do(local_hub, plain, tmp_path):
    save_file({"image": torch.zeros(1)}, tmp_path / "image.safetensors")
    result = local_hub.run(OPEN_WITHOUT_THE_IMPORT, tmp_path / "image.safetensors", plain, "{}")
    assert "import score_sde before calling `from_pretrained`" in result.stderr


def test_a_subclass_is_found_where_its_user_defined_it(pipeline):
    class Narrower(ScoreSDEScheduler):
        pass

    assert diffusers.StableDiffusionPipeline.from_pipe(pipeline, scheduler=Narrower()).config.scheduler == (
        __name__,
        "Narrower",
    )
    # whoever looks for the code of the class itself finds it
    assert ScoreSDEScheduler.__module__ == "score_sde.schedulers.scheduling_score_sde"


def test_the_scheduler_of_a_stock_folder_is_opened_as_ours(plain, tmp_path):
    STOCK.save_pretrained(tmp_path / "scheduler")
    found = ScoreSDEScheduler.from_pretrained(tmp_path, subfolder="scheduler", predictor="heun")
    expected = ScoreSDEScheduler.from_config(STOCK.config, predictor="heun")
    again = ScoreSDEScheduler.from_pretrained(plain, subfolder="scheduler")
    for scheduler, predictor in ((found, "heun"), (again, "auto")):
        assert scheduler.config.predictor == predictor and scheduler.config.timestep_spacing == "leading"
        assert torch.equal(scheduler.path.betas, expected.path.betas)


def test_a_stock_folder_is_opened_with_ours(tmp_path, pipeline, image):
    diffusers.StableDiffusionPipeline.from_pipe(pipeline, scheduler=STOCK).save_pretrained(tmp_path)
    ours = ScoreSDEScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    opened = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, scheduler=ours)
    assert opened.scheduler is ours
    torch.testing.assert_close(draw(opened), image, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"]
)
def test_copies_go_on_where_the_scheduler_is(copied):
    scheduler = ScoreSDEScheduler(predictor="adams_4")
    scheduler.set_timesteps(8)
    x, output = torch.randn(2, 1, 3, 4, 4, generator=seeded(0)).unbind()
    x = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
    twin = copied(scheduler)
    assert twin.config == scheduler.config and twin.__module__ == "score_sde"
    (a, _), (b, _) = (each.step(output, scheduler.timesteps[1], x, return_dict=False) for each in (twin, scheduler))
    assert torch.equal(a, b)


def test_components_are_moved_as_with_any_scheduler(image):
    pipeline = stable_diffusion(ScoreSDEScheduler.from_config(STOCK.config))
    pipeline.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(draw(pipeline), image, rtol=0, atol=1e-5)
    pipeline.remove_all_hooks()
    assert draw(pipeline.to(torch.bfloat16)).dtype == torch.bfloat16


# --- as a bundle ------------------------------------------------------------------------------------------------------

PUSH_AND_OPEN = """
import sys, json
import score_sde
from score_sde.sharing.hub import verify
folder, = sys.argv[1:]
address = score_sde.push_to_hub(score_sde.load_bundle(folder), "me/stock", variant="fp16")
opened = [score_sde.load_bundle("me/stock", **arguments) for arguments in ({}, {"variant": "fp16"})]
assert not any("diffusers_modules" in name for name in sys.modules)
print(json.dumps([address, [type(each).__name__ for each in opened], sorted({*verify("me/stock").values()})]))
"""
SAVED_AGAIN = LOAD_BY_REMOTE_CODE.replace(
    "pipeline.set_progress_bar_config",
    """
folder = tempfile.mkdtemp()
pipeline.save_pretrained(folder)
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipeline.set_progress_bar_config""",
).replace("import json, sys", "import json, sys, tempfile")


def test_it_goes_to_the_hub_and_opens_with_the_package_and_without(local_hub, plain, image, tmp_path):
    result = local_hub.run(PUSH_AND_OPEN, plain, token="hf_writer")
    assert result.returncode == 0, result.stderr
    address, names, verdicts = json.loads(result.stdout.splitlines()[-1])
    assert address.startswith(f"{local_hub.url}/me/stock/commit/")
    assert names == ["StableDiffusionPipeline"] * 2 and verdicts == ["same"]
    files = local_hub.files("me/stock")
    assert b"me/stock" in files["README.md"] and "text_encoder/model.fp16.safetensors" in files
    save_file({"image": image}, tmp_path / "image.safetensors")
    for program in (LOAD_BY_REMOTE_CODE, SAVED_AGAIN):
        result = local_hub.run(program, tmp_path / "image.safetensors", "me/stock", json.dumps(CALL))
        assert result.returncode == 0, result.stderr
        difference, package = json.loads(result.stdout.splitlines()[-1])
        assert difference < 1e-5 and package == "diffusers"


def test_it_opens_with_the_installed_classes(bundle, image):
    opened = load_bundle(bundle)
    assert type(opened) is diffusers.StableDiffusionPipeline and type(opened.scheduler) is ScoreSDEScheduler
    torch.testing.assert_close(draw(opened), image, rtol=0, atol=1e-5)
    half = load_bundle(bundle, variant="fp16", dtype={"default": torch.float16, "text_encoder": torch.float32})
    assert half.unet.dtype == torch.float16 and half.text_encoder.dtype == torch.float32
    assert load_bundle(bundle, scheduler=STOCK).scheduler is STOCK
    with pytest.raises(ValueError, match="holds a StableDiffusionPipeline"):
        ScoreSDEPipeline.from_pretrained(bundle)


def test_flux_is_a_bundle_too(tmp_path):
    folder = save_bundle(flux(), tmp_path / "flux")
    opened = load_bundle(folder, **dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")))
    assert type(opened) is diffusers.FluxPipeline and opened.scheduler.config.shift == 3.0
    assert {*verify(folder).values()} == {"same"}


def test_a_bundle_that_was_opened_is_saved_again(bundle, image, tmp_path):
    torch.testing.assert_close(
        draw(load_bundle(save_bundle(load_bundle(bundle), tmp_path / "again"))), image, rtol=0, atol=1e-5
    )


def test_pipelines_of_other_tasks_are_made_of_it(plain, bundle):
    for opened in (load_bundle(bundle), diffusers.AutoPipelineForText2Image.from_pretrained(plain)):
        assert type(opened) is diffusers.StableDiffusionPipeline
        other = diffusers.AutoPipelineForImage2Image.from_pipe(opened)
        assert type(other) is diffusers.StableDiffusionImg2ImgPipeline and other.scheduler is opened.scheduler


def test_changed_code_is_seen_and_not_run(bundle, image):
    [path] = bundle.glob("scheduler/paths_*.py")
    path.write_text(path.read_text() + "\nraise RuntimeError\n")
    assert verify(bundle)[f"scheduler/{path.name}"] == "differs"
    torch.testing.assert_close(draw(load_bundle(bundle)), image, rtol=0, atol=1e-5)


def index(**changes):
    return lambda folder: edit(folder / "model_index.json", **changes)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (index(scheduler=["os", "ScoreSDEPipeline"]), "holds a StableDiffusionPipeline; this package has"),
        (index(unet=["os", "system"]), "component 'unet' is a system of 'os'"),
        (index(text_encoder=["score_sde.cli", "main"]), "component 'text_encoder' is a main of 'score_sde.cli'"),
        (index(other=["diffusers", "UNet2DModel"]), "'other' is no name of a component"),
        (index(text_encoder=[5, "CLIPTextModel"]), "'text_encoder' .* must be a library and a class"),
        (index(text_encoder=[]), "'text_encoder' .* must be a library and a class"),
        (index(_class_name="DiffusionPipeline"), "holds a DiffusionPipeline; this package has"),
        (index(custom_pipeline="evil"), "custom_pipeline 'evil' is not allowed"),
        (lambda folder: edit(folder / "scheduler/scheduler_config.json", beta_end=2.0), "beta"),
        (lambda folder: edit(folder / "scheduler/scheduler_config.json", num_train_timesteps=10**9), "is more than"),
        (lambda folder: (folder / "text_encoder/transformers.py").touch(), "transformers.py would be taken for"),
        (lambda folder: (folder / "scheduler/score_sde.py").touch(), "score_sde.py would be taken for"),
    ],
)
def test_what_is_not_sound_is_refused(bundle, attack, message):
    attack(bundle)
    with pytest.raises(ValueError, match=message):
        load_bundle(bundle)


@pytest.mark.parametrize("argument", ["trust_remote_code", "custom_pipeline", "use_onnx"])
def test_arguments_that_run_code_are_refused(bundle, argument):
    with pytest.raises(ValueError, match=f"{argument}=True cannot be given here"):
        load_bundle(bundle, **{argument: True})


def test_the_command_describes_verifies_and_pushes_it(saved_bundle, plain, capsys):
    assert score_sde("info", saved_bundle) == score_sde("verify", saved_bundle) == 0
    told = capsys.readouterr().out
    assert "StableDiffusionPipeline" in told and "discrete_vp beta_schedule scaled_linear" in told
    assert "text_encoder                 CLIPTextModel" in told and "files are those of score-sde" in told
    assert describe(saved_bundle)["components"]["unet"]["parameters"] == sum(
        each.numel()
        for path in Path(saved_bundle).glob("unet/*model-*.safetensors")
        for each in load_file(path).values()
    )
    assert score_sde("verify", plain) == 0 and "after `import score_sde`" in capsys.readouterr().out
    assert score_sde("push", plain, "me/plain") == 2
    assert "'scheduler' is without its code" in capsys.readouterr().err
