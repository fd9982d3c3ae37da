"""Sound, videos and arrays as clean samples: options, rows, statistics, latents."""

from dataclasses import asdict, dataclass, fields

from score_sde.pipelines.units import to_unit_scale
from score_sde.pipelines.wording import unknown

from .clean_data import check_data_options, open_latents
from .clean_samples import CleanSamples
from .config import LoaderConfig, option
from .latents import fingerprint, latent_shape, load_vae
from .signal_rows import ARRAY_FILES, SOUNDS, VIDEOS, ArrayRows, SoundRows, VideoRows
from .sources import on_hub


# what is done with rows that are too short
SHORT_CLIPS = ("refuse", "pad", "leave_out")
CROPS = ("start", "random")
CHANNEL_AXES = ("first", "last", "none")


@dataclass
class SignalDataConfig(LoaderConfig):
    """What all kinds have. A subclass states `rows`, the class of its rows."""

    dataset: str = option(
        "",
        "A folder of files with a sample each (in folders of classes, or of splits), a parquet or tar file, several of "
        "them as a pattern or a folder (a {split} in the name is replaced by the split), or a dataset id on the Hub; "
        "of arrays and videos also one .npy or .npz file, whose first axis counts the samples.",
        "data",
        common=True,
    )
    split: str = option("train", "Split of the dataset to use.", "data")
    label_column: str | None = option(
        "label", "Column that holds the class labels; 'none' for no labels.", "data", common=True
    )
    num_classes: int | None = option(
        None, "Number of classes, where the data don't say: the labels are 0 to one less.", "data"
    )
    short_clips: str = option(
        "refuse", "What is too short: refuse, pad (zeros behind sound, the last frame again), or leave_out.", "data"
    )
    crop: str = option("start", "Part of what is too long: start, or random, another in every epoch.", "data")

    def data_problems(self):
        yield from LoaderConfig.problems(self)
        if self.label_column == "none":
            self.label_column = None
        if not self.dataset and not getattr(self, "latents", None):
            yield "dataset is missing: a folder, a file, or the id of a dataset on the Hub"
        if self.num_classes is not None and self.num_classes < 1:
            yield f"num_classes {self.num_classes} must be at least 1"
        for name, known in (("short_clips", SHORT_CLIPS), ("crop", CROPS)):
            if getattr(self, name) not in known:
                yield unknown(name, getattr(self, name), known)

    def open_rows(self, split=None, crop_seed=None):
        """The rows of a split; those to be measured by are cut at the start."""
        return self.rows(self, split, crop_seed)


@dataclass
class AudioDataConfig(SignalDataConfig):
    rows = SoundRows
    files = SOUNDS

    audio_column: str = option("audio", "Column that holds the sound.", "data")
    audio_channels: int = option(1, "Channels of the sound; 1 mixes those that there are.", "data")
    length: int = option(0, "Values of a sample, in each channel: seconds times sampling rate.", "data", common=True)
    sampling_rate: int | None = option(
        None, "Sampling rate in Hz, to which all are resampled; None keeps theirs, which must be one.", "data", True
    )

    @property
    def data_column(self):
        return self.audio_column

    def data_problems(self):
        yield from super().data_problems()
        if not getattr(self, "latents", None) and (self.length < 1 or self.audio_channels < 1):
            yield f"length {self.length} and audio_channels {self.audio_channels} must be at least 1"
        if self.sampling_rate is not None and self.sampling_rate < 1:
            yield f"sampling_rate {self.sampling_rate} must be at least 1 Hz"


@dataclass
class VideoDataConfig(SignalDataConfig):
    rows = VideoRows
    files = VIDEOS

    video_column: str = option("video", "Column that holds the videos.", "data")
    image_channels: int = option(3, "1 for greyscale, 3 for RGB.", "data")
    frames: int = option(16, "Frames of a sample.", "data", common=True)
    resolution: int = option(
        32, "Height and width in pixels: the shorter side is resized to it, a square cropped.", "data", common=True
    )
    frame_rate: float | None = option(
        None,
        "Frames in a second, at which they are taken from videos of other rates, and those of arrays, which don't say; "
        "None keeps theirs, which must be one.",
        "data",
        common=True,
    )

    @property
    def data_column(self):
        return self.video_column

    def data_problems(self):
        yield from super().data_problems()
        if self.image_channels not in (1, 3):
            yield f"image_channels {self.image_channels} must be 1 or 3"
        if self.frames < 1 or self.resolution < 1:
            yield f"frames {self.frames} and resolution {self.resolution} must be at least 1"
        if self.frame_rate is not None and not self.frame_rate > 0:
            yield f"frame_rate {self.frame_rate} must be positive"


@dataclass
class ArrayDataConfig(SignalDataConfig):
    rows = ArrayRows
    files = ARRAY_FILES

    array_column: str = option("array", "Column that holds the arrays, or lists of numbers.", "data")
    columns: list[str] = option(
        [],
        "Columns of numbers of a table (csv, parquet) whose rows are times: windows of --length of them.",
        "data",
        True,
    )
    channel_axis: str = option(
        "first", "Axis of an array that is its channels: first, last, or none, of one channel; of lists none.", "data"
    )
    length: int = option(
        0, "Values of a sample, in each channel, of signals; 0 takes arrays as they are.", "data", True
    )

    @property
    def data_column(self):
        return self.array_column

    def data_problems(self):
        yield from super().data_problems()
        self.columns = [name.strip() for each in self.columns for name in each.split(",") if name.strip()]
        if self.channel_axis not in CHANNEL_AXES:
            yield unknown("channel_axis", self.channel_axis, CHANNEL_AXES)
        if self.length < 0 or (self.columns and self.length < 2):
            yield f"length {self.length} must be positive: columns are cut into windows of so many rows, at least 2"
        if self.columns and (self.short_clips != "refuse" or self.crop != "start"):
            yield "short_clips and crop are of rows: columns are cut into all windows of --length"


@dataclass
class SignalSourceConfig:
    """Data, or latents of them, and how both are scaled."""

    latents: str | None = option(
        None,
        "Folder written by `score-sde encode-latents`, or dataset on the Hub that holds one, somebody/latents: train "
        "on these latents instead.",
        "data",
        common=True,
    )
    vae: str | None = option(
        None, "Autoencoder in diffusers format, a folder or Hub id: encode on the fly.", "data", common=True
    )
    normalize_latents: bool = option(
        False, "Give the latents of that folder mean 0 and standard deviation 1 in every channel.", "data"
    )
    normalize_data: bool = option(
        True,
        "Give data without an autoencoder mean 0 and standard deviation 1 in every channel, by statistics that the "
        "pipeline keeps; videos are scaled to [-1, 1] in any case.",
        "data",
    )

    def source_problems(self):
        if self.normalize_latents and not self.latents:
            yield "normalize_latents needs the statistics of latents: encode them by `score-sde encode-latents`"


# options under the heading of data that are of latents
READ_WITH_LATENTS = {"latents", "vae", "normalize_latents"}


class SignalData(CleanSamples):
    """The clean samples of a `SignalDataConfig`.

    Attributes: as of `CleanData`; `units`, arguments of a pipeline: its rates, and the statistics of the data.
    """

    sizes, examples = None, ()

    def __init__(self, config, accelerator):
        super().__init__()
        self.precision = accelerator.mixed_precision
        self.statistics = {"data_mean": None, "data_std": None}
        if config.latents:
            self.dataset, self.vae = open_latents(config, config.data_kind, accelerator)
            self.shape, self.units = self.dataset.shape, dict(self.dataset.facts.get("units", {}))
            names = {each.name for each in fields(config) if each.metadata["group"] == "data"}
            check_data_options(config, names - READ_WITH_LATENTS, self.dataset.facts | self.units)
        else:
            with accelerator.main_process_first():
                self.dataset = config.open_rows(crop_seed=config.seed if config.crop == "random" else None)
            self.shape, self.units = self.dataset.shape, dict(self.dataset.units)
            if config.vae:
                self.vae = load_vae(config.vae).to(accelerator.device)
                self.shape = latent_shape(self.vae, self.shape)
            else:
                normalized = config.normalize_data and config.data_kind != "video"
                self.take_statistics(config, self.dataset.statistics() if normalized else (None, None))
        self.check_rates(config)
        self.num_classes, self.id2label = self.dataset.num_classes, self.dataset.id2label
        accelerator.print(self.dataset.describe())

    def take_statistics(self, config, own):
        """Take the statistics of the data, (mean, std), or those of the model that adapters are trained for."""
        kept = config.kept_units() or dict(zip(self.statistics, own, strict=True))
        self.statistics = {name: kept[name] for name in self.statistics}
        self.units |= {name: values for name, values in self.statistics.items() if values is not None}

    def check_rates(self, config):
        """Raise ValueError for adapters on data of another rate than their model's."""
        for name, rate in (config.kept_units() or {}).items():
            if name in self.units and name not in self.statistics and self.units[name] != rate:
                raise ValueError(
                    f"lora_rank leaves the pipeline as it is, of {name} {rate}; the data have {self.units[name]}: pass "
                    f"--{name} {rate}"
                )

    @property
    def discretized(self):
        return False

    def draw(self, batch, draws):
        """Clean samples (B, C, ...) of a batch: what the network sees of the data, or normalised latents drawn from the
        autoencoder's posterior."""
        if self.vae is None:
            return to_unit_scale(batch["images"], self.statistics)
        return super().draw(batch, draws)

    def fingerprint(self):
        """As `CleanData.fingerprint`."""
        autoencoder = None if self.vae is None else fingerprint(self.vae)
        return self.dataset.fingerprint() | {"autoencoder": autoencoder}

    def facts(self, config):
        """What the rows are and where they are from, for the card, as `CleanData.facts`."""
        source = self.dataset.facts if config.latents else vars(config)
        on_the_hub = source.get("dataset_on_hub") if config.latents else on_hub(config.dataset, config.files)
        facts = {"data_kind": config.data_kind, "dataset_on_hub": on_the_hub}
        facts |= {name: source.get(name) for name in ("dataset", "split")} | {"data_shape": list(self.dataset.shape)}
        facts |= {name: value for name, value in self.units.items() if name not in self.statistics}
        return self.dataset.row_facts() | facts | {"config": asdict(config)}
