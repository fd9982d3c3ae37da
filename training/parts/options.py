"""Options of the training scripts: dataclasses filled from a YAML file and the command line.

    score-sde train quick_start/diffusion --learning_rate 1e-4

Every field of a dataclass is a key of the YAML file and an option of the command line, which wins; null is as if an
option that may be missing, or takes several values, were not there. A file is named by its path, or by its name in
training/configs/.
"""

import argparse
import difflib
import glob
import inspect
import json
import os
import re
import sys
import threading
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import get_args

import yaml

from score_sde.pipelines.wording import check_choice, one_line


# headings of --help, in their order; a script may have others, which follow
GROUPS = (
    "data",
    "start from weights",
    "captions",
    "network",
    "path and objective",
    "alignment",
    "optimisation",
    "run",
    "samples and logs",
    "averaged weights",
    "speed and memory",
    "card and Hub",
)
CONFIGS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Every option by one spelling and what it takes, with its default where it has one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action):
        kind = {whole_number: " N", float: " X", str: " TEXT"}.get(getattr(action.type, "kind", action.type), "")
        kind = " [false]" if action.default is True else kind
        more = " ..." if action.nargs == "+" else ""
        return action.option_strings[-1 if action.option_strings[0] == "-h" else 0] + kind + more

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, "", [], "{}") else super()._get_help_string(action)


def default_of(field):
    return field.default_factory() if field.default is MISSING else field.default


def may_be_null(field):
    """Whether null is as if an option were not there: one that may be missing, or takes several values."""
    return field.default in (None, MISSING)


def type_of(field):
    """The type of one value of an option: X of X | None and of list[X]."""
    return next((each for each in get_args(field.type) if each is not type(None)), field.type)


def make_parser(config_class, everything=False):
    """A parser of a config's options, in their groups; its help shows the common ones, or everything. The class says in
    `configs` how its files in training/configs/ are called."""
    shown = [each for each in fields(config_class) if everything or each.metadata["common"]]
    shown = shown or fields(config_class)
    more = len(fields(config_class)) - len(shown)
    parser = OneLineParser(
        usage="%(prog)s [CONFIG] [--option value ...]",
        description=f"{config_class.__doc__} CONFIG is a YAML file of options, 'option: value', or the name of "
        f"one that is installed; the command line wins.",
        epilog=f"--help_all shows {more} more. `score-sde` also takes options of `accelerate launch`, such as "
        f"--num_processes 8 or --config_file eight_gpus.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--help_all", "--help-all", action="help", help="show every option and exit")
    parser.add_argument("--list", action="store_true", help="show the installed CONFIGs and exit")
    own = [each.metadata["group"] for each in fields(config_class)]
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys([*GROUPS, *own])}
    for each in fields(config_class):
        kind = type_of(each)
        read = {int: whole_number, bool: true_or_false}.get(kind, kind)
        groups[each.metadata["group"]].add_argument(
            *dict.fromkeys([f"--{each.name}", f"--{each.name.replace('_', '-')}"]),
            type=or_null(read) if may_be_null(each) else read,
            default=default_of(each),
            # a switch takes a value or none
            **{"nargs": "?", "const": True} if kind is bool else {},
            **{"nargs": "+"} if each.default is MISSING else {},
            help=each.metadata["help"].replace("%", "%%") if each in shown else argparse.SUPPRESS,
        )
    return parser


def parse(config_class, argv):
    """A config from command-line arguments, the first of which may name a YAML file; its `given` are the names of the
    options that either says. Exits with a message that names the value and what is allowed when anything is wrong,
    before any work."""
    WORK_BEGUN.clear()
    name, arguments = config_and_options(argv)
    try:
        path = config_path(name, config_class.configs) if name else None
        of_file = read_yaml(path) if name else {}
        kinds = kinds_of_data(config_class)
        config_class = kinds[data_kind(config_class, of_file, arguments)]
    except ValueError as error:
        OneLineParser().error(str(error))
    parser = make_parser(config_class, everything=bool({"--help_all", "--help-all"} & set(argv)))
    known = {each.name: each for each in fields(config_class)}
    try:
        refuse_other_kinds(config_class, kinds, of_file, arguments)
        from_file = yaml_arguments(path, of_file, known)
    except ValueError as error:
        parser.error(str(error))
    nothing = argparse.Namespace(**dict.fromkeys(known, MISSING))
    values, unknown = parser.parse_known_args(from_file + arguments, nothing)
    if values.list:
        for name, comment in installed_configs(config_class.configs).items():
            print(f"{name:24} {comment}")
        parser.exit()
    del values.list
    if unknown:
        name, *_ = unknown[0].split("=")
        near = nearest(name, [f"--{each}" for each in known])
        parser.error(f"{name} is unknown{near or ';'} --help_all lists all options")
    given = {name: value for name, value in vars(values).items() if value not in (MISSING, None, [None])}
    if mixed := [name for name, value in given.items() if isinstance(value, list) and None in value]:
        parser.error(f"{mixed[0]}: null stands alone, for none of its values")
    config = config_class(**given)
    config.given = frozenset(given)
    problems = list(dict.fromkeys(config.problems()))
    if problems:
        parser.error("; ".join(problems))
    return config


def kinds_of_data(config_class):
    """{kind of data: the class of its options} of a script, whose own class says in `other_kinds` which there are
    beside its own, `data_kind`, and by `stated_kind` how to tell; {None: the class} of a script that has one class."""
    own = getattr(config_class, "data_kind", None)
    return {own: config_class} | getattr(config_class, "other_kinds", {})


def data_kind(config_class, values, arguments):
    """Which of `kinds_of_data` a YAML file's values and the arguments of a command line are of. Raises ValueError for
    one that there is not."""
    kinds = kinds_of_data(config_class)
    if len(kinds) == 1:
        return next(iter(kinds))

    def stated(option):
        """What the command line says for an option, else what the file does, else None."""
        parser = OneLineParser(add_help=False, allow_abbrev=False)
        parser.add_argument(f"--{option}", f"--{option.replace('_', '-')}", dest=option)
        found = getattr(parser.parse_known_args(arguments)[0], option)
        return values.get(option) if found is None else found

    kind = config_class.stated_kind(stated)
    check_choice("data_kind", kind, kinds)
    return kind


def refuse_other_kinds(config_class, kinds, values, arguments):
    """Raise ValueError for an option, in a YAML file's values or the arguments of a command line, that only data of
    another kind have."""
    known = {each.name for each in fields(config_class)}
    given = [each.partition("=")[0][2:].replace("-", "_") for each in arguments if each.startswith("--")]
    for name in [*values, *given]:
        theirs = [kind for kind, other in kinds.items() if name in {each.name for each in fields(other)}]
        if theirs and name not in known:
            remedy = f", or pass --data_kind {theirs[0]}" if "data_kind" in known else ""
            raise ValueError(
                f"{name} is an option for data of the kind {', '.join(theirs)}, and these are of the kind "
                f"{config_class.data_kind}: leave it out{remedy}"
            )


def config_and_options(argv):
    """(the name of the YAML file or None, the other arguments) of a command line."""
    named = bool(argv) and not argv[0].startswith("-")
    return argv[0] if named else None, list(argv[named:])


def config_path(name, kind="*"):
    """The YAML file of this path, or of this name in training/configs/. Raises ValueError where there is neither, with
    the names of those that are installed whose last part is `kind`."""
    installed = os.path.join(CONFIGS, *f"{name}.yaml".split("/"))
    if os.path.isfile(name) or not os.path.isfile(installed):
        if not os.path.isfile(name) and not name.endswith((".yaml", ".yml")):
            known = list(installed_configs(kind))
            raise ValueError(
                f"{name!r} is neither a YAML file nor one that is installed: {', '.join(known)}{nearest(name, known)}"
            )
        return name
    return installed


def installed_configs(kind="*"):
    """{name: the comment in its first line} of the YAML files in training/configs/ whose last part is `kind`."""
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(CONFIGS), "*", f"{kind}.yaml"))):
        name = os.path.relpath(path, CONFIGS).removesuffix(".yaml").replace(os.sep, "/")
        with open(path, encoding="utf-8") as file:
            first = file.readline()
        if not name.startswith("accelerate/"):
            found[name] = first.removeprefix("#").strip() if first.startswith("#") else ""
    return found


def nearest(name, known):
    """ ", did you mean ...", where a known name is near."""
    found = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {found[0]}?" if found else ""


def or_null(kind):
    """As `kind` reads a text; null, as in YAML, is None: it takes back what a file says."""

    def read(text):
        return None if text == "null" else kind(text)

    read.kind, read.__name__ = kind, kind.__name__
    return read


def whole_number(text):
    """A whole number as its text says it, 1000, 1_000 or 1e3. Raises argparse's error for others."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        if float(text).is_integer():
            return int(float(text))
    except ValueError:
        pass
    two = re.fullmatch(r"\d+\s*[,x]\s*\d+", text)
    remedy = ": a height and a width are for --aspect_ratio_buckets" if two else ""
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number{remedy}")


def true_or_false(text):
    """Whether a text says so, in any case: true, yes or 1; false, no or 0. Raises argparse's error for others."""
    for value, words in ((True, ("true", "yes", "1")), (False, ("false", "no", "0"))):
        if text.lower() in words:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


class YamlLoader(yaml.SafeLoader):
    """YAML whose 1e-4 is a number, as in JSON and YAML 1.2, and which names no key twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.YAMLError(f"{twice[0]!r} stands there twice")
        return super().construct_mapping(node, deep)


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path):
    """What stands in a YAML file of options, {option: value}. Raises ValueError for what is none."""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, YamlLoader) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold 'option: value' lines")
    return values


def yaml_arguments(path, values, known):
    """The options of a YAML file, {option: value}, as command-line arguments; `known`: {name: field}. Raises ValueError
    for what is none of them."""
    arguments = []
    for key, value in values.items():
        if key not in known:
            near = nearest(str(key), list(known))
            raise ValueError(f"{path}: option {key!r} is unknown{near}; the options are {', '.join(sorted(known))}")
        if (value is None and may_be_null(known[key])) or (value == [] and default_of(known[key]) == []):
            continue
        try:
            texts = [option_text(each, known[key]) for each in (value if isinstance(value, list) else [value])]
        except ValueError as error:
            raise ValueError(f"{path}: {key} {error}") from None
        arguments += [f"--{key}", *texts]
    return arguments


def option_text(value, field):
    """A value of a YAML file as the command line says it. Raises ValueError where it has another type than the option
    of that field."""
    kind = type_of(field)
    if isinstance(value, dict) and field.default == "{}":
        return json.dumps(value)
    taken = {float: (int, float), int: (int, float)}.get(kind, kind)
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, taken):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        quotes = ": write it in quotes, where it is meant as text" if kind is str else ""
        raise ValueError(f"must be {names[kind]}; YAML reads {value!r} there{quotes}")
    return str(value)


def mapping(name, text):
    """The mapping that an option holds as YAML, of which JSON is a part: {hidden_size: 64}. Raises ValueError, naming
    the option, when it is none."""
    try:
        value = yaml.load(text, YamlLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} {text!r} is not YAML: {one_line(error)}") from None
    # {a:1} is a key without a value
    if not isinstance(value, dict) or not all(isinstance(key, str) and ":" not in key for key in value):
        raise ValueError(f"{name} {text!r} must be a mapping, {{argument: value}}, with a space after the colon")
    return value


def arguments_of(found, name, text, elsewhere=()):
    """As `mapping`, of arguments of a class. Raises ValueError for others, with the nearest name, and for those
    `elsewhere`, which are options of their own."""
    value, known = mapping(name, text), inspect.signature(found).parameters
    for each in value:
        if each not in known:
            near = nearest(each, list(known))
            raise ValueError(f"{name}: {each!r} is no argument of {found.__name__}{near}")
        if each in elsewhere:
            raise ValueError(f"{name}: {each} is an option of its own: --{each} {value[each]}")
    return value


# set by a script once everything is open and checked: from then on an error is no matter of its options alone
WORK_BEGUN = threading.Event()


@contextmanager
def one_line_errors():
    """What a script's `main` runs in: a ValueError or OSError before its work has begun (`WORK_BEGUN`) is a line on
    stderr and exit status 2, as a wrong option is. Later ones keep their traceback."""
    WORK_BEGUN.clear()
    try:
        yield
    except (ValueError, OSError) as error:
        if WORK_BEGUN.is_set():
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {one_line(error) or type(error).__name__}", file=sys.stderr)
        raise SystemExit(2) from None
