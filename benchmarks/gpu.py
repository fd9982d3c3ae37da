"""The package on one GPU, beside facebookresearch/DiT and diffusers: one command, in parts.

    python benchmarks/gpu.py --original DiT            # a clone of facebookresearch/DiT, which needs timm
    python benchmarks/gpu.py --report                  # the Markdown of what is in benchmarks/gpu.json

    tests          pytest -m gpu
    training_step  DiT-XL/2 on 32x32x4 latents: images/s, share of the peak (MFU), memory, where the time goes
    training_loop  train.py's loop on precomputed latents beside that step
    sampling       DiT-XL/2 at 10 and 20 evaluations with guidance, beside diffusers' DiTPipeline
    unets          DDPM++, NCSN++ and ADM-256 beside diffusers' UNet2DModel
    variants       the training step in other ways, in turns with ours: compiled otherwise, the original as published

Each part is a process of its own, which stops itself after --seconds; the JSON file and its Markdown are written after
every figure. A part that is whole in that file is not run again without --again.

All sides have the same inputs, bfloat16 autocast, fused AdamW, the same average of the weights, and the kernel of
attention that is the fastest here; transformers are compiled block by block. They take turns within one process; what
waits keeps only its weights. Figures are medians over the rounds.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, UNet2DModel
from dit_gflops import gflops
from dit_speed import BUILDERS, Workload, build_diffusers, build_original, build_ours, machine
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from score_sde import ScoreSDEPipeline, ScoreSDEScheduler, ScoreUNetModel
from score_sde.pipelines.writing import whole_file, write_json
from score_sde.training.parts.latent_shards import shard_path, shard_record
from score_sde.training.parts.latents import fingerprint, latent_statistics
from score_sde.training.parts.loop import fit, make_accelerator
from score_sde.training.parts.options import parse
from score_sde.training.parts.run_folder import open_run
from score_sde.training.train import DiffusionTask, TrainConfig


GIB = 2**30
MEMORY_LIMIT = 120 * GIB
BATCHES = (256, 192, 128, 96, 64, 32, 16, 8, 4, 2)
EMA_DECAY = 0.9999

# kinds of kernels by their names, the first that fits
KINDS = {
    "attention": r"flash|fmha|sdpa|attention",
    "convolutions": r"conv|fprop|dgrad|wgrad|implicit",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|splitk|triton_mm",
    "AdamW": r"adam",
    "average of the weights": r"multi_tensor|foreach|lerp",
    "copies": r"memcpy|memset",
    "norms and sums": r"triton_(red|per)|norm|reduce",
    "elementwise": r"triton_poi|elementwise|vectorized",
}
# of a part, without some 12 for its imports: all but the tests are done within 450
SECONDS = {"tests": 240, "training_step": 130, "training_loop": 80, "sampling": 60, "unets": 60, "variants": 50}
ATTENTION = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# for any shape that the first of these does not take
FALLBACKS = [*ATTENTION.values(), SDPBackend.MATH]


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; all of them unless given")
    parser.add_argument("--again", action="store_true", help="run parts again that are whole in the file")
    parser.add_argument("--report", action="store_true", help="print the Markdown of the file, and measure nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("gpu.json"), help="JSON file")
    parser.add_argument("--seconds", type=float, help=f"of every part; unless given {SECONDS}")
    parser.add_argument("--original", help="folder of a clone of facebookresearch/DiT, measured too")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", default="XL/2", help="of the transformers (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="images of a training step; else the largest that fits, up to 256")
    parser.add_argument("--images", type=int, default=32, help="images of a sampled batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="training steps of a turn (default: %(default)s)")
    parser.add_argument("--loop_steps", type=int, default=60, help="steps of train.py (default: %(default)s)")
    parser.add_argument("--compile", choices=["on", "off"], default="on", help="off: to try this script")
    parser.add_argument("--tiny", action="store_true", help="on a CPU with tiny networks: to try this script")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # run a part in this process
    arguments = parser.parse_args(argv)
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"part {part!r} is unknown; choose among {', '.join(PARTS)}")
    if arguments.tiny:
        tiny = {"device": "cpu", "size": "S/8", "batch": 2, "images": 2, "rounds": 2, "steps": 1, "loop_steps": 6}
        vars(arguments).update(tiny)
    if arguments.device == "cuda" and not torch.cuda.is_available() and not arguments.report:
        parser.error("torch sees no GPU here; --tiny tries this script on a CPU")
    arguments.dtype = "bfloat16"
    return arguments


# --- the file of figures


def read(path):
    return json.loads(path.read_text()) if path.exists() else {"parts": {}}


class Figures:
    """The figures of one part, {name: value}, in the file of all; what is set is written at once."""

    def __init__(self, path, part, seconds):
        self.path, self.part, self.values = path, part, {"complete": False}
        self.deadline = time.monotonic() + seconds

    def __setitem__(self, name, value):
        self.values[name] = value
        report = read(self.path)
        report["parts"][self.part] = self.values
        for path, text in (
            (self.path, json.dumps(report, indent=1) + "\n"),
            (self.path.with_suffix(".md"), markdown(report)),
        ):
            with whole_file(path) as temporary:
                Path(temporary).write_text(text)

    def __getitem__(self, name):
        return self.values[name]

    def left(self):
        """Seconds."""
        return self.deadline - time.monotonic()

    @contextlib.contextmanager
    def attempt(self, name, needs=10):
        """What fails in here is written down, and what comes after it still runs. Nothing begins in the last `needs`
        seconds; what is left out is written down, too."""
        began = time.monotonic()
        try:
            if self.left() < needs:
                raise TimeoutError(f"not run: {self.left():.0f} s were left, and it takes {needs}")
            print(f"{self.part}: {name}", flush=True)
            yield
        except Exception as error:
            text = str(error) if isinstance(error, TimeoutError) else traceback.format_exc()
            print(text, flush=True)
            self["problems"] = self.values.get("problems", {}) | {name: text}
        self["took"] = self.values.get("took", {}) | {name: round(time.monotonic() - began, 1)}


def gpu_state():
    """What nvidia-smi says of clocks and power, None without it."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields.split(","), [value.strip() for value in line.splitlines()[0].split(",")], strict=True))


def versions():
    found = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


# --- measuring


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, device, repeats=1):
    """Of one call, on the clock, the device's work included."""
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    wait(device)
    return (time.perf_counter() - start) / repeats


def kernel_seconds(function, device, repeats=20):
    """The median time of one call on the device, after three for warming up."""
    for _ in range(3):
        function()
    if device == "cpu":
        return statistics.median(seconds_of(function, device) for _ in range(repeats))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)) / 1000


def interleaved(sides, figures, rounds, steps, device):
    """{name: [seconds of a step in each round]}: `sides` are {name: (enter, step, leave)}, which take turns, in
    alternating order, for as long as there is time."""
    seconds = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides) if turn % 2 == 0 else reversed(sides):
            if figures.left() < 8 and turn:
                return seconds
            enter, step, leave = sides[name]
            enter()
            seconds[name].append(seconds_of(step, device, steps))
            leave()
    return seconds


def ceilings(arguments):
    """Operations per second of a large matrix product in bfloat16 on random numbers, and of those of the network, in
    all three layouts; bytes per second of a copy."""
    device, side = arguments.device, 8192 if arguments.device == "cuda" else 256
    random = {"device": device, "dtype": torch.bfloat16}
    a, b = (torch.randn(side, side, **random) for _ in range(2))
    found = {"matrix_product": 2 * side**3 / kernel_seconds(lambda: a @ b, device)}
    source = torch.randn(side * side * 8, **random)
    target = torch.empty_like(source)
    found["copied_bytes"] = 2 * source.nbytes / kernel_seconds(lambda: target.copy_(source), device)
    with torch.device("meta"):
        config = build_ours(arguments.size, arguments).config
    width = config.hidden_size
    rows = (arguments.batch or 256) * (config.sample_size // config.patch_size) ** 2
    found["of_the_network"] = {}
    operations = seconds = 0
    for count, inputs, outputs in ((4, width, width), (1, width, 4 * width), (1, 4 * width, width)):
        tokens, weight = torch.randn(rows, inputs, **random), torch.randn(outputs, inputs, **random)
        change = torch.randn(rows, outputs, **random)
        for name, product in (
            ("forward", lambda x=tokens, w=weight: x @ w.T),
            ("of inputs", lambda g=change, w=weight: g @ w),
            ("of weights", lambda g=change, x=tokens: g.T @ x),
        ):
            taken = kernel_seconds(product, device, repeats=10)
            found["of_the_network"][f"{inputs} to {outputs}, {name}"] = 2 * rows * inputs * outputs / taken
            operations, seconds = operations + count * 2 * rows * inputs * outputs, seconds + count * taken
    found["of_the_network"]["all"] = operations / seconds
    return found


def attention_times(arguments):
    """{kernel: milliseconds of attention forward and backward for the tokens of a training batch}."""
    with torch.device("meta"):
        config = build_ours(arguments.size, arguments).config
    heads, tokens = config.num_attention_heads, (config.sample_size // config.patch_size) ** 2
    shape = (arguments.batch or 256, tokens, heads, config.hidden_size // heads)
    query, key, value, change = (
        torch.randn(shape, device=arguments.device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)
    )
    for each in (query, key, value):
        each.requires_grad_()

    def attend():
        out = F.scaled_dot_product_attention(query, key, value)
        torch.autograd.grad(out, (query, key, value), change)

    found = {"torch's choice": 1000 * kernel_seconds(attend, arguments.device)}
    for name, backend in ATTENTION.items():
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):  # not every one is on every device
            found[name] = 1000 * kernel_seconds(attend, arguments.device)
    return found


def fastest_attention(times):
    """A context with the fastest of `attention_times` in front."""
    known = {name: taken for name, taken in times.items() if name in ATTENTION}
    if not known:
        return contextlib.nullcontext()
    first = ATTENTION[min(known, key=known.get)]
    return sdpa_kernel([first, *(each for each in FALLBACKS if each is not first)], set_priority=True)


def breakdown(step, steps=2):
    """Milliseconds of the device in a step by kinds of kernels, and "idle"; and the longest kernels."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kinds, kernels, busy, end = dict.fromkeys([*KINDS, "other"], 0.0), {}, 0.0, 0.0
    events.sort(key=lambda event: event.time_range.start)
    for event in events:
        start, stop = event.time_range.start, event.time_range.end
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.name, re.IGNORECASE)), "other")
        milliseconds = (stop - start) / 1000 / steps
        kinds[kind] += milliseconds
        seen = kernels.setdefault(event.name[:120], [0.0, 0.0])
        seen[0], seen[1] = seen[0] + milliseconds, seen[1] + 1 / steps
        busy, end = busy + max(0.0, stop - max(start, end)), max(end, stop)
    kinds["idle"] = (end - events[0].time_range.start - busy) / 1000 / steps
    longest = sorted(kernels.items(), key=lambda each: -each[1][0])[:40]
    return {
        "milliseconds": {kind: round(value, 2) for kind, value in kinds.items() if value > 0},
        "kernels": [[name, round(value, 3), count] for name, (value, count) in longest],
    }


class Side(Workload):
    """A network with its training step, asleep or awake: asleep it holds its weights alone."""

    def __init__(self, build, size, arguments, compile_it):
        plain = SimpleNamespace(**vars(arguments) | {"compile": False})
        super().__init__(build, size, plain)
        config = self.model.config
        named = ("num_classes", "num_embeds_ada_norm", "num_class_embeds")
        if all(config.get(name) is None for name in named):
            self.labels = None
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.average = None
        if arguments.compile == "on":
            compile_it(self.model)

    def wake(self):
        """The first step allocates: it is taken here."""
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.train()

    def sleep(self):
        self.average = None
        self.optimizer.state.clear()
        self.optimizer.zero_grad()
        if self.latents.is_cuda:
            torch.cuda.empty_cache()

    def train(self):
        """A step, which is not waited for."""
        self.model.train()
        self.forward().float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.average, self.parameters, 1 - EMA_DECAY)

    @torch.no_grad()
    def sample(self):
        self.model.eval()
        self.forward()


def compile_blocks(model):
    """Compile the blocks of a transformer of any of the sides, one for all."""
    for block in getattr(model, "blocks", None) or model.transformer_blocks:
        block.compile()


def fitting_side(build, size, arguments, compile_it):
    """A `Side` awake, compiled, of --batch or the largest batch that fits, and the facts of it."""
    side = None
    for batch in [arguments.batch] if arguments.batch else BATCHES:
        try:
            side = Side(build, size, SimpleNamespace(**vars(arguments) | {"batch": batch}), compile_it)
            seconds = seconds_of(side.wake, arguments.device)
            side.train()
            break
        except torch.OutOfMemoryError:
            if batch == (arguments.batch or BATCHES[-1]):
                raise
        # outside the clause, whose error holds the tensors
        side = None
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    parameters = sum(parameter.numel() for parameter in side.model.parameters())
    return side, {"batch": batch, "parameters": parameters, "first_step_seconds": round(seconds, 1)}


def peak_gib(side, others, device):
    """Peak memory of training steps of one side that is awake, in GiB, without the weights of the others."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    side.train()
    torch.cuda.synchronize()
    sleeping = sum(tensor.nbytes for other in others for tensor in (*other.parameters, *other.model.buffers()))
    return (torch.cuda.max_memory_allocated() - sleeping) / GIB


def train_interleaved(sides, figures, arguments):
    """Turns of the training steps of {name: Side}; {name: images per second}, of which the rounds go into `figures`."""
    turns = {name: (side.wake, side.train, side.sleep) for name, side in sides.items()}
    seconds = interleaved(turns, figures, arguments.rounds, arguments.steps, arguments.device)
    for name in sides:
        figures[name] = figures[name] | {"step_seconds": figures[name].get("step_seconds", []) + seconds[name]}
    return {name: len(side.latents) / statistics.median(seconds[name]) for name, side in sides.items() if seconds[name]}


# --- the parts


def run_tests(arguments, figures):
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-x" if arguments.tiny else "--maxfail=40"]
    command += ["-p", "no:cacheprovider", "--no-header", "--tb=short", "tests"]
    with figures.attempt("pytest"):
        try:
            done = subprocess.run(
                command,
                cwd=Path(__file__).parents[1],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=max(10, figures.left() - 10),
            )
            lines = done.stdout.splitlines()
        except subprocess.TimeoutExpired as expired:
            lines = [*(expired.stdout or b"").decode(errors="replace").splitlines(), "stopped: out of time"]
        figures["command"] = " ".join(["python", *command[1:]])
        figures["closing_line"] = lines[-1] if lines else "nothing was printed"
        figures["failures"] = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
        figures["output_tail"] = lines[-150:]


def training_step(arguments, figures):
    with figures.attempt("ceilings"):
        figures["ceilings"] = ceilings(arguments)
    times = {}
    with figures.attempt("attention"):
        times = figures["attention_milliseconds"] = attention_times(arguments)
    with torch.device("meta"):
        model = build_ours(arguments.size, arguments)
    # as the paper counts, but multiply and add are two
    figures["operations_per_image"] = operations = 3 * 2e9 * gflops(model)
    sides = {}
    with fastest_attention(times):
        for name in BUILDERS:
            if name == "facebookresearch" and not arguments.original:
                continue
            with figures.attempt(name, needs=30):
                side, facts = fitting_side(BUILDERS[name], arguments.size, arguments, compile_blocks)
                figures[name] = facts | {"peak_memory_gib": peak_gib(side, sides.values(), arguments.device)}
                side.sleep()
                sides[name] = side
        with figures.attempt("steps"):
            peak = figures["ceilings"]["matrix_product"]
            for name, speed in train_interleaved(sides, figures, arguments).items():
                figures[name] = figures[name] | {"images_per_second": speed, "mfu": speed * operations / peak}
            figures["gpu_after"] = gpu_state()
        for name, side in sides.items() if arguments.device == "cuda" else ():
            with figures.attempt(f"profile of {name}"):
                side.wake()
                figures[name] = figures[name] | {"profile": breakdown(side.train)}
                side.sleep()


def variants(arguments, figures):
    def compiling(**options):
        return lambda model: [block.compile(options=options) for block in model.blocks]

    ours = {
        # the norms read rows of more than 1024 numbers in a loop, unless this lets both ways be tried
        "multi_kernel": (compiling(**{"triton.multi_kernel": 1}), 20),
        "max_autotune_pointwise": (compiling(max_autotune_pointwise=True), 30),
        "compiled as a whole": (lambda model: model.compile(), 80),
    }
    # {name: (model, changed arguments, how it is compiled, seconds that it takes)}
    sides = {f"score_sde, {name}": (build_ours, {}, *how) for name, how in ours.items()}
    if arguments.original:
        # as its own train.py runs: float32 by TF32, not compiled
        published = {"dtype": "float32", "compile": "off", "batch": 2 if arguments.tiny else 96}
        sides["facebookresearch, as published"] = (build_original, published, compile_blocks, 20)
    before = read(arguments.output)["parts"].get("training_step", {})
    with fastest_attention(before.get("attention_milliseconds", {})):
        with figures.attempt("score_sde"):
            plain, figures["score_sde"] = fitting_side(build_ours, arguments.size, arguments, compile_blocks)
            plain.sleep()
        for key, (build, options, compile_it, needs) in sides.items():
            with figures.attempt(key, needs=needs):
                changed = SimpleNamespace(**vars(arguments) | options | {"rounds": 2, "steps": min(arguments.steps, 4)})
                side, facts = fitting_side(build, arguments.size, changed, compile_it)
                figures[key] = facts | {"peak_memory_gib": peak_gib(side, [plain], arguments.device)}
                side.sleep()
                speeds = train_interleaved({"score_sde": plain, key: side}, figures, changed)
                beside = {"images_per_second": speeds[key], "plain_images_per_second": speeds["score_sde"]}
                figures[key] = figures[key] | beside


def write_latents(folder, rows, shape, arguments):
    """Random moments, as `score-sde encode-latents` writes them, and a tiny autoencoder of such latents beside them."""
    torch.manual_seed(0)
    blocks = 4  # 8 pixels a side for a latent
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        latent_channels=shape[0],
        norm_num_groups=4,
    )
    vae.save_pretrained(folder / "vae")
    shard_size = min(2048, rows)
    facts = {
        "dataset": "random",
        "split": "train",
        "resolution": 8 * shape[-1],
        "rows": rows,
        "num_classes": 1000,
        "id2label": None,
        "vae": str(folder / "vae"),
        "vae_fingerprint": fingerprint(vae),
        "both_flips": False,
        "shape": list(shape),
        "shard_size": shard_size,
        "num_shards": rows // shard_size,
        "shards": [],
    }
    for shard in range(facts["num_shards"]):
        tensors = {"mean": torch.randn(shard_size, *shape), "std": 0.1 * torch.rand(shard_size, *shape)}
        statistics_of_one = latent_statistics([(tensors["mean"], tensors["std"])])
        save_file(tensors | {"labels": torch.randint(1000, (shard_size,))}, shard_path(folder, shard))
        facts["shards"].append(shard_record(shard_path(folder, shard)))
    write_json(folder / "latents.json", facts | {"statistics": statistics_of_one})


def training_loop(arguments, figures):
    step = read(arguments.output)["parts"].get("training_step", {})
    batch = arguments.batch or step.get("score_sde", {}).get("batch", 256)
    times, peak = step.get("attention_milliseconds"), step.get("ceilings", {}).get("matrix_product")
    if times is None:
        with figures.attempt("attention"):
            times = attention_times(arguments)
    figures["batch"], figures["steps"], interval = batch, arguments.loop_steps, max(1, arguments.loop_steps // 6)
    with tempfile.TemporaryDirectory() as folder, fastest_attention(times or {}):
        folder = Path(folder)
        (folder / "latents").mkdir()
        with figures.attempt("latents"):
            write_latents(folder / "latents", max(16, 32 * batch), (4, 32, 32), arguments)
        with figures.attempt("train.py", needs=40):
            argv = ["--latents", folder / "latents", "--output_dir", folder / "run", "--checkpointing_steps", 0]
            argv += ["--network_name", f"DiT-{arguments.size}", "--mixed_precision", "bf16", "--batch_size", batch]
            argv += ["--max_train_steps", arguments.loop_steps, "--logging_steps", interval]
            argv += ["--peak_tflops", f"{peak / 1e12:.3f}"] if peak else []
            argv += ["--compile", "true"] if arguments.compile == "on" else []
            figures["command"] = "score-sde train " + " ".join(map(str, argv)).replace(str(folder), "runs")
            log = run_train([str(each) for each in argv])
            # the first window compiles
            figures["windows"] = [
                {key: line[key] for key in ("images_per_second", "waiting_for_data", "mfu")} for line in log[1:]
            ]
            for key in ("images_per_second", "waiting_for_data"):
                figures[key] = statistics.median(line[key] for line in log[1:])
        with figures.attempt("step", needs=20):
            # train.py's network: without a learned variance
            fitting = SimpleNamespace(**vars(arguments) | {"batch": batch})
            side, facts = fitting_side(build_without_variance, arguments.size, fitting, compile_blocks)
            seconds = [seconds_of(side.train, arguments.device, arguments.steps) for _ in range(3)]
            figures["step"] = facts | {"images_per_second": batch / statistics.median(seconds), "seconds": seconds}
            figures["loop_to_step"] = figures["images_per_second"] / figures["step"]["images_per_second"]


def build_without_variance(size, arguments):
    return type(build_ours("S/8", arguments)).from_name(f"DiT-{size}", learn_sigma=False)


def run_train(argv):
    """The lines of log.jsonl of train.py's loop, without the pipeline that it saves in the end."""
    config = parse(TrainConfig, argv)
    accelerator = make_accelerator(config)
    with open_run(config, accelerator) as run:
        fit(config, accelerator, run, DiffusionTask(config, accelerator))
    gc.collect()
    return [json.loads(line) for line in (Path(config.output_dir) / "log.jsonl").read_text().splitlines()]


def sampling(arguments, figures):
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    times = read(arguments.output)["parts"].get("training_step", {}).get("attention_milliseconds", {})
    widths = (8,) * 4 if arguments.tiny else (128, 256, 512, 512)  # Stable Diffusion's
    with torch.device(arguments.device):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=widths[0] if arguments.tiny else 32,
            sample_size=256,
        ).to(dtype)
        networks = {"score_sde": build_ours(arguments.size, arguments)}
        networks["diffusers"] = build_diffusers(arguments.size, arguments)
    for network in networks.values():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        network.to(dtype).eval()
        if arguments.compile == "on":
            compile_blocks(network)
    path = ScoreSDEScheduler(sde_type="discrete_vp", beta_schedule="linear", variance_type="learned_range")
    ours = ScoreSDEPipeline(path, transformer=networks["score_sde"], vae=vae)
    theirs = DiTPipeline(networks["diffusers"], vae, DDIMScheduler(beta_schedule="linear", clip_sample=False))
    pipelines = {"score_sde": ours, "diffusers": theirs}
    labels = list(range(arguments.images))
    figures["images"], figures["guidance_scale"] = arguments.images, 4.0

    def draw(name, evaluations, **more):
        generator = torch.Generator(arguments.device).manual_seed(0)
        options = {"guidance_scale": 4.0, "num_inference_steps": evaluations, "generator": generator}
        return pipelines[name](class_labels=labels, **options | {"output_type": "pt"} | more)

    with fastest_attention(times), torch.no_grad():
        cases = {}
        for name, pipeline in pipelines.items():
            pipeline.set_progress_bar_config(disable=True)
            with figures.attempt(f"{name}, first call", needs=20):
                first = seconds_of(lambda name=name: draw(name, 10), arguments.device)
                figures[name] = {"first_call_seconds": round(first, 1)}
                for evaluations in (10, 20):
                    cases[f"{name}, {evaluations} evaluations"] = (name, evaluations, {})
        if "score_sde" in figures.values:
            for evaluations in (10, 20):
                figures[f"evaluations of {evaluations} steps"] = draw("score_sde", evaluations).nfe
                cases[f"score_sde, {evaluations} evaluations, latents"] = (
                    "score_sde",
                    evaluations,
                    {"output_type": "latent"},
                )
        calls = {
            case: lambda n=name, e=evaluations, m=more: draw(n, e, **m)
            for case, (name, evaluations, more) in cases.items()
        }
        latents = torch.randn(arguments.images, 4, 32, 32, device=arguments.device, dtype=dtype)
        calls["autoencoder alone"] = lambda: vae.decode(latents)
        doubled, twice = torch.cat([latents] * 2), torch.tensor(labels * 2, device=arguments.device)
        for name, network in networks.items():
            # as the pipelines call it, 20 times
            times_20 = torch.full((2 * arguments.images,), 500.0, device=arguments.device)
            calls[f"{name}, 20 evaluations of the bare network"] = lambda network=network, t=times_20: [
                network(doubled, t, class_labels=twice) for _ in range(20)
            ]
        with figures.attempt("speed"):
            turns = {case: (int, call, int) for case, call in calls.items()}
            seconds = interleaved(turns, figures, arguments.rounds, 1, arguments.device)
            figures["seconds"] = {case: statistics.median(taken) for case, taken in seconds.items() if taken}
            figures["gpu_after"] = gpu_state()


def build_diffusers_unet(size, arguments):
    """A `UNet2DModel` as near to one of ours as its options allow."""
    tiny = arguments.tiny
    shared = {"norm_eps": 1e-6, "downsample_type": "resnet", "upsample_type": "resnet"}
    if size == "ADM-256":
        widths = (32, 64) if tiny else (256, 256, 512, 512, 1024, 1024)
        attends = [False, True] if tiny else [False] * 3 + [True] * 3
        kinds = {"resnet_time_scale_shift": "scale_shift", "attention_head_dim": 32 if tiny else 64}
        kinds |= {
            "layers_per_block": 2,
            "num_class_embeds": 1001,
            "sample_size": 16 if tiny else 256,
            "out_channels": 6,
        }
        prefix = ""
    else:
        widths = (32, 64) if tiny else (128, 256, 256, 256)
        attends = [False, True] if tiny else [False, True, False, False]
        kinds = {"layers_per_block": 1 if tiny else 4, "sample_size": 32, "dropout": 0.1, "attention_head_dim": None}
        prefix = ""
        if size == "NCSN++":
            prefix, kinds["time_embedding_type"], kinds["norm_num_groups"] = "Skip", "fourier", None
            del shared["downsample_type"], shared["upsample_type"]
    down = [f"Attn{prefix}DownBlock2D" if attend else f"{prefix}DownBlock2D" for attend in attends]
    up = [f"Attn{prefix}UpBlock2D" if attend else f"{prefix}UpBlock2D" for attend in reversed(attends)]
    return UNet2DModel(
        down_block_types=tuple(down), up_block_types=tuple(up), block_out_channels=widths, **shared | kinds
    )


def build_our_unet(size, arguments):
    small = {"block_out_channels": (32, 64), "layers_per_block": 1} if arguments.tiny else {}
    if arguments.tiny and size == "ADM-256":
        small |= {"sample_size": 16, "attention_resolutions": (8,), "attention_head_dim": 32}
    return ScoreUNetModel.from_name(size, **small)


UNETS = {"score_sde": build_our_unet, "diffusers": build_diffusers_unet}


def unets(arguments, figures):
    # batches that leave the device with more to do than the host; compiled as a whole where there is time
    sizes = {"ADM-256": 16, "DDPM++": 512, "NCSN++": 512}
    few = vars(arguments) | {"rounds": 2, "steps": 2}
    ways = {"contiguous": few | {"compile": "off"}, "channels_last": few | {"compile": "off"}, "compiled": few}
    if arguments.compile == "off":
        del ways["compiled"]
    for way, options in ways.items():
        for size, batch in sizes.items():
            changed = SimpleNamespace(**options | {"batch": 2 if arguments.tiny else batch})
            with figures.attempt(f"{size}, {way}", needs=120 if way == "compiled" else 8):
                measure_unets(size, way, changed, figures)


def measure_unets(size, way, options, figures):
    """Training steps and forward passes of one U-Net of both sides; attention is torch's choice here."""
    sides = {}
    for name, build in UNETS.items():

        def build_so(size, arguments, build=build):
            model = build(size, arguments)
            return model if way == "contiguous" else model.to(memory_format=torch.channels_last)

        side, facts = fitting_side(build_so, size, options, lambda model: model.compile())
        if way != "contiguous":
            side.latents = side.latents.contiguous(memory_format=torch.channels_last)
        key = f"{size}, {way}, {name}"
        figures[key] = facts | {"peak_memory_gib": peak_gib(side, sides.values(), options.device)}
        side.sleep()
        sides[key] = side
    for key, speed in train_interleaved(sides, figures, options).items():
        figures[key] = figures[key] | {"images_per_second": speed}
    if way != "compiled":  # that would compile anew
        for side in sides.values():
            side.sample()
        turns = {key: (int, side.sample, int) for key, side in sides.items()}
        for key, seconds in interleaved(turns, figures, options.rounds, options.steps, options.device).items():
            speed = options.batch / statistics.median(seconds)
            figures[key] = figures[key] | {"evaluations_per_second": speed}


PARTS = {
    "tests": run_tests,
    "training_step": training_step,
    "training_loop": training_loop,
    "sampling": sampling,
    "unets": unets,
    "variants": variants,
}


# --- the report


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def number(value, form=".1f"):
    return "" if value is None else format(value, form)


def markdown(report):
    """The figures as Markdown."""
    parts, texts = report["parts"], []
    if "machine" in report:
        gpu = report["machine"].get("gpu_state") or {}
        versions_of = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
        limit = f", driver {gpu['driver_version']}, at most {gpu['power.limit']}" if gpu else ""
        texts.append(f"Machine: {report['machine'].get('gpu', report['machine']['cpu'])}{limit}; {versions_of}.")
    for part, write in REPORTS.items():
        if part in parts:
            texts += write(parts[part])
            problems = parts[part].get("problems", {})
            texts += [f"Not measured: {name} ({text.strip().splitlines()[-1]})." for name, text in problems.items()]
    return "\n\n".join(text for text in texts if text) + "\n"


def report_tests(part):
    return [f"`{part.get('command')}`: {part.get('closing_line')}"]


def report_training_step(part):
    texts, sides = [], [name for name in part if name in BUILDERS]
    if "ceilings" in part:
        found = part["ceilings"]
        texts.append(
            f"A matrix product of bfloat16 reaches {found['matrix_product'] / 1e12:.0f} TFLOP/s here (8192^3, random "
            f"numbers), those of the network's layers {found['of_the_network']['all'] / 1e12:.0f} together, and a copy "
            f"{found['copied_bytes'] / 1e12:.2f} TB/s."
        )
    if "attention_milliseconds" in part:
        each = ", ".join(f"{name} {taken:.2f}" for name, taken in part["attention_milliseconds"].items())
        texts.append(f"Attention of one layer, forward and backward, milliseconds: {each}.")
    rows = []
    for name in sides:
        side = part[name]
        speed, memory = side.get("images_per_second"), side.get("peak_memory_gib")
        rows.append([name, f"{side['parameters']:,}", side["batch"], number(speed), number(side.get("mfu"), ".1%")])
        rows[-1] += [number(memory), number(side["first_step_seconds"], ".0f")]
    header = ["training step", "parameters", "batch", "images/s", "MFU", "peak memory, GiB", "first step, s"]
    texts.append(table(header, rows))
    ours, peers = part.get("score_sde", {}), [part.get(name, {}) for name in ("diffusers", "facebookresearch")]
    speeds = [peer["images_per_second"] for peer in peers if "images_per_second" in peer]
    if speeds and "images_per_second" in ours:
        texts.append(f"Ours / the faster peer: {ours['images_per_second'] / max(speeds):.2f}.")
    profiles = {name: part[name]["profile"]["milliseconds"] for name in sides if "profile" in part[name]}
    if profiles:
        kinds = [kind for kind in [*KINDS, "other", "idle"] if any(kind in each for each in profiles.values())]
        rows = [[kind, *(number(each.get(kind, 0.0)) for each in profiles.values())] for kind in kinds]
        texts.append(table(["milliseconds of a step", *profiles], rows))
    return texts


def report_training_loop(part):
    if "loop_to_step" not in part:
        return []
    rows = [
        ["train.py's loop", part["batch"], number(part["images_per_second"]), f"{part['waiting_for_data']:.1%}"],
        ["the bare step", part["batch"], number(part["step"]["images_per_second"]), ""],
        ["loop / step", "", f"{part['loop_to_step']:.3f}", ""],
    ]
    return [f"`{part['command']}`", table(["", "batch", "images/s", "waiting for data"], rows)]


def ddim_evaluations(evaluations):
    """{target: evaluations that DDIM needs for the median error of ours with so many, inf beyond the last measured}
    under guidance 4 on Stable Diffusion's levels, by samplers_guided.json: of each number the best of DDIM's grids, and
    between two numbers a power law."""
    report = json.loads(Path(__file__).with_name("samplers_guided.json").read_text())
    scale, found = 2, {}  # of 1, 2, 4, 7.5, 12
    for name, ours in report["median, rms, diverged by scale"].items():
        if not name.startswith("sd |"):
            continue
        aim, found[name.split()[-1]] = ours["told"][str(evaluations)][scale][0], math.inf
        grids = [grid for sampler, grid in report["stock"][name].items() if sampler.startswith("DDIM")]
        errors = {int(count): min(grid[count][scale][0] for grid in grids) for count in grids[0]}
        counts = sorted(errors)
        for before, after in zip(counts, counts[1:], strict=False):
            if errors[before] > aim >= errors[after]:
                share = math.log(errors[before] / aim) / math.log(errors[before] / errors[after])
                found[name.split()[-1]] = before * (after / before) ** share
                break
    return found


def report_equal_error(seconds):
    """What equal evaluations come to at equal error, where DDIM needs more of them."""
    rows = []
    for evaluations in (10, 20):
        ours, theirs = (seconds.get(f"{name}, {evaluations} evaluations") for name in ("score_sde", "diffusers"))
        for target, needed in ddim_evaluations(evaluations).items() if ours and theirs else ():
            shown = "more than 50" if needed == math.inf else f"{needed:.0f}"
            ratio = theirs / ours * min(needed, 50) / evaluations
            rows.append([evaluations, target, shown, ("> " if needed == math.inf else "") + f"{ratio:.1f}"])
    header = ["evaluations of ours", "target", "DDIM's for the same error", "ours / DiTPipeline"]
    return [table(header, rows)] if rows else []


def report_sampling(part):
    rows, seconds = [], part.get("seconds", {})
    for case, taken in seconds.items():
        ours = seconds.get(case.replace("diffusers", "score_sde")) if case.startswith("diffusers") else None
        ratio = number(ours and taken / ours, ".2f")
        rows.append([case, f"{taken:.3f}", number(part["images"] / taken), ratio])
    if not rows:
        return []
    header = [f"{part.get('images')} images", "seconds", "images/s", "ours / diffusers"]
    return [table(header, rows), *report_equal_error(seconds)]


def report_unets(part):
    rows = []
    for key, side in part.items():
        if not isinstance(side, dict) or "batch" not in side:
            continue
        size, way, name = key.split(", ")
        speed, forward = side.get("images_per_second"), side.get("evaluations_per_second")
        rows.append([size, way, name, f"{side['parameters']:,}", side["batch"], number(speed), number(forward)])
        rows[-1].append(number(side.get("peak_memory_gib")))
    header = ["U-Net", "", "", "parameters", "batch", "training, images/s", "forward, images/s", "peak memory, GiB"]
    return [table(header, rows)] if rows else []


def report_variants(part):
    rows = []
    for name, side in part.items():
        if isinstance(side, dict) and "plain_images_per_second" in side:
            speed, plain = side["images_per_second"], side["plain_images_per_second"]
            rows.append([name, side["batch"], number(speed), number(plain), number(speed / plain, ".3f")])
            rows[-1] += [number(side.get("peak_memory_gib")), number(side["first_step_seconds"], ".0f")]
    header = ["variant", "batch", "images/s", "score_sde beside it", "ratio", "peak memory, GiB", "first step, s"]
    return [table(header, rows)] if rows else []


REPORTS = {
    "tests": report_tests,
    "training_step": report_training_step,
    "training_loop": report_training_loop,
    "sampling": report_sampling,
    "unets": report_unets,
    "variants": report_variants,
}


# --- the processes


def run_here(part, arguments):
    """One part, in this process."""
    if arguments.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(0.97, MEMORY_LIMIT / total))
    # what is left of float32, of all sides; to change it later would compile everything anew
    torch.set_float32_matmul_precision("high")
    # a batch of another size is another program
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    figures = Figures(arguments.output, part, arguments.seconds or SECONDS[part])
    report = read(arguments.output)
    report["machine"] = machine(arguments.device) | {"gpu_state": gpu_state()}
    report["versions"], report["options"] = versions(), {name: str(value) for name, value in vars(arguments).items()}
    write_json(arguments.output, report)
    PARTS[part](arguments, figures)
    counters = torch._dynamo.utils.counters
    figures["graphs"] = {"compiled": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}
    figures["complete"] = "problems" not in figures.values


def main():
    arguments = parse_arguments()
    if arguments.report:
        print(markdown(read(arguments.output)))
        return
    if arguments.here:
        run_here(arguments.parts[0], arguments)
        return
    environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    given = [each for each in sys.argv[1:] if each not in PARTS]
    for part in arguments.parts or PARTS:
        if read(arguments.output)["parts"].get(part, {}).get("complete") and not arguments.again:
            print(f"{part}: in {arguments.output} already; --again runs it again")
            continue
        limit = (arguments.seconds or SECONDS[part]) + 45  # it stops itself; this is for one that hangs
        try:
            command = [sys.executable, __file__, part, *given, "--here"]
            done = subprocess.run(command, env=environment, timeout=limit).returncode
            problem = f"exit status {done}" if done else None
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s"
        if problem:
            print(f"{part}: {problem}", flush=True)
            figures = Figures(arguments.output, part, 0)
            figures.values = read(arguments.output)["parts"].get(part, figures.values)
            figures["problems"] = figures.values.get("problems", {}) | {"the process": problem}
    print(markdown(read(arguments.output)))


if __name__ == "__main__":
    main()
