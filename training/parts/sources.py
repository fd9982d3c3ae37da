"""Where rows come from: a dataset inside the package, files and folders here, or the Hub.

A folder of images is read by these rules, and by no patterns of names:

- Folders at its top called train, test, validation (or as in `SPLITS`) are its splits, where they are all that there
  is. Beside other folders one that holds images itself is a class of this name.
- The classes are the first folders below the dataset, or below the split's folder, whatever lies deeper. Without such
  folders the images have no classes.
- Images beside folders of classes, files that are no images by their names, and hidden ones are left out, and said.
- A metadata.csv, .jsonl or .parquet beside or above the images says which they are, with their labels, as in
  `datasets`.

Of a folder of parquet files or webdatasets, those belong to a split that have its name as a folder or as a word of
their own name (train-00000.tar); all of them to train, if none has.
"""

import difflib
import glob
import os
import re
from dataclasses import dataclass, field, replace
from importlib.resources import files as package_files

from datasets import Audio, ClassLabel, Dataset, Features, IterableDataset, Split, Value, Video, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from score_sde.pipelines.wording import few, one_line
from score_sde.sharing.downloading import check_token


EMBEDDED = {"fashion_mnist_10k": "data/fashion_mnist"}
FILES = {".parquet": "parquet", ".tar": "webdataset"}
EMBEDDED_TEXTS = {"pride_and_prejudice": "data/pride_and_prejudice"}
TEXT_FILES = {".parquet": "parquet", ".jsonl": "json", ".txt": "text"}
TABLE_FILES = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json"}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# the names of splits' folders, as in `datasets`
SPLITS = {
    **dict.fromkeys(("train", "training"), str(Split.TRAIN)),
    **dict.fromkeys(("validation", "valid", "val", "dev"), str(Split.VALIDATION)),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), str(Split.TEST)),
}
# what Pillow reads by itself: some others start programs (EPS) or hold no picture
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
# files of a stream of images, from which they are drawn in turn
STREAM_SHARDS = 1024


@dataclass(frozen=True)
class FilesOf:
    """The files of a kind of data in a folder, one for each sample.

    what: how a sample is called.
    suffixes: how they end, None for images, for which Pillow says.
    shards: {suffix: reader of `datasets`} of files that hold many rows.
    """

    what: str
    suffixes: frozenset | None
    shards: dict

    @property
    def column(self):
        """The column that holds them."""
        return self.what

    def is_one(self, name):
        """Whether a file is a sample by its name."""
        return _suffix(name) in (image_suffixes() if self.suffixes is None else self.suffixes)

    @property
    def features(self):
        """Of their column."""
        return ImageFeature() if self.suffixes is None else {"bytes": Value("binary"), "path": Value("string")}

    def value(self, path):
        return path if self.suffixes is None else {"bytes": None, "path": path}


IMAGES = FilesOf("image", None, FILES)


@dataclass
class Origin:
    """The files that a split is read from.

    Attributes: `root`, the folder that they lie in, None on the Hub; `sizes`, {name below it: bytes} of those that are
    used; `left_out`, {reason: names} of those that are not.
    """

    root: str | None = None
    sizes: dict = field(default_factory=dict)
    left_out: dict = field(default_factory=dict)

    def leave_out(self, reason, names):
        """Take these files out, if any."""
        names = sorted(names)
        if names:
            self.left_out.setdefault(reason, []).extend(names)
        for name in names:
            self.sizes.pop(name, None)


def on_hub(name, kind=IMAGES):
    """Whether a dataset of this name is read from the Hub; `kind` are the files of its kind of data."""
    is_file = _suffix(name) in kind.shards or (kind is not IMAGES and kind.is_one(name))
    return not (name in EMBEDDED or is_file or os.path.isdir(name))


def text_on_hub(name):
    """Whether a dataset of texts of this name is read from the Hub."""
    return not (name in EMBEDDED_TEXTS or _suffix(name) in TEXT_FILES or os.path.isdir(name))


def table_on_hub(name):
    """Whether a dataset of rows of numbers of this name is read from the Hub."""
    return not (_suffix(name) in TABLE_FILES or os.path.isdir(name))


def open_split(name, split, streaming=False, kind=IMAGES):
    """(rows, `Origin`) of a split of a dataset: in the package, local files or a folder of them, or on the Hub; `kind`
    are the files of its kind of data.

    Raises ValueError naming the dataset, the split and what there is.
    """
    if on_hub(name, kind):
        check_token()
    try:
        data, origin = _open(name, split, streaming, kind)
    except Exception as error:  # every reader and the Hub client raise their own
        embedded = EMBEDDED if kind is IMAGES else ()
        files = " or ".join(suffix.removeprefix(".") for suffix in kind.shards)
        raise ValueError(
            f"dataset {name!r}, split {split!r}, cannot be opened: {reason(error)}. Give "
            + (f"one of {', '.join(embedded)}, " if embedded else "")
            + f"{files} files, a folder of them or of {kind.what} files, or the id of a dataset on the Hub that can be "
            f"reached{nearest_path(name, embedded)}"
        ) from None
    if not streaming and len(data) == 0:
        raise ValueError(f"split {split!r} of dataset {name!r} is empty")
    return data, origin


def has_no_splits(name):
    """Whether any split of a dataset is all of its rows: files whose name holds no {split}."""
    return "{split}" not in name and (os.path.isfile(name) or glob.has_magic(name) or "://" in name)


def of_no_splits(name, split, trained):
    """What is said of such a dataset where a split of it is measured, whose rows were trained on as another."""
    return (
        f"dataset {name!r} has no splits: {split!r} is all of its rows, and so is {trained!r}, which is trained on; "
        f"give held-out data a file of their own, and {{split}} in the name"
    )


def reason(error):
    """What a reader's error says, in one line: of those that say nothing themselves, that which they come from."""
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    if "BatchSize must be greater than 0" in str(error):  # of a parquet file
        return "it has no rows"
    of_encoding = "its files must be written in UTF-8: " if isinstance(error, UnicodeDecodeError) else ""
    return of_encoding + one_line(error)


def open_texts(name, split, lines, streaming=False):
    """(rows, `Origin`) of a split of texts: in the package, local files or a folder of them, or on the Hub; of .txt
    files each one is a row, or with `lines` each of their lines.

    Raises ValueError naming the dataset, the split and what there is.
    """
    try:
        data, origin = _open_texts(name, split, lines, streaming)
    except Exception as error:  # every reader and the Hub client raise their own
        raise ValueError(
            f"dataset {name!r}, split {split!r}, cannot be opened: {reason(error)}. Give {', '.join(EMBEDDED_TEXTS)},"
            f" {', '.join(TEXT_FILES)} files, a folder of them, or the id of a dataset on the Hub that can be reached"
            f"{nearest_path(name, EMBEDDED_TEXTS)}"
        ) from None
    if not streaming and len(data) == 0:
        raise ValueError(f"split {split!r} of dataset {name!r} is empty")
    return data, origin


def open_table(name, split):
    """(rows, `Origin`) of a split of a table: local files or a folder of them, or on the Hub.

    Raises ValueError naming the dataset, the split and what there is.
    """
    try:
        data, origin = _open_files(name, split, TABLE_FILES)
    except Exception as error:  # every reader and the Hub client raise their own
        raise ValueError(
            f"dataset {name!r}, split {split!r}, cannot be opened: {reason(error)}. Give {', '.join(TABLE_FILES)} "
            f"files, a folder of them, or the id of a dataset on the Hub that can be reached{nearest_path(name)}"
        ) from None
    if len(data) == 0:
        raise ValueError(f"split {split!r} of dataset {name!r} is empty")
    return data, origin


def _open_texts(name, split, lines, streaming):
    if name in EMBEDDED_TEXTS:
        name = str(package_files("score_sde") / EMBEDDED_TEXTS[name] / "{split}.parquet")
    # -sig: a mark of the encoding, with which files of Windows and of Project Gutenberg begin, is none of the text
    options = {"text": {"sample_by": "line" if lines else "document", "encoding": "utf-8-sig"}}
    return _open_files(name, split, TEXT_FILES, options, streaming)


def _open_files(name, split, known, options=None, streaming=False):
    """(rows, `Origin`) of files whose suffixes are `known`, {suffix: reader of `datasets`}, by their path, pattern or
    folder, or of a dataset on the Hub; `options` are {reader: its arguments}."""
    kind = known.get(_suffix(name))
    if os.path.isdir(name):
        origin = _files_of(name)
        shards = {suffix: [each for each in origin.sizes if _suffix(each) == suffix] for suffix in known}
        suffix = max(known, key=lambda each: len(shards[each]))
        if not shards[suffix]:
            kinds = sorted({_suffix(each) or "no suffix" for each in origin.sizes})
            raise ValueError(f"the folder holds no {' or '.join(known)} files, but {few(kinds, 5) or 'none'}")
        origin.leave_out(f"no {suffix} by their names", set(origin.sizes) - set(shards[suffix]))
        _keep_shards_of(split, origin)
        kind, paths = known[suffix], [os.path.join(name, each) for each in origin.sizes]
    elif kind:
        path = name.replace("{split}", split)
        paths = [path] if "://" in path or os.path.isfile(path) else _matches(path)
        origin = _origin_of(paths)
    else:
        if name.startswith((".", "/", "~")) or name.count("/") > 1:  # no id on the Hub
            raise ValueError("there is no such folder")
        check_token()
        return load_dataset(name, split=split, streaming=streaming), Origin()
    return _load(kind, paths, streaming, **(options or {}).get(kind, {})), origin


def nearest_path(path, names=()):
    """The end of a sentence on a path that doesn't exist: "; is it ...?", with what is called almost so, one of some
    names, or a file or folder beside it. Empty without any, or where the path exists."""
    folder, name = os.path.split(path.rstrip("/"))
    if os.path.exists(path):
        return ""
    # a link to nothing is there, too
    beside = [each for each in (os.listdir(folder or ".") if os.path.isdir(folder or ".") else []) if each != name]
    found = difflib.get_close_matches(path.rstrip("/"), names, n=1, cutoff=0.7)
    # by their own names: those of long folders would all be alike
    found += [os.path.join(folder, each) for each in difflib.get_close_matches(name, beside, n=1, cutoff=0.7)]
    return f"; is it {found[0]!r}?" if found else ""


def _open(name, split, streaming, kind):
    if kind is IMAGES and name in EMBEDDED:
        name = str(package_files("score_sde") / EMBEDDED[name] / "{split}.parquet")
    reader = kind.shards.get(os.path.splitext(name)[1])
    if os.path.isdir(name):
        return _open_folder(name, split, streaming, kind)
    if reader or (kind is not IMAGES and kind.is_one(name)):
        path = name.replace("{split}", split)
        paths = [path] if "://" in path or os.path.isfile(path) else _matches(path)
        if reader:
            return _load(reader, paths, streaming, kind), _origin_of(paths)
        origin = _origin_of(paths)
        return _open_class_folders(origin, [], dict.fromkeys(origin.sizes, []), kind), origin
    if name.startswith((".", "/", "~")) or name.count("/") > 1:  # no id on the Hub
        raise ValueError("there is no such folder")
    return _load_rows(name, kind, split=split, streaming=streaming), Origin()


def _load(reader, paths, streaming, kind=IMAGES, **options):
    """Rows of files by a reader of `datasets`. None of their names is a pattern."""
    paths = [path if "://" in path else glob.escape(os.path.abspath(path)) for path in paths]
    return _load_rows(reader, kind, data_files={"train": paths}, split="train", streaming=streaming, **options)


def _load_rows(name, kind, **options):
    """`load_dataset`. Where samples are files that are read undecoded, columns of sound are made as those of videos
    are: `datasets` wants torchcodec even to put bytes into one."""
    if kind.suffixes is None or name == "parquet":  # whose columns are made
        return load_dataset(name, **options)
    features = load_dataset(name, **options | {"streaming": True}).features or {}
    if not any(isinstance(each, Audio) for each in features.values()):
        return load_dataset(name, **options)
    made = {key: Video(decode=False) if isinstance(each, Audio) else each for key, each in features.items()}
    own = {key: replace(each, decode=False) if isinstance(each, Audio) else each for key, each in features.items()}
    return load_dataset(name, **options, features=Features(made)).cast(Features(own))


def _matches(pattern):
    """The files of a pattern; folders that are really called so are no patterns."""
    folder, name = os.path.split(pattern)
    if os.path.isdir(folder):
        pattern = os.path.join(glob.escape(folder), name)
    paths = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not paths:
        raise ValueError(
            f"no file is called {pattern!r}" if glob.has_magic(name) else f"the file {pattern!r} does not exist"
        )
    return paths


def _origin_of(paths):
    local = [path for path in map(os.path.abspath, paths) if os.path.isfile(path)]
    root = os.path.commonpath([os.path.dirname(path) for path in local]) if local else None
    return Origin(root, {os.path.relpath(path, root).replace(os.sep, "/"): os.path.getsize(path) for path in local})


def _open_folder(folder, split, streaming, kind):
    origin = _files_of(folder)
    samples = [name for name in origin.sizes if kind.is_one(name)]
    shards = {suffix: [name for name in origin.sizes if _suffix(name) == suffix] for suffix in kind.shards}
    # of images alone, for which `datasets` reads it
    metadata = [name for name in origin.sizes if kind is IMAGES and os.path.basename(name) in METADATA]
    suffix = max(kind.shards, key=lambda each: len(set(shards[each]) - set(metadata)))
    if len(samples) >= len(shards[suffix]) and samples:
        rows = _open_samples(origin, samples, metadata, split, streaming, kind)
    elif shards[suffix]:
        origin.leave_out(f"no {suffix} by their names", set(origin.sizes) - set(shards[suffix]))
        _keep_shards_of(split, origin)
        rows = _load(kind.shards[suffix], [os.path.join(folder, name) for name in origin.sizes], streaming, kind)
    else:
        kinds = sorted({_suffix(name) or "no suffix" for name in origin.sizes})
        raise ValueError(
            f"the folder holds no data files: no {kind.what}, {' or '.join(kind.shards)}"
            + (f", but {len(origin.sizes)} others ({few(kinds, 5)})" if kinds else "")
        )
    return rows, origin


def _suffix(name):
    return os.path.splitext(name)[1].lower()


def image_suffixes():
    """How files of images are called."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def _files_of(folder):
    """The `Origin` of all files of a folder, sorted by their names. Hidden ones, and those of macOS' archives, are left
    out, and so is what is no file: a pipe, a link to nothing, a folder that links to one that holds it."""
    origin, hidden, odd = Origin(os.path.abspath(folder)), [], []
    for parent, folders, names in os.walk(folder, followlinks=True):
        within = os.path.relpath(parent, folder).replace(os.sep, "/") + "/"
        within = "" if within == "./" else within
        here = os.path.realpath(parent)
        for name in list(folders):
            inner = os.path.realpath(os.path.join(parent, name))
            if os.path.islink(os.path.join(parent, name)) and os.path.commonpath([here, inner]) == inner:
                folders.remove(name)
                odd.append(within + name)
        for name in names:
            path = os.path.join(parent, name)
            if any(part.startswith(".") or part == "__MACOSX" for part in (within + name).split("/")):
                hidden.append(within + name)
            elif not os.path.isfile(path):
                odd.append(within + name)
            else:
                origin.sizes[within + name] = os.path.getsize(path)
    origin.sizes = dict(sorted(origin.sizes.items()))
    origin.leave_out("hidden", hidden)
    origin.leave_out("no files", odd)
    return origin


def _keep_shards_of(split, origin):
    """Leave the files of this split in an `Origin` of files with rows."""

    def split_of(name):
        folders, words = name.lower().split("/")[:-1], re.split(r"[-._ 0-9]+", os.path.basename(name).lower())
        return next((SPLITS.get(word, word) for word in folders + words if word in SPLITS or word == split), None)

    found = {name: split_of(name) for name in origin.sizes}
    if not any(found.values()):
        found = dict.fromkeys(found, "train")
    _check_split(split, found.values())
    origin.leave_out("of no split by their names", [name for name, own in found.items() if own is None])
    for name, own in found.items():
        if own != SPLITS.get(split, split):
            origin.sizes.pop(name, None)


def _check_split(split, there):
    there = sorted({each for each in there if each})
    if SPLITS.get(split, split) not in there:
        raise ValueError(f"the folder has no split {split!r}; it has {', '.join(there)}")


def _open_samples(origin, samples, metadata, split, streaming, kind):
    """The rows of a folder of files with a sample each; its origin keeps the files of the split."""
    origin.leave_out(f"no {kind.what}s by their names", set(origin.sizes) - set(samples) - set(metadata))
    splits = _folders_of_splits([name for name in samples if "/" in name])
    _check_split(split, splits.values() or ["train"])

    def folder_of(name):
        """The first folder below the dataset, or below its split."""
        folders = name.split("/")[:-1]
        return folders[bool(splits) :][:1]

    if splits:
        inside = [name for name in samples if name.split("/")[0] in splits]
        stray = [name for name in samples if "/" not in name]
        _leave_out_samples(origin, "the folders of splits", stray, splits, len(inside), kind)
        origin.leave_out("beside the folders of splits", [x for x in origin.sizes if x.split("/")[0] not in splits])
    # the classes of all splits are the same
    classes = sorted({name for each in samples if each in origin.sizes for name in folder_of(each)})
    if splits:
        own = SPLITS.get(split, split)
        origin.sizes = {name: size for name, size in origin.sizes.items() if splits[name.split("/")[0]] == own}
    metadata = [name for name in metadata if name in origin.sizes]
    if metadata:
        return _open_metadata(origin, metadata, streaming)
    return _open_class_folders(origin, classes, {name: folder_of(name) for name in origin.sizes}, kind)


def _folders_of_splits(names):
    """{folder at the top: split} of images in folders; empty where those at the top are none of splits.

    Raises ValueError where nothing says what they are.
    """
    tops = sorted({name.split("/")[0] for name in names})
    splits = {top: SPLITS[top.lower()] for top in tops if top.lower() in SPLITS}
    others = [top for top in tops if top not in splits]
    if not splits or not others:
        return splits
    # beside others: with folders in them, splits; with images, one more class
    nested = {top: all(name.count("/") > 1 for name in names if name.split("/")[0] == top) for top in splits}
    several = len(set(splits.values())) > 1
    if several and all(nested.values()):
        return splits
    if not several and not any(nested.values()):
        return {}
    raise ValueError(
        f"its folders {', '.join(splits)} are called like splits, {few(others)} beside them are not: if they "
        f"all are classes, move them into a folder called train; else move the others away"
    )


def _open_metadata(origin, metadata, streaming):
    rows = _load("imagefolder", [os.path.join(origin.root, name) for name in metadata], streaming)
    # those of images, and of images that they are paired with
    columns = [name for name, feature in rows.features.items() if isinstance(feature, ImageFeature)]
    if not streaming and columns:
        values = [value for name in columns for value in rows.cast_column(name, ImageFeature(decode=False))[name]]
        named = {os.path.relpath(value["path"], origin.root).replace(os.sep, "/") for value in values if value}
        origin.leave_out("not in the metadata", set(origin.sizes) - set(metadata) - named)
    return rows


def _open_class_folders(origin, classes, folders, kind):
    """The rows of files in folders of classes; `folders` is {name: [its class] or []}."""
    features, stray = {kind.column: kind.features}, [name for name, folder in folders.items() if not folder]
    if len(stray) < len(folders):
        _leave_out_samples(origin, "the folders of classes", stray, classes, len(folders) - len(stray), kind)
        features["label"] = ClassLabel(names=classes)
    columns = {kind.column: [kind.value(os.path.join(origin.root, name)) for name in origin.sizes]}
    if "label" in features:
        numbers = {name: number for number, name in enumerate(classes)}
        columns["label"] = [numbers[folders[name][0]] for name in origin.sizes]
    return Dataset.from_dict(columns).cast(Features(features))


def _leave_out_samples(origin, beside, stray, folders, inside, kind):
    """Leave samples out that lie beside folders with `inside` samples. Raises ValueError where they are the more: then
    nothing says which are meant."""
    if len(stray) > inside:
        raise ValueError(
            f"{len(stray)} {kind.what}s ({stray[0]}, ...) lie beside its folders {few(folders)}, which hold {inside}: "
            f"move each into the folder that it belongs to, or all into one"
        )
    origin.leave_out(f"{kind.what}s beside {beside}", stray)


def as_stream(data):
    """A stream of the rows of a dataset in memory, of many parts."""
    count = min(len(data), STREAM_SHARDS)
    rows = data.to_list()
    # every so many, for each part to have all classes
    parts = [rows[start::count] for start in range(count)]
    return IterableDataset.from_generator(_rows_of_parts, features=data.features, gen_kwargs={"parts": parts})


def _rows_of_parts(parts):
    for part in parts:
        yield from part
