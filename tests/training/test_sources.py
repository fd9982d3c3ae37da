"""Folders of images and of shards: which files are read, as which split and class, and what is said of the others."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from runs import data_config
from score_sde.training.parts import sources
from score_sde.training.parts.config import DataConfig
from score_sde.training.parts.data import ImageDataset, ImageStream
from score_sde.training.parts.options import parse
from score_sde.training.parts.sources import FORMATS, SPLITS, image_suffixes, open_split


def make(folder, *names):
    """Files of these names: images, each of another grey, or else text."""
    for grey, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in image_suffixes():
            Image.new("L", (8, 8), grey).save(path)
        else:
            path.write_text("nothing to see")
    return folder


def opened(folder, split="train", **changes):
    return ImageDataset(data_config(dataset=str(folder), split=split, resolution=8, **changes))


def table(dataset):
    """{name of the file below the dataset: name of its class or None}, from the rows."""
    rows = dataset.data
    labels = rows["label"] if dataset.id2label else [None] * len(rows)
    names = [value["path"].removeprefix(dataset.origin.root + "/") for value in rows["image"]]
    return {name: dataset.id2label and dataset.id2label[label] for name, label in zip(names, labels, strict=True)}


CLASSES = {
    # names that patterns take for splits, or for patterns
    "words of splits in files": ["cat/on the train.png", "cat/a.png", "dog/train-2.png", "dog/dev-1.png"],
    "classes called bus, car, train": ["bus/1.png", "car/1.png", "car/2.png", "train/1.png"],
    "test_tube": ["test_tube/a.png", "flask/a.png"],
    "patterns": ["[v1]/a.png", "*/b[0].png", "b?/{c}.png"],
    "suffixes in any case": ["a/1.PNG", "a/2.JPG", "b/3.jpeg", "b/4.Tiff", "b/5.webp"],
    "whatever lies deeper": ["dress/2021/x.jpg", "dress/2022/y.jpg", "coat/z.jpg"],
    "one class": ["only/1.png", "only/2.png"],
    "not ASCII": ["猫/1.png", "chien à poil/2.png"],
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("names", CLASSES.values(), ids=CLASSES)
def test_the_first_folders_are_the_classes(names, streaming, tmp_path):
    folder = make(tmp_path / "train [v1]", *names)
    config = data_config(dataset=str(folder), resolution=8, streaming=streaming)
    dataset = (ImageStream if streaming else ImageDataset)(config)
    expected = {name: name.split("/")[0] for name in names}
    assert list(dataset.id2label.values()) == sorted(set(expected.values()))
    counts = {label: list(expected.values()).count(label) for label in expected.values()}
    assert dataset.class_counts == counts
    assert dataset.row_facts()["skipped_files"] == 0
    if not streaming:
        assert table(dataset) == expected
        # what is read is what was written, class by class
        greys = [round((item["images"][0, 0, 0].item() + 1) * 127.5) for item in dataset]
        assert greys == pytest.approx([names.index(name) for name in table(dataset)], abs=2)
    else:
        items = iter(dataset)
        found = [dataset.id2label[next(items)["labels"]] for _ in names]
        assert sorted(found) == sorted(expected.values())


@pytest.mark.parametrize("word", SPLITS)
def test_folders_at_the_top_are_splits_where_they_are_all(word, tmp_path):
    other = "train" if SPLITS[word] != "train" else "test"
    folder = make(
        tmp_path, f"{word}/cat/1.png", f"{word.title()}/cat/2.png", f"{other}/ant/1.png", f"{other}/cat/2.png"
    )
    dataset = opened(folder, SPLITS[word])
    # the classes are those of all splits: the same number means the same class in each
    assert dataset.id2label == {0: "ant", 1: "cat"}
    assert table(dataset) == {f"{word}/cat/1.png": "cat", f"{word.title()}/cat/2.png": "cat"}
    assert dataset.class_counts == {"ant": 0, "cat": 2}
    assert len(opened(folder, word)) == 2
    absent = ({"train", "validation", "test"} - {SPLITS[word], other}).pop()
    with pytest.raises(ValueError, match=f"the folder has no split '{absent}'; it has "):
        opened(folder, absent)


def test_a_folder_without_folders_of_splits_is_all_train(tmp_path):
    folder = make(tmp_path, "a/1.png", "b/test.png")
    assert len(opened(folder)) == 2
    with pytest.raises(ValueError, match="the folder has no split 'test'; it has train"):
        opened(folder, "test")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/1.png", "bus/a/1.png"], "folders train are called like splits, bus beside them are not"),
        (["train/1.png", "test/1.png", "bus/1.png"], "folders test, train are called like splits, bus beside"),
        (["1.png", "2.png", "old/3.png"], "2 images .1.png, ....* beside its folders old, which hold 1"),
        (["1.png", "2.png", "train/3.png"], "2 images .1.png, ....* beside its folders train, which hold 1"),
        (["notes.txt", "a.heic"], "no image, .parquet or .tar, but 2 others ..heic, .txt"),
        ([".hidden.png"], "the folder holds no data files"),
    ],
)
def test_what_could_mean_two_things_is_refused(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        opened(make(tmp_path, *names))


def test_what_is_left_out_is_named_and_counted(tmp_path, capsys):
    """Stray files, one nested class, hidden files, links that lead nowhere."""
    names = [
        "cover.jpg",
        "cat/1.png",
        "cat/2021/2.png",
        "dog/3.png",
        "dog/read me.txt",
        "dog/.DS_Store",
        "__MACOSX/4.png",
    ]
    folder = make(tmp_path / "photos", *names)
    (folder / "dog" / "gone.png").symlink_to(tmp_path / "nothing")
    (folder / "dog" / "loop").symlink_to(folder)
    dataset = opened(folder)
    assert table(dataset) == {"cat/1.png": "cat", "cat/2021/2.png": "cat", "dog/3.png": "dog"}
    line = dataset.describe()
    assert f"dataset '{folder}', split 'train': 3 images of 2 classes: cat 2, dog 1; left out: " in line
    for part in (
        "__MACOSX/4.png, dog/.DS_Store (hidden)",
        "dog/gone.png, dog/loop (no files)",
        "dog/read me.txt (no images by their names)",
        "cover.jpg (images beside the folders of classes)",
    ):
        assert part in line
    # every file is either used or said
    assert dataset.row_facts() == {"rows": 3, "class_counts": {"cat": 2, "dog": 1}, "skipped_files": 6}


def test_a_link_to_a_folder_is_a_folder(tmp_path):
    make(tmp_path / "elsewhere", "1.png", "2.png")
    make(tmp_path / "photos", "dog/1.png")
    (tmp_path / "photos" / "cat").symlink_to(tmp_path / "elsewhere")
    assert opened(tmp_path / "photos").class_counts == {"cat": 2, "dog": 1}


def test_images_without_folders_have_no_classes(tmp_path):
    folder = make(tmp_path / "photos", "train 1.png", "test.png", "x.txt")
    dataset = opened(folder)
    assert (dataset.num_classes, dataset.id2label, len(dataset)) == (None, None, 2)
    assert dataset[0].keys() == {"images"}
    assert "2 images, read without classes; left out: x.txt" in dataset.describe()
    with pytest.raises(ValueError, match="has no column 'species'; it has image"):
        opened(folder, label_column="species")


@pytest.mark.parametrize("streaming", [False, True])
def test_metadata_say_the_labels(streaming, tmp_path):
    folder = make(tmp_path / "[v1]", "train/a/dev 1.png", "train/b/2.png", "train/c.png", "test/1.png")
    (folder / "train" / "metadata.csv").write_text("file_name,label,text\nb/2.png,1,x\na/dev 1.png,0,y\n")
    config = data_config(dataset=str(folder), resolution=8, streaming=streaming, num_classes=2)
    dataset = (ImageStream if streaming else ImageDataset)(config)
    items = iter(dataset)
    found = {(next(items)["images"][0, 0, 0].item() + 1) * 127.5 for _ in range(2)}
    assert sorted(found) == pytest.approx([0, 1], abs=0.01)
    if not streaming:
        assert [dataset[i]["labels"] for i in range(2)] == [1, 0]
        assert "left out: train/c.png (not in the metadata)" in dataset.describe()


def parquets(folder, *names, rows=2, labels=(0, 1)):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"image": [Image.new("L", (8, 8), i) for i in range(rows)], "label": [labels[i % 2] for i in range(rows)]}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / name)
    return folder


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["a.parquet", "b.parquet"], "train", ["a.parquet", "b.parquet"]),
        (["data/train-00000-of-00002.parquet", "data/test-0.parquet"], "train", ["data/train-00000-of-00002.parquet"]),
        (["photos-train-0.parquet", "photos-val-0.parquet"], "validation", ["photos-val-0.parquet"]),
        (["train/trainers test.parquet", "test/0.parquet"], "train", ["train/trainers test.parquet"]),
        (["extra-0.parquet", "train-0.parquet"], "extra", ["extra-0.parquet"]),
    ],
)
def test_shards_of_a_split(names, split, expected, tmp_path):
    dataset = opened(parquets(tmp_path / "shards [v1]", *names), split)
    assert list(dataset.origin.sizes) == expected and len(dataset) == 2 * len(expected)


def test_shards_of_no_split_and_other_files_are_said(tmp_path):
    folder = parquets(tmp_path, "train.parquet", "others.parquet")
    (folder / "README.md").write_text("")
    line = opened(folder).describe()
    assert "left out: README.md (no .parquet by their names), others.parquet (of no split by their names)" in line


@pytest.mark.parametrize("name", ["set [v1]/train.parquet", "set [v1]/tr*.parquet", "set [v1]/{split}.parquet"])
def test_brackets_in_a_path_are_no_pattern(name, tmp_path):
    parquets(tmp_path, "set [v1]/train.parquet", "set [v1]/train[0].parquet", "set 1/train.parquet")
    assert len(opened(tmp_path / name)) == (4 if "*" in name else 2)
    assert len(opened(tmp_path / "set [v1]" / "train[0].parquet")) == 2
    with pytest.raises(ValueError, match=r"the file '.*x.parquet' does not exist"):
        opened(tmp_path / "set [v1]" / "x.parquet")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photso", "there is no such folder.*; is it '.*photos'?"),
        ("photos/trian.parquet", "the file '.*trian.parquet' does not exist.*; is it '.*train.parquet'?"),
    ],
)
def test_the_nearest_name_is_said(name, message, tmp_path):
    parquets(tmp_path, "photos/train.parquet")
    with pytest.raises(ValueError, match=message) as error:
        open_split(str(tmp_path / name), "train")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="; is it 'fashion_mnist_10k'?"):
        open_split("fashion_mnist", "train")
    # neither a link to nothing nor what lies in the same folder was meant
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="there is no such folder") as error:
        open_split(str(tmp_path / "link"), "train")
    assert "is it" not in str(error.value)


def test_the_fingerprint_tells_data_from_others(tmp_path):
    names = ["cat/1.png", "cat/2.png", "dog/3.png", "cow/4.png"]
    folder = make(tmp_path / "here", *names)
    first = opened(folder).fingerprint()
    assert first["classes"] == ["cat", "cow", "dog"] and first["autoencoder"] is None
    # moved, with other files beside and at another time: the same
    assert opened(make(tmp_path / "there" / "photos", *names, "notes.txt")).fingerprint() == first
    assert ImageStream(data_config(dataset=str(folder), streaming=True)).fingerprint()["classes"] == first["classes"]

    def changed(change):
        change()
        found = opened(folder).fingerprint()
        return {key for key in found if found[key] != first[key]}

    assert changed(lambda: (folder / "cat").rename(folder / "kitten")) == {"classes", "rows"}
    (folder / "kitten").rename(folder / "cat")
    assert changed(lambda: (folder / "cat" / "1.png").rename(folder / "cat" / "0.png")) == {"rows"}
    (folder / "cat" / "0.png").rename(folder / "cat" / "1.png")
    assert changed(lambda: None) == set()
    assert changed(lambda: Image.new("RGB", (50, 40), "red").save(folder / "cat" / "1.png")) == {"rows"}
    # of rows in files, the labels are a part
    parquet, other = (parquets(tmp_path, name, rows=rows) for name, rows in (("a.parquet", 2), ("b.parquet", 4)))
    prints = [opened(path).fingerprint() for path in (parquet / "a.parquet", other / "b.parquet")]
    assert prints[0]["rows"] != prints[1]["rows"] and prints[0]["classes"] == prints[1]["classes"] == ["a", "b"]
    assert opened(parquet / "a.parquet").fingerprint() == prints[0]


def test_the_fingerprint_tells_labels_from_others(tmp_path):
    """Also where the files are as large as before."""
    prints = []
    for name, labels in (("here", [0, 1]), ("there", [1, 0])):
        path = parquets(tmp_path, f"{name}/a.parquet", labels=labels) / name / "a.parquet"
        prints.append((path.stat().st_size, opened(path).fingerprint()["rows"]))
    assert prints[0][0] == prints[1][0] and prints[0][1] != prints[1][1]


def test_every_part_of_a_stream_of_images_has_all_classes(tmp_path, monkeypatch):
    """So that a process, or a worker, which reads its own parts, sees them all."""
    monkeypatch.setattr(sources, "STREAM_SHARDS", 2)
    folder = make(tmp_path, *(f"{label}/{number}.png" for label in "ab" for number in range(4)))
    dataset = ImageStream(data_config(dataset=str(folder), resolution=8, streaming=True, shuffle_buffer=1))
    for rank in range(2):
        dataset.begin(rank, world_size=2, given=0)
        items = iter(dataset)
        assert sorted(next(items)["labels"] for _ in range(4)) == [0, 0, 1, 1]


def test_every_mode_and_background_reaches_training(tmp_path):
    (tmp_path / "a").mkdir()
    ramp = (np.arange(64).reshape(8, 8) * 1040).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a" / "0.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a" / "1.png")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "a" / "2.tif")
    expected = torch.from_numpy((ramp / 65535 * 2 - 1).astype(np.float32))
    white, black = opened(tmp_path), opened(tmp_path, background="black", image_channels=3)
    for row in (0, 2):
        assert (white[row]["images"][0] - expected).abs().max() <= 1 / 255
        assert (black[row]["images"] - expected).abs().max() <= 1 / 255
    assert white[1]["images"].eq(1).all() and black[1]["images"].eq(-1).all()
    with pytest.raises(SystemExit):
        parse(DataConfig, ["--background", "colourless"])


def test_formats_exist():
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)
