"""The command `score-sde`: every subcommand on a tiny model, its errors, its processes, and all of it from a wheel."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import typer
from diffusers import AutoencoderTiny, DDPMPipeline, DDPMScheduler, UNet2DModel
from outside_network import OutsideNetwork
from PIL import Image
from places import CONFIGS, ROOT, TRAINING
from texts import characters_pipeline
from tiny import tiny_pipeline
from words import prompt_pipeline

import score_sde
from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler, cli, load_bundle
from score_sde.cli_texts import in_one, print_texts
from score_sde.training import train
from score_sde.training.parts.launching import accelerate_config, is_to_launch, split_arguments
from score_sde.training.parts.options import WORK_BEGUN, installed_configs


COMMANDS = [
    *("quick-start", "train", "distill", "train-autoencoder", "train-classifier", "encode-latents", "evaluate"),
    *("reconstruct-ema", "share-latents", "tokenizer", "sample", "info", "calibrate", "plot"),
    *("push", "verify", "card", "convert", "space", "env", "merge"),
]
ONE_BLOCK = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
TINY = [
    *("--resolution", "8", "--image_channels", "1", "--batch_size", "4", "--lr_warmup_steps", "0"),
    *("--sample_num_images", "2", "--sample_num_inference_steps", "2", "--max_train_steps", "2"),
    *("--network_kwargs", "{patch_size: 2, hidden_size: 16, num_layers: 1, num_attention_heads: 2}"),
]


@pytest.fixture(autouse=True)
def own_process(monkeypatch):
    """A command may set what belongs to its process."""
    monkeypatch.setattr(sys, "argv", ["score-sde"])


def run(*argv, status=0):
    WORK_BEGUN.clear()
    with pytest.raises(SystemExit) as exit:
        cli.main([str(each) for each in argv])
    assert (exit.value.code or 0) == status


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline folder that `score-sde train` wrote."""
    folder = tmp_path_factory.mktemp("train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["score-sde"])
        run("train", *TINY, "--output_dir", folder / "run")
    return folder / "run" / "pipeline"


def test_help_names_every_command_and_imports_nothing_slow():
    code = "import sys; from score_sde.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    listed = re.findall(r"^  ([a-z-]+)  ", result.stdout.split("Commands:")[1], re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    assert not {"torch", "diffusers", "transformers"} & set(result.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_help(command, capsys):
    run(command, "--help")
    assert f"score-sde {command}" in capsys.readouterr().out


def test_a_training_command_writes_its_name_on_the_card(pipeline):
    facts = json.loads((pipeline / "training.json").read_text())
    assert facts["command"].startswith("score-sde train --resolution 8")


def test_installed_configurations_are_listed_and_found_by_name(capsys):
    for command, kind in (("train", "diffusion"), ("evaluate", "evaluation"), ("encode-latents", "latents")):
        run(command, "--list")
        listed = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in listed] == list(installed_configs(kind))
        assert all(len(line.split()) > 3 for line in listed)  # each says what it is
    run("train", "quick_start/diffusion", "--max_train_steps", "0", status=2)
    assert capsys.readouterr().err == "score-sde train: error: max_train_steps 0 must be at least 1\n"


def test_a_network_from_outside_is_drawn_with_by_its_name(tmp_path):
    folder = score_sde.save_bundle(tiny_pipeline(network=OutsideNetwork()), tmp_path / "bundle")
    arguments = ("sample", folder, "--steps", 2, "--num_images", 1, "--output", tmp_path / "x.png")
    run(*arguments, "--network", "outside_network:OutsideNetwork")
    assert Image.open(tmp_path / "x.png").size == (64, 64)


def test_samples_are_those_of_their_seeds_in_any_batches(pipeline, tmp_path, capsys):
    options = ("--classes", "Dress", "8", "--steps", 3, "--guidance", 1.5, "--num-images", 5, "--seed", 7)
    run("sample", pipeline, *options, "--output", tmp_path / "one.png")
    run("sample", pipeline, *options, "--batch_size", 2, "--output", tmp_path / "two.png")
    one, two = (np.asarray(Image.open(tmp_path / f"{name}.png"), float) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 1
    pipe = load_bundle(pipeline)
    image = pipe(
        class_labels=["Bag"], guidance_scale=1.5, num_inference_steps=3, generator=torch.Generator().manual_seed(10)
    ).images[0]
    # the classes in turn, a column each: image 3, of seed 7 + 3, is the second of the second row
    assert one.shape == (3 * 64, 2 * 64, 3)
    assert np.abs(one[64::8, 64::8, 0][:8] - np.asarray(image, float)).max() <= 1
    run(
        "sample",
        pipeline,
        "--steps",
        2,
        "--predictor",
        "euler",
        "--dtype",
        "bfloat16",
        "--output",
        tmp_path / "all.png",
    )
    assert Image.open(tmp_path / "all.png").size == (10 * 64, 64)


def test_without_a_number_of_steps_the_pipelines_own_are_taken(pipeline, tmp_path, monkeypatch):
    """As the help says, and not an adaptive solver, which needs a package of its own."""
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    run("sample", pipeline, "--num_images", 1, "--output", tmp_path / "x.npy")
    pipe, told = load_bundle(pipeline), {"class_labels": [0], "generator": torch.Generator().manual_seed(0)}
    wanted = pipe(num_inference_steps=50, output_type="np", **told).images
    assert np.abs(np.load(tmp_path / "x.npy") - wanted).max() < 1e-5


def test_images_beside_are_of_the_size_that_is_asked_for(tmp_path, capsys):
    network = DiTModel(8, 2, 2, hidden_size=16, num_layers=1, num_attention_heads=2, condition_channels=1)
    pipe = ScoreSDEPipeline(
        ScoreSDEScheduler(prediction_type="v_prediction"), transformer=network, condition_from="downsample:2"
    )
    folder = score_sde.save_bundle(pipe, tmp_path / "bundle")
    Image.new("L", (6, 4), 200).save(tmp_path / "small.png")
    options = ("--steps", 2, "--height", 8, "--width", 12, "--output", tmp_path / "x.npy")
    run("sample", folder, "--condition_image", tmp_path / "small.png", *options)
    assert np.load(tmp_path / "x.npy").shape == (1, 8, 12, 1)
    run("sample", folder, "--condition_image", tmp_path / "small.png", tmp_path / "small.png", *options)
    assert np.load(tmp_path / "x.npy").shape == (2, 8, 12, 1)
    capsys.readouterr()
    run("sample", folder, *options, status=2)
    assert "pass --condition_image, files of 6 x 4 pixels" in capsys.readouterr().err


def test_options_that_say_so_take_several_values():
    of_several = {
        option.opts[0]
        for command in typer.main.get_command(cli.app).commands.values()
        for option in command.params
        if option.opts[0].startswith("--") and (option.metavar or "").endswith("...")
    }
    assert of_several == set(cli.OF_SEVERAL)
    for option in of_several:
        assert cli.spelled([option, "a", "b", "--steps", "3"]) == [option, "a", option, "b", "--steps", "3"]


def test_prompts_are_drawn_in_turn_with_their_words_beneath(tmp_path, pipeline, capsys):
    folder = score_sde.save_bundle(prompt_pipeline(), tmp_path / "bundle")
    options = ("--steps", 3, "--guidance", 2, "--negative_prompt", "a bag", "--seed", 7, "--output", tmp_path / "x.png")
    run("sample", folder, "--prompt", "a red hat", "the blue dress", *options, "--num_images", 3)
    grid = np.asarray(Image.open(tmp_path / "x.png").convert("L"), float)
    # one column of pictures of 4 pixels, enlarged to 128, with three lines of text
    assert grid.shape == (3 * (128 + 43), 128)
    pipe = load_bundle(folder)
    for i, prompt in enumerate(["a red hat", "the blue dress", "a red hat"]):
        generator, told = torch.Generator().manual_seed(7 + i), {"negative_prompt": "a bag", "guidance_scale": 2.0}
        [image] = pipe(prompt=prompt, num_inference_steps=3, generator=generator, **told).images
        top = i * (128 + 43)
        assert np.abs(grid[top + 16 : top + 128 : 32, 16::32] - np.asarray(image, float)).max() <= 1
        assert grid[top + 128 : top + 128 + 43].min() < 100  # there are letters
    run("sample", pipeline, "--prompt", "a hat", "--output", tmp_path / "x.png", status=2)
    assert "--prompt: this model has no text encoder" in capsys.readouterr().err


def test_info_says_what_a_pipeline_is(pipeline, capsys):
    run("info", pipeline, "--json")
    facts = json.loads(capsys.readouterr().out)
    denoiser = load_bundle(pipeline).denoiser
    assert facts["components"]["transformer"]["parameters"] == sum(each.numel() for each in denoiser.parameters())
    assert facts["components"]["transformer"]["arguments"]["hidden_size"] == 16
    assert facts["path"] == {"sde_type": "vp"} and facts["prediction"] == "v_prediction"
    assert facts["classes"][3] == "Dress" and set(facts["code"].values()) == {"same"}
    assert facts["training"]["dataset"] == "fashion_mnist_10k" and facts["training"]["steps"] == 2
    run("info", pipeline)
    text = capsys.readouterr().out
    assert re.search(r"^transformer +DiTModel, [\d,]+ parameters, .*hidden_size 16", text, re.MULTILINE)
    assert re.search(rf"^code .*all those of score-sde {score_sde.__version__}", text, re.MULTILINE)


def test_info_builds_no_model(pipeline, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda self: pytest.fail("a model is built"))
    run("info", pipeline)


def test_info_of_measured_figures_without_weights(capsys):
    """As the folders in model_cards are."""
    folder = ROOT / "model_cards" / "quick_start"
    [accuracy] = [
        metric["value"]
        for metric in json.loads((folder / "metrics.json").read_text())
        if metric["name"] == "classifier accuracy on samples"
    ]
    run("info", folder)
    text = capsys.readouterr().out
    assert "no weights here" in text and "(missing)" in text
    line = rf"^measured +classifier accuracy on samples: {re.escape(str(accuracy))} \(n 500, .*guidance_scale 1\.5"
    assert re.search(line, text, re.MULTILINE)


def test_a_command_says_which_pipelines_it_is_for(tmp_path, capsys):
    """One sentence, and no work before it."""
    unet = UNet2DModel(8, 1, 1, block_out_channels=(4,), layers_per_block=1, norm_num_groups=4, **ONE_BLOCK)
    own, stock = ScoreSDEScheduler(prediction_type="v_prediction"), DDPMScheduler()
    bundles = {
        "stock": DDPMPipeline(unet, own),
        "scheduler": ScoreSDEPipeline(stock, unet=unet),
        "text": characters_pipeline(),
    }
    for name, pipe in bundles.items():
        score_sde.save_bundle(pipe, tmp_path / name)
    DDPMPipeline(unet, stock).save_pretrained(tmp_path / "other")
    fitted = "times are fitted for a ScoreSDEScheduler; that of '.*' is a "
    for command, name, message in [
        ("sample", "stock", "is a DDPMPipeline of diffusers, whose arguments this command doesn't know"),
        ("calibrate", "stock", "is a DDPMPipeline of diffusers, whose arguments this command doesn't know"),
        ("calibrate", "scheduler", fitted + "DDPMScheduler"),
        ("calibrate", "text", fitted + "DiscreteScoreScheduler"),
        ("convert", "stock", "a DDPMPipeline with a ScoreSDEScheduler cannot be a stock DiTPipeline"),
        ("convert", "scheduler", "a ScoreSDEPipeline with a DDPMScheduler cannot be a stock DiTPipeline"),
        ("convert", "text", "a ScoreSDETextPipeline with a DiscreteScoreScheduler cannot be a stock DiTPipeline"),
        ("info", "other", "ScoreSDETextPipeline and opens .*; `score-sde convert from-diffusers` makes one of it"),
    ]:
        arguments = ["to-diffusers", tmp_path / name, tmp_path / "out"] if command == "convert" else [tmp_path / name]
        run(command, *arguments, status=2)
        assert re.search(message, capsys.readouterr().err), (command, name)


def test_times_are_calibrated_in_the_folder(pipeline, tmp_path, capsys):
    before = json.loads((pipeline / "scheduler" / "scheduler_config.json").read_text())
    try:
        run("calibrate", pipeline, "--nfe", 2, 3, "--num_samples", 1)
        after = json.loads((pipeline / "scheduler" / "scheduler_config.json").read_text())
        assert set(after.pop("calibration")) == {"2", "3"}
        assert after == {name: value for name, value in before.items() if name != "calibration"}
        assert set(load_bundle(pipeline).scheduler.config.calibration) == {"2", "3"}
    finally:
        (pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(before))
    assert "3 network evaluations: error" in capsys.readouterr().out


def test_runs_are_plotted(pipeline, tmp_path, capsys):
    run("plot", pipeline.parent, pipeline.parent, "--output", tmp_path / "runs.png")
    assert Image.open(tmp_path / "runs.png").format == "PNG" and str(tmp_path / "runs.png") in capsys.readouterr().out
    run("plot", tmp_path, "--output", tmp_path / "none.png", status=2)
    assert "score-sde plot: error: " in capsys.readouterr().err


def test_verify_and_card(pipeline, capsys):
    run("verify", pipeline)
    assert "files are those of score-sde" in capsys.readouterr().out
    (pipeline / "README.md").unlink()
    run("card", pipeline, "--repo-id", "me/model")
    assert "me/model" in (pipeline / "README.md").read_text()
    changed = next(pipeline.glob("pipeline_score_sde_*.py"))
    source = changed.read_text()
    changed.write_text(source + "\n")
    run("verify", pipeline, status=1)
    changed.write_text(source)
    assert f"differs  {changed.name}" in capsys.readouterr().out


def test_the_report_of_the_environment_names_versions_and_no_place(capsys):
    run("env")
    lines = dict(line[2:].split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == torch.__version__ and lines["score-sde"] == score_sde.__version__
    assert not any(os.sep + "home" in value or os.path.expanduser("~") in value for value in lines.values())


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["trian"], "score-sde: error: No such command 'trian'"),
        (["sample"], "score-sde sample: error: Missing argument 'FOLDER_OR_REPO'"),
        (["sample", "a/b/c"], "score-sde sample: error: 'a/b/c' is neither a folder nor the id of a repo"),
        (
            ["sample", "PIPELINE", "--classes", "dres"],
            "Bag, Ankle boot, 0 to 9, did you mean Dress?",
        ),
        (
            ["sample", "PIPELINE", "--classes", "10"],
            "score-sde sample: error: class '10' is unknown; this",
        ),
        (["sample", "PIPELINE", "--output", "no/such/x.png"], "--output 'no/such/x.png': there is no such folder"),
        (["sample", "PIPELINE", "--output", "x.jpg"], "--output 'x.jpg' must be a .png, .npy, .wav, .gif or .csv file"),
        (["plot", "nowhere"], "score-sde plot: error: 'nowhere' is no folder"),
        (["sample", "PIPELINE", "--device", "gpu"], "--device gpu: "),
        (["sample", "PIPELINE", "--dtype", "int8"], "--dtype 'int8' is unknown; choose one of float32, "),
        (["sample", "PIPELINE", "--predictor", "huen"], "predictor 'huen' is unknown; choose one of "),
        (["calibrate", "me/model"], "score-sde calibrate: error: 'me/model' is no folder"),
        (["push", "nowhere", "x/y/z"], "score-sde push: error: repo id 'x/y/z'"),
        (["card", "nowhere"], "score-sde card: error: "),
        (["env", "--nope"], "score-sde env: error: No such option: --nope"),
        (["train", "quick_start/difusion"], ", did you mean quick_start/diffusion?"),
        (["train", "--learnign_rate", "1"], "score-sde train: error: --learnign_rate is unknown, did you mean"),
        (["train", "--num_processes", "2", "--config_file", "eigth_gpus"], "did you mean eight_gpus?"),
        (["reconstruct-ema", "run"], "score-sde reconstruct-ema: error: "),
        (["share-latents", "nowhere", "me/latents"], "score-sde share-latents: error: "),
        (["quick-start", "--nope"], "score-sde quick-start: error: "),
        (["convert", "dit"], "score-sde convert"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_status_2(argv, error, pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(*[str(pipeline) if each == "PIPELINE" else each for each in argv], status=2)
    captured = capsys.readouterr()
    [line] = [each for each in captured.err.splitlines() if not re.search(r"Loading pipeline|^$", each)]
    assert error in line


@pytest.mark.parametrize("argv", [["--traceback", "card", "nowhere"], ["card", "nowhere", "--traceback"]])
def test_the_traceback_is_shown_where_it_is_asked_for(argv):
    with pytest.raises((OSError, ValueError)):
        cli.main(argv)


def test_faults_of_the_code_are_named_and_those_of_a_running_training_keep_their_traceback(monkeypatch, capsys):
    def fault(*_):
        raise KeyError("weights")

    monkeypatch.setattr(train, "main", fault)
    run("train", status=2)
    assert capsys.readouterr().err == "score-sde train: error: KeyError: 'weights' (--traceback shows where)\n"

    def later(*_):
        WORK_BEGUN.set()
        raise KeyError("weights")

    monkeypatch.setattr(train, "main", later)
    with pytest.raises(KeyError):
        cli.main(["train"])


def test_notices_of_libraries_are_silent(tmp_path, caplog):
    for name, _ in cli.NOTICES:
        logging.getLogger(name).filters.clear()
    small = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    AutoencoderTiny(**small, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(tmp_path)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for each in loggers:
        each.addHandler(caplog.handler)
    try:
        AutoencoderTiny.from_pretrained(tmp_path)
        assert "will be ignored" in caplog.text  # as libraries are
        caplog.clear()
        cli.silence_notices()
        AutoencoderTiny.from_pretrained(tmp_path)
        assert caplog.text == ""
    finally:
        for each in loggers:
            each.removeHandler(caplog.handler)


# --- several processes --------------------------------------------------------------------------------------------


def test_options_of_the_launcher_are_told_from_those_of_the_script():
    argv = (
        "cifar10/diffusion --num_processes 2 --mixed_precision bf16 --multi-gpu --learning-rate 1 --accelerate_config=x"
    )
    own, launching = split_arguments(train.TrainConfig, argv.split())
    assert own == ["cifar10/diffusion", "--mixed_precision", "bf16", "--learning-rate", "1"]
    assert launching == ["--num_processes", "2", "--multi-gpu", "--config_file=x"]


def test_one_process_without_options_of_the_launcher_is_this_one(monkeypatch, tmp_path):
    for name in ("LOCAL_RANK", "SCORE_SDE_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("score_sde.training.parts.launching.default_config_file", str(tmp_path / "config.yaml"))
    assert not is_to_launch([]) and is_to_launch(["--num_processes", "2"])
    (tmp_path / "config.yaml").write_text("")
    assert is_to_launch([])
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not is_to_launch(["--num_processes", "2"])


def test_configurations_of_accelerate_are_found_by_name(tmp_path):
    assert os.path.samefile(accelerate_config("one_gpu"), CONFIGS / "accelerate" / "one_gpu.yaml")
    (tmp_path / "own.yaml").write_text("")
    assert accelerate_config(str(tmp_path / "own.yaml")) == str(tmp_path / "own.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_a_signal_ends_all_processes_with_a_checkpoint_and_status_75(number, processes, tmp_path):
    command = [sys.executable, "-m", "score_sde.cli", "train", *TINY, "--max_train_steps", "100000"]
    command += ["--num_processes", str(processes), "--output_dir", str(tmp_path / "run"), "--logging_steps", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    for line in iter(lambda: process.stderr.read(200), ""):
        if "loss=" in line:
            break
    assert process.poll() is None
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    step = int(re.search(r"told to stop: step (\d+); go on by", output)[1])
    assert "`score-sde train --resolution 8" in output and f"--num_processes {processes}" in output
    assert "--resume_from_checkpoint latest`" in output and "Traceback" not in errors
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "error"),
    [
        ("--cpu", "dataset '/no/such_data'"),
        ("--tpu", "accelerate launch: You can only use one of"),
    ],
)
def test_the_status_of_processes_that_fail_is_theirs(option, error, tmp_path):
    command = [sys.executable, "-m", "score_sde.cli", "train", "--num_processes", "2", option]
    command += ["--dataset", "/no/such_data", "--output_dir", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and f"score-sde train: error: {error}" in result.stderr
    assert "Traceback" not in result.stderr and "ChildFailedError" not in result.stderr


def test_scripts_that_are_run_by_path_hide_no_package():
    code = (
        f"import sys; sys.path.insert(0, {str(TRAINING)!r})\n"
        "import importlib.util; assert importlib.util.find_spec('evaluate')\n"
        "import score_sde.training; assert not importlib.util.find_spec('evaluate')"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- from a wheel -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_everything_works_from_a_wheel_in_an_empty_folder(tmp_path):
    """In a fresh environment, which sees the packages of this one."""

    def succeed(*command, **options):
        result = subprocess.run(command, capture_output=True, text=True, **options)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    succeed(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheel", ROOT, cwd=tmp_path)
    [wheel] = (tmp_path / "wheel").glob("score_sde-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "score_sde/training/configs/quick_start/diffusion.yaml" in names and "score_sde/py.typed" in names
    succeed(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    [packages] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    succeed(*pip, "install", "--no-deps", "--no-index", "--target", packages, wheel)
    others = [each for each in sys.path if each.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    python, empty = tmp_path / "venv" / "bin" / "python", tmp_path / "empty"
    empty.mkdir()
    where = succeed(python, "-c", "import score_sde; print(score_sde.__file__)", cwd=empty)
    assert where.startswith(str(packages))
    command = [packages / "bin" / "score-sde"]
    command[0].write_text(re.sub("^#!.*", f"#!{python}", command[0].read_text()))

    assert "quick-start" in succeed(*command, "--help", cwd=empty)
    assert "quick_start/diffusion" in succeed(*command, "train", "--list", cwd=empty)
    succeed(*command, "train", "quick_start/diffusion", *TINY, "--output_dir", "run", cwd=empty)
    succeed(*command, "sample", "run/pipeline", "--classes", "Dress", "Bag", "--steps", "2", cwd=empty)
    assert Image.open(empty / "samples.png").size == (128, 64)
    assert "DiTModel" in succeed(*command, "info", "run/pipeline", cwd=empty)
    assert sorted(os.listdir(empty)) == ["run", "samples.png"]


# --- texts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A pipeline of texts with two classes."""
    names = {0: "prose", 1: "verse"}
    folder = tmp_path_factory.mktemp("texts") / "bundle"
    return score_sde.save_bundle(characters_pipeline(num_classes=2, id2label=names), folder)


def test_texts_are_those_of_their_seeds_in_any_batches(texts, tmp_path, capsys):
    options = ("--classes", "verse", "0", "--prompt", "ab", "c", "--steps", 4, "--guidance", 1.5, "--seed", 7)
    options += ("--num-texts", 3, "--temperature", 0.8, "--top_p", 0.9, "--top_k", 5, "--predictor", "first_hitting")
    run("sample", texts, *options, "--batch_size", 2)
    printed = capsys.readouterr().out
    run("sample", texts, *options, "--output", tmp_path / "texts.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [7, 8, 9]
    found = [row["text"] for row in rows]
    pipe = load_bundle(texts)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, predictor="first_hitting")
    limits = {"temperature": 0.8, "top_p": 0.9, "top_k": 5, "guidance_scale": 1.5, "num_inference_steps": 4}
    for i, (label, prompt) in enumerate([("verse", "ab"), ("prose", "c"), ("verse", "ab")]):
        generator = torch.Generator().manual_seed(7 + i)
        assert found[i : i + 1] == pipe(class_labels=[label], prompt=prompt, generator=generator, **limits).texts
    assert printed == in_one(found) + "\n"
    run("sample", texts, *options, "--output", tmp_path / "texts.txt")
    assert (tmp_path / "texts.txt").read_text() == printed


def test_texts_longer_than_the_model_are_written_in_blocks(texts, capsys):
    run("sample", texts, "--length", 30, "--block_length", 6, "--steps", 4, "--seed", 2)
    pipe = load_bundle(texts)
    drawn = pipe(length=30, block_length=6, num_inference_steps=4, generator=[torch.Generator().manual_seed(2)])
    assert capsys.readouterr().out == drawn.texts[0] + "\n"
    run("sample", texts, "--length", 30, status=2)
    assert "pass a block_length" in capsys.readouterr().err


def test_a_text_is_shown_while_it_forms(texts, monkeypatch, capsys):
    run("sample", texts, "--stream", status=2)
    assert "--stream shows a text on a terminal, which the output is not" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run("sample", texts, "--stream", "--steps", 4, "--prompt", "ab")
    shown = capsys.readouterr().out
    *frames, end = re.split(r"\x1b\[\d+F\x1b\[J", shown)
    assert len(frames) >= 2 and "\u2591" in frames[0] and all(each.startswith("ab") for each in [*frames, end])
    # what is known stays, and the end has no gaps
    for before, after in zip(frames, [*frames[1:], end], strict=True):
        assert all(b in (a, "\u2591") for a, b in zip(after, before, strict=False))
    assert "\u2591" not in end


def test_a_text_has_nothing_that_a_terminal_obeys(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    print_texts(["a\x1b[31m\n\tb\u202e"])
    assert capsys.readouterr().out == "a\ufffd[31m\n        b\ufffd\n"


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("texts", ("--height", 4), "--height means nothing for this model, which makes texts"),
        ("texts", ("--negative_prompt", "a"), "--negative_prompt means nothing for this model, which makes texts"),
        ("texts", ("--condition_image", "a.png"), "--condition_image means nothing"),
        ("texts", ("--output", "x.png"), "--output 'x.png': texts go to a .txt file"),
        ("texts", ("--output", "no/such/x.txt"), "--output 'no/such/x.txt': there is no such folder"),
        ("texts", ("--prompt", "a?"), "the tokenizer has no token for '?'"),
        ("texts", ("--prompt", "a" * 13), "has 13 tokens, more than the length 12"),
        ("texts", ("--classes", "song"), "class 'song' is unknown; this model knows prose, verse, 0 to 1"),
        ("texts", ("--predictor", "heun"), "predictor 'heun' is unknown"),
        ("texts", ("--top_p", 2), "top_p 2.0 must be a number from 1e-06 to 1"),
        ("texts", ("--complete",), "--complete is of prompts: pass --prompt"),
        ("pipeline", ("--complete",), "--complete means nothing for this model"),
        ("pipeline", ("--length", 4), "--length means nothing for this model, which makes no texts"),
        ("pipeline", ("--temperature", 1), "--temperature means nothing for this model"),
        ("pipeline", ("--stream",), "--stream means nothing for this model"),
        ("pipeline", ("--output", "x.txt"), "--output 'x.txt' must be a .png, .npy, .wav, .gif or .csv file"),
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused_by_name(model, arguments, message, request, capsys):
    run("sample", request.getfixturevalue(model), *arguments, status=2)
    assert message in capsys.readouterr().err
