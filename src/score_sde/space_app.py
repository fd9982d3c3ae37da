"""The page of a Space: a model draws, and one of its images is shown on the way from noise.

`python -m score_sde.space` opens it on this machine. A Space carries this file; it needs torch, diffusers and gradio.
"""

import copy

import torch
from diffusers.utils import make_image_grid
from PIL import Image


PREDICTORS = ("auto", "ddim", "dpmpp_2m", "unipc_2", "deis_3", "adams_4", "heun", "ancestral", "euler_maruyama")
EVERY_CLASS = "every class in turn"
FRAMES = 10


def tiles(images, columns, side):
    """PIL images as one grid, each enlarged by a whole number to about `side` pixels."""
    zoom = max(1, side // images[0].width)
    size = (zoom * images[0].width, zoom * images[0].height)
    images = [image.resize(size, Image.Resampling.NEAREST).convert("RGB") for image in images]
    rows = -(-len(images) // columns)
    return make_image_grid(images + [Image.new("RGB", size, "white")] * (rows * columns - len(images)), rows, columns)


@torch.no_grad()
def draw(pipeline, label, predictor, num_inference_steps, guidance_scale, seed, num_images):
    """Draw images, and follow the first of them.

    Args:
        pipeline: a `ScoreSDEPipeline`.
        label: a class name or number; None for every class in turn, or of a model without classes.
        predictor: of `ScoreSDEScheduler`.
        num_inference_steps, guidance_scale: as for the pipeline.
        seed: image i is drawn from seed + i.
        num_images: how many.

    Returns:
        (a grid of the images; two rows of pictures, the first image's noisy sample and below it what the network takes
        it for, at times from the beginning to the end; the number of network evaluations). Raises ValueError for what
        the pipeline can't do.
    """
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, predictor=predictor)
    # requests draw at once: each on its own view of the pipeline
    pipeline = copy.copy(pipeline)
    pipeline.scheduler = scheduler
    labels = None
    if pipeline.num_classes is not None:
        labels = [i % pipeline.num_classes for i in range(num_images)] if label is None else [label] * num_images
    generators = [torch.Generator("cpu").manual_seed(int(seed) + i) for i in range(num_images)]
    noise = pipeline.prepare_noise(num_images, generators, None)
    samples = []
    output = pipeline(
        class_labels=labels,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        latents=noise,
        generator=generators,
        callback_on_step_end=lambda pipe, step, timestep, tensors: samples.append(tensors["latents"][:1]),
    )

    scheduler.set_timesteps(num_inference_steps)
    samples = [noise[:1] * scheduler.init_noise_sigma, *samples]
    # where time steps begin: the entries between are stages of one
    begins = range(0, output.nfe, scheduler.order)
    shown = [begins[i] for i in sorted({round(i * (len(begins) - 1) / (FRAMES - 1)) for i in range(FRAMES)})]
    denoise = scheduler.denoiser(pipeline.guided_network(1, labels and labels[:1], guidance_scale))
    noisy, denoised = [], []
    for entry in shown:
        t = scheduler.path_time(scheduler.timesteps[entry])
        noisy.append(scheduler.path.unit_variance(samples[entry], t))
        denoised.append(denoise(samples[entry], t))
    pictures = pipeline.finish(torch.cat([*noisy, *denoised]), "pil")
    # a column for every class, as long as that fits
    columns = pipeline.num_classes if labels and label is None and pipeline.num_classes <= 10 else 8
    return tiles(output.images, min(num_images, columns), 96), tiles(pictures, len(shown), 96), output.nfe


def page(pipeline, title):
    """The gradio page on which a pipeline draws."""
    import gradio

    pipeline.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    names = pipeline.config.id2label or {}
    classes = [(names.get(str(label), str(label)), label) for label in range(pipeline.num_classes or 0)]
    guided = pipeline.null_label is not None

    def on_click(label, predictor, steps, guidance_scale, seed, num_images):
        label = None if label == EVERY_CLASS else label
        try:
            grid, way, nfe = draw(pipeline, label, predictor, steps, guidance_scale, seed, num_images)
        except ValueError as error:
            raise gradio.Error(str(error)) from error
        return f"### Images after {nfe} network evaluations of {predictor}", grid, way

    with gradio.Blocks(title=title) as blocks:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                label = gradio.Dropdown(
                    [EVERY_CLASS, *classes], value=EVERY_CLASS, label="Class", visible=bool(classes)
                )
                predictor = gradio.Dropdown(list(PREDICTORS), value="auto", label="Sampler")
                steps = gradio.Slider(1, 100, value=20, step=1, label="Time steps")
                guidance = gradio.Slider(
                    1, 6, value=1.5 if guided else 1, step=0.1, label="Guidance scale (1: none)", visible=guided
                )
                seed = gradio.Number(0, precision=0, label="Seed")
                num_images = gradio.Slider(
                    1, 64, value=2 * len(classes) if 0 < len(classes) <= 10 else 8, step=1, label="Images"
                )
                button = gradio.Button("Draw", variant="primary")
            with gradio.Column(scale=3):
                caption = gradio.Markdown("### Images")
                grid = gradio.Image(show_label=False, format="png", interactive=False, buttons=[])
                gradio.Markdown("### The first one's way: the noisy sample, and below it what the network takes it for")
                way = gradio.Image(show_label=False, format="png", interactive=False, buttons=[])
        inputs = [label, predictor, steps, guidance, seed, num_images]
        button.click(on_click, inputs, [caption, grid, way], api_name="draw")
    return blocks
