"""Training on tokens that starts from weights: what comes with them."""

import inspect
import json
from dataclasses import dataclass
from typing import ClassVar

from score_sde.pipelines.wording import one_line
from score_sde.sharing.convert.starting_point import StartingPoint, starting_point

from .config import option
from .networks import NETWORKS, outside_classes
from .options import mapping
from .starting import FREE_OF_NETWORK, FROM_DATA


# arguments of the scheduler that say what the network was trained on; the others are of sampling
TRAINED_ON = {"alpha_min", "exponent", "sigma_min", "sigma_max"}


@dataclass
class TextStartConfig:
    init_from: str | None = option(
        None,
        "Pipeline of texts to start from, a folder or repo on the Hub; network, process and tokenizer come with it.",
        "start from weights",
        common=True,
    )
    init_revision: str | None = option(None, "Branch, tag or commit of that repo.", "start from weights")

    # what the command line or the YAML file said (`options.parse`)
    given: ClassVar[frozenset[str]] = frozenset()
    # what to start from
    start: ClassVar[StartingPoint | None] = None

    def start_problems(self):
        """Fill in the options that come with the weights, as if they had been given."""
        if self.init_from is None:
            if self.init_revision:
                yield "init_revision needs init_from, the weights to start from"
            return
        try:
            outside = outside_classes(self.network) if ":" in self.network else []
            self.start = starting_point(self.init_from, self.init_revision, outside)
            if not hasattr(self.start.opened, "tokenizer"):
                raise ValueError("it is no pipeline of texts, with a tokenizer: images are --data_kind image")
            yield from self.adopt(options_of(self.start))
        except ValueError as error:
            yield f"init_from {self.init_from!r}: {one_line(error)}"

    def adopt(self, options):
        """Take options that aren't given; yields what contradicts them."""
        whence = repr(self.init_from)
        if "network_name" in self.given:
            yield f"network_name {self.network_name!r}: the network comes from {whence}, leave it out"
        for name, theirs in options.items():
            own = getattr(self, name)
            if name.endswith("_kwargs"):
                own = mapping(name, own) if name in self.given else {}
                for key in (own.keys() & theirs.keys()) - FREE_OF_NETWORK:
                    if own[key] != theirs[key]:
                        yield f"{name} {key} {own[key]!r} contradicts {theirs[key]!r} of {whence}: leave it out"
                setattr(self, name, json.dumps(theirs | own))
            elif name in self.given and own != theirs:
                yield f"{name} {own!r} contradicts {theirs!r} of {whence}: leave it out"
            else:
                setattr(self, name, theirs)


def options_of(start):
    """{name of an option: value} that come with a pipeline of texts."""
    kind, scheduler, network = type(start.network), start.scheduler.config, start.network.config
    classes = {found: name for name, (_, found) in NETWORKS.items()}
    taken = inspect.signature(kind).parameters.keys() - FROM_DATA - {"vocab_size"}
    length = network["sample_size"]
    return {
        "network": classes.get(kind, f"{kind.__module__}:{kind.__name__}"),
        "network_kwargs": {name: network[name] for name in sorted(taken) if network.get(name) is not None},
        **{name: scheduler[name] for name in ("process", "noise", "prediction_type")},
        "scheduler_kwargs": {name: scheduler[name] for name in sorted(TRAINED_ON) if scheduler.get(name) is not None},
        "length": length if isinstance(length, int) else length[0],
    }
