"""The page of a Space of texts: a model writes, and its text is shown while it forms.

`score-sde space` opens it on this machine. A Space carries this file; it needs torch, diffusers, transformers and
gradio.
"""

import queue
import re
import threading

import torch


EVERY_CLASS, NO_CLASS = "any class", "no class"
# what one click may ask for
MOST_STEPS, MOST_GUIDANCE, MOST_TEMPERATURE, LARGEST_SEED, LONGEST_PROMPT = 256, 20, 2, 2**53, 4000


def number(name, value, least, most, whole=False):
    """A number, which a browser may send as 3.0 or as a text. Raises ValueError for another, or out of bounds."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most
    if not is_number or (whole and value != int(value)):
        raise ValueError(f"{name} {str(value)[:50]!r} must be a {'whole ' * whole}number from {least} to {most}")
    return int(value) if whole else value


def write(pipeline, prompt, label, num_inference_steps, temperature, guidance_scale, seed):
    """Write one text, from its noise on. The pipeline stays as it is: calls may overlap.

    Args:
        pipeline: a `ScoreSDETextPipeline`.
        prompt: what the text begins with, with [MASK] for every token to be filled in; an empty one is none.
        label: a class name or number, None for no class.
        num_inference_steps: 1 to `MOST_STEPS`.
        temperature: 0 to `MOST_TEMPERATURE`.
        guidance_scale: 0 to `MOST_GUIDANCE`.
        seed: 0 to `LARGEST_SEED`.

    Yields:
        (the text as far as it is known, network evaluations up to it, None on the way). Raises ValueError, at the
        first one, for what is out of bounds, and for what the pipeline can't do.
    """
    if not isinstance(prompt, str) or len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"prompt {str(prompt)[:50]!r} must be a text of at most {LONGEST_PROMPT} characters")
    if label is not None and not (isinstance(label, (int, str)) and not isinstance(label, bool)):
        raise ValueError(f"class {str(label)[:50]!r} must be the name or the number of one")
    arguments = {
        "prompt": prompt or None,
        "class_labels": None if label is None else [label],
        "num_inference_steps": number("time steps", num_inference_steps, 1, MOST_STEPS, whole=True),
        "temperature": number("temperature", temperature, 0, MOST_TEMPERATURE),
        "guidance_scale": number("guidance scale", guidance_scale, 0, MOST_GUIDANCE),
        "generator": torch.Generator("cpu").manual_seed(number("seed", seed, 0, LARGEST_SEED, whole=True)),
    }
    shown, ended = queue.Queue(), []

    def show(call, step, timestep, tensors):
        shown.put((call.decode(tensors["token_ids"])[0], None))

    def run():
        try:
            output = pipeline(batch_size=1, callback_on_step_end=show, **arguments)
            shown.put((output.texts[0], output.nfe))
        except Exception as error:  # whatever it is, it is raised to who reads
            ended.append(error)
        finally:
            shown.put(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while (found := shown.get()) is not None:
        yield found
    if ended:
        raise ended[0]


def as_title(text):
    """A text as Markdown that shows it, whatever stands in it."""
    return re.sub(r"([^\w\s])", r"\\\1", " ".join(text.split()))


def page(pipeline, title):
    """The gradio page on which a pipeline writes."""
    import gradio

    pipeline.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    names = pipeline.config.id2label or {}
    classes = [(names.get(str(label), str(label)), label) for label in range(pipeline.num_classes or 0)]
    unclassed = [NO_CLASS] if pipeline.null_label is not None or not classes else []

    def on_click(prompt, label, steps, temperature, guidance_scale, seed):
        try:
            for text, nfe in write(
                pipeline, prompt, None if label == NO_CLASS else label, steps, temperature, guidance_scale, seed
            ):
                yield text, "" if nfe is None else f"{nfe} network evaluations"
        except ValueError as error:
            raise gradio.Error(str(error)[:500]) from None

    with gradio.Blocks(title=title) as blocks:
        gradio.Markdown("# " + as_title(title))
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                prompt = gradio.Textbox(
                    "", label="Prompt", lines=3, placeholder="how the text begins; [MASK]: a gap to fill in"
                )
                label = gradio.Dropdown(
                    [*unclassed, *classes],
                    value=unclassed[0] if unclassed else classes[0][1],
                    label="Class",
                    visible=bool(classes),
                )
                steps = gradio.Slider(1, MOST_STEPS, value=64, step=1, label="Time steps")
                temperature = gradio.Slider(0, MOST_TEMPERATURE, value=1, step=0.05, label="Temperature")
                guidance = gradio.Slider(
                    1, 6, value=1.5 if classes else 1, step=0.1, label="Guidance scale (1: none)", visible=bool(classes)
                )
                seed = gradio.Number(0, precision=0, label="Seed")
                button = gradio.Button("Write", variant="primary")
            with gradio.Column(scale=3):
                text = gradio.Textbox(label="Text", lines=20, interactive=False)
                evaluations = gradio.Markdown()
        inputs = [prompt, label, steps, temperature, guidance, seed]
        button.click(on_click, inputs, [text, evaluations], api_name="write")
    return blocks
