"""Every pipeline class of the installed diffusers, built from tiny random components, with `ScoreSDEScheduler`.

    python benchmarks/stock_pipelines.py --output benchmarks/stock_pipelines.json
    python benchmarks/stock_pipelines.py --only StableDiffusionPipeline FluxPipeline --verbose
    python benchmarks/stock_pipelines.py --family flux

For each, with nothing downloaded:
- runs: with the stock scheduler that belongs to it;
- equal: our scheduler, made from the stock one's config by `from_config`, with the predictor that is the stock method
  on the stock grid, gives the stock result: the largest difference of pixels and of the last samples, relative to the
  largest value where that is above 1, is below 1e-5. Of a multistep scheduler the method is that of
  order 1 with the same config;
  Where it is not, both are compared in float64, with the stock tables of betas in float64: some networks amplify the
  rounding of float32, and so does the division by alpha near all noise;
- auto: the result of predictor "auto" at 50 steps is no farther from the stock method's at 500 (`--long`) than the
  stock method's at 50 steps, or less than 5 % of the result's standard deviation; both without clipping.

Components are chosen by the type hints of `__init__` and arguments by the signature of `__call__`; `tiny_unets` and
`tiny_transformers` have the tables.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import json
import math
import multiprocessing
import os
import re
import sys
import time
import traceback
import typing
import warnings

import diffusers
import numpy as np
import tiny_transformers
import tiny_unets
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from tiny_cases import Case, mask, picture, seeded, video

from score_sde import ScoreSDEScheduler


TOLERANCE = 1e-5
# the stock schedulers that draw samples, by their names in pipelines
SAMPLING = ("scheduler", "prior_scheduler", "decoder_scheduler", "super_res_scheduler")
COMPONENTS = tiny_unets.COMPONENTS | tiny_transformers.COMPONENTS
CASES = tiny_unets.CASES + tiny_transformers.CASES
# what is given to every pipeline whose `__call__` takes it
ARGUMENTS: dict[str, typing.Any] = {
    "prompt": "a cat",
    "image": picture,
    "images": picture,
    "mask_image": mask,
    "control_image": lambda: picture(seed=1),
    "video": video,
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "max_sequence_length": 16,
    "generator": lambda: torch.Generator().manual_seed(0),
    "output_type": "pt",
}
# schedulers that no solver can stand for, by class, and why
REASONS = {
    "FlowMapEulerDiscreteScheduler": "a flow map",
    "AmusedScheduler": "discrete tokens",
    "VQDiffusionScheduler": "discrete tokens",
    "BlockRefinementScheduler": "discrete tokens",
    "DiscreteDDIMScheduler": "discrete tokens",
    "EntropyBoundScheduler": "discrete tokens",
    "HeliosScheduler": "a pyramid of resolutions inside the scheduler",
    "HeliosDMDScheduler": "a pyramid of resolutions inside the scheduler",
    "RePaintScheduler": "fills masks inside the scheduler",
    "KarrasVeScheduler": "the pipeline calls steps of its own",
}


def pipelines():
    """{name: class} of all pipelines of the installed diffusers."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if "Pipeline" in name}
    return {
        name: each
        for name, each in found.items()
        if isinstance(each, type) and issubclass(each, DiffusionPipeline) and each is not DiffusionPipeline
    }


def case_of(name):
    """All rows of CASES that fit the pipeline, as one."""
    case = Case()
    for pattern, row in CASES:
        if re.fullmatch(pattern, name.replace("Pipeline", "")):
            case.components = case.components | row.components
            case.call = case.call | row.call
            case.without += tuple(row.without)
            case.reason = row.reason or case.reason
            case.auto = row.auto or case.auto
    return case


def class_names(hint):
    """The names of the classes in a type hint, unions taken apart."""
    inner = [each for each in typing.get_args(hint) if each is not type(None)]
    return [name for each in inner for name in class_names(each)] if inner else [getattr(hint, "__name__", str(hint))]


def reason_of(kind):
    """Why none of the schedulers that the pipeline names can be ours; None where one can."""
    hints = typing.get_type_hints(kind.__init__)
    names = [name for key, hint in hints.items() if key in SAMPLING for name in class_names(hint)]
    reasons = [REASONS[name] for name in names if name in REASONS]
    return reasons[0] if names and len(reasons) == len(names) else None


def why_not_auto(kind, case):
    """Why `auto`, whose grid is its own, means something else in the pipeline; None where it doesn't."""
    if case.auto:
        return case.auto
    cuts = any(re.fullmatch("(inpaint_)?strength", name) for name in inspect.signature(kind.__call__).parameters)
    if cuts and "set_begin_index" not in inspect.getsource(sys.modules[kind.__module__]):
        return "cuts the grid by strength, and does not tell the scheduler"
    return None


def components_of(kind, case):
    """{name: component} of `__init__`, random ones where the case has none.

    Raises KeyError with the name of a component for which there is no tiny one.
    """
    hints = typing.get_type_hints(kind.__init__)
    made: dict[str, typing.Any] = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name in case.components:
            made[name] = seeded(case.components[name], name)
        elif name == "requires_safety_checker":
            made[name] = False
        elif name != "self":
            known = [each for each in class_names(hints.get(name)) if each in COMPONENTS]
            if known:
                made[name] = seeded(COMPONENTS[known[0]], name)
            elif parameter.default is inspect.Parameter.empty:
                known = [
                    getattr(diffusers, each, None)
                    for each in class_names(hints.get(name))
                    if name.endswith("scheduler") and hasattr(diffusers, each)
                ]
                if not known:
                    raise KeyError(f"no tiny {name}: {' | '.join(class_names(hints.get(name)))}")
                made[name] = known[0]()
    return made


def arguments_of(pipe, case, steps):
    """The arguments of `__call__`."""
    takes = inspect.signature(pipe.__call__).parameters
    given = {name: value for name, value in ARGUMENTS.items() if name in takes and name not in case.without}
    given |= {name: steps for name in takes if re.fullmatch(r".*num_inference_steps", name)}
    given |= {name: value for name, value in case.call.items() if name in takes}
    return {
        name: value(*[steps] * len(inspect.signature(value).parameters.keys() & {"steps"}))
        if callable(value)
        else value
        for name, value in given.items()
    }


def tensors(output):
    """All numbers of a pipeline's output, flat."""
    if isinstance(output, torch.Tensor):
        return [output.detach().double().flatten()]
    if isinstance(output, np.ndarray):
        return [torch.from_numpy(output.astype(np.float64)).flatten()]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [each for part in output for each in tensors(part)]
    return tensors(np.asarray(output)) if hasattr(output, "getbands") else []


@contextlib.contextmanager
def recorded(schedulers):
    """Keeps the last sample that each class of schedulers stepped to, in the list that this gives."""
    last, originals = {}, {}
    for kind in {type(each) for each in schedulers}:
        originals[kind] = kind.step

        def step(self, *args, _step=kind.step, **kwargs):
            result = _step(self, *args, **kwargs)
            last[id(self)] = result[0] if isinstance(result, tuple) else result.prev_sample
            return result

        kind.step = functools.wraps(kind.step)(step)
    try:
        yield last
    finally:
        for kind, original in originals.items():
            kind.step = original


def draw(kind, case, components, schedulers, steps):
    """(pixels, last samples) of the pipeline with these schedulers, each one vector."""
    torch.manual_seed(0)
    schedulers = {name: copy.deepcopy(each) for name, each in schedulers.items()}
    # some pipelines change their networks
    pipe = kind(**copy.deepcopy(components) | schedulers)
    for name, scheduler in schedulers.items():
        if type(getattr(pipe, name)) is not type(scheduler):
            setattr(pipe, name, scheduler)
    if hasattr(pipe, "resolutions"):
        # those of Kandinsky 5, about 1024 x 1024
        pipe.resolutions = [(32, 32)]
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    np.random.seed(0)
    with recorded(schedulers.values()) as last, torch.no_grad():
        output = pipe(**arguments_of(pipe, case, steps))
    pixels = torch.cat(tensors(output if isinstance(output, tuple) else tuple(output.values())))
    if not last:
        raise ValueError("the pipeline never called its scheduler")
    # a pipeline may call a copy of its scheduler
    return pixels, torch.cat([each.flatten().double() for each in last.values()])


def difference(found, expected):
    """The largest, relative to the largest value where that is above 1."""
    sizes = [max(1.0, float(each.abs().max())) for each in expected]
    parts = zip(found, expected, sizes, strict=True)
    return max(float((one - other).abs().max()) / size for one, other, size in parts)


def distance(found, expected):
    """Root mean square of the difference of the last samples, relative to their standard deviation."""
    return float((found[1] - expected[1]).square().mean().sqrt() / expected[1].std())


class UniPCBetweenTimesteps(diffusers.UniPCMultistepScheduler):
    """With the timesteps of its own noise levels in flow matching: stock's tells the network whole ones, cut off."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(self.timesteps.device)


class WuerstchenToData(diffusers.DDPMWuerstchenScheduler):
    """With clean data at its end, not a level of 0.9999, without noise drawn there to be multiplied by 0, and with
    levels in float64, of times that are not rounded to float32."""

    def _alpha_cumprod(self, t, device):
        t = (t.double() * 1e5).round() / 1e5
        return torch.where(t == 0, 1.0, super()._alpha_cumprod(t, device))

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        state = generator.get_state()
        result = super().step(model_output, timestep, sample, generator, return_dict)
        if (self.previous_timestep(timestep) == 0).all():
            generator.set_state(state)
        return result


def one_step_method(scheduler, whole_timesteps=False):
    """(stock scheduler of the same config whose method is a one-step one, our predictor that is the same method)."""
    name, config = type(scheduler).__name__, dict(scheduler.config)
    if name == "DDPMWuerstchenScheduler":
        return WuerstchenToData.from_config(config), "ancestral"
    if name in ("DDPMScheduler", "UnCLIPScheduler"):
        return scheduler, "ancestral"
    if name in ("LCMScheduler", "CMStochasticIterativeScheduler"):
        return scheduler, "consistency"
    if name == "PNDMScheduler":
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        return diffusers.DDIMScheduler.from_config(config | {"set_alpha_to_one": True, "clip_sample": False}), "ddim"
    if "solver_order" in config:
        order_1 = {"solver_order": 1, "final_sigmas_type": "zero"}
        if "disable_corrector" in config:
            order_1["disable_corrector"] = list(range(1000))
        kind = type(scheduler)
        if kind is diffusers.UniPCMultistepScheduler and config["use_flow_sigmas"] and not whole_timesteps:
            kind = UniPCBetweenTimesteps
        return kind.from_config(config, **order_1), "ddim"
    if "set_alpha_to_one" in config:
        return type(scheduler).from_config(config, set_alpha_to_one=True), "ddim"
    if "Heun" in name:
        return scheduler, "heun"
    return scheduler, "euler" if "FlowMatch" in name else "ddim"


@torch.no_grad()
def doubled_network(component):
    return copy.deepcopy(component).double() if isinstance(component, torch.nn.Module) else component


def in_float64(scheduler):
    """The stock scheduler with its tables of betas in float64: its own are rounded to float32, also 1 - beta near 0."""
    scheduler, config = copy.deepcopy(scheduler), scheduler.config
    if not hasattr(scheduler, "alphas_cumprod"):
        return scheduler
    n = config.num_train_timesteps
    if config.get("beta_schedule") == "squaredcos_cap_v2":
        level = torch.cos((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * torch.pi / 2) ** 2
        betas = (1 - level[1:] / level[:-1]).clamp_max(0.999)
    elif config.get("beta_schedule") == "exp":
        betas = torch.full((n,), -math.expm1(-12 / n), dtype=torch.float64)
    else:
        power = {"linear": 1.0, "scaled_linear": 0.5}[config["beta_schedule"]]
        ends = [config[name] ** power for name in ("beta_start", "beta_end")]
        betas = torch.linspace(*ends, n, dtype=torch.float64) ** (1 / power)
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = torch.ones((), dtype=torch.float64)
    return scheduler


def deterministic(scheduler):
    """The same, of an ODE: what 500 steps of it tend to is what `auto` tends to. Clipping is left out: stock's changes
    the sample in every step by as much, however short the steps are, and has no limit."""
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    unclipped = {key: False for key in ("clip_sample", "thresholding") if key in config}
    if type(scheduler).__name__ == "DDPMScheduler":
        given = {"set_alpha_to_one": True, "variance_type": "fixed_small"}
        return diffusers.DDIMScheduler.from_config(config | unclipped | given)
    if type(scheduler).__name__ in ("UnCLIPScheduler", "WuerstchenToData"):
        # no stock scheduler of an ODE takes the arguments that their pipelines pass
        return ScoreSDEScheduler.from_config(scheduler.config, predictor="ddim", **unclipped)
    return type(scheduler).from_config(scheduler.config, **unclipped)


def ours(schedulers, predictors):
    return {
        name: ScoreSDEScheduler.from_config(each.config, predictor=predictors[name])
        for name, each in schedulers.items()
    }


def check(name, kind, steps=10, long=500):
    """The row of a pipeline."""
    started = time.perf_counter()
    case = case_of(name)
    row = {"pipeline": name, "family": kind.__module__.split(".")[2]}
    if reason := case.reason or reason_of(kind):
        return row | {"reason": reason}
    stage = "build"
    try:
        with torch.no_grad():
            components = components_of(kind, case)
        schedulers = {
            key: each for key, each in components.items() if key in SAMPLING and isinstance(each, SchedulerMixin)
        }
        row["scheduler"] = ", ".join(sorted({type(each).__name__ for each in schedulers.values()}))
        if not schedulers:
            return row | {"reason": "no scheduler"}
        stage = "runs"
        # which looks for its schedulers' whole timesteps
        whole = "DiffusionForcing" in name
        stock = {key: one_step_method(each, whole) for key, each in schedulers.items()}
        methods = {key: scheduler for key, (scheduler, _) in stock.items()}
        expected = draw(kind, case, components, methods, steps)
        if not all(torch.isfinite(each).all() for each in expected):
            raise ValueError("the stock result is not finite")
        row["runs"] = True
        stage = "equal"
        found = draw(kind, case, components, ours(methods, {key: each for key, (_, each) in stock.items()}), steps)
        row["difference"] = difference(found, expected)
        if row["difference"] >= TOLERANCE:
            stage = "equal in float64"
            doubled = {key: doubled_network(each) for key, each in components.items()}
            precise = {key: in_float64(each) for key, each in methods.items()}
            expected = draw(kind, case, doubled, precise, steps)
            found = draw(kind, case, doubled, ours(methods, {key: each for key, (_, each) in stock.items()}), steps)
            row["difference_float32"], row["difference"] = row["difference"], difference(found, expected)
        row["equal"] = row["difference"] < TOLERANCE
        if why_not := why_not_auto(kind, case):
            row["auto_reason"] = why_not
        elif long:
            stage = "auto"
            ends = {key: deterministic(each) for key, each in methods.items()}
            reference, few = (draw(kind, case, components, ends, n) for n in (long, long // 10))
            auto = draw(kind, case, components, ours(ends, dict.fromkeys(ends, "auto")), long // 10)
            row["stock_few"], row["auto_few"] = distance(few, reference), distance(auto, reference)
            row["long"] = long
            row["auto"] = row["auto_few"] <= max(row["stock_few"], 0.05)
    except Exception as error:
        row |= {"failed": stage, "error": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
        row["trace"] = traceback.format_exc()
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def check_within(seconds, name, *args):
    """The row of a pipeline, from a process of its own: a size that a pipeline has fixed may be too large for this."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(check(name, *args)))
    process.start()
    theirs.close()
    error = f"took longer than {seconds} s"
    try:
        if ours.poll(seconds):
            return ours.recv()
    except EOFError:
        error = "the process ended without a word"
    finally:
        process.kill()
        process.join()
    return {"pipeline": name, "family": args[0].__module__.split(".")[2], "failed": "all", "error": error}


def save(rows, path):
    """Counts and rows as JSON; gives the counts."""
    counts = {"equal and auto": 0, "equal": 0, "not applicable": 0, "not run": 0, "fail": 0}
    for row in rows:
        word = re.split("[:,]", verdict(row))[0]
        counts[word if word in counts else "fail"] += 1
    if path:
        with open(path, "w") as file:
            json.dump({"diffusers": diffusers.__version__, "counts": counts, "rows": rows}, file, indent=1)
    return counts


def verdict(row):
    if "reason" in row:
        return f"not applicable: {row['reason']}"
    # without ours
    not_run = {
        "build": "no tiny components for it",
        "runs": "fails here with its own scheduler",
        "all": "too slow here",
    }
    if row.get("failed") in not_run:
        return f"not run: {not_run[row['failed']]}"
    if "failed" in row:
        return f"{row['failed']} failed: {row['error']}"
    wrong = [key for key in ("equal", "auto") if row.get(key) is False]
    if wrong:
        return f"differs: {', '.join(wrong)}"
    if "auto_reason" in row:
        return f"equal, auto not compared: {row['auto_reason']}"
    return "equal and auto" if "auto" in row else "equal, auto not compared: no time"


def table(rows):
    """Markdown: what holds, of how many pipelines, and of which where it is not all that is asked."""
    groups = {}
    for row in rows:
        groups.setdefault(verdict(row), []).append(row["pipeline"].replace("Pipeline", ""))
    lines = ["| result | pipelines | which |", "|---|---|---|"]
    for result, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        lines.append(f"| {result} | {len(names)} | {', '.join(names) if result != 'equal and auto' else ''} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of pipelines")
    parser.add_argument("--family", nargs="+", help="folders of diffusers.pipelines")
    parser.add_argument("--steps", type=int, default=10, help="of the comparison with the stock method")
    parser.add_argument(
        "--long", type=int, default=500, help="steps that `auto` with a tenth is compared with; 0: not at all"
    )
    parser.add_argument("--verbose", action="store_true", help="traces of what failed")
    parser.add_argument("--limit", type=int, default=600, help="seconds for a pipeline")
    parser.add_argument("--output", help="JSON file; with --only or --family the rows of others stay")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()

    rows, kept = [], []
    if args.output and os.path.exists(args.output) and (args.only or args.family):
        # the rest of an earlier run
        with open(args.output) as file:
            kept = json.load(file)["rows"]
    for name, kind in pipelines().items():
        if args.only and name not in args.only or args.family and kind.__module__.split(".")[2] not in args.family:
            continue
        row = check_within(args.limit, name, kind, args.steps, args.long)
        numbers = [f"{row[key]:.1e}" for key in ("difference", "stock_few", "auto_few") if key in row]
        print(f"{name} | {row.get('scheduler', '')} | {' '.join(numbers)} | {verdict(row)}", flush=True)
        if args.verbose and "trace" in row:
            print(row["trace"])
        rows.append({key: value for key, value in row.items() if key != "trace"})
        kept = [each for each in kept if each["pipeline"] != name]
        save(kept + rows, args.output)
    print(save(kept + rows, args.output), table(kept + rows), sep="\n")


if __name__ == "__main__":
    main()
