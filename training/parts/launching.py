"""Several processes by Accelerate, which end as one does: signals reach them, and their exit status is kept."""

import logging
import os
import re
import signal
import subprocess
import threading
from dataclasses import fields
from itertools import islice

import psutil
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .options import CONFIGS, nearest


# says to a process that it is one of those that `launch` started
LAUNCHED = "SCORE_SDE_LAUNCHED"


def split_arguments(config_class, argv):
    """(the script's arguments, those of `accelerate launch`) of a command line; an option that both have is the
    script's."""
    actions = [each for each in launch_command_parser()._actions if each.dest != "help"]
    launcher = {option: each.nargs != 0 for each in actions for option in each.option_strings if option[:2] == "--"}
    launcher |= {"--accelerate_config": True, "--accelerate-config": True}
    for each in fields(config_class):
        for name in (each.name, each.name.replace("_", "-")):
            launcher.pop(f"--{name}", None)
    script, options, arguments = [], [], iter(argv)
    for each in arguments:
        option, equals, _ = each.partition("=")
        if option not in launcher:
            script.append(each)
            continue
        # trl's name of it
        options.append(re.sub("^--accelerate[_-]config", "--config_file", each))
        if launcher[option] and not equals:
            options += islice(arguments, 1)
    return script, options


def is_to_launch(options):
    """Whether a command is to start others: where it has options of `accelerate launch`, or `accelerate config` wrote
    some; not in a process that a launcher has started."""
    launched = {LAUNCHED, "LOCAL_RANK"} & os.environ.keys()
    return not launched and bool(options or os.path.isfile(default_config_file))


def accelerate_config(name):
    """A configuration of Accelerate: the file of this path, or of this name in training/configs/accelerate. Raises
    ValueError where there is neither."""
    folder = os.path.join(CONFIGS, "accelerate")
    if os.path.isfile(name):
        return name
    known = sorted(each.removesuffix(".yaml") for each in os.listdir(folder))
    if name not in known:
        raise ValueError(
            f"--config_file {name!r} is neither a file nor one that is installed: {', '.join(known)}"
            f"{nearest(name, known)}"
        )
    return os.path.join(folder, f"{name}.yaml")


def launch(options, module, argv):
    """Run a module in the processes that `accelerate launch` makes of its options; return their exit status.

    SIGTERM and Ctrl-C are passed on to them as SIGTERM, at which training saves itself; a second Ctrl-C interrupts.

    Raises ValueError for a configuration that isn't there, and options that Accelerate refuses.
    """
    parser = launch_command_parser()
    arguments = parser.parse_args([*options, "--module", module, *argv])
    if arguments.cpu and (arguments.num_processes or 1) > 1:
        # Accelerate would want MPI for them
        arguments.cpu, arguments.multi_gpu = False, True
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if arguments.config_file is not None:
        arguments.config_file = accelerate_config(arguments.config_file)
    elif not os.path.isfile(default_config_file):
        # without GPUs as well
        arguments.multi_gpu |= (arguments.num_processes or 1) > 1 and not (
            arguments.use_fsdp or arguments.use_deepspeed
        )
        # what is assumed anyhow, with a notice
        arguments.num_machines = arguments.num_machines or 1
        arguments.mixed_precision = arguments.mixed_precision or "no"
        arguments.dynamo_backend = arguments.dynamo_backend or "no"
    os.environ[LAUNCHED] = "1"
    if arguments.num_processes:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.num_processes)))
    # what the processes say themselves is enough
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    status, interrupts, refused = [], 0, []

    def run():
        try:
            launch_command(arguments)
            status.append(0)
        except ValueError as error:
            refused.append(error)
        except subprocess.CalledProcessError as error:
            status.append(error.returncode)
        except ChildFailedError as error:
            status.append(error.get_first_failure()[1].exitcode)

    def pass_on(number, _):
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        children = psutil.Process().children()
        if not children:
            os._exit(128 + number)
        for child in children:
            child.send_signal(signal.SIGINT if interrupts > 1 else signal.SIGTERM)

    # in a thread of its own, where the launcher leaves the signals alone
    thread = threading.Thread(target=run, daemon=True)
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    thread.start()
    thread.join()
    for number, handler in before.items():
        signal.signal(number, handler)
    if refused:
        raise ValueError(f"accelerate launch: {refused[0]}") from refused[0]
    found = status[0] if status else 1
    return found if found >= 0 else 128 - found
