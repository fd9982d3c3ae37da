"""What the tests don't notice: one mutation at a time of one source file, against the test files that belong to it.

    python tests/mutate.py src/score_sde/schedulers/paths.py --sample 40 --seed 0

It works in a temporary copy of the checkout and prints every mutation that no test noticed, and the share noticed.
Some survivors change nothing that matters: read each before writing a test. Not part of the suite.
"""

import argparse
import ast
import copy
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import diffusers  # noqa: F401
import pytest
import torch  # noqa: F401


ROOT = Path(__file__).resolve().parents[1]
# source file -> test files, the quick ones first; those not listed: tests/test_<name>.py
TESTS = {
    "src/score_sde/schedulers/paths.py": "paths solvers stock_configs scheduler",
    "src/score_sde/schedulers/discrete_paths.py": "discrete_paths discrete_losses",
    "src/score_sde/schedulers/solvers.py": "solvers scheduler",
    "src/score_sde/schedulers/calibration.py": "calibration scheduler",
    "src/score_sde/schedulers/checks.py": "scheduler",
    "src/score_sde/schedulers/parameterization.py": "scheduler",
    "src/score_sde/schedulers/arguments.py": "scheduler calibration",
    "src/score_sde/schedulers/saved_config.py": "scheduler way_back stock_saving",
    "src/score_sde/schedulers/timetables.py": "scheduler flow_matching stock_configs auto",
    "src/score_sde/schedulers/trajectory.py": "scheduler flow_matching stock_steps",
    "src/score_sde/schedulers/scheduling_score_sde.py": "calibration flow_matching stock_configs scheduler "
    "stable_diffusion",
    "src/score_sde/schedulers/stock_configs.py": "flow_matching stock_configs",
    "src/score_sde/losses/conditions.py": "losses training",
    "src/score_sde/losses/denoising.py": "losses training",
    "src/score_sde/losses/discrete.py": "discrete_losses",
    "src/score_sde/ema.py": "ema",
    "src/score_sde/models/transformer_score_dit.py": "dit models",
    "src/score_sde/models/unet_score.py": "models",
    "src/score_sde/models/noise_conditional_classifier.py": "models guidance",
    "src/score_sde/sharing/bundles.py": "hub cards",
    "src/score_sde/sharing/hub.py": "hub local_hub attacks/push attacks/tokens",
    "src/score_sde/sharing/pushed_files.py": "hub attacks/push",
    "src/score_sde/sharing/downloading.py": "hub local_hub attacks/tokens",
    "src/score_sde/sharing/opening.py": "hub outside attacks/loading",
    "src/score_sde/sharing/bundle_checks.py": "hub outside attacks/loading attacks/verify",
    "src/score_sde/sharing/config_checks.py": "attacks/loading",
    "src/score_sde/sharing/weight_checks.py": "attacks/loading",
    "src/score_sde/sharing/bundle_code.py": "hub outside attacks/verify",
    "src/score_sde/sharing/facts.py": "cards attacks/cards attacks/push",
    "src/score_sde/sharing/markdown.py": "cards attacks/cards",
    "src/score_sde/sharing/model_card.py": "cards attacks/cards",
    "src/score_sde/sharing/convert/checkpoints.py": "convert attacks/converters",
    "src/score_sde/sharing/convert/original_dit.py": "convert attacks/converters",
    "src/score_sde/sharing/convert/score_sde_pytorch.py": "convert attacks/converters",
    "src/score_sde/sharing/convert/guided_diffusion.py": "convert attacks/converters",
    "src/score_sde/sharing/convert/from_diffusers.py": "convert attacks/converters",
    "src/score_sde/sharing/convert/to_diffusers.py": "convert attacks/converters",
    "src/score_sde/sharing/convert/command.py": "convert attacks/converters",
    "src/score_sde/sharing/space.py": "space attacks/page",
    "src/score_sde/sharing/space_app.py": "space attacks/page",
    "pipelines/pipeline_score_sde.py": "pipeline guidance image_to_image likelihood threads",
    "pipelines/pipeline_score_sde_inverse.py": "inverse",
    "pipelines/operators.py": "inverse",
    "pipelines/bundling.py": "hub saving attacks/loading attacks/verify",
    "pipelines/bundle_files.py": "attacks/loading attacks/push",
    "pipelines/carried_code.py": "hub outside attacks/verify",
    "pipelines/wording.py": "attacks/loading",
    "pipelines/latents.py": "pipeline",
    "training/parts/image_rows.py": "data image_conditions attacks/data",
    "training/parts/data.py": "data buckets attacks/data",
    "training/parts/latent_shards.py": "data latents attacks/data",
    "training/parts/batches.py": "data buckets training",
    "training/parts/clean_data.py": "data",
    "training/encode_latents.py": "data share_latents",
    "training/parts/loop.py": "training tasks survival attacks/training",
    "training/parts/networks.py": "networks",
    "training/parts/plots.py": "plots",
    "training/parts/run_folder.py": "survival tasks attacks/training",
    "training/parts/trackers.py": "plots",
    "training/parts/checkpoints.py": "survival tasks attacks/training training",
    "training/parts/averages.py": "ema tasks training",
    "training/parts/schedule.py": "training",
    "training/parts/metrics.py": "metrics",
    "training/evaluate.py": "evaluate",
    "training/parts/validation.py": "evaluate",
    "training/parts/classifier.py": "evaluate",
}
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def mutants(node):
    """What may stand in the place of a node."""
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        yield replaced(node, op=SWAPS[type(node.op)]())
    if isinstance(node, ast.BinOp):
        yield node.left
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield replaced(node, ops=[SWAPS[type(node.ops[0])]()])
    if isinstance(node, ast.UnaryOp):
        yield node.operand
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield replaced(node, test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1 if isinstance(node.value, int) else 1.1 * node.value + 1e-3)
    if isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(ast.Constant(None))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    if isinstance(node, ast.AugAssign):
        yield ast.Pass()


def replaced(node, **fields):
    node = copy.deepcopy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def places(node, path=()):
    """(path, node) of every node whose meaning counts: not types, messages of errors, or names of modules."""
    yield path, node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns") or isinstance(value, (ast.JoinedStr, ast.Raise)):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST) and not isinstance(child, (ast.JoinedStr, ast.Raise, ast.ImportFrom)):
                yield from places(child, (*path, (field, i if isinstance(value, list) else None)))


def put(tree, path, node):
    tree = copy.deepcopy(tree)
    *above, (field, i) = path
    parent = tree
    for name, at in above:
        parent = getattr(parent, name) if at is None else getattr(parent, name)[at]
    if i is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[i] = node
    return ast.unparse(ast.fix_missing_locations(tree))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a source file, relative to the checkout")
    parser.add_argument("--sample", type=int, default=40, help="number of mutations tried, 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", default="1-1000000", help="only mutations of these lines, as 120-200")
    parser.add_argument("--tests", help="test names instead of the table's, as 'paths solvers'")
    parser.add_argument("-k", default="", help="pytest's -k")
    options = parser.parse_args()
    names = options.tests or TESTS.get(options.source, Path(options.source).stem)
    every = sorted(ROOT.glob("tests/*/test_*.py"))
    files = [
        str(path.relative_to(ROOT))
        for name in names.split()
        for path in every
        if f"{path.parent.name}/{path.stem}".endswith(f"/test_{name.removeprefix('attacks/')}")
        and (path.parent.name == "attacks") == name.startswith("attacks/")
    ]

    tree = ast.parse((ROOT / options.source).read_text(encoding="utf-8"))
    first, last = (int(line) for line in options.lines.split("-"))
    every = [
        (path, node, mutant)
        for path, node in places(tree)
        if first <= getattr(node, "lineno", 0) <= last
        for mutant in mutants(node)
    ]
    chosen = random.Random(options.seed).sample(every, min(options.sample or len(every), len(every)))

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        shutil.copytree(
            ROOT, root, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache"), symlinks=True
        )
        # the copy goes before an installed package
        os.environ |= {"PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-k", options.k, *files]

        def child():
            os.chdir(root)
            sys.path.insert(0, str(root / "src"))
            with open(root / "output", "w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os._exit(pytest.main(arguments))

        def exit_code(limit=None):
            # forked: the libraries are imported once
            process = multiprocessing.get_context("fork").Process(target=child)
            process.start()
            process.join(limit)
            process.kill()
            process.join()
            return process.exitcode

        begin = time.time()
        if exit_code():
            sys.exit(f"the tests fail without a mutation:\n{(root / 'output').read_text()[-3000:]}")
        limit, survivors = 3 * (time.time() - begin) + 60, 0
        print(f"{options.source}: {len(chosen)} of {len(every)} mutations, {', '.join(files)}", flush=True)
        for path, node, mutant in chosen:
            (root / options.source).write_text(put(tree, path, mutant), encoding="utf-8")
            if exit_code(limit) == 0:
                survivors += 1
                before, after = (ast.unparse(each).split("\n")[0] for each in (node, mutant))
                print(f"  line {node.lineno}: {before}  ->  {after}", flush=True)
    share = 1 - survivors / max(len(chosen), 1)
    print(f"{options.source}: {len(chosen) - survivors} of {len(chosen)} noticed ({share:.0%})")


if __name__ == "__main__":
    main()
