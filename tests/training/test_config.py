"""Options of the training scripts, as the command line and a YAML file give them."""

import json
import re
import subprocess
import sys
import tomllib

import pytest
from places import ROOT, TRAINING

from runs import CONFIG_CLASSES
from score_sde.training import train
from score_sde.training.parts.options import WORK_BEGUN, mapping, one_line_errors, parse


EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("text", ["1000", "1_000", "1e3", "1000.0"])
def test_whole_numbers(text, tmp_path):
    assert parse(train.TrainConfig, ["--max_train_steps", text]).max_train_steps == 1000
    (tmp_path / "config.yaml").write_text(f"max_train_steps: {text}\n")
    assert parse(train.TrainConfig, [str(tmp_path / "config.yaml")]).max_train_steps == 1000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{hidden_size: 64, qk_norm: true}", {"hidden_size": 64, "qk_norm": True}),
        ('{"beta_min": 1e-4, "t_min": .5E-3}', {"beta_min": 1e-4, "t_min": 5e-4}),
        ("sigma_max: 1e+2", {"sigma_max": 100.0}),
    ],
)
def test_mappings_are_what_yaml_takes(text, value, tmp_path):
    assert mapping("network_kwargs", text) == value
    (tmp_path / "config.yaml").write_text(f"time_density_kwargs: {text if '{' in text else '{' + text + '}'}\n")
    problems = parse(
        type("Lenient", (train.TrainConfig,), {"problems": lambda self: []}), [str(tmp_path / "config.yaml")]
    )
    assert mapping("time_density_kwargs", problems.time_density_kwargs) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learnign_rate", "1"], "--learnign_rate is unknown, did you mean --learning_rate? --help_all lists"),
        (["--network-kwarg={}"], "--network-kwarg is unknown, did you mean --network_kwargs?"),
        (["--batch_size", "8", "here"], "here is unknown; --help_all lists"),
        (["--max_train_steps", "1e-3"], "argument --max_train_steps/--max-train-steps: '1e-3' is not a whole number"),
        (["--max_train_steps", "inf"], "'inf' is not a whole number"),
        (["--scheduler_kwargs", "{beta_max:20}"], "scheduler_kwargs '{beta_max:20}' must be a mapping"),
        (["--scheduler_kwargs", "{1: 2}"], "scheduler_kwargs '{1: 2}' must be a mapping"),
    ],
)
def test_wrong_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(train.TrainConfig, arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_null_takes_back_what_a_file_says(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("adam_beta2: 0.98\nlog_with: tensorboard\nlearning_rate: 0.1\n")
    nulls = ["--adam_beta2", "null", "--log_with=null", "--max-train-seconds", "null"]
    config = parse(train.TrainConfig, [str(tmp_path / "config.yaml"), *nulls])
    assert (config.log_with, config.max_train_seconds, config.given) == (None, None, {"learning_rate"})
    # filled in by the optimizer that it is for
    assert config.adam_beta2 == parse(train.TrainConfig, []).adam_beta2 != 0.98
    assert parse(train.TrainConfig, [*nulls, "--adam_beta2", "0.9"]).adam_beta2 == 0.9
    with pytest.raises(SystemExit):
        parse(train.TrainConfig, ["--learning_rate", "null"])
    assert "argument --learning_rate/--learning-rate: invalid float value: 'null'" in capsys.readouterr().err


def test_null_takes_back_a_list_that_a_file_says(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("further_ema_decays: [0.9, 0.99]\nema_sigma_rel: 0.2\nfreeze: [blocks]\n")
    nulls = ["--further_ema_decays", "null", "--ema_sigma_rel=null"]
    config = parse(train.TrainConfig, [str(tmp_path / "config.yaml"), *nulls, "--freeze", "null"])
    # ema_sigma_rel has others by itself
    assert (config.further_ema_decays, config.ema_sigma_rel, config.freeze) == ([], [0.05, 0.1], [])
    assert config.given == set()
    (tmp_path / "nulls.yaml").write_text("further_ema_decays: null\nema_sigma_rel: null\nsample_prompts: []\n")
    config = parse(train.TrainConfig, [str(tmp_path / "nulls.yaml")])
    assert (config.further_ema_decays, config.ema_sigma_rel, config.sample_prompts) == ([], [0.05, 0.1], [])
    with pytest.raises(SystemExit):
        parse(train.TrainConfig, ["--further_ema_decays", "0.9", "null"])
    assert "further_ema_decays: null stands alone" in capsys.readouterr().err


def test_a_domain_that_is_null_makes_no_points(capsys):
    with pytest.raises(SystemExit):
        parse(train.TrainConfig, ["--domain", "null"])
    assert "domain is an option for data of the kind points, and these are of the kind image" in capsys.readouterr().err


def test_what_is_wrong_is_said_once(capsys):
    with pytest.raises(SystemExit):
        parse(train.TrainConfig, ["--condition_from", "sharpen", "--batch_size", "0"])
    problems = capsys.readouterr().err.strip().removeprefix("usage: ").split("; ")
    assert sum("condition_from 'sharpen' is unknown" in each for each in problems) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1", "option 'learning_rat' is unknown, did you mean learning_rate?"),
        ("learning_rate: fast", "learning_rate must be a number; YAML reads 'fast'"),
        ("learning_rate: true", "learning_rate must be a number; YAML reads True"),
        ("learning_rate: null", "learning_rate must be a number; YAML reads None"),
        ("max_train_steps: '10'", "max_train_steps must be a whole number; YAML reads '10'"),
        ("max_train_steps: 0.5", "'0.5' is not a whole number"),
        ("compile: 1", "compile must be true or false; YAML reads 1"),
        ("mixed_precision: no", "mixed_precision must be text; YAML reads False there: write it in quotes"),
        ("license: 1.10", "license must be text; YAML reads 1.1 there: write it in quotes"),
        ("dataset: {a: b}", "dataset must be text"),
        ("label_column: null", "label_column must be text; YAML reads None"),
        ("further_ema_decays: [0.9, null]", "further_ema_decays must be a number; YAML reads None"),
        ("ema_sigma_rel: []", "argument --ema_sigma_rel/--ema-sigma-rel: expected at least one argument"),
        ("log_with: []", "argument --log_with/--log-with: expected one argument"),
        ("further_ema_decays: [0.9, no]", "further_ema_decays must be a number; YAML reads False"),
        ("seed: 1\nseed: 2", "'seed' stands there twice"),
        ("seed: [", "cannot read"),
        ("- seed", "must hold 'option: value' lines"),
        ("seed: \xff", "cannot read"),
    ],
)
def test_wrong_lines_of_a_yaml_file_are_named(line, message, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(line, encoding="latin-1")
    with pytest.raises(SystemExit) as exit:
        parse(train.TrainConfig, [str(tmp_path / "config.yaml")])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_errors_before_the_work_are_one_line_and_later_ones_keep_their_traceback(capsys):
    for error in (ValueError("two\n  lines"), FileNotFoundError(2, "No such file", "x")):
        with pytest.raises(SystemExit) as exit, one_line_errors():
            raise error
        assert exit.value.code == 2
    assert [line.split("error: ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "two lines",
        "[Errno 2] No such file: 'x'",
    ]
    with pytest.raises(ValueError, match="later"), one_line_errors():
        WORK_BEGUN.set()
        raise ValueError("later")
    with pytest.raises(TypeError), one_line_errors():
        raise TypeError("a fault of the code")


def script_of(config_class):
    """The name of the script whose options a class has; None of measurements that a pipeline's folder chooses."""
    name = config_class.__module__.rpartition(".")[2]
    if (TRAINING / f"{name}.py").is_file():
        return name
    return {"diffusion": "train", "evaluation": None}[config_class.configs]


@pytest.mark.slow
@pytest.mark.parametrize("config_class", [each for each in CONFIG_CLASSES if script_of(each)])
def test_scripts_end_with_one_line_where_their_data_do_not_exist(config_class, tmp_path):
    name = script_of(config_class)
    (tmp_path / "model_index.json").write_text("{}")
    needed = {"encode_latents": ["--vae", "nowhere"], "evaluate": ["--pipeline", tmp_path]}
    needed["train_classifier"] = needed["evaluate"]
    needed["distill"] = ["--teacher", "nowhere"]
    arguments = [
        *needed.get(name, []),
        "--dataset",
        "no/such_data",
        "--output_dir",
        tmp_path / "run",
    ]
    if name == "evaluate":
        arguments = arguments[:-2]
    kind = getattr(config_class, "data_kind", None)
    of_kind = {"audio": ["--length", 8], "points": ["--columns", "phi"]}
    arguments += ["--data_kind", kind, *of_kind.get(kind, [])] if isinstance(kind, str) else []
    command = [sys.executable, TRAINING / f"{name}.py", *arguments]
    ended = subprocess.run([str(each) for each in command], capture_output=True, text=True, cwd=TRAINING)
    assert ended.returncode == 2
    assert f"{name}.py: error: " in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_the_constraints_fit_every_extra(extra):
    """Into an empty environment, from the package index; every package that an extra brings has its version."""

    def canonical(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = {canonical(name) for name in re.findall(r"^(.+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)}
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--report", "-"]
    ended = subprocess.run([*command, "-c", "constraints.txt", f".[{extra}]"], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    brought = {canonical(each["metadata"]["name"]) for each in json.loads(ended.stdout)["install"]}
    # CUDA builds of torch bring libraries of their own
    free = {"score-sde", "setuptools", "triton"}
    assert not {name for name in brought - pinned - free if not name.startswith(("nvidia", "cuda"))}
