"""The whole way in minutes on two CPU cores: data, training, samples, folder, figures, card.

    score-sde quick-start
    score-sde quick-start --data text

Images: autoencoder, latents, a class-conditional latent DiT. Text: a DiT on characters. Each stage is a command of its
own, printed as it starts, with an installed YAML file of its settings. A stage that is done is not run again, and a
stage that was stopped goes on from its last checkpoint: to resume, run the same command again.
"""

import argparse
import os
import shlex
import shutil
import time

from score_sde.sharing.facts import read_facts
from score_sde.training import encode_latents, evaluate, train, train_autoencoder
from score_sde.training.parts.options import OneLineParser, one_line_errors


DATA = {"images": "quick_start", "text": "quick_start_text"}


def main(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="images", help="what is learned (default: images)")
    parser.add_argument("--output_dir", help="folder for everything that is written (default: runs/ and its name)")
    arguments = parser.parse_args(argv)
    output_dir = arguments.output_dir or os.path.join("runs", DATA[arguments.data])
    run_stages(arguments.data, output_dir)
    {"images": show_images, "text": show_texts}[arguments.data](output_dir)


def run_stages(data, output_dir):
    """Run the commands of a quick start that are not done yet."""

    def at(*names):
        return os.path.join(output_dir, *names)

    autoencoder = ["--output_dir", at("autoencoder"), "--resume_from_checkpoint", "latest"]
    latents = ["--vae", at("autoencoder", "vae"), "--output_dir", at("latents")]
    diffusion = ["--output_dir", at("diffusion"), "--resume_from_checkpoint", "latest"]
    if data == "images":
        diffusion = ["--latents", at("latents"), *diffusion]
    # (configuration, command, script, its options, what it makes)
    stages = [
        ("autoencoder", "train-autoencoder", train_autoencoder, autoencoder, at("autoencoder", "vae")),
        ("latents", "encode-latents", encode_latents, latents, None),
    ] * (data == "images")
    stages += [
        ("diffusion", "train", train, diffusion, at("diffusion", "pipeline")),
        (
            *("evaluation", "evaluate", evaluate, ["--pipeline", at("diffusion", "pipeline")]),
            at("diffusion", "pipeline", "metrics.json"),
        ),
    ]
    started = time.monotonic()
    for number, (name, command, script, options, result) in enumerate(stages, start=1):
        arguments = [f"{DATA[data]}/{name}", *options]
        print(f"\n[{number}/{len(stages)}] score-sde {command} {shlex.join(arguments)}", flush=True)
        if result and os.path.exists(result):
            print(f"already done: {result}")
            continue
        script.main(arguments)
    print(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes")


def show_images(output_dir):
    pipeline, picture = os.path.join(output_dir, "diffusion", "pipeline"), os.path.join(output_dir, "samples.png")
    shutil.copyfile(os.path.join(pipeline, "samples.png"), picture)
    print(f"look at {picture}; the pipeline and its card are in {pipeline}")


def show_texts(output_dir):
    pipeline = os.path.join(output_dir, "diffusion", "pipeline")
    for text in (read_facts(pipeline).get("samples") or {}).get("texts", []):
        print(f"\n{text}")
    print(f"\nthe pipeline and its card are in {pipeline}")


if __name__ == "__main__":
    with one_line_errors():
        main()
