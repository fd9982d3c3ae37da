"""diffusers' training examples with our scheduler in the place of theirs: two steps of each, from tiny random pipelines
on this disk, and the losses beside those of the scheduler that the example has.

git clone https://github.com/huggingface/diffusers
pip install datasets peft torchvision
python benchmarks/training_examples.py --diffusers diffusers --output benchmarks/training_examples.json

A line of an example is changed, the one after its imports, as a user does: `from score_sde import ScoreSDEScheduler as
DDPMScheduler`; where an example builds a scheduler instead of opening one, that call names the path, too.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path

import accelerate
import datasets  # noqa: F401
import diffusers
import numpy as np
import peft  # noqa: F401
import torch
import torchvision  # noqa: F401
from PIL import Image
from tiny_training_pipelines import flux, kandinsky_decoder, kandinsky_prior, sd3, stable_diffusion, stable_diffusion_xl

import score_sde.schedulers  # noqa: F401
from score_sde.pipelines.writing import write_json


COMMON = "--resolution 64 --train_batch_size 2 --max_train_steps 2 --seed 0 --checkpointing_steps 1000"
MODEL = f"--pretrained_model_name_or_path MODEL {COMMON}"
CAPTIONS = f"{MODEL} --train_data_dir CAPTIONED"
PHOTOS = f"{MODEL} --instance_data_dir PHOTOS --instance_prompt dog"
CONTROL = f"{MODEL} --dataset_name PAIRS --conditioning_image_column conditioning_image"
EDITS = f"{MODEL} --dataset_name PAIRS --original_image_column image --edit_prompt_column text"
EDITS += " --edited_image_column conditioning_image"
WORD = f"{MODEL} --train_data_dir PHOTOS --placeholder_token new --initializer_token a"
KANDINSKY = "--pretrained_prior_model_name_or_path PRIOR --pretrained_decoder_model_name_or_path MODEL"
KANDINSKY += f" --train_data_dir CAPTIONED {COMMON}"
SNR, V = "--snr_gamma 5", "--prediction_type v_prediction"
# example: the pipeline that it starts from, its arguments, and more arguments of further runs
EXAMPLES = {
    "unconditional_image_generation/train_unconditional.py": (
        None,
        "--train_data_dir PHOTOS --resolution 32 --train_batch_size 2 --save_images_epochs 1 "
        "--num_epochs 1 --ddpm_num_inference_steps 2 --eval_batch_size 1 --model_config_name_or_path NETWORK",
        ["--prediction_type sample"],
    ),
    "text_to_image/train_text_to_image.py": (stable_diffusion, CAPTIONS, [SNR, V, f"{SNR} {V}"]),
    "text_to_image/train_text_to_image_lora.py": (stable_diffusion, CAPTIONS, [SNR, V]),
    "text_to_image/train_text_to_image_sdxl.py": (
        stable_diffusion_xl,
        CAPTIONS,
        [SNR, V, "--prediction_type sample", "--timestep_bias_strategy later"],
    ),
    "text_to_image/train_text_to_image_lora_sdxl.py": (stable_diffusion_xl, CAPTIONS, [SNR, V]),
    "dreambooth/train_dreambooth.py": (stable_diffusion, PHOTOS, ["--snr_gamma 5"]),
    "dreambooth/train_dreambooth_lora.py": (stable_diffusion, PHOTOS, []),
    "dreambooth/train_dreambooth_lora_sdxl.py": (stable_diffusion_xl, PHOTOS, ["--snr_gamma 5"]),
    "dreambooth/train_dreambooth_sd3.py": (sd3, PHOTOS, ["--weighting_scheme logit_normal"]),
    "dreambooth/train_dreambooth_lora_sd3.py": (sd3, PHOTOS, []),
    "dreambooth/train_dreambooth_flux.py": (flux, PHOTOS, ["--weighting_scheme sigma_sqrt"]),
    "dreambooth/train_dreambooth_lora_flux.py": (flux, PHOTOS, []),
    "dreambooth/train_dreambooth_lora_flux_kontext.py": (flux, PHOTOS, []),
    "textual_inversion/textual_inversion.py": (stable_diffusion, WORD, []),
    "textual_inversion/textual_inversion_sdxl.py": (stable_diffusion_xl, WORD, []),
    "custom_diffusion/train_custom_diffusion.py": (
        stable_diffusion,
        f"{PHOTOS} --modifier_token new --initializer_token a --no_safe_serialization",
        [],
    ),
    "controlnet/train_controlnet.py": (stable_diffusion, CONTROL, []),
    "controlnet/train_controlnet_sdxl.py": (stable_diffusion_xl, CONTROL, []),
    "controlnet/train_controlnet_sd3.py": (sd3, CONTROL, []),
    "controlnet/train_controlnet_flux.py": (flux, CONTROL, []),
    "flux-control/train_control_flux.py": (flux, CONTROL, []),
    "flux-control/train_control_lora_flux.py": (flux, CONTROL, []),
    "instruct_pix2pix/train_instruct_pix2pix.py": (stable_diffusion, EDITS, []),
    "instruct_pix2pix/train_instruct_pix2pix_sdxl.py": (stable_diffusion_xl, EDITS, []),
    "kandinsky2_2/text_to_image/train_text_to_image_prior.py": (kandinsky_decoder, KANDINSKY, [SNR]),
    "kandinsky2_2/text_to_image/train_text_to_image_lora_prior.py": (kandinsky_decoder, KANDINSKY, []),
    "kandinsky2_2/text_to_image/train_text_to_image_decoder.py": (kandinsky_decoder, KANDINSKY, [SNR]),
    "kandinsky2_2/text_to_image/train_text_to_image_lora_decoder.py": (kandinsky_decoder, KANDINSKY, []),
    "consistency_distillation/train_lcm_distill_lora_sdxl.py": (
        stable_diffusion_xl,
        f"--pretrained_teacher_model MODEL --dataset_name CAPTIONED {COMMON}",
        [],
    ),
    "advanced_diffusion_training/train_dreambooth_lora_sd15_advanced.py": (stable_diffusion, PHOTOS, [SNR]),
    "advanced_diffusion_training/train_dreambooth_lora_sdxl_advanced.py": (stable_diffusion_xl, PHOTOS, [SNR]),
    "advanced_diffusion_training/train_dreambooth_lora_flux_advanced.py": (flux, PHOTOS, []),
}
IMPORT = "from score_sde import ScoreSDEScheduler as {}\n"


def with_ours(source):
    """An example with our scheduler: imported under the name of theirs, and told the path where it is built anew."""
    names = {"DDPMScheduler", "FlowMatchEulerDiscreteScheduler"} & set(re.findall(r"\w+Scheduler", source))
    [name] = names
    line = re.search(r"^check_min_version\(", source, re.MULTILINE)
    source = source[: line.start()] + IMPORT.format(name) + source[line.start() :]
    return re.sub(rf"\b{name}\((?=\S|\n)", f'{name}(sde_type="discrete_vp", ', source)


def write_images(folder):
    """Four images each in PHOTOS; in CAPTIONED with captions; and in PAIRS with captions and one more image."""
    random = np.random.default_rng(0)
    for name, columns in (("PHOTOS", ()), ("CAPTIONED", ("image",)), ("PAIRS", ("image", "conditioning_image"))):
        (folder / name).mkdir()
        rows = [{"text": "dog"} | {f"{each}_file_name": f"{each}{i}.png" for each in columns} for i in range(4)]
        for i in range(4):
            for each in columns or ("photo",):
                pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{each}{i}.png")
        if columns:
            (folder / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def run(source, arguments, folder, log):
    """The losses of an example, in this process."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    losses, backward = [], accelerate.Accelerator.backward

    def recorded(accelerator, loss, **options):
        losses.append(float(loss))
        backward(accelerator, loss, **options)

    accelerate.Accelerator.backward = recorded
    os.chdir(folder)
    # some examples draw without a seed
    torch.manual_seed(0)
    np.random.seed(0)
    script = Path("example.py")
    script.write_text(source)
    sys.argv = [str(script), *arguments]
    try:
        exec(compile(source, script, "exec"), {"__name__": "__main__", "__file__": str(script.resolve())})
    except BaseException:
        traceback.print_exc()
        raise
    return losses


def child(connection, *arguments):
    try:
        connection.send(run(*arguments))
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}"[:300])
    connection.close()


def in_a_process(*arguments):
    """What `run` returns, or how it failed, in a fork of this process, which has imported all that takes seconds."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return f"ended with {process.exitcode}"
    finally:
        process.join()


def compare(source, options, folder, logs):
    """The losses of an example with its own scheduler and with ours, or how it failed, and how far they are apart."""
    row = {}
    for kind, code in (("stock", source), ("ours", with_ours(source))):
        work = Path(tempfile.mkdtemp(dir=folder))
        # of its own also by name: datasets are cached by the arguments
        row[kind] = in_a_process(code, [*options, "--output_dir", str(work / "out")], work, f"{logs}_{kind}.txt")
    if all(isinstance(losses, list) for losses in row.values()):
        row["difference"] = max(abs(a - b) / abs(a) for a, b in zip(row["stock"], row["ours"], strict=True))
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", required=True, type=Path, help="a clone of diffusers")
    parser.add_argument("--only", default="", help="a part of the names of the examples to run")
    parser.add_argument("--output", type=Path, help="a JSON file of what was found, beside what it has")
    parser.add_argument("--logs", type=Path, help="a folder for what the examples print")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "DIFFUSERS_VERBOSITY": "error"}
    torch.set_num_threads(1)
    known = arguments.output is not None and arguments.output.is_file()
    found = json.loads(arguments.output.read_text())["examples"] if known else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder)
        places = {name: str(folder / name) for name in ("PHOTOS", "CAPTIONED", "PAIRS")}
        for name, (make, line, variations) in EXAMPLES.items():
            if arguments.only not in name:
                continue
            for word, build in (("MODEL", make), ("PRIOR", kandinsky_prior), ("NETWORK", network)):
                if word in line.split():
                    places[word] = str(folder / build.__name__)
                    if not os.path.isdir(places[word]):
                        build(places[word])
            source = (arguments.diffusers / "examples" / name).read_text()
            for more in ("", *variations):
                options = [places.get(word, word) for word in f"{line} {more}".split()]
                logs = (arguments.logs or folder) / f"{Path(name).stem}{more.replace(' ', '')}"
                row = found[f"{name} {more}".strip()] = compare(source, options, folder, logs)
                print(name, more, row.get("difference", row), flush=True)
                if arguments.output:
                    write_json(arguments.output, {"diffusers": diffusers.__version__, "examples": found})


def network(folder):
    """The config of a small network of pixels."""
    diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    ).save_config(folder)


if __name__ == "__main__":
    main()
