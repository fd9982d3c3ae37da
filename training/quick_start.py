"""The whole way in minutes on two CPU cores: autoencoder, latents, class-conditional latent DiT, samples, folder, card.

    score-sde quick-start

Each stage is a command of its own, printed as it starts, with an installed YAML file of its settings. A stage that is
done is not run again, and a stage that was stopped goes on from its last checkpoint: to resume, run the same command
again.
"""

import argparse
import os
import shlex
import shutil
import time

from score_sde.training import encode_latents, evaluate, train, train_autoencoder
from score_sde.training.parts.options import OneLineParser, one_line_errors


def main(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/quick_start", help="folder for everything that is written")
    output_dir = parser.parse_args(argv).output_dir

    def at(*names):
        return os.path.join(output_dir, *names)

    autoencoder = ["--output_dir", at("autoencoder"), "--resume_from_checkpoint", "latest"]
    latents = ["--vae", at("autoencoder", "vae"), "--output_dir", at("latents")]
    diffusion = ["--latents", at("latents"), "--output_dir", at("diffusion"), "--resume_from_checkpoint", "latest"]
    evaluation = ["--pipeline", at("diffusion", "pipeline")]
    # (configuration, command, script, its options, what it makes)
    stages = [
        ("autoencoder", "train-autoencoder", train_autoencoder, autoencoder, at("autoencoder", "vae")),
        ("latents", "encode-latents", encode_latents, latents, None),
        ("diffusion", "train", train, diffusion, at("diffusion", "pipeline")),
        ("evaluation", "evaluate", evaluate, evaluation, at("diffusion", "pipeline", "metrics.json")),
    ]
    started = time.monotonic()
    for number, (name, command, script, options, result) in enumerate(stages, start=1):
        arguments = [f"quick_start/{name}", *options]
        print(f"\n[{number}/{len(stages)}] score-sde {command} {shlex.join(arguments)}", flush=True)
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
