"""The code that a bundle carries: which files a class needs, and how they are called there.

diffusers puts the code files of all repos into one flat folder of modules, so every carried file's name ends in a
stamp, a hash of the code it belongs with: bundles of different versions live side by side in one process.
"""

import hashlib
import inspect
import re
from pathlib import Path


# the libraries whose classes need no code in a bundle
LIBRARIES = ("diffusers", "transformers")

_RELATIVE_IMPORT = re.compile(r"^(from \.)(\w+)( import )", re.MULTILINE)
_STAMP = re.compile(r"_[0-9a-f]{10}$")


def without_stamps(source):
    """Source code as it is in this package: its imports of siblings without the stamps of a bundle."""
    return _RELATIVE_IMPORT.sub(lambda match: match[1] + unstamped(match[2]) + match[3], source)


def unstamped(module):
    """The name of a module of a bundle as it is in this package."""
    return _STAMP.sub("", module)


def sibling_imports(source):
    """Names of the modules beside it that a source file imports."""
    return [match[2] for match in _RELATIVE_IMPORT.finditer(source)]


def carried_sources(cls):
    """The code that a class needs: {module name: source} of its file and, through relative imports, its siblings; the
    class's own file first. Stamps of an earlier bundle are taken off. Raises ValueError for a class that was defined in
    no file."""
    try:
        entry = Path(inspect.getfile(cls))
    except (OSError, TypeError):
        raise ValueError(f"the code of {cls.__name__} is in no file: define it in a file of its own") from None
    sources, pending = {}, [entry]
    while pending:
        path = pending.pop(0)
        name = unstamped(path.stem)
        if name in sources:
            continue
        source = path.read_text(encoding="utf-8")
        pending += [path.with_name(f"{sibling}.py") for sibling in sibling_imports(source)]
        sources[name] = without_stamps(source)
    return sources


def write_code(cls, folder):
    """Write the code of a class into a folder under stamped names; return the stamped name of its module."""
    sources = carried_sources(cls)
    stamp = hashlib.sha256("".join(name + sources[name] for name in sorted(sources)).encode()).hexdigest()[:10]
    for name, source in sources.items():
        source = _RELATIVE_IMPORT.sub(rf"\g<1>\g<2>_{stamp}\g<3>", source)
        Path(folder, f"{name}_{stamp}.py").write_text(source, encoding="utf-8")
    return f"{next(iter(sources))}_{stamp}"
