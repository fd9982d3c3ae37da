"""Whole runs on tokens: from texts to a pipeline folder with its figures, in this process or several."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from safetensors.torch import load_file

from runs import launch, run
from score_sde import DiscreteScoreScheduler, DiTModel, ScoreSDETextPipeline, load_bundle, save_bundle
from score_sde.training import evaluate, quick_start, train
from score_sde.training.parts import publishing, text_figures, text_task
from score_sde.training.parts.options import WORK_BEGUN
from score_sde.training.parts.text_evaluation import HeldOutTexts, TextEvaluateConfig
from score_sde.training.parts.text_figures import distinct, entropy, ngram_figures, ngrams


TINY = "{hidden_size: 16, num_layers: 1, num_attention_heads: 2}"
SETTINGS = ["--data_kind", "text", "--network_kwargs", TINY, "--batch_size", 4, "--lr_warmup_steps", 0]
SETTINGS += ["--learning_rate", "1e-2", "--max_train_steps", 2, "--sample_num_texts", 3, "--length", 8]
SETTINGS += ["--sample_num_inference_steps", 3, "--num_workers", 0]
WEIGHTS = os.path.join("pipeline", "transformer", "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The pattern of small texts of two classes."""
    folder = tmp_path_factory.mktemp("words")
    for split, count in (("train", 24), ("validation", 8), ("test", 8)):
        texts = [("hello " if i % 2 else "bye ") + "abcdefgh"[i % 8] for i in range(count)]
        rows = {"text": texts, "kind": [text.split()[0] for text in texts]}
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
    return str(folder / "{split}.parquet")


def train_text(words, output_dir, *arguments):
    run(train.main, *SETTINGS, "--dataset", words, "--packing", "false", "--output_dir", output_dir, *arguments)
    return load_file(os.path.join(output_dir, WEIGHTS))


@pytest.fixture(scope="module")
def trained(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    options = ["--label_column", "kind", "--sample_guidance_scale", 2, "--sample_steps", 1, "--evaluation_steps", 2]
    train_text(words, folder, *options, "--model_name", "greetings", "--logging_steps", 1)
    return folder


def test_a_run_makes_a_pipeline_with_its_samples_and_its_bound(trained, capsys):
    pipe = load_bundle(trained / "pipeline")
    assert isinstance(pipe, ScoreSDETextPipeline)
    assert pipe.config.id2label == {"0": "bye", "1": "hello"}
    assert len(pipe.tokenizer) == pipe.scheduler.config.vocab_size == 13
    facts = json.loads((trained / "pipeline" / "training.json").read_text())
    assert facts["data_kind"] == "text" and facts["class_counts"] == {"bye": 12, "hello": 12}
    assert (facts["rows"], facts["tokens"], facts["sequences"], facts["images_seen"]) == (24, 12 * 6 + 12 * 8, 24, 8)
    # what is drawn again from the folder is what stands on the card
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    labels, settings = [0, 1, 0], {"num_inference_steps": 3, "guidance_scale": 2}
    again = [
        pipe(class_labels=label, generator=each, **settings) for label, each in zip(labels, generators, strict=True)
    ]
    assert [each.texts[0] for each in again] == facts["samples"]["texts"]
    assert facts["samples"]["classes"] == ["bye", "hello", "bye"]
    [token, character] = json.loads((trained / "pipeline" / "metrics.json").read_text())
    [line] = [json.loads(each) for each in (trained / "evaluation.jsonl").read_text().splitlines()]
    assert token["value"] == round(line["bits_per_token"], 4)
    # an end mark is a token and no character
    assert character["value"] == pytest.approx(token["value"] * 7 / 6, rel=0.01)
    assert token["n"] == 8 and token["split"] == "validation" and token["standard_error"] > 0
    card = (trained / "pipeline" / "README.md").read_text()
    assert "greetings" in card and "bits/character" in card and "tokens given the class, standard" in card
    assert {path.name for path in (trained / "samples").iterdir()} == {"step-00000001.txt", "step-00000002.txt"}
    written = (trained / "samples" / "step-00000002.txt").read_text()
    for number, (name, text) in enumerate(zip(["bye", "hello", "bye"], facts["samples"]["texts"], strict=True)):
        assert f"[{number}] {name}\n{text}\n" in written


def test_evaluate_adds_the_bound_and_figures_of_texts(trained, words, tmp_path, capsys):
    folder = shutil.copytree(trained / "pipeline", tmp_path / "pipeline")
    samples = tmp_path / "samples.jsonl"
    options = ["--num_texts", 6, "--num_inference_steps", 3, "--likelihood", 8, "--num_times", 2, "--guidance_scale", 2]
    run(evaluate.main, "--pipeline", folder, *options, "--save_samples", samples)
    metrics = {
        each["name"]: each for each in json.loads((folder / "metrics.json").read_text()) if each["split"] == "test"
    }
    bound = metrics["negative log-likelihood given the class, at most, bits/token"]
    assert (
        bound["n"] == 8
        and bound["num_times"] == 2
        and bound["dataset"] == os.path.basename(os.path.dirname(words)) + "/{split}.parquet"
    )
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["label"] for row in rows] == [0, 1, 0, 1, 0, 1]
    texts = [row["text"] for row in rows]
    assert metrics["distinct-1"]["value"] == pytest.approx(distinct(ngrams([text.split() for text in texts], 1)), 1e-4)
    assert metrics["2-gram entropy"]["value"] == pytest.approx(entropy(ngrams(texts, 2)), 1e-4)
    assert metrics["distinct-1"]["of_real_texts"] == 8 / 12
    assert (metrics["distinct-1"]["guidance_scale"], metrics["distinct-1"]["num_inference_steps"]) == (2, 3)
    assert "distinct-1" in (folder / "README.md").read_text()
    before = json.loads((folder / "metrics.json").read_text())
    run(evaluate.main, "--pipeline", folder, *options, "--batch_size", 4)
    after = json.loads((folder / "metrics.json").read_text())
    assert [each["value"] for each in after] == pytest.approx([each["value"] for each in before], rel=1e-4)
    # one of texts of the same pattern elsewhere is another one
    shutil.copytree(os.path.dirname(words), tmp_path / "letters")
    elsewhere = ["--dataset", tmp_path / "letters" / "{split}.parquet", "--num_texts", 0]
    run(evaluate.main, "--pipeline", folder, *options[4:8], *elsewhere)
    more = json.loads((folder / "metrics.json").read_text())
    assert len(more) == len(after) + 2 and more[-1]["dataset"] == "letters/{split}.parquet"
    # a bound that isn't given the classes stands beside the one that is
    run(evaluate.main, "--pipeline", folder, *options[4:8], "--num_texts", 0, "--label_column", "none")
    beside = json.loads((folder / "metrics.json").read_text())
    assert {each["name"] for each in beside} - {each["name"] for each in after} == {
        f"negative log-likelihood, at most, bits/{unit}" for unit in ("token", "character")
    }


def test_texts_are_drawn_at_the_temperature_of_the_pipeline_and_the_card_says_so(trained, tmp_path):
    pipe = load_bundle(trained / "pipeline")
    options = {"predictor": "ancestral", "corrector": "remasking", "temperature": 0.0}
    pipe.scheduler = DiscreteScoreScheduler.from_config(pipe.scheduler.config, **options)
    facts = json.loads((trained / "pipeline" / "training.json").read_text())
    folder, samples = save_bundle(pipe, tmp_path / "cold", facts=facts), tmp_path / "samples.jsonl"
    common = ["--pipeline", folder, "--likelihood", 0, "--num_texts", 4, "--num_inference_steps", 3]
    run(evaluate.main, *common, "--save_samples", samples)

    def drawn(**options):
        generators = [torch.Generator().manual_seed(i) for i in range(4)]
        return pipe(class_labels=[0, 1, 0, 1], generator=generators, num_inference_steps=3, **options).texts

    texts = [json.loads(line)["text"] for line in samples.read_text().splitlines()]
    assert texts == drawn() != drawn(temperature=1.0)
    found = json.loads((tmp_path / "cold" / "metrics.json").read_text())
    assert {(each["sampler"], each["corrector"], each["temperature"]) for each in found} == {
        ("ancestral", "remasking", 0.0)
    }
    # at another one stands beside them, and 1 is not said
    run(evaluate.main, *common, "--temperature", 1)
    again = json.loads((tmp_path / "cold" / "metrics.json").read_text())
    assert len(again) == 2 * len(found) and "temperature" not in again[-1]
    run(evaluate.main, *common, "--temperature", 0)
    assert len(json.loads((tmp_path / "cold" / "metrics.json").read_text())) == 2 * len(found)
    card = (tmp_path / "cold" / "README.md").read_text()
    for sampler in ("ancestral, corrector remasking, temperature 0.0", "ancestral, corrector remasking"):
        assert f"| {sampler} |" in card
    assert "temperature: 0.0" in card


def test_a_pipeline_without_a_record_is_measured_as_it_is_said_to_be_trained(trained, words, tmp_path):
    load_bundle(trained / "pipeline").save_pretrained(tmp_path / "again")
    options = ["--likelihood", 8, "--num_texts", 0, "--num_times", 2, "--label_column", "kind"]

    def bound(folder, *more):
        run(evaluate.main, "--pipeline", folder, *options, *more)
        return json.loads((folder / "metrics.json").read_text())

    with pytest.raises(ValueError, match="doesn't say how its sequences were made: pass --packing true .* false"):
        bound(tmp_path / "again", "--dataset", words)
    folder = shutil.copytree(trained / "pipeline", tmp_path / "pipeline")
    expected = [each["value"] for each in bound(folder) if each["split"] == "test"]
    found = bound(tmp_path / "again", "--dataset", words, "--packing", "false")
    assert [each["value"] for each in found] == expected
    assert {each["packing"] for each in found} == {False}
    packed = bound(tmp_path / "again", "--dataset", words, "--packing")
    assert len(packed) == 4 and packed[2]["value"] != expected[0]


def test_a_network_that_was_never_without_a_class_is_not_measured_without(trained, words, tmp_path):
    pipe, facts = load_bundle(trained / "pipeline"), json.loads((trained / "pipeline" / "training.json").read_text())
    network = DiTModel.from_config(pipe.transformer.config, class_dropout_prob=0.0)
    of_classes = ScoreSDETextPipeline(pipe.scheduler, network, pipe.tokenizer, pipe.config.id2label)
    folder = Path(save_bundle(of_classes, tmp_path / "pipeline", facts=facts))
    common = ["--pipeline", folder, "--num_texts", 0, "--likelihood", 8]
    with pytest.raises(ValueError, match="knows no null label: its likelihood needs the classes"):
        run(evaluate.main, *common, "--label_column", "none")
    assert not (folder / "metrics.json").exists() and not WORK_BEGUN.is_set()
    run(evaluate.main, *common)
    assert "given the class" in (folder / "metrics.json").read_text()


def test_an_adapter_is_to_be_merged_before_its_options_are_read(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit):
        run(evaluate.main, "--pipeline", tmp_path, "--num_texts", 2)
    assert "an adapter becomes one by `score-sde merge`" in capsys.readouterr().err


def test_a_bound_is_kept_whatever_becomes_of_the_texts(trained, tmp_path, monkeypatch):
    folder = shutil.copytree(trained / "pipeline", tmp_path / "pipeline")
    monkeypatch.setitem(text_figures.FIGURES, "ngrams", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(evaluate.main, "--pipeline", folder, "--num_texts", 2, "--num_inference_steps", 2, "--likelihood", 4)
    found = json.loads((folder / "metrics.json").read_text())
    assert [each["type"] for each in found if each["split"] == "test"] == ["bits_per_token", "bits_per_character"]


def test_the_length_of_a_network_may_be_a_plain_number(trained):
    """As the config of a class from elsewhere has it."""
    pipe = load_bundle(trained / "pipeline")
    pipe.transformer.register_to_config(sample_size=8)
    data = HeldOutTexts(TextEvaluateConfig(pipeline=str(trained / "pipeline")), pipe)
    assert data.dataset[0]["tokens"].shape == (8,)


def test_what_is_new_is_told_from_the_training_texts_alone(trained, words, tmp_path):
    pipe, pipeline = load_bundle(trained / "pipeline"), str(trained / "pipeline")
    shutil.copytree(os.path.dirname(words), tmp_path / "others")
    other = str(tmp_path / "others" / "train.parquet")

    def texts(**options):
        options = {"pipeline": pipeline, "figures": ["molecules"], "test_split": "train"} | options
        return HeldOutTexts(TextEvaluateConfig(**options), pipe).trained

    assert texts(test_split="test").split == "train" and len(texts()) == len(texts(dataset=words)) == 24
    assert texts(dataset=other) is None and texts(text_column="kind") is None
    assert texts(figures=["ngrams"]) is texts(num_texts=0) is None


def test_figures_count_what_they_say():
    assert ngrams([[1, 2, 1, 2], [1]], 2) == {(1, 2): 2, (2, 1): 1}
    assert entropy(ngrams(["abab", "ab"], 1)) == 1.0
    assert f"{entropy(ngrams(['aa'], 1)):g}" == "0"
    assert distinct(ngrams([["a", "b", "a", "b"]], 2)) == 2 / 3
    assert entropy(ngrams(["a"], 2)) == distinct(ngrams(["a"], 2)) == 0


def test_runs_that_no_real_text_has_are_no_figures():
    data = SimpleNamespace(tokenizer=lambda texts, **_: {"input_ids": [list(text) for text in texts]})
    found = ngram_figures(["CC C", "", "OO"], ["CO", "CCO"], data)
    assert [(each["name"], each["value"], each["of_real_texts"]) for each in found][:2] == [
        ("distinct-1", 1.0, 1.0),
        ("1-gram entropy", pytest.approx(0.8113, abs=1e-4), pytest.approx(0.9710, abs=1e-4)),
    ]
    assert [each["name"] for each in found][2:] == ["2-gram entropy", "3-gram entropy"]
    assert {each["n"] for each in found} == {2}


def test_a_figure_is_a_row(trained, tmp_path, monkeypatch):
    def lengths(texts, real, data):
        assert len(real) == 4 and data.split("train").row_facts()["rows"] == 24
        return [
            {"name": "mean length", "value": sum(map(len, texts)) / len(texts), "n": 4, "explanation": "characters."}
        ]

    monkeypatch.setitem(text_figures.FIGURES, "lengths", lengths)
    folder = shutil.copytree(trained / "pipeline", tmp_path / "pipeline")
    run(evaluate.main, "--pipeline", folder, "--num_texts", 4, "--likelihood", 0, "--figures", "lengths")
    assert "mean length" in [each["name"] for each in json.loads((folder / "metrics.json").read_text())]


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (
            evaluate.main,
            ["--features", "classifier"],
            "features is an option for data of the kind image, and these are",
        ),
        (
            evaluate.main,
            ["--num_texts", 0, "--likelihood", 0],
            "likelihood 0, num_texts 0: one of them must be positive",
        ),
        (evaluate.main, ["--figures", "novelty"], "figures 'novelty' is unknown; choose one of ngrams"),
        (evaluate.main, ["--test_split", "dev"], "split 'dev', cannot be opened"),
        (evaluate.main, ["--num_inference_steps", 200000], "num_inference_steps 200000 must be a whole number from 1"),
        (evaluate.main, ["--packing", "true"], "packing True contradicts False, by which '.*' was trained"),
        (evaluate.main, ["--save_samples", "tests"], "save_samples 'tests' is a folder: name a file in it"),
        (evaluate.main, ["--temperature", 5000], "temperature 5000.0 must be a number from 0 to 1000"),
        (evaluate.main, ["--guidance_scale", "nan"], "guidance_scale nan must be a number from"),
        (evaluate.main, ["--guidance_scale", "1e8"], "guidance_scale 100000000.0 must be a number from"),
        (train.main, ["--data_kind", "text", "--random_flip"], "random_flip is an option for data of the kind image"),
        (train.main, ["--process", "uniform"], "process is an option for data of the kind text, .*--data_kind text"),
        (train.main, ["--data_kind", "sound"], "data_kind 'sound' is unknown; choose one of image, text"),
        (train.main, ["--data_kind", "text", "--network", "unet"], "a ScoreUNetModel takes no vocab_size"),
        (
            train.main,
            ["--data_kind", "text", "--noise", "linear"],
            "noise 'linear' is unknown; choose one of log_linear",
        ),
        (train.main, ["--data_kind", "text", "--sample_guidance_scale", 2], "sample_guidance_scale 2 needs classes"),
        *(
            (train.main, ["--data_kind", "text", "--scheduler_kwargs", f"{{{stated}}}"], message)
            for stated, message in [
                ("vocab_size: 9", "scheduler_kwargs: vocab_size 9 is for the data to say: leave it out"),
                ("timestep_type: index", "scheduler_kwargs: timestep_type 'index' is of pipelines of diffusers"),
                ("noise: cosine", "scheduler_kwargs: noise is an option of its own: --noise cosine"),
                ("predictr: margin", "scheduler_kwargs: 'predictr' is no argument of DiscreteScoreScheduler"),
            ]
        ),
        (
            train.main,
            ["--data_kind", "text", "--network_kwargs", "{vocab_size: 9}"],
            "vocab_size 9 is for the data to say",
        ),
        (
            train.main,
            ["--data_kind", "text", "--network_kwargs", "{num_classes: 4}"],
            "network_kwargs: num_classes 4 is for the data to say: leave it out",
        ),
        (
            train.main,
            ["--data_kind", "text", "--sample_num_inference_steps", 200000],
            "sample_num_inference_steps 200000 must be from 1 to 100,000",
        ),
        (train.main, ["--data_kind", "text", "--network_kwargs", "{widht: 9}"], "'widht' is no argument of DiTModel"),
        *(
            (
                train.main,
                ["--data_kind", "text", "--network_kwargs", "{time_conditioning: false}", "--process", process]
                + ["--prediction_type", prediction_type],
                f"prediction_type '{prediction_type}' of process '{process}' depends on the time.*leave_one_out",
            )
            for process, prediction_type in [("uniform", "sample"), ("uniform", "score"), ("absorbing", "score")]
        ),
    ],
)
def test_bad_options_are_refused_by_name(trained, main, options, message, capsys):
    pipeline = ["--pipeline", trained / "pipeline"] if main is evaluate.main else []
    with pytest.raises((SystemExit, ValueError)) as refused:
        run(main, *pipeline, *options)
    text = str(refused.value) if refused.type is ValueError else capsys.readouterr().err

    assert re.search(message, text), text
    assert not WORK_BEGUN.is_set()


def test_training_starts_from_a_pipeline_of_texts(trained, words, tmp_path, capsys):
    start = ["--init_from", trained / "pipeline", "--network_kwargs", "{class_dropout_prob: 0.2}"]
    more = ["--label_column", "kind", "--learning_rate", "1e-30", "--ema_decay", 0]
    before, after = load_file(trained / WEIGHTS), train_text(words, tmp_path / "same", *start, *more)
    assert max((before[name] - after[name]).abs().max() for name in before) < 1e-20
    assert "class hello  kept" in capsys.readouterr().out
    facts = json.loads((tmp_path / "same" / "pipeline" / "training.json").read_text())
    assert facts["started_from"]["name"] == "greetings"
    for options, message in [
        (["--tokenizer", "bytes"], "tokenizer 'bytes', of 257 tokens, is another one than that of '.*', of 13"),
        (["--process", "uniform"], "process 'uniform' contradicts 'absorbing' of"),
        (["--length", 9], "length 9 contradicts 8 of"),
        (["--network_kwargs", "{hidden_size: 32}"], "network_kwargs hidden_size 32 contradicts 16 of"),
    ]:
        with pytest.raises((SystemExit, ValueError)) as refused:
            train_text(words, tmp_path / "other", *start, *options)
        text = str(refused.value) if refused.type is ValueError else capsys.readouterr().err

        assert re.search(message, text), text
    with pytest.raises(SystemExit):
        run(train.main, "--init_from", trained / "pipeline")
    assert "it is a pipeline of tokens, not of images: --data_kind text" in capsys.readouterr().err


def test_a_pipeline_that_cannot_be_saved_costs_no_training(words, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(text_task, "save_bundle", fails)
    with pytest.raises(OSError, match="no space left"):
        train_text(words, tmp_path, "--checkpointing_steps", 2)
    monkeypatch.undo()
    train_text(words, tmp_path, "--resume_from_checkpoint", "latest")
    assert json.loads((tmp_path / "pipeline" / "training.json").read_text())["steps"] == 2


def test_the_card_of_a_run_has_its_last_bound_also_where_it_is_resumed_at_its_end(words, tmp_path):
    """Of weights whose step is none of those that are evaluated on the way."""
    found = []
    for more in ([], ["--resume_from_checkpoint", "latest"]):
        train_text(words, tmp_path, "--evaluation_steps", 3, "--checkpointing_steps", 2, *more)
        found.append(json.loads((tmp_path / "pipeline" / "metrics.json").read_text()))
        assert "bits/character" in (tmp_path / "pipeline" / "README.md").read_text()
    assert [each["value"] for each in found[0]] == [each["value"] for each in found[1]]
    # what was measured since is of the same weights
    run(evaluate.main, "--pipeline", tmp_path / "pipeline", "--num_texts", 3, "--num_inference_steps", 2)
    measured = json.loads((tmp_path / "pipeline" / "metrics.json").read_text())
    train_text(words, tmp_path, "--evaluation_steps", 3, "--resume_from_checkpoint", "latest")
    kept = json.loads((tmp_path / "pipeline" / "metrics.json").read_text())
    assert {(each["name"], each["value"]) for each in kept} == {(each["name"], each["value"]) for each in measured}
    assert len(kept) == len(measured) > len(found[1])
    assert "distinct-1" in (tmp_path / "pipeline" / "README.md").read_text()
    # of those of a longer run it isn't known
    train_text(words, tmp_path, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert not (tmp_path / "pipeline" / "metrics.json").exists()
    [line] = [json.loads(each) for each in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert line["step"] == 2 and found[0][0]["value"] == round(line["bits_per_token"], 4)


def test_samples_that_cannot_be_drawn_cost_themselves_alone(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_task, "sample_texts", lambda *_: 1 / 0)
    train_text(words, tmp_path, "--sample_steps", 1)
    out = capsys.readouterr().out
    assert "samples of step 1 could not be written" in out and "the samples could not be written" in out
    assert "samples" not in json.loads((tmp_path / "pipeline" / "training.json").read_text())


def test_a_run_pushes_its_pipeline(words, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(publishing, "push_to_hub", lambda folder, repo, **_: pushed.append((folder, repo)))
    train_text(words, tmp_path, "--push_to_hub", "me/texts", "--push_steps", 1)
    assert pushed[-1] == (str(tmp_path / "pipeline"), "me/texts")
    assert pushed[0] == (str(tmp_path / "pushed"), "me/texts")


@pytest.mark.slow
def test_two_processes_train_as_one_does(words, tmp_path):
    options = [*SETTINGS, "--dataset", words, "--packing", "false", "--evaluation_steps", 2, "--evaluation_texts", 7]
    launch("train.py", *options, "--batch_size", 2, "--output_dir", tmp_path / "two", processes=2)
    one = train_text(words, tmp_path / "one", *options, "--batch_size", 4)
    two = load_file(tmp_path / "two" / WEIGHTS)
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    lines = [json.loads((tmp_path / name / "evaluation.jsonl").read_text()) for name in ("one", "two")]
    assert lines[0]["bits_per_token"] == pytest.approx(lines[1]["bits_per_token"], rel=1e-4)


@pytest.mark.slow
def test_a_quick_start_in_little(tmp_path, monkeypatch, capsys):
    little = ["--max_train_steps", "2", "--length", "16", "--network_kwargs", TINY]
    evaluated = ["--likelihood", "4", "--num_texts", "4", "--num_inference_steps", "2"]
    trains, evaluates = train.main, evaluate.main
    monkeypatch.setattr(train, "main", lambda arguments: trains([*arguments, *little]))
    monkeypatch.setattr(evaluate, "main", lambda arguments: evaluates([*arguments, *evaluated]))
    quick_start.main(["--data", "text", "--output_dir", str(tmp_path)])
    out = capsys.readouterr().out
    facts = json.loads((tmp_path / "diffusion" / "pipeline" / "training.json").read_text())
    assert all(text in out for text in facts["samples"]["texts"])
    assert "bits/character" in (tmp_path / "diffusion" / "pipeline" / "README.md").read_text()
    quick_start.main(["--data", "text", "--output_dir", str(tmp_path)])
    assert capsys.readouterr().out.count("already done") == 2


@pytest.mark.slow
def test_the_quick_start_learns_to_write(tmp_path):
    quick_start.main(["--data", "text", "--output_dir", str(tmp_path)])
    metrics = json.loads((tmp_path / "diffusion" / "pipeline" / "metrics.json").read_text())
    [bits] = [each["value"] for each in metrics if each["name"].endswith("bits/character") and each["split"] == "test"]
    assert bits < 2.9
