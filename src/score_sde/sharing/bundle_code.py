"""Is the code that a bundle carries that of this release? Every file that
`DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` could run is looked at; none of it is run."""

import os
from pathlib import Path

import diffusers

from ..pipelines.bundle_files import own_file, read_config, read_index
from ..pipelines.bundling import of_library
from ..pipelines.carried_code import LIBRARIES, carried_sources, sibling_imports, unstamped, without_stamps
from .bundle_checks import OWN_SCHEDULERS, PACKAGE, component_class, outside_classes
from .config_checks import check_keys


# bytes; the longest file of ours has a tenth of that
LARGEST_SOURCE = 2**20


def compare_code(folder, pipeline_class, classes=()):
    """How the code that a bundle carries, or leads to, differs from that of installed classes; none of it is run.

    Args:
        folder: a bundle.
        pipeline_class: the installed class that it names.
        classes: of networks from outside this package, by which the caller opens it.

    Returns:
        {path in the folder: verdict}: "same", or "differs"; "unknown" for code, or a component, that this release
        doesn't have, or a config that leads to code; "missing" for a file that isn't there; "outside" for what leads
        out of the folder, as links do.
    """
    index, known, places, verdicts = read_index(folder), {}, {}, {}
    outside = outside_classes(index, classes)
    entries = {name: value for name, value in index.items() if isinstance(value, list) and name[:1] != "_"}
    if of_library(pipeline_class):
        # whatever diffusers and transformers have may be part of a stock pipeline, which diffusers saves without code
        entries = {
            name: value for name, value in entries.items() if not is_of_libraries(value) and value[:1] != [PACKAGE]
        }
    for name, value in ({".": index["_class_name"]} | entries).items():
        if isinstance(value, list) and value != [None, None]:
            known[name] = pipeline_class if name == "." else outside.get(name) or known_class(name, value)
            places[name] = place_of_code(name, value)
    known |= {".": pipeline_class}
    installed = {
        os.path.normpath(os.path.join(where, f"{name}.py")): source
        for where, cls in known.items()
        if cls is not None and cls.__module__.split(".")[0] not in LIBRARIES
        for name, source in carried_sources(cls).items()
    }

    # what is there
    found, wanted = set(), set()
    for place, own in files_in(folder):
        name = unstamped_path(place)
        if not own:
            found.add(name)
            verdicts[place] = "outside"
        elif place.endswith(".json"):
            if leads_to_code(folder, place):
                verdicts[place] = "unknown"
        else:
            found.add(name)
            source = read_source(os.path.join(folder, place)) if name in installed else None
            same = source is not None and without_stamps(source) == installed[name]
            verdicts[place] = "unknown" if name not in installed else "same" if same else "differs"
            siblings = sibling_imports(source) if same else ()
            wanted |= {os.path.join(os.path.dirname(place), f"{sibling}.py") for sibling in siblings}

    # what model_index.json asks for
    for name, place in places.items():
        if place is None:
            verdicts[name] = "outside"
        elif known[name] is None:
            verdicts[place] = "unknown"
        elif place != name:
            wanted.add(place)
    # not said twice: with and without stamp
    unsaid = {place for place in wanted - verdicts.keys() if unstamped_path(place) not in installed.keys() - found}
    verdicts |= dict.fromkeys(sorted(unsaid), "missing")
    return verdicts | dict.fromkeys(sorted(installed.keys() - found), "missing")


def is_of_libraries(entry):
    """Whether an entry of model_index.json is of transformers, diffusers, or a module of diffusers' pipelines."""
    library = entry[0] if len(entry) == 2 and isinstance(entry[0], str) else ""
    return library in LIBRARIES or hasattr(diffusers.pipelines, library)


def is_stock_bundle(index):
    """Whether a model index is of a pipeline of diffusers with a scheduler of this package."""
    return isinstance(index["_class_name"], str) and own_scheduler(index) is not None


def own_scheduler(index):
    """The name of the component of a model index that is a scheduler of this package, None where there is none."""
    parts = [name for name, value in index.items() if isinstance(value, list) and name[:1] != "_"]
    return next((name for name in parts if index[name][1:] in [[each] for each in OWN_SCHEDULERS]), None)


def unstamped_path(place):
    return os.path.join(os.path.dirname(place), unstamped(Path(place).stem) + ".py")


def known_class(name, value):
    """The class of this release, or of diffusers, that an entry of model_index.json means; None for another."""
    try:
        library, class_name = value
        return component_class("", name, library if library in LIBRARIES else PACKAGE, class_name)
    except (KeyError, TypeError, ValueError):
        return None


def place_of_code(name, value):
    """The path in the folder of the file that an entry of model_index.json runs, or the component itself where that is
    one of a library; None for what would lead out of the folder."""
    module = value[0] if value and isinstance(value[0], str) else ""
    if any(part in ("", "..") or os.path.basename(part) != part or "\0" in part for part in (name, module)):
        return None
    return name if module in LIBRARIES else os.path.normpath(os.path.join(name, f"{module}.py"))


def files_in(folder):
    """(path in the folder, whether it is a file of its own) of source files, configs, and links to folders."""
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        sources = [name for name in names if name.endswith((".py", "config.json", "model_index.json"))]
        for name in sorted(links + sources):
            place = os.path.relpath(os.path.join(parent, name), folder)
            try:
                own_file(folder, *Path(place).parts)
            except ValueError:
                yield place, False
            else:
                yield place, True


def read_source(path):
    """The text of a source file; None where it is too long, or not in UTF-8."""
    with open(path, "rb") as file:
        content = file.read(LARGEST_SOURCE + 1)
    try:
        return content.decode().replace("\r\n", "\n") if len(content) <= LARGEST_SOURCE else None
    except UnicodeDecodeError:
        return None


def leads_to_code(folder, place):
    """Whether a config makes diffusers or transformers run code, or is none that could be read to know."""
    try:
        check_keys(read_config(folder, *Path(place).parts), place)
    except ValueError:
        return True
    return False
