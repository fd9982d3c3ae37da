"""Attacks by data: rows that read other files, start programs, ask for all memory, or are no rows; latents that are
damaged. Each is refused with a sentence, or passed over by --skip_corrupt_images."""

import io
import json
import os
import struct
import subprocess
import zlib

import datasets
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tars import ROWS as TAR_ROWS
from tars import WEBDATASET, tar_shards

from runs import data_config
from score_sde.training.parts.data import ImageDataset, ImageStream
from score_sde.training.parts.image_rows import resize_and_crop
from score_sde.training.parts.latent_shards import LatentDataset, shard_path, shard_record
from score_sde.training.parts.sources import Origin


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def huge_png(width, height):
    """A few bytes that say that they are a picture of this size."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + -(-width // 8)) * min(height, 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
WHITE = encoded(Image.new("L", (8, 8), 255))
# what a row holds -> what is said of it; {secret} is a picture outside of the dataset
ROWS = {
    "file elsewhere": ({"bytes": None, "path": "{secret}"}, "secret.png' is no file of the dataset"),
    "file above": ({"bytes": None, "path": "../secret.png"}, "secret.png' is no file of the dataset"),
    "password": ({"bytes": None, "path": "/etc/passwd"}, "'/etc/passwd' is no file of the dataset"),
    "device": ({"bytes": None, "path": "/dev/zero"}, "'/dev/zero' is no file of the dataset"),
    "pipe inside": ({"bytes": None, "path": "pipe.png"}, "pipe.png' is no file"),
    "link to a device inside": ({"bytes": None, "path": "zero.png"}, "zero.png' is no file"),
    "address": ({"bytes": None, "path": "http://127.0.0.1:9/x.png"}, "'http://127.0.0.1:9/x.png' is no file of"),
    "other repo": ({"bytes": None, "path": "hf://datasets/a/b@main/x.png"}, "x.png' is no file of the dataset"),
    "archive elsewhere": ({"bytes": None, "path": "zip://x.png::{secret}"}, "secret.png' is no file"),
    "nothing": (None, "the row has none"),
    "neither": ({"bytes": None, "path": None}, "the row has none"),
    "no image": ({"bytes": b"GIF89a", "path": None}, "cannot be decoded"),
    "EPS": ({"bytes": EPS, "path": "x.png"}, "cannot identify image file"),
    "too long": (
        {"bytes": huge_png(3_000_000, 1), "path": None},
        "3000000 x 1 pixels would be resized to 24000000 x 8",
    ),
    "bomb": ({"bytes": huge_png(100_000, 100_000), "path": None}, "could be decompression bomb"),
    "floats": (
        {"bytes": encoded(Image.new("F", (8, 8), 1e30), "TIFF"), "path": None},
        r"mode F has values from 1e\+30 to 1e\+30",
    ),
}


def parquet(folder, images, labels):
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    # as an attacker writes it: `datasets` would put what a path leads to into the file
    table = pyarrow.Table.from_pydict({"image": images, "label": labels}, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    return str(folder / "train.parquet")


@pytest.mark.parametrize(("row", "message"), ROWS.values(), ids=ROWS)
def test_a_row_is_refused_or_passed_over(row, message, tmp_path, monkeypatch):
    secret = tmp_path / "secret.png"
    secret.write_bytes(WHITE)
    if row and isinstance(row["path"], str):
        row = row | {"path": row["path"].replace("{secret}", str(secret))}
    name = parquet(tmp_path / "rows", [row, {"bytes": WHITE, "path": None}], [0, 1])
    os.mkfifo(tmp_path / "rows" / "pipe.png")
    (tmp_path / "rows" / "zero.png").symlink_to("/dev/zero")
    # no program is started
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ValueError, match=message):
        _ = ImageDataset(data_config(dataset=name, resolution=8))[0]
    item = ImageDataset(data_config(dataset=name, resolution=8, skip_corrupt_images=True))[0]
    assert item["labels"] == 1 and item["images"].eq(1).all()


@pytest.mark.parametrize("attack", ["EPS", "too long", "bomb", "floats"])
def test_a_row_of_a_stream_is_refused_or_passed_over(attack, tmp_path):
    row, message = ROWS[attack]
    source = tar_shards(tmp_path / "tars", shards=1, images=[row["bytes"], *[WHITE] * (TAR_ROWS - 1)])
    changes = {"dataset": str(source), "resolution": 8, "shuffle_buffer": 1} | WEBDATASET
    with pytest.raises(ValueError, match=message):
        next(iter(ImageStream(data_config(**changes))))
    item = next(iter(ImageStream(data_config(**changes, skip_corrupt_images=True))))
    assert item["labels"] == 1 and item["images"].eq(1).all()


def test_a_file_of_the_dataset_itself_is_read(tmp_path):
    name = parquet(tmp_path / "rows", [{"bytes": None, "path": str(tmp_path / "rows" / "sub" / "x.png")}], [0])
    (tmp_path / "rows" / "sub").mkdir()
    (tmp_path / "rows" / "sub" / "x.png").write_bytes(WHITE)
    assert ImageDataset(data_config(dataset=name, resolution=8))[0]["images"].eq(1).all()


def test_rows_of_the_hub_name_only_what_was_downloaded(tmp_path, monkeypatch):
    name = parquet(tmp_path / "rows", [{"bytes": WHITE, "path": None}], [0])
    dataset = ImageDataset(data_config(dataset=name, resolution=8))
    dataset.origin, dataset.name = Origin(), "me/photos"
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache")
    for folder in ("cache", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(WHITE)
    assert dataset.open_image({"bytes": None, "path": str(tmp_path / "cache" / "x.png")}).size == (8, 8)
    others = [str(tmp_path / "elsewhere" / "x.png"), str(tmp_path / "cache" / ".." / "elsewhere" / "x.png")]
    for path in [
        *others,
        "hf://datasets/me/photos2@main/x.png",
        "hf://datasets/you/photos/x.png",
        "file:///etc/passwd",
    ]:
        with pytest.raises(ValueError, match="is no file of the dataset"):
            dataset.open_image({"bytes": None, "path": path})


@pytest.mark.parametrize("labels", [[0, 2_000_000_000], [0, -1], [0, 2**62]])
def test_labels_make_no_table_of_billions(labels, tmp_path):
    name = parquet(tmp_path / "rows", [{"bytes": WHITE, "path": None}] * 2, labels)
    with pytest.raises(ValueError, match="label column 'label' (must hold integers from 0|has 2 labels, but up to)"):
        ImageDataset(data_config(dataset=name, resolution=8))


def test_many_corrupt_rows_in_turn_are_passed_over(tmp_path, capsys):
    """More than Python nests calls."""
    bad = {"bytes": b"no image", "path": None}
    name = parquet(tmp_path / "rows", [bad] * 1500 + [{"bytes": WHITE, "path": None}], [0] * 1501)
    dataset = ImageDataset(data_config(dataset=name, resolution=8, skip_corrupt_images=True))
    assert dataset[0]["images"].eq(1).all()
    every = parquet(tmp_path / "none", [bad] * 3, [0] * 3)
    with pytest.raises(ValueError, match="cannot be decoded: .*, and no other row of it can"):
        _ = ImageDataset(data_config(dataset=every, resolution=8, skip_corrupt_images=True))[1]


@pytest.mark.parametrize("size", [(1, 3_000_000), (3_000_000, 1), (2, 2**24)])
def test_a_long_image_takes_no_memory(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels would be resized to .*: cut it"):
        resize_and_crop(Image.new("1", size), 32)


@pytest.mark.parametrize("path", ["../secret.png", "{secret}", "/etc/passwd"])
def test_metadata_name_no_file_outside(path, tmp_path):
    (tmp_path / "secret.png").write_bytes(WHITE)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(WHITE)
    path = path.replace("{secret}", str(tmp_path / "secret.png"))
    (tmp_path / "photos" / "metadata.jsonl").write_text(json.dumps({"file_name": path, "label": 0}) + "\n")
    with pytest.raises(ValueError, match="cannot be opened|is no file of the dataset"):
        _ = ImageDataset(data_config(dataset=str(tmp_path / "photos"), resolution=8))[0]


def latents(folder):
    """Two shards of three rows, as encode_latents.py writes them."""
    folder.mkdir()
    facts = {"rows": 3, "shape": [2, 2, 2], "shard_size": 2, "num_shards": 2, "num_classes": 2, "vae": "v"}
    facts |= {"id2label": {"0": "a", "1": "b"}, "vae_fingerprint": "0123", "shards": []}
    for shard, rows in enumerate((2, 1)):
        path = shard_path(folder, shard)
        tensors = {name: torch.full((rows, 2, 2, 2), float(shard)) for name in ("mean", "std")}
        save_file(tensors | {"labels": torch.arange(rows)}, path)
        facts["shards"].append(shard_record(path))
    (folder / "latents.json").write_text(json.dumps(facts))
    return folder


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def swapped_labels(path):
    save_file({**load_file(path), "labels": torch.tensor([1, 0])}, path)


def other_shape(path):
    save_file({"mean": torch.zeros(2, 3)}, path)


@pytest.mark.parametrize(
    "damage", [flip_byte, zeros, swapped_labels, other_shape, os.unlink, lambda path: path.write_bytes(b"")]
)
def test_a_damaged_shard_is_named(damage, tmp_path):
    folder = latents(tmp_path / "latents")
    dataset = LatentDataset(folder)
    assert [item["mean"].mean() for item in (dataset[i] for i in range(3))] == [0, 0, 1]
    damage(folder / "moments-00000.safetensors")
    with pytest.raises(
        ValueError, match="moments-00000.safetensors' is missing or damaged .*`score-sde encode-latents` again"
    ):
        _ = LatentDataset(folder)[1]
    assert dataset[2]["mean"].eq(1).all()  # read before


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"3", b'{"rows": 3}', b"\xff\xfe", b"[" * 100_000])
def test_latents_json_of_any_content_is_refused(content, tmp_path):
    folder = latents(tmp_path / "latents")
    (folder / "latents.json").write_bytes(content)
    with pytest.raises(ValueError, match="latents.json' is damaged"):
        LatentDataset(folder)
    with pytest.raises(ValueError, match="'.*latens' holds no latents.json: .*; is it '.*latents'?"):
        LatentDataset(str(tmp_path / "latens"))
