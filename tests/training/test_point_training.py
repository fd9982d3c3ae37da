"""Training on points, from files to bundles: each domain, resume, likelihood, what is no point."""

import json
import math
import re
import subprocess
import sys
from contextlib import nullcontext

import datasets
import numpy as np
import pytest
import torch
from bundles import LOAD_BY_REMOTE_CODE
from PIL import Image
from safetensors.torch import load_file, save_file

from runs import equal, forget_runs, run
from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler, cli, load_bundle
from score_sde.training import evaluate, train
from score_sde.training.parts.options import parse
from score_sde.training.parts.point_data import PointData
from score_sde.training.train import TrainConfig


TINY = "{hidden_size: 16, num_layers: 1, num_attention_heads: 2}"
TINY_RUN = [
    *("--network_kwargs", TINY, "--batch_size", 8, "--lr_warmup_steps", 0, "--learning_rate", "1e-2"),
    *("--max_train_steps", 4, "--checkpointing_steps", 2, "--sample_num_images", 12),
    *("--sample_num_inference_steps", 2, "--num_workers", 0),
]
# {domain: options that say what the columns of the fixture are}
OPTIONS = {
    "torus": ["--columns", "phi,psi", "--units", "degrees"],
    "sphere": ["--columns", "latitude,longitude", "--units", "latitude_longitude"],
    "box": ["--columns", "share", "x", "--box_ranges", "{share: [0, 1], x: [-20, 20]}"],
    "flat": ["--columns", "x,share"],
    "{torus: 1, sphere: 3, flat: 1}": [
        *("--columns", "phi,latitude,longitude,x", "--units", "degrees", "latitude_longitude")
    ],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The folder of rows with columns of every domain."""
    folder = tmp_path_factory.mktemp("rows")
    for seed, (split, count) in enumerate([("train", 60), ("validation", 20), ("test", 20)]):
        rng = np.random.default_rng(seed)
        columns = {
            "phi": rng.uniform(-180, 180, count),
            "psi": rng.integers(-180, 181, count),
            "latitude": rng.uniform(-90, 90, count),
            "longitude": rng.uniform(-180, 180, count),
            "share": rng.beta(0.5, 0.5, count),
            "x": rng.normal(3, 2, count),
            "kind": rng.choice(["a", "b", "c"], count),
        }
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
        datasets.Dataset.from_dict(columns).to_csv(folder / f"{split}.csv", index=False)
    return folder


def arguments_of(rows, domain, *options):
    given = ["--domain", domain, "--dataset", rows / "{split}.parquet", *OPTIONS[domain], *TINY_RUN, *options]
    return [str(each) for each in given]


def config_of(rows, domain, *options):
    return parse(TrainConfig, arguments_of(rows, domain, *options))


def problem(rows, domain, capsys, *options):
    with pytest.raises(SystemExit):
        config_of(rows, domain, *options)
    return capsys.readouterr().err


class Printer:
    """What `PointData` asks of an accelerator."""

    print = staticmethod(print)

    @staticmethod
    def main_process_first():
        return nullcontext()


QUICK = ("torus", "sphere")


@pytest.mark.parametrize(
    "domain", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in OPTIONS]
)
def test_points_go_from_files_to_a_bundle_and_back(rows, tmp_path, domain, capsys):
    more = ["--label_column", "kind", "--evaluation_steps", 4, "--output_dir", tmp_path]
    run(train.main, *arguments_of(rows, domain, *more))
    pipeline = ScoreSDEPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    values = pipeline(class_labels=["a", "c"] * 20, num_inference_steps=3).images
    columns = pipeline.kind.coordinates.names
    assert values.shape == (40, len(columns)) and np.isfinite(values).all()
    bounds = {"phi": (-180, 180), "psi": (-180, 180), "latitude": (-90, 90), "longitude": (-180, 180)}
    bounds |= {"share": (0, 1), "x": (-20, 20)} if domain == "box" else {}
    for i, name in enumerate(columns):
        low, high = bounds.get(name, (-np.inf, np.inf))
        assert low - 1e-3 <= values[:, i].min() and values[:, i].max() <= high + 1e-3
    assert Image.open(tmp_path / "pipeline" / "samples.png").size[0] > 200
    facts = json.loads((tmp_path / "pipeline" / "training.json").read_text())
    assert facts["rows"] == 60 and facts["data_kind"] == "points" and facts["columns"] == columns
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert "points" in card and "negative log-likelihood of a, nats" in card
    run(evaluate.main, "--pipeline", tmp_path / "pipeline", "--tolerance", 1e-2)
    found = json.loads((tmp_path / "pipeline" / "metrics.json").read_text())
    whole, *of_classes = [each for each in found if each["split"] == "test"]
    assert whole["n"] == 20 == sum(each["n"] for each in of_classes)
    assert whole["value"] == pytest.approx(sum(each["n"] * each["value"] for each in of_classes) / 20, abs=1e-3)
    assert f"{whole['value']:.4f} on 20 points" in capsys.readouterr().out


def test_the_card_of_a_run_that_is_resumed_at_its_end_has_its_likelihood(rows, tmp_path):
    found = []
    for more in ([], ["--resume_from_checkpoint", "latest"]):
        run(train.main, *arguments_of(rows, "torus", "--evaluation_steps", 4, "--output_dir", tmp_path, *more))
        found.append(json.loads((tmp_path / "pipeline" / "metrics.json").read_text()))
    assert [each["value"] for each in found[0]] == pytest.approx([each["value"] for each in found[1]], rel=1e-6)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(rows, tmp_path):
    def trained(folder, *more):
        run(
            train.main,
            *arguments_of(rows, "sphere", "--label_column", "kind", "--output_dir", tmp_path / folder, *more),
        )
        return load_file(tmp_path / folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")

    whole = trained("whole")
    trained("parts", "--max_train_steps", 2)
    assert equal(trained("parts", "--resume_from_checkpoint", "latest"), whole)
    # the same rows in another file
    csv = ["--dataset", rows / "{split}.csv", "--resume_from_checkpoint", "latest", "--max_train_steps", 6]
    trained("parts", *csv)
    with pytest.raises(ValueError, match="was trained on other data: rows was '"):
        trained("parts", *csv, "--max_train_steps", 8, "--split", "validation")
    with pytest.raises(ValueError, match="missing was 'refuse', is 'drop'"):
        trained("parts", "--missing", "drop", "--resume_from_checkpoint", "latest", "--max_train_steps", 8)


@pytest.mark.slow
def test_without_the_package_a_bundle_draws_the_same_points(rows, tmp_path):
    run(train.main, *arguments_of(rows, "{torus: 1, sphere: 3, flat: 1}", "--output_dir", tmp_path / "run"))
    folder = tmp_path / "run" / "pipeline"
    pipeline = load_bundle(folder)
    for parameter in pipeline.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    pipeline.save_pretrained(folder)
    told = {"batch_size": 3, "num_inference_steps": 3, "output_type": "pt"}
    save_file({"image": pipeline(**told, generator=torch.Generator().manual_seed(3)).images}, tmp_path / "points")
    command = [sys.executable, "-c", LOAD_BY_REMOTE_CODE, tmp_path / "points", folder, json.dumps(told)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    difference, module = json.loads(result.stdout.splitlines()[-1])
    assert difference < 1e-5 and module == "diffusers_modules"


def test_a_fresh_network_has_the_likelihood_of_uniform_angles(rows, tmp_path):
    """A score of 0 everywhere leaves the prior: log p is minus the logarithm of the volume."""
    options = ["--learning_rate", "1e-9", "--ema_decay", 0, "--output_dir", tmp_path, "--max_train_steps", 1]
    run(train.main, *arguments_of(rows, "torus", *options))
    run(evaluate.main, "--pipeline", tmp_path / "pipeline")
    [metric] = json.loads((tmp_path / "pipeline" / "metrics.json").read_text())
    assert metric["value"] == pytest.approx(2 * math.log(2 * math.pi), abs=1e-3)
    assert "angles in radians" in metric["explanation"]


def test_rows_that_were_trained_on_are_not_called_held_out(rows, tmp_path, capsys):
    """One file is all splits: what is measured on it is of the split that was trained on, and that is said."""
    single, run_folder = rows / "train.csv", tmp_path / "run"
    options = ["--dataset", single, "--output_dir", run_folder, "--max_train_steps", 1, "--evaluation_steps", 1]
    options += ["--learning_rate", "1e-9", "--ema_decay", 0]
    run(train.main, *arguments_of(rows, "torus", *options))
    said = f"dataset '{single}' has no splits: 'validation' is all of its rows, and so is 'train'"
    assert said in capsys.readouterr().out
    run(evaluate.main, "--pipeline", run_folder / "pipeline", "--tolerance", 1e-2)
    assert "'test' is all of its rows, and so is 'train', which is trained on" in capsys.readouterr().out
    for data, split in ((single, "train"), (rows / "test.csv", "test"), (rows / "{split}.csv", "test")):
        forget_runs()
        run(evaluate.main, "--pipeline", run_folder / "pipeline", "--tolerance", 1e-2, "--dataset", data)
        assert f"split '{split}'" in capsys.readouterr().out
        metrics = json.loads((run_folder / "pipeline" / "metrics.json").read_text())
        assert metrics[-1]["split"] == split


def test_a_fresh_flat_network_has_the_likelihood_of_a_normal_distribution(rows, tmp_path):
    """A v_prediction of 0 is exact for data of mean 0 and standard deviation 1, which standardised columns are taken
    for: in their own units, a normal distribution of the training data's mean and standard deviation."""
    options = ["--learning_rate", "1e-9", "--ema_decay", 0, "--output_dir", tmp_path, "--max_train_steps", 1]
    run(train.main, *arguments_of(rows, "flat", *options))
    run(evaluate.main, "--pipeline", tmp_path / "pipeline", "--tolerance", 1e-6)
    [metric] = json.loads((tmp_path / "pipeline" / "metrics.json").read_text())
    train_, test = (
        datasets.load_dataset("parquet", data_files=str(rows / f"{split}.parquet"), split="train").to_pandas()
        for split in ("train", "test")
    )
    nats = 0.0
    for name in ("x", "share"):
        mean, std = train_[name].mean(), train_[name].std(ddof=0)
        nats += (((test[name] - mean) / std) ** 2 / 2 + np.log(std * math.sqrt(2 * math.pi))).mean()
    assert metric["value"] == pytest.approx(nats, abs=5e-3) and metric["n"] == 20


@pytest.fixture(scope="module")
def begun(rows, tmp_path_factory):
    """Pipelines of a torus with classes, and of several domains, to begin with."""
    folder = tmp_path_factory.mktemp("begun")
    for name, domain, more in (("torus", "torus", ["--label_column", "kind"]), ("mixed", [*OPTIONS][-1], [])):
        forget_runs()
        run(train.main, *arguments_of(rows, domain, *more, "--max_train_steps", 1, "--output_dir", folder / name))
        pipeline = load_bundle(folder / name / "pipeline")
        for parameter in pipeline.transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        pipeline.save_pretrained(folder / name / "pipeline")
    return folder


def beginning(rows, begun, name, output, *more):
    """The options of a run that begins with one of these; network and domain come with it."""
    columns = OPTIONS["torus" if name == "torus" else [*OPTIONS][-1]]
    given = ["--data_kind", "points", "--init_from", begun / name / "pipeline", "--dataset", rows / "{split}.parquet"]
    steps = TINY_RUN[: TINY_RUN.index("--network_kwargs")] + TINY_RUN[TINY_RUN.index("--network_kwargs") + 2 :]
    classes = ["--label_column", "kind"] if name == "torus" else []
    return [*map(str, [*given, *columns, *classes, *steps, "--output_dir", output, *more])]


@pytest.mark.parametrize("name", ["torus", "mixed"])
def test_a_run_of_points_begins_with_the_weights_of_another(rows, begun, tmp_path, name):
    """Whose network, domain and path it takes; what is frozen stays."""
    forget_runs()
    run(train.main, *beginning(rows, begun, name, tmp_path / "run", "--freeze", "blocks", "--learning_rate", "1e-3"))
    old, new = (load_bundle(each / "pipeline") for each in (begun / name, tmp_path / "run"))
    assert old.scheduler.config.domain == new.scheduler.config.domain
    assert old.config.columns == new.config.columns and old.units == new.units
    before, after = old.transformer.state_dict(), new.transformer.state_dict()
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if key.startswith("blocks.")} <= same and "proj_out.weight" not in same
    facts = json.loads((tmp_path / "run" / "pipeline" / "training.json").read_text())
    assert facts["started_from"]["source"] == str(begun / name / "pipeline")
    # it goes on without the weights
    go_on = ["--resume_from_checkpoint", "latest", "--max_train_steps", "6", "--freeze", "blocks"]
    run(train.main, *beginning(rows, begun, name, tmp_path / "run", "--learning_rate", "1e-3", *go_on))


@pytest.mark.parametrize("name", ["torus", "mixed"])
def test_adapters_of_points_open_with_their_model(rows, begun, tmp_path, name):
    pytest.importorskip("peft")
    forget_runs()
    # half of the classes, and of flat columns other statistics: the model keeps its own
    table = datasets.load_dataset("parquet", data_files=str(rows / "train.parquet"), split="train").to_pandas()
    table = table[table["kind"] == "b"].assign(x=lambda each: 2 * each["x"])
    table.to_parquet(tmp_path / "train.parquet")
    more = ["--lora_rank", 2, "--learning_rate", "1e-2", "--dataset", tmp_path / "train.parquet"]
    run(train.main, *beginning(rows, begun, name, tmp_path / "run", *more))
    old, new = load_bundle(begun / name / "pipeline"), load_bundle(tmp_path / "run" / "pipeline")
    assert (tmp_path / "run" / "pipeline" / "pytorch_lora_weights.safetensors").is_file()
    assert old.units == new.units and old.config.id2label == new.config.id2label
    told = {"class_labels": ["b"] * 3} if name == "torus" else {"batch_size": 3}
    drawn = []
    for pipeline in (old, new):
        pipeline.set_progress_bar_config(disable=True)
        drawn.append(pipeline(**told, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images)
    assert drawn[0].shape == drawn[1].shape and np.abs(drawn[0] - drawn[1]).max() > 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--domain", "box"], "domain 'box' contradicts 'torus' of .*: leave it out"),
        (["--columns", "phi"], "domain|channels"),
        (["--network_kwargs", "{hidden_size: 64}"], "network_kwargs hidden_size 64 contradicts"),
        (["--lora_rank", 2, "--freeze", "blocks"], "lora_rank trains adapters alone"),
    ],
)
def test_a_beginning_that_contradicts_its_weights_is_refused(rows, begun, tmp_path, capsys, options, message):
    with pytest.raises((SystemExit, ValueError)) as raised:
        run(train.main, *beginning(rows, begun, "torus", tmp_path, *options))
    assert re.search(message, capsys.readouterr().err + str(raised.value))


def test_other_kinds_of_data_do_not_begin_with_points(rows, begun, tmp_path, capsys):
    given = ["--init_from", str(begun / "torus" / "pipeline"), "--dataset", "fashion_mnist_10k"]
    with pytest.raises(SystemExit):
        parse(TrainConfig, given)
    assert "it is a pipeline of points: --data_kind points" in capsys.readouterr().err
    image = ScoreSDEPipeline(ScoreSDEScheduler(), transformer=DiTModel(8, 4, 1, 16, 1, 2))
    image.save_pretrained(tmp_path / "image")
    with pytest.raises(SystemExit):
        config_of(rows, "torus", "--init_from", tmp_path / "image")
    assert "it is no pipeline of points" in capsys.readouterr().err


# --- what is read -------------------------------------------------------------------------------------------------


def test_flat_columns_are_standardised_and_the_others_keep_the_units_of_their_domain(rows):
    data = PointData(config_of(rows, "{torus: 1, sphere: 3, flat: 1}"), Printer)
    points = data.dataset.points.squeeze(2)
    table = datasets.load_dataset("parquet", data_files=str(rows / "train.parquet"), split="train").to_pandas()
    assert np.abs(points[:, 0].numpy() - np.radians(table["phi"])).max() < 1e-6
    assert (points[:, 1:4].norm(dim=1) - 1).abs().max() < 1e-6
    assert np.abs(points[:, 4].numpy() - (table["x"] - table["x"].mean()) / table["x"].std(ddof=0)).max() < 1e-5
    box = PointData(config_of(rows, "box"), Printer).dataset.points.squeeze(2)
    assert np.abs(box[:, 0].numpy() - (2 * table["share"] - 1)).max() < 1e-6
    assert np.abs(box[:, 1].numpy() - table["x"] / 20).max() < 1e-6


@pytest.fixture
def broken(tmp_path):
    """A file with rows that lack something, and columns that are no points."""
    columns = {"a": [1.0, None, 3.0, 2.0], "b": [1.0, 2.0, math.nan, 0.5], "c": [2.0] * 4, "name": ["x"] * 4}
    columns |= {"kind": ["u", "v", None, "v"], "degrees": [10.0, -170.0, 90.0, 0.0]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "broken.parquet")
    return tmp_path / "broken.parquet"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--columns", "a"], r"in 1 of 4 rows something is missing \(a 1\): leave them out by --missing drop"),
        (["--columns", "degrees", "--label_column", "kind"], r"something is missing \(kind 1\)"),
        (["--columns", "b"], "b: 1 of 4 values are not finite"),
        (["--columns", "c,degrees"], "column 'c' is constant, 2 in all of 4 rows"),
        (["--columns", "name"], "column 'name' must hold numbers, not string"),
        (["--columns", "degree"], "has no column 'degree', but .*, did you mean degrees"),
        (["--columns", "degrees", "--domain", "torus"], "degrees: 3 of 4 .*they look like degrees; say units degrees"),
        (["--columns", "degrees", "--domain", "box"], r"are outside of \[-1, 1\].* say by box_ranges"),
        (["--columns", "degrees", "--dataset", "nowhere.csv"], "the file 'nowhere.csv' does not exist"),
    ],
)
def test_rows_that_are_no_points_are_refused(broken, options, message):
    config = parse(TrainConfig, ["--domain", "flat", "--dataset", str(broken), *options])
    with pytest.raises(ValueError, match=message):
        PointData(config, Printer)


def test_rows_that_lack_something_are_dropped_where_asked_for(broken, capsys):
    options = ["--columns", "a,degrees", "--label_column", "kind", "--missing", "drop", "--dataset", str(broken)]
    data = PointData(parse(TrainConfig, ["--domain", "flat", *options]), Printer)
    assert len(data.dataset) == 2 and data.dataset.row_facts()["missing_rows"] == 2
    assert data.dataset.class_counts == {"u": 1, "v": 1}
    assert "2 rows left out, in which something is missing" in capsys.readouterr().out


def test_classes_without_rows_are_none_of_the_model(tmp_path):
    features = datasets.Features({"a": datasets.Value("float32"), "kind": datasets.ClassLabel(names=["u", "v", "w"])})
    columns = {"a": [0.5, 1.0, None, 2.0], "kind": [2, 0, 1, 2]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
    options = ["--columns", "a", "--label_column", "kind", "--missing", "drop", "--dataset"]
    data = PointData(parse(TrainConfig, ["--domain", "flat", *options, str(tmp_path / "rows.parquet")]), Printer)
    assert data.classes.id2label == {0: "u", 1: "w"} and data.dataset.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--columns", "phi,phi"], "columns phi, phi: phi is named twice"),
        (["--domain", "circle"], "domain 'circle' is unknown; choose one of torus, box, sphere, flat"),
        (["--domain", "{torus: 3}"], "has 3 channels; the points have 2|has 3"),
        (["--units", "degree"], "units 'degree' is unknown; choose one of degrees, latitude_longitude"),
        (["--units", "latitude_longitude"], "units latitude_longitude needs a domain sphere of 3 channels"),
        (["--domain", "box", "--units", "degrees"], "units degrees are of the angles of a torus"),
        (
            ["--domain", "box", "--units", "none", "--box_ranges", "{phi: [2, 1]}"],
            "must be two numbers, the lower first",
        ),
        (["--box_ranges", "{phi: [0, 1]}"], "box_ranges: phi is no column of a box; those are none"),
        (["--missing", "skip"], "missing 'skip' is unknown"),
        (["--prediction_type", "v_prediction"], "prediction_type 'v_prediction' has no meaning on domain 'torus'"),
        (["--sde_type", "vp"], "sde_type 'vp' has no meaning on domain 'torus'"),
        (["--scheduler_kwargs", "{domain: box}"], "scheduler_kwargs: domain is an option of its own: --domain box"),
        (["--scheduler_kwargs", "{predictor: dpmpp_2m}"], "predictor 'dpmpp_2m' has no meaning on domain 'torus'"),
        (["--network", "unet"], "network 'unet' is of images and signals: points need dit"),
        (["--network_kwargs", "{domain: box}"], "network_kwargs: domain 'box' is for the data to say"),
        (["--network_kwargs", "{num_frequencies: 0}"], "num_frequencies 0 must be a whole number from 1"),
        (["--vlb_weight", "0.1"], "vlb_weight 0.1"),
        (["--sample_guidance_scale", "2"], "sample_guidance_scale 2 needs classes"),
        (
            ["--domain", "sphere", "--columns", "longitude,latitude", "--units", "latitude_longitude"],
            "columns longitude, latitude: latitude comes first, then longitude",
        ),
        (
            ["--resolution", "32"],
            "resolution is an option for data of the kind image, .*and these are of the kind points",
        ),
    ],
)
def test_options_that_mean_nothing_on_a_domain_are_refused(rows, options, message, capsys):
    assert re.search(message, problem(rows, "torus", capsys, *options))


def commanded(*argv):
    with pytest.raises(SystemExit) as exit:
        cli.main([str(each) for each in argv])
    assert not exit.value.code


def test_the_command_line_draws_a_table_and_says_what_a_pipeline_is_of(rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["score-sde"])
    run(train.main, *arguments_of(rows, "flat", "--label_column", "kind", "--output_dir", tmp_path))
    folder, table = tmp_path / "pipeline", tmp_path / "points.csv"
    commanded("sample", folder, "--classes", "a", "c", "--num_images", 5, "--steps", 2, "--output", table)
    assert "5 points" in capsys.readouterr().out
    header, *lines = table.read_text().splitlines()
    assert header == "x,share,class" and [line.split(",")[2] for line in lines] == ["a", "c", "a", "c", "a"]
    assert all(np.isfinite(float(each)) for line in lines for each in line.split(",")[:2])
    commanded("info", folder)
    described = capsys.readouterr().out
    assert re.search(r"columns +x,share", described) and re.search(r"domain +flat", described)
    assert re.search(r"training points +60", described) and re.search(r"points seen +32", described)
    commanded("verify", folder)
