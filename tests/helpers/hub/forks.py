"""Runs the Python programs that it reads from stdin, each in a fork of itself: what takes seconds to import is there.

Each line is a JSON object with "code", "arguments", "environment" and "output", a folder for stdout and stderr. Answers
by the process's id, and by its exit status once it has ended.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import diffusers
import torch
from diffusers import (  # noqa: F401
    AutoencoderKL,
    DiffusionPipeline,
    DiTPipeline,
    FluxPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)

import score_sde.sharing.hub  # noqa: F401


torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
diffusers.utils.logging.disable_progress_bar()
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(os.path.join(job["output"], name), os.O_CREAT | os.O_WRONLY), descriptor)
        os.environ.update(job["environment"])
        sys.argv = ["program", *job["arguments"]]
        status = 0
        try:
            exec(compile(job["code"], "<program>", "exec"), {"__name__": "__main__"})
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(bool(error.code))
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
