"""Training on texts that starts from weights: frozen ones, LoRA adapters, and what a resumed run needs no more."""

import json
import shutil

import datasets
import pytest
import torch
from networks import awake
from safetensors.torch import load_file
from test_lora import FILE, check_published
from test_text_runs import SETTINGS, WEIGHTS
from texts import letters, written

from runs import equal, forget_runs, run
from score_sde import DiscreteScoreScheduler, DiTModel, ScoreSDETextPipeline, cli, load_bundle, save_bundle
from score_sde.training import evaluate, train


LORA = ["--lora_rank", 2]
END = {"eos_token": "<end>"}


def make_source(folder, names=("bye", "hello"), tokenizer=None, **scheduler_options):
    """A pipeline of texts of 8 letters at most, of random weights and these classes, in a folder."""
    tokenizer = tokenizer or letters("abcdefghlo y", **END)
    config = {"sample_size": (8,), "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    network = awake(DiTModel(vocab_size=len(tokenizer), num_classes=len(names) or None, **config))
    scheduler = DiscreteScoreScheduler(len(tokenizer), **scheduler_options)
    pipeline = ScoreSDETextPipeline(scheduler, network, tokenizer, dict(enumerate(names)) or None)
    return save_bundle(pipeline, folder, facts={"license": "mit", "model_name": "Greetings", "data_kind": "text"})


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "source")


def greetings(folder, *names):
    """The pattern of small texts of the classes of these names."""
    folder.mkdir()
    for split, count in (("train", 12), ("validation", 6), ("test", 6)):
        kinds = [names[i % len(names)] for i in range(count)]
        texts = [f"{'hello' if kind == 'hello' else 'bye'} {'abcdefgh'[i % 8]}" for i, kind in enumerate(kinds)]
        datasets.Dataset.from_dict({"text": texts, "kind": kinds}).to_parquet(folder / f"{split}.parquet")
    return str(folder / "{split}.parquet")


def start(source, output_dir, data, *arguments):
    forget_runs()
    options = ["--dataset", data, "--packing", "false", "--label_column", "kind", "--output_dir", output_dir]
    options = [*SETTINGS, *options, "--init_from", source]
    at = options.index("--network_kwargs")
    del options[at : at + 2]
    run(train.main, *options, *arguments)
    return output_dir / "pipeline"


def refused(capsys, *arguments):
    with pytest.raises((SystemExit, ValueError)) as error:
        start(*arguments)
    return f"{error.value} {capsys.readouterr().err}"


@torch.no_grad()
def output(pipeline, labels=(0, 1)):
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [3, 3, 1, 1, 0, 0, 2, 2]])
    return pipeline.transformer(tokens, torch.tensor([3.0, 500.0]), class_labels=torch.tensor(labels)).sample


def merged(adapter, folder):
    with pytest.raises(SystemExit) as end:
        cli.main(["merge", str(adapter), str(folder)])
    assert not end.value.code
    return load_bundle(folder)


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_an_adapter_opens_with_its_model_on_any_pipeline_and_merged(source, tmp_path, capsys):
    data = greetings(tmp_path / "data", "hello", "bye")
    arguments = [*LORA, "--max_train_steps", 3, "--evaluation_steps", 3]
    adapter = start(source, tmp_path / "run", data, *arguments)
    names = {"README.md", FILE, "metrics.json", "training.json"}
    assert {each.name for each in adapter.iterdir()} == names
    tensors = load_file(adapter / FILE)
    assert all(name.startswith("transformer.") and ".lora_" in name for name in tensors)
    plain, opened, loaded = load_bundle(source), load_bundle(adapter), load_bundle(source)
    loaded.load_lora_weights(adapter)
    assert isinstance(opened, ScoreSDETextPipeline)
    assert (output(opened) - output(plain)).abs().max() > 1e-3  # it has learned something
    assert torch.equal(output(loaded), output(opened))
    assert written(loaded) == written(opened)
    together = merged(adapter, tmp_path / "merged")
    assert together.transformer.state_dict().keys() == plain.transformer.state_dict().keys()
    assert (output(together) - output(opened)).abs().max() < 1e-5 * output(opened).abs().max()
    assert together.config.id2label == plain.config.id2label
    loaded.unload_lora_weights()
    assert torch.equal(output(loaded), output(plain))
    facts = json.loads((adapter / "training.json").read_text())
    assert facts["trained_parameters"] == sum(each.numel() for each in tensors.values())
    card = (adapter / "README.md").read_text()
    assert "LoRA adapter of rank 2 for `Greetings`" in card and "license: mit" in card and "bits/character" in card
    assert "| started from | Greetings |" in card and "| training texts | 12 |" in card
    assert all(text in card for text in facts["samples"]["texts"]) and "was not measured" not in card
    # the command knows what it makes
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(["sample", str(adapter), "--num_texts", "2", "--steps", "4", "--temperature", "0.9"])
    assert not end.value.code and capsys.readouterr().out.count("\n") >= 2


def test_what_is_published_is_the_average_and_resume_is_bit_for_bit_without_the_source(source, tmp_path):
    data = greetings(tmp_path / "data", "hello", "bye")
    arguments = [*LORA, "--checkpointing_steps", 2, "--ema_decay", 0.5]
    whole = load_file(start(source, tmp_path / "whole", data, *arguments, "--max_train_steps", 4) / FILE)
    start(source, tmp_path / "parts", data, *arguments, "--max_train_steps", 2)
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    parts = load_file(start(source, tmp_path / "parts", data, *arguments, *more) / FILE)
    assert equal(whole, parts)
    check_published(whole, tmp_path / "whole" / "checkpoints" / "step-00000004", tmp_path / "elsewhere")


def test_data_are_of_the_classes_of_the_model_by_name_and_may_bring_others(tmp_path):
    source = make_source(tmp_path / "source", names=("aloha", "bye", "hello"))
    told, forward = [], DiTModel.forward

    def recording(self, tokens, timestep, class_labels=None, **arguments):
        if tokens.device.type != "meta" and len(tokens) == 4:
            told.extend(class_labels.tolist())
        return forward(self, tokens, timestep, class_labels=class_labels, **arguments)

    data = greetings(tmp_path / "data", "hello", "salve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiTModel, "forward", recording)
        options = [*LORA, "--max_train_steps", 4, "--evaluation_steps", 4, "--ema_decay", 0.5]
        adapter = start(source, tmp_path / "run", data, *options)
    # hello, salve, and the null label; in evaluations, too
    assert {2, 3} <= set(told) <= {2, 3, 4}
    plain, opened = load_bundle(source), load_bundle(adapter)
    assert opened.config.id2label == {"0": "aloha", "1": "bye", "2": "hello", "3": "salve"}
    rows = load_file(adapter / FILE)["transformer.class_embed.token_adapter.trainable_tokens_delta"]
    table = plain.transformer.class_embed.weight
    assert rows.shape == (1, table.shape[1]) and (rows - table[3]).abs().max() > 1e-3
    assert json.loads((adapter / "training.json").read_text())["samples"]["classes"] == ["aloha", "bye", "hello"]
    assert "| new classes | salve |" in (adapter / "README.md").read_text()
    # measured beside data of some of its classes alone
    together = merged(adapter, tmp_path / "merged")
    assert (output(together, (2, 3)) - output(opened, (2, 3))).abs().max() < 1e-5 * output(opened).abs().max()
    run(evaluate.main, "--pipeline", tmp_path / "merged", "--likelihood", 6, "--num_texts", 0, "--num_times", 2)
    assert "bits/character" in (tmp_path / "merged" / "README.md").read_text()


def test_what_is_told_no_class_draws_so(source, tmp_path, capsys):
    bare, data = make_source(tmp_path / "bare", names=()), greetings(tmp_path / "data", "hello", "bye")
    found = refused(capsys, bare, tmp_path / "no", data, *LORA)
    assert "leaves a network without classes as it is, and the data have bye, hello: train without --lora_rank" in found
    start(bare, tmp_path / "unlabelled", data, *LORA, "--label_column", "none")
    # nor are samples of the classes that the model has and the data have not
    folder = start(source, tmp_path / "untold", data, *LORA, "--class_conditional", "false")
    samples = json.loads((folder / "training.json").read_text())["samples"]
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    again = load_bundle(folder)(batch_size=3, num_inference_steps=3, generator=generators).texts
    assert samples["texts"] == again and "classes" not in samples


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*LORA, "--lora_targets", "to_w"], "lora_targets 'to_w' is no layer of the network; there are"),
        ([*LORA, "--freeze", "blocks"], "leave freeze out"),
        (["--lora_rank", -1], "lora_rank -1 must be at least 0"),
        ([*LORA, "--lora_alpha", 0], "lora_alpha 0.0 must be positive"),
        (["--lora_alpha", 2], "lora_alpha and lora_targets need lora_rank"),
        ([*LORA, "--ema_snapshot_steps", 1], "leave them out with lora_rank"),
        ([*LORA, "--length", 9], "length 9 contradicts 8 of"),
        (["--freeze", "nothing"], "freeze 'nothing' matches no weight; there are"),
        (["--freeze", "*"], "freeze *: nothing is left to train"),
        (["--init_revision", "main"], "revision 'main' is of a repo on the Hub"),
        (["--scheduler_kwargs", "{alpha_min: 0.005}"], "scheduler_kwargs alpha_min 0.005 contradicts 0.001 of"),
        (["--noise", "cosine"], "noise 'cosine' contradicts 'log_linear' of"),
    ],
)
def test_what_cannot_be_is_refused_before_work(source, tmp_path, capsys, arguments, message):
    data = greetings(tmp_path / "data", "hello", "bye")
    assert message in refused(capsys, source, tmp_path / "run", data, *arguments)
    # nor is anything left in the way of the next try
    assert not [each for each in (tmp_path / "run").glob("*") if each.name != ".run.lock"]
    with pytest.raises(SystemExit):
        run(train.main, *SETTINGS, *LORA)
    assert "freeze, init_revision and lora_rank need init_from" in capsys.readouterr().err


def test_an_adapter_of_another_model_is_refused(source, tmp_path):
    adapter = start(source, tmp_path / "run", greetings(tmp_path / "data", "hello", "bye"), *LORA)
    other = load_bundle(make_source(tmp_path / "other"))
    with torch.no_grad():
        other.transformer.token_embed.weight += 1
    save_bundle(other, source)
    with pytest.raises(ValueError, match="holds other weights than those that the adapter"):
        load_bundle(adapter)


def test_an_adapter_is_merged_before_it_is_started_from(source, tmp_path, capsys):
    data = greetings(tmp_path / "data", "hello", "bye")
    adapter = start(source, tmp_path / "run", data, *LORA)
    assert "is a LoRA adapter and no pipeline: `score-sde merge` makes" in refused(
        capsys, adapter, tmp_path / "next", data
    )


# --- frozen weights ---------------------------------------------------------------------------------------------------


def test_frozen_weights_stay_and_a_run_goes_on_without_the_source(source, tmp_path):
    data = greetings(tmp_path / "data", "hello", "bye")
    options = ["--freeze", "token_embed", "blocks.0.*", "--checkpointing_steps", 2, "--ema_decay", 0]
    whole = load_file(start(source, tmp_path / "whole", data, *options, "--max_train_steps", 4) / WEIGHTS_THERE)
    before = load_bundle(source).transformer.state_dict()
    stays = {name for name in before if torch.equal(before[name], whole[name])}
    assert stays == {name for name in before if name.startswith(("token_embed", "blocks.0."))}
    start(source, tmp_path / "parts", data, *options, "--max_train_steps", 2)
    shutil.rmtree(source)
    # the folder of the run has moved, too
    (tmp_path / "parts").rename(tmp_path / "moved")
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    parts = load_file(start(source, tmp_path / "moved", data, *options, *more) / WEIGHTS_THERE)
    assert equal(whole, parts)
    card = (tmp_path / "moved" / "pipeline" / "README.md").read_text()
    assert "| started from | Greetings |" in card and "weights that were trained" in card


WEIGHTS_THERE = WEIGHTS.removeprefix("pipeline/")


def test_the_sampler_comes_with_the_weights_and_may_be_another(tmp_path):
    source = make_source(tmp_path / "source", predictor="ancestral", corrector="remasking", alpha_min=1e-4)
    data = greetings(tmp_path / "data", "hello", "bye")
    config = load_bundle(start(source, tmp_path / "same", data)).scheduler.config
    assert (config.predictor, config.corrector, config.alpha_min) == ("ancestral", "remasking", 1e-4)
    other = ["--scheduler_kwargs", "{corrector: null, predictor: confidence}"]
    config = load_bundle(start(source, tmp_path / "other", data, *other)).scheduler.config
    assert (config.predictor, config.corrector, config.alpha_min) == ("confidence", None, 1e-4)
