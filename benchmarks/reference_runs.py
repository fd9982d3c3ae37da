"""The reference runs of one large GPU, beside each other in one command of ten minutes: trained by `score-sde train`
with the configurations in training/configs/, measured, and reported.

    python benchmarks/reference_runs.py --data FOLDER --output runs/reference --seconds 580
    python benchmarks/reference_runs.py --report runs/reference     # cards, pictures and tables of those

FOLDER (one or several) holds what a run needs, and a run whose data are not there is left out:

    cifar10/train*.parquet, test.parquet        resnet56_cifar10.safetensors
    clothing256/train.parquet, test.parquet     taesd3/   efficientnet_lite0/model.safetensors
    fashion_mnist/train.parquet, test.parquet   (without them, the 10,000 images inside the package)

- cifar10: class-conditional, pixels (cifar10/one_gpu). Fréchet distance, KID, precision and recall in the features of
  a ResNet-56 that classifies CIFAR-10, and what it says of the samples' classes, without guidance and with; bits/dim;
  the training images nearest to samples.
- clothing128: photographs at 128 px in the latents of a pretrained autoencoder (clothing128/one_gpu); whether a linear
  classifier of real photographs, on the features of an EfficientNet-Lite0, recognises the samples' classes.
- fashion_mnist: pixels, by likelihood (fashion_mnist/one_gpu); bits/dim, uniform dequantisation.
- quick_start: the quick start's own configurations, longer.

Each is a process of its own; those of a lane follow one another, lanes go side by side (--lanes). A run that isn't
through with its steps when its time is nearly over ends (--max_train_seconds), with its learning rate at 0 by then, and
is measured. What is found is written as it comes, to OUTPUT/NAME/result.json, tracebacks, too. A network whose
compilation takes too long is trained again without.
--pack FOLDER collects all but weights in one archive, and the weights of cifar10 in fp16 in pieces of 15 MiB. --report
takes the folder, or what the archive holds, and writes what is committed (reference_report.py).

--warm_up --lanes cifar10 compiles that run's network, for TORCHINDUCTOR_CACHE_DIR, and no more; --little is a rehearsal
on any machine, with tiny networks and few images.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from pathlib import Path


# what a run needs of the data
RUNS = {
    "cifar10": ["cifar10", "resnet56_cifar10.safetensors"],
    "clothing128": ["clothing256", "taesd3", "efficientnet_lite0"],
    "fashion_mnist": [],
    "quick_start": [],
}
# seconds that a run has, at most, and how many of them its measurements may take; and those of packing
SECONDS = {"cifar10": 600, "clothing128": 150, "fashion_mnist": 120, "quick_start": 120}
MEASURING = {"cifar10": 110, "clothing128": 30, "fashion_mnist": 40, "quick_start": 30}
PACKING = 12
# without a line in its log after so many seconds, a network that is compiled is trained without
PATIENCE = 190


# --- all of them --------------------------------------------------------------------------------------------------


def assemble(folders, output):
    """Copy several folders into one."""
    for folder in map(Path, folders):
        for path in sorted(folder.rglob("*")):
            copy = output / path.relative_to(folder)
            if path.is_file() and not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def run_lane(lane, ends, options):
    """The runs of a lane one after another, each with its seconds, or fewer where the time is too short for all."""
    for i, name in enumerate(lane):
        wanted = sum(SECONDS[each] for each in lane[i:])
        until = time.time() + SECONDS[name] * min(1, (ends - time.time()) / wanted)
        folder = options.output / name
        status = start(name, folder, until, options, PATIENCE if name == "cifar10" else None)
        if status is None:
            print(f"{name}: not compiled after {PATIENCE} s; without", flush=True)
            status = start(name, folder, until, options, None, "--eager")
        print(f"{name}: exit status {status}", flush=True)


def start(name, folder, until, options, patience, *more):
    """The exit status of a run in a process of its own, which is killed when its time is over; None for one that is
    given up, because after `patience` seconds it has logged nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--run", name, "--data", options.output / "data", "--output", folder]
    command += ["--until", until, "--seed", options.seed, *more]
    command += ["--little"] * options.little + ["--warm_up"] * options.warm_up
    began = time.time()
    with open(folder / "output.txt", "ab") as log:
        environment, command = os.environ | {"TQDM_MININTERVAL": "20"}, list(map(str, command))
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        while process.poll() is None and time.time() < until:
            given_up = patience and time.time() > began + patience and not (folder / "run/log.jsonl").exists()
            if given_up and not options.warm_up:
                break
            time.sleep(0.5)
        else:
            given_up = False
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return None if given_up else process.returncode


def gather(options):
    """reference_runs.json: the results of all runs."""
    results = {}
    for name in RUNS:
        path = options.output / name / "result.json"
        if path.is_file():
            results[name] = json.loads(path.read_text())
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/reference_runs.py", *words])
    document = {"seconds": options.seconds, "lanes": options.lanes, "command": command, "runs": results}
    (options.output / "reference_runs.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def pack(options):
    """What comes back of a machine that is given back: an archive of all but weights and data, and the weights of
    cifar10 in pieces."""
    options.pack.mkdir(parents=True, exist_ok=True)

    def small(entry):
        left_out = r"/(data|checkpoints|latents|weights)(/|$)|\.(safetensors|parquet|bin|partial|lock)$"
        return None if re.search(left_out, entry.name) else entry

    with tarfile.open(options.pack / "reference_runs.tar.gz", "w:gz") as archive:
        archive.add(options.output, arcname="reference", filter=small)
    for piece in sorted((options.output / "cifar10/weights").glob("weights-*")):
        shutil.copyfile(piece, options.pack / piece.name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, help="folders of data")
    parser.add_argument("--output", type=Path, default=Path("runs/reference"), help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=580, help="of the whole command (default: %(default)s)")
    parser.add_argument("--lanes", nargs="+", default=["cifar10", "clothing128,fashion_mnist,quick_start"])
    parser.add_argument("--run", choices=RUNS, help="one run alone, in this process")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--until", type=float, help="when the run's time is over, as time.time() has it")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--warm_up", action="store_true", help="compile, and no more")
    parser.add_argument("--little", action="store_true", help="a rehearsal with tiny networks")
    parser.add_argument("--pack", type=Path, help="folder for what is to be taken home")
    parser.add_argument("--report", type=Path, help="folder of runs that are over, to report")
    options = parser.parse_args()

    if options.report:
        from reference_report import report

        report(options.report)
        return
    if options.run:
        # imported here, so that the main process starts at once
        import reference_work

        work = reference_work.Run(options)
        work.write()
        reference_work.RUNS[options.run](work)
        return
    ends = time.time() + options.seconds - (PACKING if options.pack else 3)
    assemble(options.data, options.output / "data")
    lanes = []
    for lane in options.lanes:
        names = [name for name in lane.split(",") if name in RUNS]
        there = [name for name in names if all((options.output / "data" / each).exists() for each in RUNS[name])]
        print(f"lane: {', '.join(there)}" + "".join(f"; no data for {name}" for name in names if name not in there))
        lanes.append(there)
    threads = [threading.Thread(target=partial(run_lane, lane, ends, options)) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gather(options)
    if options.pack:
        pack(options)
    print((options.output / "reference_runs.json").read_text()[-6000:])


if __name__ == "__main__":
    main()
