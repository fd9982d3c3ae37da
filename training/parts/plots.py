"""Curves of runs, drawn from their own records."""

import os

from matplotlib.figure import Figure

from score_sde.pipelines.writing import whole_file

from .run_folder import read_records


# what is drawn of log.jsonl: name there, title
CURVES = {
    "loss": "training loss",
    "gradient_norm": "norm of the gradient, before clipping",
    "images_per_second": "samples per second",
}
# drawn together, of one run alone
BY_TIME = "loss_in_quarter_"


def plot_runs(run_folders, output):
    """Draw loss, gradient norm, samples per second, and what was evaluated on the way, of one or several runs; of one,
    the loss by noise level, too.

    Args:
        run_folders: output_dir of each run, as `fit` leaves it: log.jsonl and, where there is one, evaluation.jsonl.
        output: a .png file.

    Returns:
        output.

    Raises ValueError for a folder without values, and another kind of file.
    """
    if not str(output).endswith(".png"):
        raise ValueError(f"output {str(output)!r} must be a .png file")
    logs, evaluations = {}, {}
    for folder in map(str, run_folders):
        if not os.path.isdir(folder):
            raise ValueError(f"{folder!r} is no folder: name the output_dir of a run")
        logs[folder] = read_records(os.path.join(folder, "log.jsonl"))
        evaluations[folder] = read_records(os.path.join(folder, "evaluation.jsonl"))
        if not logs[folder]:
            raise ValueError(
                f"{folder!r} has no values in log.jsonl: name the output_dir of a run that has logged some"
            )
    labels = dict(zip(logs, distinct_names(logs), strict=True))

    # a panel is a title and its curves, {label: (steps, values)}
    panels = [
        (title, {labels[folder]: curve(lines, name) for folder, lines in logs.items()})
        for name, title in CURVES.items()
    ]
    if len(logs) == 1:
        [lines] = logs.values()
        parts = sorted({name for line in lines for name in line if name.startswith(BY_TIME)})
        by_time = {f"quarter {name.removeprefix(BY_TIME)}": curve(lines, name) for name in parts}
        panels.insert(1, ("loss by noise level: quarters of the time, 1 is the least noise", by_time))
    evaluated = dict.fromkeys(name for lines in evaluations.values() for line in lines for name in line)
    panels += [
        (
            f"evaluation: {name.replace('_', ' ')}",
            {labels[each]: curve(evaluations[each], name) for each in evaluations},
        )
        for name in evaluated
        if name not in ("run_id", "step", "images_seen")
    ]
    panels = [(title, {label: xy for label, xy in curves.items() if xy[0]}) for title, curves in panels]
    draw([(title, curves) for title, curves in panels if curves], output)
    return output


def distinct_names(folders):
    """What tells paths from each other: the last part of one, of several all but what they begin with alike."""
    parts = [os.path.normpath(os.path.abspath(folder)).split(os.sep) for folder in folders]
    shared = len(os.path.commonprefix(parts)) if len(parts) > 1 else len(parts[0]) - 1
    return [os.path.join(*each[min(shared, len(each) - 1) :]) for each in parts]


def curve(lines, name):
    """(steps, values) of the lines that have a value."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def draw(panels, output):
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 3.6 * rows), layout="constrained")
    for number, (title, curves) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        for label, (steps, values) in curves.items():
            # a single point has no line
            axes.plot(steps, values, label=label, linewidth=1.2, marker="." if len(steps) < 30 else None)
        every = [value for _, values in curves.values() for value in values]
        if min(every) > 0 and max(every) > 20 * min(every):
            axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer steps", fontsize=9)
        axes.tick_params(which="both", labelsize=8)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.legend(fontsize=8)
    with whole_file(output) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
