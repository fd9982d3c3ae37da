"""Images of several sizes: which size each takes, what is cropped, batches of one size each, latents, cards."""

import io
import json
import shutil
from types import SimpleNamespace

import datasets
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tars import WEBDATASET, tar_shards

from runs import TINY_DIT, TINY_RUN, data_config, equal, launch, run, tiny_dc, train_tiny
from score_sde import ScoreSDEPipeline
from score_sde.pipelines.image_conditions import Measurement
from score_sde.pipelines.likelihood import dequantize
from score_sde.training import encode_latents, evaluate, train, train_classifier
from score_sde.training.parts import classifier
from score_sde.training.parts.batches import BucketBatchSampler, training_batches
from score_sde.training.parts.buckets import counts_of_sizes, nearest_size, parse_sizes, shares_of_sizes
from score_sde.training.parts.clean_data import CleanData
from score_sde.training.parts.data import ImageDataset
from score_sde.training.parts.image_rows import resize_and_crop
from score_sde.training.parts.latent_shards import LatentDataset
from score_sde.training.parts.loop import Draws, make_accelerator
from score_sde.training.parts.options import parse
from score_sde.training.share_latents import latents_card


SIZES = "8,8;12,8;8,12"
# height and width of the pictures, in turn: squares, tall ones, wide ones twice as often
PICTURES = [(16, 16), (24, 16), (16, 24), (8, 12)]


def picture(row, height, width, kind="PNG", **options):
    """The bytes of a picture with a ramp to the right, and a grey level that tells its row."""
    pixels = np.full((height, width), 5 * row, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def parquet(path, rows=24, pictures=None):
    pictures = pictures or [picture(row, *PICTURES[row % 4]) for row in range(rows)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"bytes": each, "path": None} for each in pictures]
    columns = {"image": images, "label": [row % 2 for row in range(len(images))]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return str(path)


@pytest.fixture
def pictures(tmp_path):
    return parquet(tmp_path / "train.parquet")


def rows_in(batch):
    return ((batch["images"][:, 0, 0, 0] + 1) * 127.5 / 5).round().int().tolist()


def opened(path, sizes=SIZES, **changes):
    config = data_config(dataset=path, aspect_ratio_buckets=sizes, **changes)
    return ImageDataset(config, crop_seed=config.crop_seed, sizes=config.sizes, first_size=config.first_size)


# --- sizes --------------------------------------------------------------------------------------------------------


def test_sizes_are_named_or_made_of_a_budget():
    assert parse_sizes("64,64; 48,80 ;80,48", 32) == [(64, 64), (48, 80), (80, 48)]
    assert parse_sizes("65,33", 32) == [(65, 33)]
    for text, step in (("auto", 8), ("auto,4", 4)):
        sizes = parse_sizes(text, 64)
        assert sizes[0] == (64, 64) and len(sizes) > 5 and {(w, h) for h, w in sizes} == set(sizes)
        assert all(side % step == 0 for size in sizes for side in size)
        assert all(abs(h * w / 64**2 - 1) < 0.15 for h, w in sizes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("64", "Expected 'height,width'"),
        ("64,0", "positive"),
        ("-64,64", "Expected"),
        ("", "empty"),
        ("64,64;32,32", "64 x 64 and 32 x 32 have one aspect ratio"),
        ("64,64;48,80;64,64", "64 x 64 and 64 x 64 have one aspect ratio"),
        ("auto,0", "multiple of 0, not 36"),
        ("auto", "auto needs a resolution that is a multiple of 8, not 36"),
        ("auto,16", "auto needs a resolution that is a multiple of 16, not 36"),
        ("auto;64,64", "Expected"),
    ],
)
def test_what_are_no_sizes(text, message, capsys):
    with pytest.raises(ValueError, match=message):
        parse_sizes(text, 36)
    with pytest.raises(SystemExit):
        run(train.main, "--aspect_ratio_buckets", text, "--resolution", 36)
    assert "aspect_ratio_buckets" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["64,64;48,80;80,48;32,128", "auto", "16,16;64,96;96,64;512,40"])
def test_an_image_takes_the_size_of_which_least_of_it_is_cropped(text):
    sizes = parse_sizes(text, 64)

    def lost(height, width, size):
        scale = max(size[0] / height, size[1] / width)
        return 1 - size[0] * size[1] / (height * width * scale**2)

    generator = np.random.default_rng(0)
    for height, width in generator.integers(20, 400, (300, 2)).tolist():
        shares = [lost(height, width, size) for size in sizes]
        assert shares[nearest_size(height, width, sizes)] < min(shares) + 1e-9
    assert [nearest_size(2 * height, 2 * width, sizes) for height, width in sizes] == list(range(len(sizes)))


def test_nothing_is_cropped_that_need_not_be():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80), dtype=np.uint8))
    for size, box in (
        ((24, 40), None),
        ((24, 24), (16, 0, 64, 48)),
        ((24, 60), (0, 8, 80, 40)),
        ((12, 10), (20, 0, 60, 48)),
    ):
        whole = resize_and_crop(noise, size)
        height, width = size
        assert whole.size == (width, height)
        if box is None:
            expected = noise.resize((width, height), Image.Resampling.LANCZOS)
        else:  # the same place, but for the filter's reach over the border
            expected = noise.crop(box).resize((width, height), Image.Resampling.LANCZOS)
        difference = np.abs(np.asarray(whole, dtype=int) - np.asarray(expected, dtype=int))
        assert difference[2:-2, 2:-2].max() <= 1
    # at random, but never beyond
    ramp = Image.fromarray(np.tile(np.arange(30, dtype=np.uint8), (10, 1)))
    lefts = {np.asarray(resize_and_crop(ramp, (10, 20), seed=(0, row)))[0, 0] for row in range(200)}
    assert lefts == set(range(11))


def test_rows_by_size(pictures, tmp_path, capsys):
    dataset = opened(pictures)
    assert dataset.sizes == [(8, 8), (12, 8), (8, 12)] and dataset.shape == (1, 8, 8)
    assert [rows.tolist() for rows in dataset.buckets] == [
        list(range(0, 24, 4)),
        list(range(1, 24, 4)),
        sorted([*range(2, 24, 4), *range(3, 24, 4)]),
    ]
    for row in range(24):
        wanted = [(8, 8), (12, 8), (8, 12), (8, 12)][row % 4]
        assert dataset[row]["images"].shape == (1, *wanted) and rows_in({"images": dataset[row]["images"][None]}) == [
            row
        ]
    assert dataset.row_facts()["sizes"] == {"8 x 8": 6, "12 x 8": 6, "8 x 12": 12}
    assert "heights and widths: 8 x 8 6, 12 x 8 6, 8 x 12 12" in dataset.describe()
    # those of a budget begin with the most frequent one, and end with the last that any image has
    found = opened(pictures, "auto,2", resolution=8)
    assert list(found.row_facts()["sizes"].values()) == [12, 6, 6] and found.sizes[1:] == [(8, 8), (10, 6)]
    # the first one named is the network's own
    with pytest.raises(ValueError, match=r"no image is nearest to 4 x 16.*--aspect_ratio_buckets '8,8;8,12'"):
        opened(pictures, "4,16;8,8;8,12")
    # one alone is a rectangle
    alone = opened(pictures, "8,12")
    assert alone.buckets is None and alone.shape == (1, 8, 12) and alone.row_facts()["sizes"] == {"8 x 12": 24}


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_sizes_of_other_sources(kind, tmp_path):
    found = [picture(row, *PICTURES[row % 4]) for row in range(12)]
    if kind == "tar":
        source, changes = tar_shards(tmp_path / "files", images=found), WEBDATASET
    else:
        source, changes = tmp_path / "files", {}
        source.mkdir()
        for row, image in enumerate(found):
            (source / f"{row:02d}.png").write_bytes(image)
    dataset = opened(str(source), **changes)
    assert dataset.row_facts()["sizes"] == {"8 x 8": 3, "12 x 8": 3, "8 x 12": 6}
    for rows, (height, width) in zip(dataset.buckets, dataset.sizes, strict=True):
        for item in dataset.__getitems__(rows.tolist()):
            assert item["images"].shape == (1, height, width)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_sizes_are_of_upright_images(kind, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    path = parquet(
        tmp_path / "train.parquet", pictures=[picture(20, 16, 24, kind, exif=exif), picture(1, 16, 16, kind)]
    )
    assert opened(path)[0]["images"].shape == (1, 12, 8)


def test_another_image_of_the_same_size_is_taken_for_one_that_is_corrupt(tmp_path, capsys):
    """Also where its size cannot be read: that is then the next row's."""
    found = [picture(row, *PICTURES[row % 4]) for row in range(12)]
    found[4] = found[4][:45]  # a square that ends after its header
    found[9] = b"nothing"
    path = parquet(tmp_path / "train.parquet", pictures=found)
    with pytest.raises(ValueError, match="row 9 of dataset .* cannot be decoded: .*--skip_corrupt_images"):
        opened(path)
    dataset = opened(path, skip_corrupt_images=True)
    assert [len(rows) for rows in dataset.buckets] == [3, 2, 7]
    assert rows_in({"images": dataset[4]["images"][None]}) == [8]
    assert rows_in({"images": dataset[9]["images"][None]}) == [10]
    assert "row 4 of dataset" in (said := capsys.readouterr().out) and "row 8 is taken instead" in said
    lonely = parquet(tmp_path / "lonely.parquet", pictures=[found[0], found[1], found[5][:45]])
    assert opened(lonely, skip_corrupt_images=True)[2]["images"].shape == (1, 12, 8)
    lonely = parquet(tmp_path / "alone.parquet", pictures=[found[0], found[5][:45]])
    with pytest.raises(ValueError, match="no other row of it of its size can"):
        opened(lonely, skip_corrupt_images=True)[1]
    nothing = parquet(tmp_path / "nothing.parquet", pictures=[b"nothing", b"either"])
    with pytest.raises(ValueError, match="none of its images can be decoded"):
        opened(nothing, skip_corrupt_images=True)


# --- batches ------------------------------------------------------------------------------------------------------

BUCKETS = [np.arange(0, 16), np.arange(16, 28), np.arange(28, 31)]


def take(count, images_per_step=4, batch_size=4, rank=0, world_size=1, images_seen=0, seed=0, buckets=BUCKETS):
    sampler = iter(BucketBatchSampler(buckets, images_per_step, batch_size, seed, rank, world_size, images_seen))
    return [next(sampler) for _ in range(count)]


def test_every_image_is_seen_once_an_epoch():
    """Exactly, where steps divide the buckets; else all that is left of an epoch comes before what follows it."""
    whole = [np.arange(0, 16), np.arange(16, 28), np.arange(28, 32)]
    for epoch in range(3):
        batches = take(8 * (epoch + 1), buckets=whole)[8 * epoch :]
        assert sorted(key - 32 * epoch for batch in batches for key in batch) == list(range(32))
    batches = take(310)  # 40 epochs of 31
    keys = [key for batch in batches for key in batch]
    assert len(set(keys)) == len(keys)  # each is another epoch's
    for bucket in BUCKETS:
        own = [key for key in keys if key % 31 in bucket]
        assert len(own) == 40 * len(bucket) and np.bincount([key % 31 for key in own])[bucket].tolist() == [40] * len(
            bucket
        )
        epochs = [key // 31 for key in own]
        assert epochs == sorted(epochs)
    # in random order, another in every epoch and for every seed
    assert batches[:7] != batches[7:14] and take(20, seed=1) != batches[:20]
    turns = [next(i for i, rows in enumerate(BUCKETS) if batch[0] % 31 in rows) for batch in batches]
    assert len({tuple(turns[start : start + 7]) for start in range(0, 280, 7)}) > 20


def test_a_step_is_of_one_bucket_however_it_is_shared():
    whole = take(60, images_per_step=8, batch_size=8)
    assert all(any({key % 31 for key in batch} <= set(rows) for rows in BUCKETS) for batch in whole)
    flat = [key for batch in whole for key in batch]
    for batch_size, world_size in ((4, 2), (2, 2), (4, 1), (2, 4), (8, 1)):
        ranks = [take(480 // batch_size // world_size, 8, batch_size, rank, world_size) for rank in range(world_size)]
        assert [key for turn in zip(*ranks, strict=True) for batch in turn for key in batch] == flat
        later = take(20, 8, batch_size, 0, world_size, images_seen=240)
        assert later == ranks[0][240 // batch_size // world_size :][:20]
    # a bucket smaller than a step fills one with its images of several epochs
    small = next(batch for batch in whole if batch[0] % 31 >= 28)
    assert sorted(np.bincount([key % 31 for key in small])[28:]) == [2, 3, 3]
    assert take(1, 8, 8, buckets=[np.arange(3)]) == [
        sorted(take(1, 8, 8, buckets=[np.arange(3)])[0], key=lambda key: key // 3)
    ]


def batches_of(dataset, progress, print_=print, **changes):
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"), print=print_)
    settings = {"batch_size": 2, "num_workers": 0, "seed": 0, "gradient_accumulation_steps": 2} | changes
    return training_batches(dataset, SimpleNamespace(**settings), accelerator, progress)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_images(num_workers, pictures):
    dataset, said, progress = opened(pictures), [], {"images_seen": 0}
    loader = batches_of(dataset, progress, said.append, num_workers=num_workers)
    found = [next(loader) for _ in range(20)]
    assert {tuple(batch["images"].shape) for batch in found} == {(2, 1, 8, 8), (2, 1, 12, 8), (2, 1, 8, 12)}
    for first, second in zip(found[::2], found[1::2], strict=True):  # an optimizer step
        assert first["images"].shape == second["images"].shape
    assert not said
    again = batches_of(dataset, progress | {"images_seen": 16}, said.append)
    assert all(torch.equal(next(again)["images"], batch["images"]) for batch in found[8:])
    with pytest.raises(ValueError, match="only in optimizer steps of 4 images, as they were begun, not 8"):
        batches_of(dataset, progress, batch_size=4)
    batches_of(dataset, {"images_seen": 0}, said.append, batch_size=5)
    assert "fewer images than an optimizer step, which has 10, all of one size: 8 x 8 has 6, 12 x 8 has 6;" in said[0]


# --- training -----------------------------------------------------------------------------------------------------

STEPS = ("--max_train_steps", 4, "--random_flip")


def test_training_on_images_of_several_sizes(pictures, tmp_path):
    """It resumes bit for bit, also by micro-batches; grid, facts and card show the sizes."""
    arguments = [*("--dataset", pictures, "--aspect_ratio_buckets", SIZES, "--crop", "random"), *STEPS]
    whole = train_tiny(tmp_path / "whole", *arguments)
    halves = [*arguments, "--gradient_accumulation_steps", 2, "--batch_size", 2]
    train_tiny(tmp_path / "parts", *halves[:6], *("--max_train_steps", 2, "--random_flip"), *halves[-4:])
    parts = train_tiny(tmp_path / "parts", *halves, "--resume_from_checkpoint", "latest")
    assert max((whole[name] - parts[name]).abs().max() for name in whole) < 1e-5
    train_tiny(tmp_path / "again", *arguments[:6], *("--max_train_steps", 2, "--random_flip"))
    assert equal(whole, train_tiny(tmp_path / "again", *arguments, "--resume_from_checkpoint", "latest"))

    pipeline = ScoreSDEPipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    assert pipeline.sample_shape(1) == (1, 1, 8, 8)
    facts = json.loads((tmp_path / "whole" / "pipeline" / "training.json").read_text())
    assert facts["sizes"] == {"8 x 8": 6, "12 x 8": 6, "8 x 12": 12} and facts["resolution"] is None
    card = (tmp_path / "whole" / "pipeline" / "README.md").read_text()
    assert "images by height x width in px | 8 x 8 6, 12 x 8 6, 8 x 12 12" in card
    assert "trained on images of 8 x 8, 12 x 8, 8 x 12 pixels (height x width) alone" in card
    # ten images in two columns of classes: rows of 8, 12, 8, 8 and 12 pixels, 8 times as large, 12 wide
    with Image.open(tmp_path / "whole" / "samples" / "step-00000004.png") as grid:
        assert grid.size == (2 * 12 * 8, (8 + 12 + 8 + 8 + 12) * 8)
        # what one sees is what the pipeline draws
        seen = np.asarray(grid.crop((0, 64, 64, 64 + 96)))[::8, ::8, 0]
    drawn = pipeline(
        class_labels=[0], height=12, width=8, num_inference_steps=2, generator=torch.Generator().manual_seed(2)
    ).images[0]
    assert np.array_equal(seen, np.asarray(drawn))


@pytest.fixture
def evaluated(pictures, tmp_path):
    """[(pipeline folder, the figures during training)] of one model, trained by batches of 4, and of 3."""
    shutil.copy(pictures, tmp_path / "test.parquet")
    found = []
    for batch_size in (4, 3):
        folder = tmp_path / str(batch_size)
        train_tiny(
            folder,
            *("--dataset", tmp_path / "{split}.parquet", "--aspect_ratio_buckets", SIZES, "--max_train_steps", 1),
            *("--evaluation_steps", 1, "--evaluation_images", 22, "--learning_rate", 1e-12, "--batch_size", batch_size),
            *("--evaluation_features", "classifier"),
        )
        found.append((folder / "pipeline", json.loads((folder / "evaluation.jsonl").read_text())))
    return found


def test_figures_of_several_sizes_are_those_of_every_image_alone(evaluated, pictures, monkeypatch):
    pytest.importorskip("torchdiffeq")
    (folder, before), (_, other) = evaluated
    for name in ("held_out_loss", "frechet_distance"):  # whatever the batches
        assert before[name] == pytest.approx(other[name], rel=1e-4)
    drawn, plain = {}, evaluate.draw

    def watched(pipeline, numbers, *settings, **told):
        images, nfe = plain(pipeline, numbers, *settings, **told)
        drawn.update(zip(numbers, images, strict=True))
        return images, nfe

    monkeypatch.setattr(evaluate, "draw", watched)
    options = ["--num_inference_steps", 2, "--num_images", 22, "--features", "classifier", "--batch_size", 5]
    options += ["--loss", 22, "--likelihood", 8, "--tolerance", 1e-2]
    run(evaluate.main, "--pipeline", folder, *options)
    found = {each["name"]: each for each in json.loads((folder / "metrics.json").read_text())}
    loss, accuracy = found["loss on test images"], found["classifier accuracy on samples"]
    assert loss["value"] == pytest.approx(before["held_out_loss"], rel=1e-4)
    assert loss["sizes"] == ["8 x 8", "12 x 8", "8 x 12"] and "resolution" not in loss
    [distance] = [each for name, each in found.items() if name.startswith("Fréchet distance of 22 samples to the 24")]
    assert distance["value"] == pytest.approx(before["frechet_distance"], rel=1e-3)
    # in the proportions of the training images, 1 : 1 : 2
    shapes = [tuple(drawn[number].shape[1:]) for number in range(22)]
    assert [shapes.count(size) for size in ((8, 8), (12, 8), (8, 12))] == [6, 5, 11]
    assert drawn.keys() == set(range(22)) and accuracy["n"] == 22

    pipeline, dataset = ScoreSDEPipeline.from_pretrained(folder), opened(pictures)
    pipeline.set_progress_bar_config(disable=True)
    for number in (0, 7, 21):
        height, width = shapes[number]
        generator = torch.Generator().manual_seed(number)
        alone = pipeline(
            *(1, number % 2), num_inference_steps=2, generator=generator, height=height, width=width, output_type="pt"
        )
        assert (drawn[number] - (2 * alone.images[0] - 1)).abs().max() < 1e-5
    values = []
    for row in range(8):
        generator = torch.Generator().manual_seed(row)
        image = dequantize(((dataset[row]["images"] + 1) * 127.5).round(), generator)[None]
        values.append(pipeline.log_likelihood(image, generator=generator, rtol=1e-2, atol=1e-2).bits_per_dim())
    expected = found["negative log-likelihood of the pixels, bits/dim"]["value"]
    assert float(torch.cat(values).mean()) == pytest.approx(expected, abs=0.02)


def test_a_classifier_of_several_sizes_learns_from_all(tmp_path):
    """Which it shows by telling dark ones from light ones of either size."""
    images = [picture((5, 40)[row % 2] + row // 4, *((8, 8), (8, 12))[row // 2 % 2]) for row in range(24)]
    dataset = opened(parquet(tmp_path / "train.parquet", pictures=images), "8,8;8,12")
    judge = classifier.train_classifier(dataset, 40, 0, torch.device("cpu"))
    for rows in dataset.buckets:
        batch = torch.utils.data.default_collate([dataset[int(row)] for row in rows])
        assert classifier.recognises(judge, batch["images"], batch["labels"]).float().mean() > 0.9


def test_numbers_are_parted_in_proportion():
    counts = counts_of_sizes({"sizes": {"8 x 8": 6, "12 x 8": 6, "8 x 12": 12}})
    assert counts == {(8, 8): 6, (12, 8): 6, (8, 12): 12}
    for count in (1, 2, 3, 24, 1001):
        parts = shares_of_sizes(counts, count)
        assert [number for _, numbers in parts for number in numbers] == list(range(count))
        assert all(abs(len(numbers) - count * counts[size] / 24) < 1 for size, numbers in parts)
    assert shares_of_sizes({}, 5) == [(None, range(5))]


# --- beside condition images --------------------------------------------------------------------------------------


@pytest.fixture
def with_negatives(pictures, tmp_path):
    """The pictures, each with its negative."""
    rows = datasets.Dataset.from_parquet(pictures)[:]
    rows["negative"] = [Image.eval(image, lambda value: 255 - value) for image in rows["image"]]
    kinds = {"image": datasets.Image(), "negative": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    path = str(tmp_path / "negatives.parquet")
    datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(path)
    return path


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("condition", [("--condition_column", "negative"), ("--condition_from", "downsample:2")])
def test_condition_images_have_the_sizes_of_theirs(condition, cached, with_negatives, tmp_path):
    where = [*("--dataset", with_negatives, "--aspect_ratio_buckets", SIZES), *condition]
    if cached:
        tiny_dc(tmp_path / "vae")
        folder = tmp_path / "latents"
        encode(with_negatives, tmp_path / "vae", folder, *where[2:], "--both_flips")
        where = ["--latents", folder]
    train_tiny(tmp_path / "run", *where, *STEPS)
    # the first rows, of latents squares and tall ones, in pairs; each line as high as its highest
    with Image.open(tmp_path / "run" / "samples" / "step-00000004.png") as grid:
        assert grid.size == (
            (4 * 8 * 8, (8 + 8 + 8 + 12 + 12) * 8) if cached else (4 * 12 * 8, (12 + 8 + 12 + 8 + 12) * 8)
        )
    arguments = [*TINY_RUN[4:], *where, "--image_channels", 1, "--random_flip"]
    config = parse(train.TrainConfig, [str(each) for each in arguments])
    data = CleanData(config, make_accelerator(config), conditions=config)
    for rows in data.dataset.buckets:
        batch = torch.utils.data.default_collate([data.dataset[int(row)] for row in rows[:4]])
        draws = Draws(0, 0, make_accelerator(config), 4)
        batch = data.mirrored(batch, draws)
        x0, seen = data.draw(batch, draws), data.conditions(batch)["condition_sample"]
        assert seen.shape == x0.shape
        if not cached:
            beside = Measurement("downsample:2")(x0) if "downsample:2" in condition else -x0
            assert (seen - beside).abs().max() < 1e-2
    pipeline = ScoreSDEPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    grey = Image.new("L", (4, 6) if "downsample:2" in condition else (8, 12))
    images = pipeline(condition_image=grey, height=12, width=8, num_inference_steps=1).images
    assert images[0].size == (8, 12)


def test_a_measured_one_must_fit_every_size(pictures, tmp_path, capsys):
    arguments = [*TINY_RUN, "--network_kwargs", TINY_DIT, "--dataset", pictures, "--output_dir", tmp_path / "run"]
    with pytest.raises(SystemExit):
        run(train.main, *arguments, "--aspect_ratio_buckets", "8,8;12,10", "--condition_from", "downsample:4")
    assert "condition_from downsample:4: super-resolution by 4 does not fit" in capsys.readouterr().err


def test_squares_are_begun_with(pictures, tmp_path):
    """A network of squares goes on with images of several sizes; `auto` is of its resolution."""
    train_tiny(tmp_path / "squares", "--dataset", pictures, "--max_train_steps", 1)
    run(
        train.main,
        *("--init_from", tmp_path / "squares" / "pipeline", "--dataset", pictures, "--aspect_ratio_buckets", "auto,2"),
        *("--max_train_steps", 1, "--batch_size", 4, "--sample_num_images", 4, "--sample_num_inference_steps", 1),
        *("--output_dir", tmp_path / "run"),
    )
    pipeline = ScoreSDEPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.sample_shape(1) == (1, 1, 6, 10)
    before = load_file(tmp_path / "squares" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert pipeline.transformer.state_dict().keys() == before.keys()


def test_a_rectangle_for_all(pictures, tmp_path):
    unet = '{"block_out_channels": [8, 8], "layers_per_block": 1, "attention_resolutions": []}'
    arguments = [*TINY_RUN, "--dataset", pictures, "--aspect_ratio_buckets", "8,12", "--max_train_steps", 1]
    run(train.main, *arguments, *("--network", "unet", "--network_kwargs", unet, "--output_dir", tmp_path))
    pipeline = ScoreSDEPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.sample_shape(1) == (1, 1, 8, 12)


@pytest.mark.slow
def test_two_processes_train_as_one(pictures, tmp_path):
    arguments = [*TINY_RUN, "--network_kwargs", TINY_DIT, "--dataset", pictures, "--aspect_ratio_buckets", SIZES]
    arguments += ["--max_train_steps", 3]
    for processes, batch_size in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        settings = [*arguments, "--batch_size", batch_size, "--output_dir", folder]
        if processes == 1:
            run(train.main, *settings)
        else:
            launch("train.py", *settings, processes=processes)
    one, two = (
        load_file(tmp_path / name / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("1", "2")
    )
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--streaming"], "a stream doesn't know: leave streaming out"),
        (["--cache_images"], "cache_images needs a dataset of images of one size"),
        (["--latents", "somewhere"], "pass them to `score-sde encode-latents`"),
        (
            ["--aspect_ratio_buckets", "8,8;9,12"],
            "images of 9 x 12 pixels: height 9 must be a multiple of 2 pixels: use 8 or 10",
        ),
        (
            ["--resolution", "64,96"],
            "'64,96' is not a whole number: a height and a width are for --aspect_ratio_buckets",
        ),
    ],
)
def test_what_is_refused_before_any_work(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(
            train.main,
            *TINY_RUN,
            "--network_kwargs",
            TINY_DIT,
            "--aspect_ratio_buckets",
            SIZES,
            "--output_dir",
            tmp_path,
            *arguments,
        )
    assert message in " ".join(capsys.readouterr().err.split())


# --- latents ------------------------------------------------------------------------------------------------------


def encode(source, vae, folder, *arguments):
    settings = ["--dataset", source, "--vae", vae, "--image_channels", 1, "--shard_size", 5, "--output_dir", folder]
    run(encode_latents.main, *settings, *arguments)
    return LatentDataset(folder)


def test_latents_of_several_sizes(tiny_vae, pictures, tmp_path):
    """Every shard is of one size; rows are the encoded images, in order by size; training on them is training on images
    that are encoded on the fly."""
    folder, buckets = tmp_path / "latents", ("--aspect_ratio_buckets", SIZES)
    latents, images = encode(pictures, tiny_vae, folder, *buckets, "--both_flips"), opened(pictures)
    assert latents.sizes == [(8, 8), (12, 8), (8, 12)] and latents.shape == (4, 4, 4) and len(latents) == 24
    assert [bucket["shape"] for bucket in latents.facts["buckets"]] == [[4, 4, 4], [4, 6, 4], [4, 4, 6]]
    assert latents.facts["num_shards"] == 2 + 2 + 3 and latents.row_facts()["sizes"] == images.row_facts()["sizes"]
    vae = diffusers.AutoencoderKL.from_pretrained(tiny_vae)
    order = np.concatenate(images.buckets).tolist()
    flipped = LatentDataset(folder, flips=True)
    for row, image in enumerate(order):
        with torch.no_grad():
            for name, given in (("mean", images[image]["images"]), ("mean_flipped", images[image]["images"].flip(-1))):
                expected = vae.encode(given[None]).latent_dist.mean[0]
                assert (flipped[row][name] - expected).abs().max() < 1e-5
        assert latents[row + 24]["labels"] == images[image]["labels"]
    assert [rows.tolist() for rows in latents.buckets] == [list(range(6)), list(range(6, 12)), list(range(12, 24))]

    card = str(latents_card(latents.facts, "me/latents"))
    assert "split train, of several sizes, encoded by an autoencoder into latents." in card
    assert "| images of 12 x 8 pixels (height x width), latents of shape 4 x 6 x 4 | 6 |" in card

    # nothing is done twice, and what is damaged is mended
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "moments-00003.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="moments-00003.safetensors' is missing or damaged"):
        LatentDataset(folder)
    encode(pictures, tiny_vae, folder, *buckets, "--both_flips")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    for other, message in (([], "aspect_ratio_buckets were there"), (["--aspect_ratio_buckets", "8,8"], "buckets was")):
        with pytest.raises(ValueError, match=message):
            encode(pictures, tiny_vae, folder, "--both_flips", *other)

    losses = []
    for name, data in (
        ("before", ["--latents", folder]),
        ("on the fly", ["--dataset", pictures, "--vae", tiny_vae, *buckets]),
    ):
        train_tiny(tmp_path / name, *data, *STEPS, "--logging_steps", 1)
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        facts = json.loads((tmp_path / name / "pipeline" / "training.json").read_text())
        assert facts["sizes"] == images.row_facts()["sizes"] and facts["resolution"] is None
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    pipeline = ScoreSDEPipeline.from_pretrained(tmp_path / "before" / "pipeline")
    assert pipeline(height=12, width=8, num_inference_steps=1, output_type="pt").images.shape == (1, 1, 12, 8)
    config = data_config(latents=str(folder))
    assert CleanData(config, make_accelerator(config)).sizes == latents.sizes
    pixels = ["--pipeline", tmp_path / "before" / "pipeline", "--latents", folder, "--output_dir", tmp_path / "c"]
    with pytest.raises(ValueError, match="several sizes or rectangles: a classifier is trained on one"):
        run(train_classifier.main, *pixels)


def test_sizes_must_fit_autoencoder_and_network(tiny_vae, pictures, tmp_path):
    with pytest.raises(ValueError, match="height 9 is no multiple of 2, the factor of the autoencoder: use 8 or 10"):
        encode(pictures, tiny_vae, tmp_path / "latents", "--aspect_ratio_buckets", "8,8;9,12")
    with pytest.raises(
        ValueError, match="height 10 must be a multiple of 4 pixels, 2 of the autoencoder times 2 of .*8 or 12"
    ):
        train_tiny(tmp_path / "run", "--dataset", pictures, "--vae", tiny_vae, "--aspect_ratio_buckets", "8,8;10,16")
