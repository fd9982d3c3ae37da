"""Data for training: sources, streams and their resume, crops, latents with mirror images and statistics, kills."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import datasets
import diffusers
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from places import TRAINING
from safetensors.torch import load_file
from tars import ROWS, WEBDATASET, png, tar_shards

from runs import TINY_DATA, data_config, encode, equal, run, tiny_dc, train_tiny
from score_sde import ScoreSDEPipeline
from score_sde.pipelines.latents import denormalize_latents, normalize_latents
from score_sde.training import encode_latents, train_classifier
from score_sde.training.parts.batches import training_batches
from score_sde.training.parts.cores import loading_processes
from score_sde.training.parts.data import ImageDataset, ImageStream
from score_sde.training.parts.image_rows import resize_and_crop
from score_sde.training.parts.latent_shards import LatentDataset


def parquet_shards(folder, shards=3):
    """`ROWS` images in several files; row i has grey level 10 i and label i % 3."""
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    for shard in range(shards):
        rows = range(shard, ROWS, shards)
        images = [{"bytes": png(10 * row), "path": None} for row in rows]
        columns = {"image": images, "label": [row % 3 for row in rows]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"train-{shard}.parquet")
    return folder


def rows_of(batch):
    """The numbers of the rows that the images of a batch are from; their labels fit."""
    rows = ((batch["images"][:, 0, 0, 0] + 1) * 127.5 / 10).round().int().tolist()
    assert batch["labels"].tolist() == [row % 3 for row in rows]
    return rows


def batches(dataset, count, rank=0, world_size=1, progress=None, **changes):
    """The first batches of a process, and its progress; resumed after `progress`."""
    progress = {"images_seen": 0} if progress is None else progress
    accelerator = SimpleNamespace(process_index=rank, num_processes=world_size, device=torch.device("cpu"))
    config = SimpleNamespace(**{"batch_size": 2, "num_workers": 0, "seed": 0} | changes)
    loader = training_batches(dataset, config, accelerator, progress)
    found = [next(loader) for _ in range(count)]
    return found, progress | {"images_seen": progress["images_seen"] + count * config.batch_size * world_size}


# --- images kept in memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("label_column", ["label", None])
def test_images_kept_in_memory_are_decoded_once(num_workers, label_column, tmp_path):
    config = data_config(dataset=str(parquet_shards(tmp_path / "files")), resolution=8, label_column=label_column)
    decoded, kept = ImageDataset(config), ImageDataset(config)
    kept.keep_images()
    expected, _ = batches(decoded, ROWS, num_workers=num_workers)
    found, _ = batches(kept, ROWS, num_workers=num_workers)  # two passes
    assert kept.is_kept.all()  # by whichever process
    kept.open_image = None  # nothing is decoded now
    again, _ = batches(kept, ROWS)
    for each, other in ((expected, found), (expected, again)):
        assert all(equal(batch, like) for batch, like in zip(each, other, strict=True))


def test_an_image_that_cannot_be_decoded_is_not_kept(tmp_path):
    images = [{"bytes": png(10 * row) if row != 1 else b"none", "path": None} for row in range(3)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(tmp_path / "train.parquet")
    options = {"dataset": str(tmp_path / "train.parquet"), "label_column": None, "resolution": 8}
    kept = ImageDataset(data_config(**options, skip_corrupt_images=True))
    kept.keep_images()
    for _ in range(2):
        greys = [round((float(item["images"][0, 0, 0]) + 1) * 12.75) for item in kept.__getitems__([0, 1, 2])]
        assert greys == [0, 2, 2] and kept.is_kept.tolist() == [True, False, True]


# --- sources ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "streaming"),
    [
        # a stream of parquet files sleeps 5 s when it is closed (in `datasets`): the other tests of streams have tars
        *(("parquet pattern", False), ("parquet folder", False), ("parquet folder", True)),
        *((source, streaming) for source in ("tar pattern", "tar folder", "json") for streaming in (False, True)),
    ],
)
def test_every_row_of_several_files_is_read(source, streaming, tmp_path):
    kind, *where = source.split()
    make, changes = (parquet_shards, {}) if kind == "parquet" else (tar_shards, WEBDATASET)
    if kind == "json":
        changes = changes | {"label_column": "json.label"}
    folder = make(tmp_path / "files")
    name = folder / f"{{split}}-*.{kind}" if where == ["pattern"] else folder
    config = data_config(dataset=str(name), resolution=8, streaming=streaming, shuffle_buffer=4, **changes)
    dataset = (ImageStream if streaming else ImageDataset)(config)
    assert dataset.num_classes == 3 and dataset.id2label[2] == ("c" if kind == "parquet" else "2")
    found, _ = batches(dataset, ROWS // 2)
    assert sorted(row for batch in found for row in rows_of(batch)) == list(range(ROWS))


def test_number_of_classes(tmp_path):
    tars, parquets = tar_shards(tmp_path / "tars"), parquet_shards(tmp_path / "parquets")
    assert ImageDataset(data_config(dataset=str(tars), **WEBDATASET | {"num_classes": None})).num_classes == 3
    assert ImageDataset(data_config(dataset=str(tars), **WEBDATASET | {"num_classes": 7})).num_classes == 7
    assert ImageStream(data_config(dataset=str(parquets))).id2label == {0: "a", 1: "b", 2: "c"}
    for kind, changes, message in (
        (ImageStream, WEBDATASET | {"num_classes": None}, "doesn't say how many classes .* pass --num_classes"),
        (ImageDataset, WEBDATASET | {"num_classes": 2}, "must hold integers from 0 to 1; it has .2."),
        (ImageStream, {"dataset": str(parquets), "num_classes": 4}, "num_classes 4: dataset .* has 3 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(data_config(**{"dataset": str(tars)} | changes))


@pytest.mark.parametrize("kind", [ImageDataset, ImageStream])
def test_what_cannot_be_opened_is_named(kind, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    tars = str(tar_shards(tmp_path / "tars"))
    for changes, message in (
        ({"dataset": str(tmp_path / "empty")}, "dataset '.*empty', split 'train', cannot be opened: .*data files"),
        ({"dataset": str(tmp_path / "bad.parquet")}, "dataset '.*bad.parquet', split .*cannot be opened"),
        ({"dataset": str(tmp_path / "none-*.tar")}, "dataset '.*none-.*tar', split .*cannot be opened"),
        ({"dataset": tars}, "no column 'image'; it has png, cls, json.*--image_column"),
        (
            {"dataset": tars} | WEBDATASET | {"label_column": "json.class"},
            "no column 'json.class'.*--label_column none",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            kind(data_config(**changes))


# --- streams ------------------------------------------------------------------------------------------------------


def stream(source, **changes):
    changes = {"resolution": 8, "streaming": True, "shuffle_buffer": 5} | WEBDATASET | changes
    config = data_config(dataset=str(source), **changes)
    return ImageStream(config, crop_seed=config.crop_seed)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_goes_on_exactly_where_it_was(world_size, num_workers, tmp_path):
    """Each pass has every row once, in another order; from any batch on, a resumed stream gives what the whole one
    gave, also with as many files as two processes can't share evenly."""
    source = tar_shards(tmp_path / "files", shards=3)
    layout = {"world_size": world_size, "num_workers": num_workers}
    # processes of three files take every second image, workers whole files: 12 images in 2 batches, or in 6
    count = 2 * ROWS // 2 // world_size
    whole = [batches(stream(source), count, rank, **layout)[0] for rank in range(world_size)]
    if num_workers == 0:
        passes = [
            [row for rank in whole for batch in rank[i : i + count // 2] for row in rows_of(batch)]
            for i in (0, count // 2)
        ]
        assert [sorted(each) for each in passes] == [list(range(ROWS))] * 2
        assert passes[0] != passes[1] != list(range(ROWS))
    for rank in range(world_size):
        for seen in (1, count - 2):
            _, progress = batches(stream(source), seen, rank, **layout)
            rest, _ = batches(stream(source), count - seen, rank, progress=progress, **layout)
            assert all(equal(*pair) for pair in zip(rest, whole[rank][seen:], strict=True))
    with pytest.raises(ValueError, match="a stream goes on only as it was begun, with .*'batch_size': 2.*: 3"):
        batches(stream(source), 1, progress=progress, **layout, batch_size=3)
    assert rows_of(batches(stream(source, seed=1), 6)[0][0]) != rows_of(batches(stream(source), 6)[0][0])


def test_a_corrupt_image_of_a_stream_is_named_or_passed_over(tmp_path):
    images = [png(10 * row) for row in range(ROWS)]
    for row in (0, 4, 5, ROWS - 1):
        images[row] = b"no image"
    source = tar_shards(tmp_path / "files", shards=1, images=images)
    with pytest.raises(ValueError, match="row 0 of pass 0 .* cannot be decoded: .*pass --skip_corrupt_images"):
        batches(stream(source, shuffle_buffer=1), 1)
    changes = {"shuffle_buffer": 1, "skip_corrupt_images": True}
    whole, _ = batches(stream(source, **changes), 12)
    found = [row for batch in whole for row in ((batch["images"][:, 0, 0, 0] + 1) * 12.75).round().int().tolist()]
    # the next row takes the place, so the stream is as long as it was; the last is followed by the next pass
    assert found == [1, 1, 2, 3, 6, 6, 6, 7, 8, 9, 10, *[1] * 3, 2, 3, 6, 6, 6, 7, 8, 9, 10, 1]
    for seen in (1, 2, 3, 5, 6):
        _, progress = batches(stream(source, **changes), seen)
        rest, _ = batches(stream(source, **changes), 12 - seen, progress=progress)
        assert all(equal(*pair) for pair in zip(rest, whole[seen:], strict=True))
    bad = tar_shards(tmp_path / "bad", shards=1, images=[b"no image"] * ROWS)
    with pytest.raises(ValueError, match="found no image in dataset .* among its 12 rows"):
        batches(stream(bad, **changes), 1)


def test_a_stream_that_breaks_off_is_named(tmp_path):
    source = tar_shards(tmp_path / "tars", shards=2)
    path = source / "train-1.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="dataset '.*tars' cannot be read on at row [0-9]+ of pass 0 of worker 0"):
        batches(stream(source), 7)


def test_more_processes_than_images_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "a" / "0.png")
    with pytest.raises(ValueError, match="process 1 found no image .* among its 0 rows: use fewer processes"):
        batches(stream(tmp_path, image_column="image", label_column=None), 1, rank=1, world_size=2)


def test_a_label_of_a_stream_that_is_no_class_is_named(tmp_path):
    source = tar_shards(tmp_path / "tars")
    for changes, message in (
        ({"num_classes": 2}, "label column 'cls' must hold integers from 0 to 1; it has 2"),
        ({"label_column": "__key__"}, "label column '__key__' must hold integers from 0 to 2; it has '00"),
    ):
        with pytest.raises(ValueError, match=message):
            batches(stream(source, **changes), 6)


def test_training_on_a_stream_resumes_bit_for_bit(tmp_path):
    """With workers, random crops and flips, through checkpoints."""
    images = [png(10 * row, size=(8, 12)) for row in range(ROWS)]
    source = tar_shards(tmp_path / "files", shards=2, images=images)
    arguments = ["--dataset", source, "--streaming", "--shuffle_buffer", 4, "--num_workers", 2, "--crop", "random"]
    arguments += ["--image_column", "png", "--label_column", "json.label", "--num_classes", 3, "--random_flip"]
    arguments += ["--checkpointing_steps", 3, "--gradient_accumulation_steps", 3]
    whole = train_tiny(tmp_path / "whole", *arguments, "--max_train_steps", 6)
    train_tiny(tmp_path / "parts", *arguments, "--max_train_steps", 3)
    more = ["--max_train_steps", 6, "--resume_from_checkpoint", "latest"]
    assert equal(whole, train_tiny(tmp_path / "parts", *arguments, *more))
    facts = json.loads((tmp_path / "whole" / "pipeline" / "training.json").read_text())
    assert (facts["images_seen"], facts["rows"]) == (72, None)
    with pytest.raises(ValueError, match="a stream goes on only as it was begun, with .*'num_workers': 2"):
        train_tiny(tmp_path / "parts", *arguments, *more[2:], "--max_train_steps", 7, "--num_workers", 1)


# --- crops --------------------------------------------------------------------------------------------------------


def test_a_random_crop_is_anywhere_and_always_the_same():
    ramp = Image.fromarray(np.tile(np.arange(12, dtype=np.uint8), (8, 1)))
    lefts = [np.asarray(resize_and_crop(ramp, 8, seed=(0, row)))[0, 0] for row in range(200)]
    assert set(lefts) == {0, 1, 2, 3, 4}
    assert lefts == [np.asarray(resize_and_crop(ramp, 8, seed=(0, row)))[0, 0] for row in range(200)]
    assert np.asarray(resize_and_crop(ramp, 8))[0, 0] == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_crops_change_from_epoch_to_epoch_and_not_on_resume(num_workers, tmp_path):
    (tmp_path / "a").mkdir()
    for row in range(4):
        Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (8, 1))).save(tmp_path / "a" / f"{row}.png")
    dataset = ImageDataset(data_config(dataset=str(tmp_path), resolution=8, label_column=None), crop_seed=0)
    whole, _ = batches(dataset, 8, num_workers=num_workers)
    lefts = torch.cat([batch["images"][:, 0, 0, 0] for batch in whole])
    assert len(set(lefts.tolist())) > 8
    for seen in (1, 5):
        rest, _ = batches(dataset, 8 - seen, num_workers=num_workers, progress={"images_seen": 2 * seen})
        assert all(equal(*pair) for pair in zip(rest, whole[seen:], strict=True))
    shared = [batches(dataset, 8, rank, 2, batch_size=1)[0] for rank in range(2)]
    merged = [torch.cat([one["images"], other["images"]]) for one, other in zip(*shared, strict=True)]
    assert all(torch.equal(pair, batch["images"]) for pair, batch in zip(merged, whole, strict=True))


# --- latents ------------------------------------------------------------------------------------------------------


def plain_vae(folder, tiny_vae):
    """The autoencoder without any statistics in its config."""
    vae = diffusers.AutoencoderKL.from_pretrained(tiny_vae)
    vae.register_to_config(latents_mean=None, latents_std=None, scaling_factor=1.0, shift_factor=None)
    vae.save_pretrained(folder)
    return folder


def samples(folder, vae_config, count=400):
    """Latents as the loop draws them, per channel: (channels, all values)."""
    shards = [load_file(path) for path in sorted(folder.glob("moments-*.safetensors"))]
    mean, std = (torch.cat([shard[name] for shard in shards]) for name in ("mean", "std"))
    noise = torch.randn(count, *mean.shape, generator=torch.Generator().manual_seed(0))
    return normalize_latents((mean + std * noise).flatten(0, 1), vae_config).transpose(0, 1).flatten(1).double()


def test_statistics_of_latents_and_their_normalisation(tiny_vae, small_data, tmp_path):
    vae, folder = plain_vae(tmp_path / "vae", tiny_vae), tmp_path / "latents"
    encode(small_data, vae, folder)
    statistics = json.loads((folder / "latents.json").read_text())["statistics"]
    means = torch.cat([load_file(path)["mean"] for path in sorted(folder.glob("moments-*.safetensors"))]).double()
    assert statistics["mean"] == pytest.approx(means.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert statistics["std_of_means"] == pytest.approx(means.std((0, 2, 3), correction=0).tolist(), rel=1e-9)

    arguments = ["--latents", folder, "--max_train_steps", 1]
    train_tiny(tmp_path / "run", *arguments, "--normalize_latents")
    pipeline = ScoreSDEPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    config = pipeline.vae.config
    assert (list(config.latents_mean), list(config.latents_std)) == (statistics["mean"], statistics["std"])
    # truth: what is trained on has mean 0 and standard deviation 1, and the checkpoint alone undoes it
    drawn = samples(folder, config)
    assert drawn.mean(1).abs().max() < 0.02 and (drawn.std(1) - 1).abs().max() < 0.02
    latents = torch.randn(2, 4, 4, 4)
    assert (denormalize_latents(normalize_latents(latents, config), config) - latents).abs().max() < 1e-5
    # and without the option the latents stay in the autoencoder's own units
    train_tiny(tmp_path / "plain", *arguments)
    assert ScoreSDEPipeline.from_pretrained(tmp_path / "plain" / "pipeline").vae.config.latents_mean is None

    # a classifier for the one pipeline can't be trained on the latents of the other
    classify = [*TINY_DATA, *arguments, "--pipeline", tmp_path / "run" / "pipeline", "--output_dir", tmp_path / "c"]
    with pytest.raises(ValueError, match="normalise latents by other statistics .*pass --normalize_latents"):
        run(train_classifier.main, *classify)


def tiny_tiny(folder):
    diffusers.AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=2,
    ).save_pretrained(folder)


@pytest.mark.parametrize("make", [tiny_dc, tiny_tiny])
def test_statistics_also_fit_autoencoders_whose_config_has_no_place_for_them(make, small_data, tmp_path):
    make(tmp_path / "vae")
    encode(small_data, tmp_path / "vae", tmp_path / "latents")
    train_tiny(tmp_path / "run", "--latents", tmp_path / "latents", "--max_train_steps", 1, "--normalize_latents")
    config = ScoreSDEPipeline.from_pretrained(tmp_path / "run" / "pipeline").vae.config
    drawn = samples(tmp_path / "latents", config, count=1)
    assert drawn.mean(1).abs().max() < 1e-4 and (drawn.std(1, correction=0) - 1).abs().max() < 1e-4


def test_latents_of_mirror_images_train_like_mirrored_images(tiny_vae, small_data, tmp_path):
    folder = tmp_path / "latents"
    encode(small_data, tiny_vae, folder, "--both_flips")
    vae, images = (
        diffusers.AutoencoderKL.from_pretrained(tiny_vae),
        ImageDataset(data_config(dataset=small_data, resolution=8)),
    )
    with torch.no_grad():
        expected = vae.encode(images[7]["images"][None].flip(-1)).latent_dist.mean[0]
    item = LatentDataset(folder, flips=True)[7]
    assert (item["mean_flipped"] - expected).abs().max() < 1e-4 < (item["mean"] - expected).abs().max()
    assert LatentDataset(folder)[7].keys() == {"mean", "std", "labels"}
    # the statistics are over both
    both = torch.stack(
        [
            torch.stack([row["mean"], row["mean_flipped"]])
            for row in (LatentDataset(folder, flips=True)[i] for i in range(60))
        ]
    )
    statistics = json.loads((folder / "latents.json").read_text())["statistics"]
    assert statistics["mean"] == pytest.approx(both.double().mean((0, 1, 3, 4)).tolist(), rel=1e-9)

    losses = []
    for name, data in (("before", ["--latents", folder]), ("on the fly", ["--dataset", small_data, "--vae", tiny_vae])):
        train_tiny(tmp_path / name, *data, "--random_flip", "--max_train_steps", 2, "--logging_steps", 1)
        losses.append(json.loads((tmp_path / name / "pipeline" / "training.json").read_text())["final_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    encode(small_data, tiny_vae, tmp_path / "single")
    with pytest.raises(ValueError, match="random_flip needs the mirror images, which '.*single' lacks: .*--both_flips"):
        train_tiny(tmp_path / "run", "--latents", tmp_path / "single", "--random_flip")


def test_damaged_shards_are_named_and_mended(tiny_vae, small_data, tmp_path):
    folder = tmp_path / "latents"
    encode(small_data, tiny_vae, folder)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for shard, damage in (
        (1, whole["moments-00001.safetensors"][:-9]),
        (2, b""),
        (3, whole["moments-00000.safetensors"]),
    ):
        path = folder / f"moments-0000{shard}.safetensors"
        path.write_bytes(damage)
        with pytest.raises(
            ValueError, match=f"moments-0000{shard}.safetensors' is missing or damaged .*encode-latents"
        ):
            LatentDataset(folder)
        encode(small_data, tiny_vae, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_encoding_that_is_killed_loses_and_doubles_no_row(processes, tiny_vae, tmp_path):
    """kill -9 while shards are written; the same command then completes them to what an undisturbed run writes."""
    options = [*TINY_DATA, "--dataset", "fashion_mnist_10k", "--split", "test", "--vae", tiny_vae, "--shard_size", 40]
    run(encode_latents.main, *options, "--output_dir", tmp_path / "whole")
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes]
        command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [TRAINING / "encode_latents.py", *options, "--output_dir", tmp_path / "killed"]
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("moments-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-2000:]
        time.sleep(0.001)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.communicate()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("moments-*.safetensors")}
    assert 0 < len(written) < 50, "the run was over before it was killed"
    run(encode_latents.main, *options, "--output_dir", tmp_path / "killed")
    whole, killed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("moments-*.safetensors")}
        for name in ("whole", "killed")
    )
    assert len(whole) == 50 and whole == killed
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())


@pytest.mark.parametrize(
    ("changes", "device", "cores", "processes", "room", "expected"),
    [
        ({"num_workers": 3}, "cuda", 16, 1, 2**40, 3),
        ({}, "cpu", 16, 1, 2**40, 0),
        ({}, "cuda", 16, 1, 2**40, 8),
        ({}, "cuda", 16, 4, 2**40, 3),
        ({}, "cuda", 1, 1, 2**40, 0),
        ({"most_workers": 2}, "cuda", 16, 1, 2**40, 2),
        # a batch of 8 images of 3x32x32 in float32, four times over, is 393,216 bytes, of which each process has three
        ({}, "cuda", 16, 1, 3 * 3 * 393_216, 3),
    ],
)
def test_as_many_processes_load_data_as_suit_the_machine(
    changes, device, cores, processes, room, expected, monkeypatch
):
    monkeypatch.setattr("score_sde.training.parts.cores.own_cores", lambda: cores)
    monkeypatch.setattr("psutil.disk_usage", lambda path: SimpleNamespace(free=room))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    dataset = SimpleNamespace(shape=(3, 32, 32), **{k: v for k, v in changes.items() if k == "most_workers"})
    config = SimpleNamespace(batch_size=8, num_workers=changes.get("num_workers"))
    assert loading_processes(config, SimpleNamespace(device=torch.device(device)), dataset) == expected
