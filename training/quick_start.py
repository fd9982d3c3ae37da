"""The whole way in minutes on two CPU cores: autoencoder, latents, class-conditional latent DiT, samples, folder, card.

    python training/quick_start.py

Each stage is a command of its own, printed as it starts; its settings are in training/configs/quick_start/. A stage
that is done is not run again, and a stage that was stopped goes on from its last checkpoint: to resume, run the same
command again.
"""

import argparse
import os
import shlex
import shutil
import sys
import time

from score_sde.training import encode_latents, evaluate, train, train_autoencoder
from score_sde.training.parts.options import one_line_errors


CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "quick_start")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/quick_start", help="folder for everything that is written")
    output_dir = parser.parse_args().output_dir

    def at(*names):
        return os.path.join(output_dir, *names)

    autoencoder = ["--output_dir", at("autoencoder"), "--resume_from_checkpoint", "latest"]
    latents = ["--vae", at("autoencoder", "vae"), "--output_dir", at("latents")]
    diffusion = ["--latents", at("latents"), "--output_dir", at("diffusion"), "--resume_from_checkpoint", "latest"]
    stages = [
        ("autoencoder", train_autoencoder, autoencoder, at("autoencoder", "vae")),
        ("latents", encode_latents, latents, None),
        ("diffusion", train, diffusion, at("diffusion", "pipeline")),
        (
            "evaluation",
            evaluate,
            ["--pipeline", at("diffusion", "pipeline")],
            at("diffusion", "pipeline", "metrics.json"),
        ),
    ]
    started = time.monotonic()
    for number, (name, script, options, result) in enumerate(stages, start=1):
        arguments = [os.path.relpath(os.path.join(CONFIGS, f"{name}.yaml")), *options]
        launch = [os.path.relpath(sys.executable), "-m", "accelerate.commands.launch", os.path.relpath(script.__file__)]
        command = shlex.join([*launch, *arguments])
        print(f"\n[{number}/{len(stages)}] {name}: {command}", flush=True)
        if result and os.path.exists(result):
            print(f"already done: {result}")
            continue
        script.main(arguments)
    shutil.copyfile(at("diffusion", "pipeline", "samples.png"), at("samples.png"))
    print(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes")
    print(f"look at {at('samples.png')}; the pipeline and its card are in {at('diffusion', 'pipeline')}")


if __name__ == "__main__":
    with one_line_errors():
        main()
