"""LoRA adapters: trained alone, resumed, saved as diffusers has them, opened, merged, refused on other models."""

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from test_init_from import DIT, STAND_STILL, STOCK_UNET, UNET, photographs, randomized, refused

from runs import equal, forget_runs, run
from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler, ScoreUNetModel, cli, load_bundle, save_bundle
from score_sde.losses.denoising import Objective
from score_sde.sharing import space
from score_sde.sharing.info import describe
from score_sde.training import distill, train


FILE = "pytorch_lora_weights.safetensors"
LORA = ["--lora_rank", 2, "--learning_rate", "1e-2"]
NETWORKS = {"transformer": (DiTModel, DIT), "unet": (ScoreUNetModel, UNET)}


def make_source(folder, role="transformer", names=("cat", "dog"), **changes):
    kind, config = NETWORKS[role]
    network = randomized(kind(**(config | {"num_classes": len(names)} | changes)))
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(), **{role: network}, id2label=dict(enumerate(names)))
    return save_bundle(pipeline, folder, facts={"license": "mit", "model_name": "Animals"})


def adapt(source, output_dir, *arguments):
    forget_runs()
    run(train.main, "--init_from", source, "--output_dir", output_dir, *STAND_STILL, *LORA, *arguments)
    return output_dir / "pipeline"


@torch.no_grad()
def output(pipeline, seed=0, labels=(0, 1)):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return pipeline.denoiser(x, torch.tensor([3.0, 500.0]), class_labels=torch.tensor(labels)).sample


@pytest.mark.parametrize("role", NETWORKS)
def test_an_adapter_opens_with_its_model_on_any_pipeline_and_merged(role, tmp_path):
    source, data = make_source(tmp_path / "source", role), photographs(tmp_path / "data", "dog")
    adapter = adapt(source, tmp_path / "run", "--dataset", data, "--max_train_steps", 3)
    assert sorted(each.name for each in adapter.iterdir()) == ["README.md", FILE, "samples.png", "training.json"]
    tensors = load_file(adapter / FILE)
    assert all(name.startswith(f"{role}.") and ".lora_" in name for name in tensors)
    plain, opened, loaded = load_bundle(source), load_bundle(adapter), load_bundle(source)
    loaded.load_lora_weights(adapter)
    assert (output(opened) - output(plain)).abs().max() > 1e-3  # it has learned something
    assert torch.equal(output(loaded), output(opened))
    with pytest.raises(SystemExit) as end:
        cli.main(["merge", str(adapter), str(tmp_path / "merged")])
    assert not end.value.code
    merged = load_bundle(tmp_path / "merged")
    assert merged.denoiser.state_dict().keys() == plain.denoiser.state_dict().keys()
    assert (output(merged) - output(opened)).abs().max() < 1e-5 * output(opened).abs().max()
    assert merged.config.id2label == plain.config.id2label
    loaded.unload_lora_weights()
    assert torch.equal(output(loaded), output(plain))
    facts = json.loads((adapter / "training.json").read_text())
    assert facts["trained_parameters"] == sum(each.numel() for each in tensors.values())
    card = (adapter / "README.md").read_text()
    assert "LoRA adapter of rank 2 for `Animals`" in card and "license: mit" in card


def check_published(tensors, checkpoint, source):
    """The tensors of an adapter are the averages of a checkpoint, beside which the weights of the source stay."""
    average, last = load_file(checkpoint / "ema.safetensors"), load_file(checkpoint / "model.safetensors")
    published = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    assert equal({name.replace(".default", ""): value for name, value in average.items()}, published)
    assert not equal({name: last[name] for name in average}, average)
    base = load_bundle(source).transformer.state_dict()
    frozen = {name.replace(".base_layer", ""): value for name, value in last.items() if "lora" not in name}
    assert equal(frozen, base)


def test_what_is_published_is_the_average_of_the_adapters_and_resume_is_bit_for_bit(tmp_path):
    source, data = make_source(tmp_path / "source"), photographs(tmp_path / "data", "dog", "cat")
    arguments = ["--dataset", data, "--checkpointing_steps", 2, "--ema_decay", 0.5]
    whole = load_file(adapt(source, tmp_path / "whole", *arguments, "--max_train_steps", 4) / FILE)
    adapt(source, tmp_path / "parts", *arguments, "--max_train_steps", 2)
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    parts = load_file(adapt(source, tmp_path / "parts", *arguments, *more) / FILE)
    assert equal(whole, parts)
    check_published(whole, tmp_path / "whole" / "checkpoints" / "step-00000004", tmp_path / "elsewhere")


def test_the_data_are_of_the_classes_of_the_model_by_name(tmp_path, capsys):
    """The adapter of one class of three learns from rows that are told as that class, whatever its number there."""
    source = make_source(tmp_path / "source", names=("cat", "dog", "eel"))
    told = []
    forward = DiTModel.forward

    def recording(self, x, timestep, class_labels=None, **arguments):
        if self.training and x.device.type != "meta":
            told.extend(class_labels.tolist())
        return forward(self, x, timestep, class_labels=class_labels, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiTModel, "forward", recording)
        adapt(source, tmp_path / "run", "--dataset", photographs(tmp_path / "data", "dog"), "--max_train_steps", 8)
    assert set(told) == {1, 3} and told.count(1) > 6  # 3 is the null label
    birds, bare = photographs(tmp_path / "birds", "bird"), make_source(tmp_path / "bare", names=(), num_classes=None)
    arguments = ["--init_from", bare, *STAND_STILL, *LORA, "--dataset", birds]
    found = refused(capsys, *arguments, "--output_dir", tmp_path / "no")
    assert "leaves a network without classes as it is, and the data have bird: train without --lora_rank" in found
    adapt(bare, tmp_path / "unlabelled", "--dataset", birds, "--class_conditional", "false")


@pytest.mark.parametrize("role", NETWORKS)
def test_an_adapter_brings_classes(role, tmp_path, capsys):
    """Rows behind those of the model, by name, which alone of its table are trained, and go with the adapter."""
    source = make_source(tmp_path / "source", role, names=("cat", "dog", "eel"))
    data = photographs(tmp_path / "data", "dog", "emu", "owl")
    arguments = ["--dataset", data, "--checkpointing_steps", 2, "--ema_decay", 0.5]
    adapter = adapt(source, tmp_path / "run", *arguments, "--max_train_steps", 6)
    found = capsys.readouterr().out
    assert all(f"class {line}" in found for line in ("cat  kept", "dog  kept", "emu  new", "owl  new"))
    rows = load_file(adapter / FILE)[f"{role}.class_embed.token_adapter.trainable_tokens_delta"]
    # resumed, the same
    parts = tmp_path / "parts"
    adapt(source, parts, *arguments, "--max_train_steps", 4)
    again = adapt(source, parts, *arguments, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    assert equal(load_file(adapter / FILE), load_file(again / FILE))

    plain, opened, loaded = load_bundle(source), load_bundle(adapter), load_bundle(source)
    table = plain.denoiser.class_embed.weight
    assert rows.shape == (2, table.shape[1]) and (rows - table[3]).abs().amax(1).min() > 1e-3 and table.shape[0] == 4
    loaded.load_lora_weights(adapter)
    names = {"0": "cat", "1": "dog", "2": "eel", "3": "emu", "4": "owl"}
    for pipeline in (opened, loaded):
        assert pipeline.config.id2label == names and (pipeline.num_classes, pipeline.null_label) == (5, 5)
        assert torch.equal(output(pipeline, labels=(1, 4)), output(opened, labels=(1, 4)))
    # what it is told as none, and as its own classes, is what the model has
    opened.disable_lora()
    assert torch.equal(output(opened, labels=(2, 5)), output(plain, labels=(2, 3)))
    opened.enable_lora()
    with pytest.raises(ValueError, match="this adapter brings classes, as one does that is there"):
        loaded.load_lora_weights(adapter, adapter_name="twice")
    before = output(loaded, labels=(1, 4))
    loaded.unload_lora_weights()
    assert equal(loaded.denoiser.state_dict(), plain.denoiser.state_dict())
    assert loaded.config.id2label == plain.config.id2label and loaded.num_classes == 3
    loaded.load_lora_weights(adapter)
    assert torch.equal(output(loaded, labels=(1, 4)), before)

    with pytest.raises(SystemExit) as end:
        cli.main(["merge", str(adapter), str(tmp_path / "merged")])
    assert not end.value.code
    merged = load_bundle(tmp_path / "merged")
    assert merged.denoiser.state_dict().keys() == plain.denoiser.state_dict().keys()
    assert torch.equal(merged.denoiser.class_embed.weight, torch.cat([table[:3], rows, table[3:]]))
    assert (output(merged, labels=(1, 4)) - before).abs().max() < 1e-5 * before.abs().max()
    assert merged.config.id2label == names and merged.label_ids("owl") == [4]
    with pytest.raises(ValueError, match="another model: it brings 2 classes, not to follow 5 that are known"):
        merged.load_lora_weights(adapter)
    assert merged.num_classes == 5
    card = (adapter / "README.md").read_text()
    assert "| new classes | emu, owl |" in card


def test_an_adapter_of_a_model_of_rectangles(tmp_path):
    source = make_source(tmp_path / "source", sample_size=(4, 8))
    data = photographs(tmp_path / "data", "dog")
    adapter = adapt(source, tmp_path / "run", "--dataset", data, "--aspect_ratio_buckets", "4,8")
    assert load_bundle(adapter).sample_shape(1) == (1, 1, 4, 8)


def test_an_adapter_learns_in_the_units_of_its_model(tmp_path):
    """Which stay those of the pipeline that it is put on, whatever the data are."""
    np.save(tmp_path / "data.npy", np.random.default_rng(0).normal(50, 10, (8, 1, 8)).astype("float32"))
    network = randomized(DiTModel((8,), 2, 1, hidden_size=16, num_layers=1, num_attention_heads=2))
    units = {"data_mean": [1.0], "data_std": [2.0]}
    source = save_bundle(ScoreSDEPipeline(ScoreSDEScheduler(), transformer=network, **units), tmp_path / "source")
    seen = []

    def recording(self, network, x0, *arguments, **options):
        seen.append(x0)
        return score(self, network, x0, *arguments, **options)

    score = Objective.__call__
    arguments = ["--data_kind", "array", "--dataset", tmp_path / "data.npy", "--checkpointing_steps", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "__call__", recording)
        adapter = adapt(source, tmp_path / "run", *arguments)
        more = ["--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
        adapt(source, tmp_path / "run", *arguments, *more)
    assert len(seen) == 2 and all(20 < x0.mean() < 29 for x0 in seen)  # (50 - 1) / 2
    assert load_bundle(adapter).units == units


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora_targets", "to_w"], "lora_targets 'to_w' is no layer of the network; there are"),
        (["--freeze", "blocks"], "leave freeze out"),
        (["--lora_rank", -1], "lora_rank -1 must be at least 0"),
        (["--lora_alpha", 0], "lora_alpha 0.0 must be positive"),
        (["--ema_snapshot_steps", 1], "leave them out with lora_rank"),
        (["--image_channels", 3], "lora_rank leaves the network as it is, of in_channels 1"),
        (["--resolution", 16], "lora_rank leaves the network as it is, of sample_size 8"),
    ],
)
def test_what_an_adapter_cannot_be_is_refused(tmp_path, capsys, arguments, message):
    source, data = make_source(tmp_path / "source"), photographs(tmp_path / "data", "dog")
    start = ["--init_from", source, "--output_dir", tmp_path / "run", "--dataset", data, *STAND_STILL, *LORA]
    assert message in refused(capsys, *start, *arguments)
    assert "lora_rank need init_from" in refused(capsys, "--lora_rank", 2, "--output_dir", tmp_path / "run")


@pytest.mark.parametrize(
    ("told", "arguments", "message"),
    [
        ((0, None), ["--condition_from", "blur:2"], "sees no image beside the sample: leave condition_column and"),
        ((1, "blur:1"), [], "sees an image of 1 channels beside the sample, and the data have none: pass"),
        ((1, "blur:1"), ["--condition_from", "blur:2"], "sees images of blur:1 beside the sample, not of blur:2: pass"),
        ((1, None), ["--condition_from", "blur:2"], "sees images of a column beside the sample, not of blur:2: pass"),
    ],
)
@pytest.mark.parametrize("command", [train, distill])
def test_who_stays_as_it_is_sees_what_it_saw(tmp_path, capsys, command, told, arguments, message):
    """A model under adapters, and a teacher."""
    (channels, condition_from), data = told, photographs(tmp_path / "data", "dog", "cat")
    network = randomized(
        DiTModel(**(DIT | {"num_classes": 2, "in_channels": 1 + channels}), condition_channels=channels or None)
    )
    network = ScoreSDEPipeline(
        ScoreSDEScheduler(), transformer=network, id2label={0: "cat", 1: "dog"}, condition_from=condition_from
    )
    source = save_bundle(network, tmp_path / "source")
    start = ["--teacher", source] if command is distill else ["--init_from", source, *LORA]
    forget_runs()
    with pytest.raises(ValueError, match=message):
        run(command.main, *start, "--dataset", data, "--output_dir", tmp_path / "run", *STAND_STILL, *arguments)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_an_adapter_is_told_from_a_pipeline(tmp_path, capsys):
    """Where one is wanted: by what to do, and before any work."""
    source, data = make_source(tmp_path / "source"), photographs(tmp_path / "data", "dog", "cat")
    adapter = adapt(source, tmp_path / "run", "--dataset", data)
    message = "is a LoRA adapter and no pipeline: `score-sde merge` makes one of it and its model"
    commands = (["calibrate"], ["convert", "to-diffusers"])
    for command in commands:
        forget_runs()
        with pytest.raises(SystemExit) as end:
            cli.main([*command, str(adapter), *([str(tmp_path / "out")] if command[0] == "convert" else [])])
        assert end.value.code == 2 and message in capsys.readouterr().err, command
    begun = ["--output_dir", tmp_path / "other", "--dataset", data, *STAND_STILL]
    assert message in refused(capsys, "--init_from", adapter, *begun)
    forget_runs()
    with pytest.raises(SystemExit):
        run(distill.main, "--teacher", adapter, *begun)
    assert message in capsys.readouterr().err


def said_by(capsys, *arguments):
    """What a command prints that ends well."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(each) for each in arguments])
    assert not end.value.code
    return capsys.readouterr().out


def test_what_an_adapter_is_is_said_by_the_header_of_its_weights(tmp_path, capsys, monkeypatch):
    source, data = make_source(tmp_path / "source"), photographs(tmp_path / "data", "dog", "emu")
    adapter = adapt(source, tmp_path / "run", "--dataset", data, "--lora_alpha", 6, "--lora_targets", "to_q", "proj")
    capsys.readouterr()
    count = sum(each.numel() for each in load_file(adapter / FILE).values())
    found = json.loads(said_by(capsys, "info", adapter, "--json"))
    told = {"network": "transformer", "rank": 2, "alpha": 6.0, "targets": ["proj", "to_q"], "classes": ["emu"]}
    assert found["adapter"] == told | {"parameters": count} and found["code"] == {}
    assert found["training"]["started_from"]["source"] == str(source)
    words = " ".join(said_by(capsys, "info", adapter).split())
    assert f"LoRA adapter rank 2, alpha 6.0, {count:,} parameters, in proj, to_q" in words
    assert f"of the model {source}" in words and "classes that it brings emu" in words
    assert "it is a LoRA adapter: weights alone, no code" in said_by(capsys, "verify", adapter)
    # its page here, with its model
    opened = []

    class Page:
        def launch(self, server_port):
            opened.append(server_port)

    monkeypatch.setattr(space, "installed_version", lambda package: "6.0")
    monkeypatch.setattr(space.space_app, "page", lambda pipeline, title: opened.append(pipeline) or Page())
    space.open_page(str(adapter), 7000)
    assert torch.equal(output(opened[0]), output(load_bundle(adapter))) and opened[1] == 7000
    # of somebody else, who says nothing
    (adapter / "training.json").unlink()
    save_file(load_file(adapter / FILE), adapter / FILE, metadata={"lora_adapter_metadata": '{"transformer.r": "x"}'})
    found = json.loads(said_by(capsys, "info", adapter, "--json"))
    assert found["adapter"] == {"network": "transformer", "parameters": count}
    assert "of the model not said" in " ".join(said_by(capsys, "info", adapter).split())
    (adapter / FILE).write_bytes(b"no weights")
    with pytest.raises(ValueError, match="is damaged, or no safetensors"):
        describe(adapter)


def test_the_folder_of_a_run_names_its_pipeline(tmp_path, capsys):
    make_source(tmp_path / "run" / "pipeline")
    with pytest.raises(ValueError, match="no model_index.json: .*; its pipeline is .*run.pipeline"):
        load_bundle(tmp_path / "run")
    arguments = ["--dataset", photographs(tmp_path / "data", "dog"), "--output_dir", tmp_path / "other", *STAND_STILL]
    assert "start from its pipeline" in refused(capsys, "--init_from", tmp_path / "run", *arguments)


def test_a_network_of_diffusers_without_adapters_is_refused(tmp_path, capsys):
    source = ScoreSDEPipeline(ScoreSDEScheduler(), unet=randomized(UNet2DModel(**STOCK_UNET)))
    source, data = save_bundle(source, tmp_path / "source"), photographs(tmp_path / "data")
    start = ["--init_from", source, "--output_dir", tmp_path / "run", "--dataset", data, *STAND_STILL, *LORA]
    assert "a UNet2DModel takes no adapters" in refused(capsys, *start)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    source, data = make_source(tmp_path / "source"), photographs(tmp_path / "data", "dog")
    adapter = adapt(source, tmp_path / "run", "--dataset", data)
    for name, other in [
        ("wider", load_bundle(make_source(tmp_path / "wider", hidden_size=32))),
        ("unet", load_bundle(make_source(tmp_path / "unet", "unet"))),
    ]:
        before = output(other)
        with pytest.raises(ValueError, match="adapter is of another model than this .*: it"):
            other.load_lora_weights(adapter)
        assert torch.equal(output(other), before), name
    tensors = load_file(adapter / FILE)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * float("nan")}, adapter / FILE)
    with pytest.raises(ValueError, match="is not finite"):
        load_bundle(source).load_lora_weights(adapter)
    torch.save(tensors, adapter / "pytorch_lora_weights.bin")
    (adapter / FILE).unlink()
    with pytest.raises((ValueError, OSError), match=FILE):
        load_bundle(source).load_lora_weights(adapter)


def test_the_model_of_an_adapter_must_be_what_it_was(tmp_path):
    source, data = make_source(tmp_path / "source"), photographs(tmp_path / "data", "dog")
    adapter = adapt(source, tmp_path / "run", "--dataset", data)
    pipeline = load_bundle(source)
    with torch.no_grad():
        pipeline.transformer.proj_out.bias += 1
    save_bundle(pipeline, source)
    with pytest.raises(ValueError, match="holds other weights than those that the adapter"):
        load_bundle(adapter)
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="or open the model yourself, and pipe.load_lora_weights"):
        load_bundle(adapter)


def test_adapters_that_are_told_no_class_draw_so(tmp_path):
    """Not the classes that the network has: nor are the samples that are measured."""
    source, data = make_source(tmp_path / "source"), photographs(tmp_path / "data", "owl", "emu")
    untold = ["--class_conditional", "false", "--max_train_steps", 1, "--sample_num_images", 4]
    folder = adapt(source, tmp_path / "run", "--dataset", data, *untold, "--sample_num_inference_steps", 2)
    pipeline = load_bundle(folder)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    images = pipeline(batch_size=4, num_inference_steps=2, generator=generators).images
    pipeline.kind.save_grid(images, tmp_path / "expected.png")
    assert (folder / "samples.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
