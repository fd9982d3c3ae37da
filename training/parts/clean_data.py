"""What diffusion is trained on: images, latents encoded before, or images encoded on the fly by an autoencoder."""

import os
from dataclasses import asdict, dataclass, fields

from score_sde.pipelines.latents import data_channels, normalises_itself, spatial_factor

from .alignment import VisionModel, vision_model_of_latents
from .buckets import BucketConfig
from .captions import CaptionEncoder, encoder_of_latents
from .clean_samples import CleanSamples
from .config import DataConfig, option
from .data import ImageDataset, ImageStream
from .image_conditions import ImageCondition, condition_of_latents
from .latent_shards import LatentDataset
from .latents import fetch_latents, fingerprint, latent_shape, load_vae
from .sources import on_hub


@dataclass
class CleanDataConfig(DataConfig, BucketConfig):
    latents: str | None = option(
        None,
        "Folder written by `score-sde encode-latents`, or dataset on the Hub that holds one, somebody/latents: train "
        "on these latents instead of images.",
        "data",
        common=True,
    )
    vae: str | None = option(
        None,
        "Autoencoder in diffusers format, a folder or Hub id: encode images on the fly. With latents, it is the one "
        "they were encoded by, unless given.",
        "data",
        common=True,
    )

    normalize_latents: bool = option(
        False,
        "Give the latents of that folder mean 0 and standard deviation 1 in every channel, by its statistics; they "
        "replace those in the autoencoder's config, in the saved pipeline, too.",
        "data",
    )
    streaming: bool = option(
        False,
        "Read the dataset as it comes, without a copy of it on disk and without its length. The order then depends on "
        "the processes, num_workers and batch_size, which must be the same on resume; a resumed run reads past what "
        "it has seen, without decoding it.",
        "data",
    )
    shuffle_buffer: int = option(1000, "Images of a stream, in each worker, among which the next is drawn.", "data")

    def problems(self):
        yield from DataConfig.problems(self)
        if self.latents and (self.crop != "centre" or self.streaming):
            yield "crop random and streaming need images: latents are read as they were encoded"
        if self.cache_images and (self.latents or self.streaming or self.aspect_ratio_buckets):
            yield "cache_images needs a dataset of images of one size: no latents, streaming or aspect_ratio_buckets"
        yield from self.bucket_problems()
        if self.aspect_ratio_buckets and self.latents:
            yield "aspect_ratio_buckets are of images: pass them to `score-sde encode-latents`, and latents keep them"
        if self.aspect_ratio_buckets and self.streaming:
            yield "aspect_ratio_buckets need the size of every image, which a stream doesn't know: leave streaming out"
        if self.normalize_latents and not self.latents:
            yield "normalize_latents needs the statistics of latents: encode them by `score-sde encode-latents`"
        if self.shuffle_buffer < 1:
            yield f"shuffle_buffer {self.shuffle_buffer} must be at least 1"


# options of images that held-out ones are read by, where latents are trained on
READ_FOR_EVALUATION = {"image_column", "label_column", "num_classes", "skip_corrupt_images"}


def normalize_by(vae, statistics, folder):
    """Let the config of an autoencoder give its latents mean 0 and standard deviation 1, by the statistics of latents
    in a folder. Raises ValueError where there are none, or of channels that are constant, and for an autoencoder that
    has them inside."""
    if normalises_itself(vae.config):
        raise ValueError(
            f"normalize_latents: a {type(vae).__name__} normalises its latents itself, by the latents_mean and "
            f"latents_std that it was saved with: leave it out"
        )
    if statistics is None:
        raise ValueError(f"latents.json of {folder!r} has no statistics: run `score-sde encode-latents` to its end")
    if not min(statistics["std"]) > 0:
        raise ValueError(f"latents in {folder!r} are constant in a channel: standard deviations {statistics['std']}")
    vae.register_to_config(
        latents_mean=statistics["mean"], latents_std=statistics["std"], scaling_factor=1.0, shift_factor=0.0
    )


def check_data_options(config, names, facts):
    """Raise ValueError for an option of data, of these names, that is given beside latents and says other than they do,
    or what would change nothing. `facts` is what is known of the data that they were encoded from."""
    for name in sorted(set(names) & config.given - {"num_workers"}):
        value, latents = getattr(config, name), f"the latents in {config.latents!r}"
        if name not in facts:
            raise ValueError(f"{name} {value!r} is of data that are read, and {latents} are encoded: leave it out")
        if value != facts[name] and not (name == "dataset" and same_path(value, facts[name])):
            raise ValueError(
                f"{name} {value!r} contradicts {latents}, of {name} {facts[name]!r}: leave it out, or encode anew"
            )


def same_path(one, other):
    return os.path.exists(one) and os.path.realpath(one) == os.path.realpath(other)


def open_latents(config, kind, accelerator, **options):
    """The latents that a configuration names, and the autoencoder that they are from: (`LatentDataset`, vae).

    Raises ValueError for latents of another kind of data than `kind`, or of another autoencoder.
    """
    with accelerator.main_process_first():
        folder = fetch_latents(config.latents)
    dataset = LatentDataset(folder, **options)
    found = dataset.facts.get("data_kind", "image")
    if found != kind:
        raise ValueError(f"latents {config.latents!r} are of the kind {found}: pass --data_kind {found}")
    named = config.vae or dataset.facts["vae"]
    # of latents from the Hub, it may be in their own folder
    named = folder if named == "vae" else named
    vae = load_vae(named)
    if fingerprint(vae) != dataset.facts["vae_fingerprint"]:
        raise ValueError(
            f"the latents in {config.latents!r} were encoded by another autoencoder than the one that is now in "
            f"{named!r}: encode them anew, or pass --vae with the one they are from"
        )
    if config.normalize_latents:
        normalize_by(vae, dataset.facts.get("statistics"), config.latents)
    return dataset, vae.to(accelerator.device)


class CleanData(CleanSamples):
    """The clean samples of a `CleanDataConfig`; with `captions`, a `CaptionConfig`, also what they are told in words;
    with `conditions`, an `ImageConditionConfig`, also the images that they are seen beside; with `align`, an
    `AlignConfig`, also their features.

    Attributes: `dataset`, its rows; `vae`, None for pixels; `shape` (channels, height, width) of a sample, where there
    are several of the first size; `sizes`, [(height, width), ...] of images in pixels, None for squares;
    `num_classes` and `id2label`, None without labels; `captions`, a `CaptionEncoder`, None without captions, with the
    `caption_column` that they are read from and `examples` of them; `condition`, an `ImageCondition`, None without;
    `vision`, the `VisionModel` whose features of the images they come with, None without.
    """

    def __init__(self, config, accelerator, captions=None, conditions=None, align=None):
        super().__init__(random_flip=config.random_flip)
        self.precision = accelerator.mixed_precision
        align_to = align and align.align_to
        self.caption_column, self.caption_facts, self.examples = None, {}, []
        if config.latents:
            options = {"flips": config.random_flip, "features": align_to is not None}
            self.dataset, self.vae = open_latents(config, "image", accelerator, **options)
            read = READ_FOR_EVALUATION if "evaluation_steps" in config.given else set()
            known = self.dataset.facts | {"image_channels": data_channels(self.vae.config)}
            check_data_options(config, {field.name for field in fields(DataConfig)} - read, known)
            if align_to is not None:
                self.vision = vision_model_of_latents(self.dataset.facts, align_to, config.latents)
            if captions is not None:
                self.find_captions(config.latents, captions)
            self.shape, self.sizes = self.dataset.shape, self.dataset.sizes
            beside = conditions and condition_of_latents(self.dataset.facts, conditions, config.latents)
            if beside is not None:
                size = tuple(side * spatial_factor(self.vae) for side in self.shape[1:])
                images_of = data_channels(self.vae.config), self.sizes or [size]
                self.condition = ImageCondition(*beside, None, *images_of, self.vae, self.shape[0])
        else:
            images, reader = ImageStream if config.streaming else ImageDataset, None
            if captions is not None and captions.reads_captions:
                self.captions = CaptionEncoder(
                    captions.text_encoder, captions.given_settings() | {"pooled": captions.pooled_captions}
                )
                self.caption_column = captions.caption_column
                reader = self.captions.reader(self.caption_column, config.seed)
            pairs = conditions and conditions.paired_column(config.image_channels)
            with accelerator.main_process_first():
                named = {"sizes": config.sizes, "first_size": config.first_size} if config.sizes else {}
                self.dataset = images(config, crop_seed=config.crop_seed, captions=reader, condition=pairs, **named)
            if config.cache_images:
                self.dataset.keep_images()
            if reader is not None:
                self.caption_facts, self.examples = self.captions.facts() | reader.facts, reader.examples
            self.shape, self.sizes = self.dataset.shape, self.dataset.sizes if config.sizes else None
            if config.vae:
                self.vae = load_vae(config.vae).to(accelerator.device)
                [self.shape, *_] = [latent_shape(self.vae, (self.shape[0], *size)) for size in self.dataset.sizes]
            if align_to is not None:
                self.vision = VisionModel(align_to).to(accelerator.device)
            if conditions is not None:
                images_of = self.dataset.shape[0], self.dataset.sizes
                self.condition = conditions.make_condition(*images_of, self.vae, self.shape[0])
        self.num_classes, self.id2label = self.dataset.num_classes, self.dataset.id2label
        if self.captions is not None:
            self.captions.text_encoder.to(accelerator.device)
        accelerator.print(self.dataset.describe())

    def find_captions(self, latents, config):
        """Those that were encoded with latents. Raises ValueError where there are none but shall be."""
        facts = self.dataset.facts.get("captions")
        if facts is None:
            if config.reads_captions or config.text_encoder:
                raise ValueError(
                    f"latents {latents!r} hold no captions: encode them anew by `score-sde encode-latents` with "
                    f"--caption_column and --text_encoder"
                )
        elif config.caption_column != "none":
            self.captions = encoder_of_latents(facts, config, latents)
            self.captions.settings["pooled"] = config.pooled_captions
            self.caption_column, self.examples = facts["column"], facts["examples"]
            self.caption_facts = {name: value for name, value in facts.items() if name != "examples"}
        if self.captions is None and (unused := config.given_without_captions()):
            hold = "hold none" if facts is None else "are read without, by caption_column none"
            raise ValueError(f"{unused} need captions, and the latents in {latents!r} {hold}: leave that out")

    def fingerprint(self):
        """What tells these data from others, as JSON: {"classes": names in order, "rows": a hash, "autoencoder": a hash
        of its weights}, each None where there are none. It is the same on every machine."""
        autoencoder = None if self.vae is None else fingerprint(self.vae)
        found = self.dataset.fingerprint() | {"autoencoder": autoencoder}
        if self.captions is not None:
            found |= {"text_encoder": self.captions.fingerprint, "caption_settings": self.captions.settings}
        found |= {} if self.vision is None else {"aligned_to": self.vision.fingerprint}
        return found if self.condition is None else found | {"condition": self.condition.facts()}

    def facts(self, config):
        """What the rows are and where they are from, for the card: "rows", "class_counts" ({name: rows}),
        "skipped_files" and what the config says; None where it isn't known. And "config": of latents without the
        options of images, which were not read; what is known of those is in latents.json."""
        if config.latents:
            source = self.dataset.facts | {"skip_corrupt_images": bool(self.dataset.facts.get("skipped_rows"))}
        else:
            source = vars(config) | {"dataset_on_hub": on_hub(config.dataset)}
        keys = ("dataset", "dataset_on_hub", "split", "resolution", "background", "skip_corrupt_images")
        facts = {key: source.get(key) for key in keys} | ({"resolution": None} if self.sizes else {})
        unread = {field.name for field in fields(DataConfig)} - {"num_workers"} if config.latents else set()
        options = {name: value for name, value in asdict(config).items() if name not in unread}
        told = {} if self.captions is None else {"captions": self.caption_facts}
        told |= {} if self.condition is None else {"condition": self.condition.facts()}
        return self.dataset.row_facts() | facts | told | {"config": options}
