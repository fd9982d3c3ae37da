"""The page of a Space: a model draws, and one of its images, sounds or videos, or all points, are shown on the way from
noise.

`score-sde space` opens it on this machine. A Space carries this file; it needs torch, diffusers and
gradio.
"""

import base64
import copy
import math
import re
import tempfile
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps


PREDICTORS = ("auto", "ddim", "dpmpp_2m", "unipc_2", "deis_3", "adams_4", "heun", "ancestral", "euler_maruyama")
# those that have a meaning for points of a domain
PREDICTORS_OF_DOMAINS = ("auto", "ddim", "heun", "deis_2", "euler_maruyama")
EVERY_CLASS, NO_CLASS = "every class in turn", "no class"
FRAMES, FRAMES_OF_POINTS = 10, 4
# what one click may ask for
MOST_STEPS, MOST_IMAGES, MOST_POINTS, MOST_GUIDANCE, LARGEST_SEED, LONGEST_PROMPT = 100, 64, 2000, 20, 2**53, 2000


def tiles(images, columns, side):
    """PIL images as one grid, each enlarged by a whole number to about `side` pixels."""
    zoom = max(1, side // images[0].width)
    size = (zoom * images[0].width, zoom * images[0].height)
    images = [image.resize(size, Image.Resampling.NEAREST).convert("RGB") for image in images]
    rows = -(-len(images) // columns)
    return make_image_grid(images + [Image.new("RGB", size, "white")] * (rows * columns - len(images)), rows, columns)


def kind_of(pipeline):
    """The name of what a pipeline draws, and how many a click may ask for."""
    # the code of older bundles says nothing of kinds
    name = getattr(getattr(pipeline, "kind", None), "name", "image")
    return name, MOST_POINTS if name == "point" else MOST_IMAGES


def shown(pipeline, outputs, columns, captions=None):
    """A picture of outputs of a pipeline, in so many columns, of points a plot for each of `captions`, one text for
    each point; and HTML that plays them: of images none, of videos a GIF, of sounds the first ones."""
    name, _ = kind_of(pipeline)
    if name == "image":
        return tiles(outputs, columns, 96), ""
    with tempfile.TemporaryDirectory() as folder:
        pipeline.kind.save_grid(outputs, f"{folder}/samples.png", columns, captions)
        with Image.open(f"{folder}/samples.png") as picture:
            picture.load()
        data = {path: base64.b64encode(path.read_bytes()).decode() for path in sorted(Path(folder).iterdir())}
    players = [
        f'<img src="data:image/gif;base64,{each}">'
        if path.suffix == ".gif"
        else f'<audio controls src="data:audio/wav;base64,{each}"></audio>'
        for path, each in data.items()
        if path.suffix in (".gif", ".wav")
    ]
    return picture, "\n".join(players)


def whole_number(name, value, least, most):
    """A value as a whole number, which a browser may send as 3.0. Raises ValueError for another, or out of bounds."""
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (whole and value == int(value) and least <= value <= most):
        raise ValueError(f"{name} {str(value)[:50]!r} must be a whole number from {least} to {most}")
    return int(value)


def predictors_of(pipeline):
    """The samplers that the page offers: of a consistency model its own alone, of a flow map that beside the others."""
    config = pipeline.scheduler.config
    own = config.get("predictor", "auto")
    if config.get("network_map") == "consistency":
        return (own,)
    if config.get("domain") is not None:
        return PREDICTORS_OF_DOMAINS
    return PREDICTORS if own in PREDICTORS or config.get("network_map") is None else (own, *PREDICTORS)


def guidance_offered(pipeline):
    """(the guidance scale that the page begins with, whether another may be chosen, whether words may be led away
    from). A network that has learned guidance with one scale takes no other, and one that has learned any leads away
    from nothing else."""
    # the code of older bundles doesn't say
    worded = getattr(pipeline, "takes_prompts", False)
    config, seeing = pipeline.denoiser.config, getattr(pipeline, "takes_condition_image", False)
    folded = config.get("folded_guidance") is not None
    guided = (pipeline.null_label is not None or worded or seeing) and not folded
    scale = (3 if worded else 1.5) if guided else 1
    return scale, guided, worded and not folded and not config.get("guidance_embeds")


def lines_of(name, text):
    """The lines of a text that hold something, at least one, which may be empty. Raises ValueError for what is no text,
    or too long."""
    if not isinstance(text, str) or len(text) > LONGEST_PROMPT:
        raise ValueError(f"{name} {str(text)[:50]!r} must be a text of at most {LONGEST_PROMPT} characters")
    return [line.strip() for line in text.splitlines() if line.strip()] or [""]


def fitted(image, pipeline):
    """A visitor's picture as the condition image of a pipeline: turned upright, cut to its proportions around the
    middle, resized. Raises ValueError for what is none."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"the image {str(image)[:50]!r} must be a picture")
    _, height, width = pipeline.condition_shape()
    return ImageOps.fit(ImageOps.exif_transpose(image), (width, height), Image.Resampling.LANCZOS)


@torch.no_grad()
def draw(
    pipeline,
    label,
    predictor,
    num_inference_steps,
    guidance_scale,
    seed,
    num_images,
    prompt=None,
    negative_prompt="",
    condition_image=None,
):
    """Draw images, and follow the first of them, or of points all. The pipeline stays as it is: calls may overlap.

    Args:
        pipeline: a `ScoreSDEPipeline`.
        label: a class name or number; None for every class in turn, or of a model without classes; "" for no class.
        predictor: one of `predictors_of` the pipeline.
        num_inference_steps: of the pipeline, 1 to `MOST_STEPS`.
        guidance_scale: of the pipeline, 0 to `MOST_GUIDANCE`.
        seed: image i is drawn from seed + i; 0 to `LARGEST_SEED`.
        num_images: how many, 1 to `MOST_IMAGES`, of points to `MOST_POINTS`.
        prompt: what a model that follows words is to draw, each line of it in turn; an empty one is none. None for a
            model that follows no words.
        negative_prompt: what guidance leads away from, one text; an empty one is none.
        condition_image: what a model sees beside the sample, a PIL image, which is `fitted`; None for no image.

    Returns:
        (a grid of the images; two rows of pictures, the first image's noisy sample and below it what the network takes
        it for, at times from the beginning to the end, of points a row of plots of all of them; the number of network
        evaluations; HTML that plays sounds and videos). Raises ValueError for what is out of bounds, and for what the
        pipeline can't do.
    """
    offered = predictors_of(pipeline)
    if predictor not in offered:
        raise ValueError(f"sampler {str(predictor)[:50]!r} is unknown; choose one of {', '.join(offered)}")
    num_inference_steps = whole_number("time steps", num_inference_steps, 1, MOST_STEPS)
    kind, most = kind_of(pipeline)
    num_images = whole_number(f"{kind}s", num_images, 1, most)
    seed = whole_number("seed", seed, 0, LARGEST_SEED)
    number = isinstance(guidance_scale, (int, float)) and not isinstance(guidance_scale, bool)
    if not (number and 0 <= guidance_scale <= MOST_GUIDANCE):
        raise ValueError(f"guidance scale {str(guidance_scale)[:50]!r} must be a number from 0 to {MOST_GUIDANCE}")
    if label is not None and not (isinstance(label, (int, str)) and not isinstance(label, bool)):
        raise ValueError(f"class {str(label)[:50]!r} must be the name or the number of one")
    words, conditions, negative = {}, {}, None
    if prompt is not None:
        prompts, [unwanted, *more] = lines_of("prompt", prompt), lines_of("negative prompt", negative_prompt)
        if more:
            raise ValueError("the negative prompt must be one line")
        # the prompts of all images, and what the network is told of the first
        words = {"prompt": [prompts[i % len(prompts)] for i in range(num_images)]}
        conditions = pipeline.encode_prompt(prompts[:1])
        if unwanted:
            words["negative_prompt"], negative = unwanted, pipeline.encode_prompt(unwanted)
    if condition_image is not None:
        words["condition_image"] = fitted(condition_image, pipeline)
        conditions |= pipeline.encode_condition(words["condition_image"])
    # a pipeline of this call's own, around the same networks
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, predictor=predictor)
    pipeline = copy.copy(pipeline)
    pipeline.scheduler = scheduler
    labels = None
    if pipeline.num_classes is not None and label != "":
        labels = [i % pipeline.num_classes for i in range(num_images)] if label is None else [label] * num_images
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(num_images)]
    noise = pipeline.prepare_noise(num_images, generators, None)
    samples, followed = [], num_images if kind == "point" else 1
    output = pipeline(
        class_labels=labels,
        **words,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        latents=noise,
        generator=generators,
        callback_on_step_end=lambda pipe, step, timestep, tensors: samples.append(tensors["latents"][:followed]),
    )

    # the plan that the pipeline followed
    # the code of older bundles tells nothing of guidance
    told = pipeline.told_of_guidance(guidance_scale) if hasattr(pipeline, "told_of_guidance") else {}
    scheduler.set_timesteps(num_inference_steps, device=noise.device, **told)
    samples = [noise[:followed] * scheduler.init_noise_sigma, *samples]
    # where time steps begin: the entries between are stages of one
    begins = range(0, output.nfe, scheduler.order)
    frames = FRAMES_OF_POINTS if kind == "point" else FRAMES
    entries = [begins[i] for i in sorted({round(i * (len(begins) - 1) / (frames - 1)) for i in range(frames)})]
    times = [scheduler.path_time(scheduler.timesteps[entry]) for entry in entries]
    if kind == "point":
        names = pipeline.config.id2label or {}
        classes = labels and [names.get(str(each), str(each)) for each in labels]
        way = [points_at(scheduler, samples[entry], t) for entry, t in zip(entries, times, strict=True)]
        captions = [f"t = {float(t):.2g}" for t in times for _ in range(num_images)]
        way, _ = shown(pipeline, pipeline.finish(torch.cat(way)), len(entries), captions)
        grid, _ = shown(pipeline, output.images, 1, classes)
        return grid, way, output.nfe, ""
    # the code of older bundles knows no words or images
    told = {"conditions": conditions, "negative_conditions": negative} if words else {}
    denoise = scheduler.denoiser(pipeline.guided_network(1, labels and labels[:1], guidance_scale, **told))
    noisy = [scheduler.path.unit_variance(samples[entry], t) for entry, t in zip(entries, times, strict=True)]
    denoised = [denoise(samples[entry], t) for entry, t in zip(entries, times, strict=True)]
    pictures = pipeline.finish(torch.cat([*noisy, *denoised]))
    # a column for every class, or prompt, as long as that fits
    in_turn = len(prompts) if prompt is not None else pipeline.num_classes if labels and label is None else 1
    columns = in_turn if 1 < in_turn <= 10 else 8
    grid, players = shown(pipeline, output.images, min(num_images, columns))
    return grid, shown(pipeline, pictures, len(entries))[0], output.nfe, players


def points_at(scheduler, points, t):
    """Points on their way, as they lie on their domain, or in flat space with the variance of data."""
    return points if scheduler.config.get("domain") is not None else scheduler.path.unit_variance(points, t)


def as_title(text):
    """A text as Markdown that shows it, whatever stands in it."""
    return re.sub(r"([^\w\s])", r"\\\1", " ".join(text.split()))


def page(pipeline, title):
    """The gradio page on which a pipeline draws."""
    import gradio

    pipeline.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    names = pipeline.config.id2label or {}
    classes = [(names.get(str(label), str(label)), label) for label in range(pipeline.num_classes or 0)]
    # the code of older bundles doesn't say
    worded = getattr(pipeline, "takes_prompts", False)
    seeing = getattr(pipeline, "takes_condition_image", False)
    kind, most = kind_of(pipeline)
    made, several = f"{kind}s".capitalize(), 2 * len(classes) if 0 < len(classes) <= 10 else 8
    way_of = "The first one's way: the noisy sample, and below it what the network takes it for"
    if kind == "point":
        several, way_of = 1000, "Their way from noise"
    first_scale, guided, rather_not = guidance_offered(pipeline)
    samplers = predictors_of(pipeline)
    map_steps = pipeline.scheduler.config.get("map_steps")
    beside = "Image that the model sees"
    if seeing:
        beside += " (height {1} x width {2} pixels; others are cut and resized)".format(*pipeline.condition_shape())
    # words alone, unless a class is chosen
    unclassed = [NO_CLASS] if worded and pipeline.null_label is not None else []

    def on_click(label, predictor, steps, guidance_scale, seed, num_images, prompt, negative_prompt, image):
        label = {EVERY_CLASS: None, NO_CLASS: ""}.get(label, label)
        words = {"prompt": prompt, "negative_prompt": negative_prompt} if worded else {}
        words |= {"condition_image": image} if seeing else {}
        try:
            grid, way, nfe, players = draw(pipeline, label, predictor, steps, guidance_scale, seed, num_images, **words)
        except ValueError as error:
            raise gradio.Error(str(error)[:500]) from None
        return f"### {made} after {nfe} network evaluations of {predictor}", grid, way, players

    with gradio.Blocks(title=title) as blocks:
        gradio.Markdown("# " + as_title(title))
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                prompt = gradio.Textbox(
                    "", label="Prompt", lines=2, placeholder="what to draw; several lines in turn", visible=worded
                )
                negative = gradio.Textbox("", label="Rather not", visible=rather_not)
                image = gradio.Image(label=beside, type="pil", image_mode="RGBA", visible=seeing)
                label = gradio.Dropdown(
                    [*unclassed, EVERY_CLASS, *classes],
                    value=(unclassed or [EVERY_CLASS])[0],
                    label="Class",
                    visible=bool(classes),
                )
                predictor = gradio.Dropdown(list(samplers), value=samplers[0], label="Sampler")
                steps = gradio.Slider(1, MOST_STEPS, value=map_steps or 20, step=1, label="Time steps")
                guidance = gradio.Slider(
                    1,
                    6,
                    value=first_scale,
                    step=0.1,
                    label="Guidance scale (1: none)",
                    visible=guided,
                )
                seed = gradio.Number(0, precision=0, label="Seed")
                num_images = gradio.Slider(1, most, value=several, step=1, label=made)
                button = gradio.Button("Draw", variant="primary")
            with gradio.Column(scale=3):
                caption = gradio.Markdown(f"### {made}")
                grid = gradio.Image(show_label=False, format="png", interactive=False, buttons=[])
                players = gradio.HTML(visible=made in ("Sounds", "Videos"))
                gradio.Markdown(f"### {way_of}")
                way = gradio.Image(show_label=False, format="png", interactive=False, buttons=[])
        inputs = [label, predictor, steps, guidance, seed, num_images, prompt, negative, image]
        button.click(on_click, inputs, [caption, grid, way, players], api_name="draw")
    return blocks
