"""The config of a `ScoreSDEScheduler` outside of it: in files, and in the hands of stock schedulers."""

import inspect
import json
from dataclasses import replace
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME, KarrasDiffusionSchedulers, SchedulerMixin

from .checks import check_choice, refuse_unknown_arguments, without_given
from .parameterization import Parameterization
from .paths import PREDICTIONS
from .stock_configs import FLOW, HANDED_ON, from_stock_config, refuse_unknown_meaning


class SavedConfig(SchedulerMixin, ConfigMixin):
    """What a scheduler of diffusers does with its config, for a config that stock schedulers understand, too."""

    # two base classes declare it, as a string and as None
    config_name: Any = SCHEDULER_CONFIG_NAME
    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    parameterization: Parameterization

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """A scheduler from a config of ours or of a stock diffusers scheduler: the same path, prediction type, grid and
        clipping as the stock scheduler; the predictor is ours, unless given in `kwargs`.

        Stock configs: see `stock_configs`, which takes every scheduler of diffusers whose path is known, or says why
        not. The last step leads to clean data, wherever the stock scheduler's does.

        Raises ValueError for other schedulers, for a key whose value has no counterpart here, and for keywords that are
        no argument of this class (with return_unused_kwargs they are returned).
        """
        if isinstance(config, dict):
            own = inspect.signature(cls).parameters.keys()
            if not return_unused_kwargs:
                refuse_unknown_arguments(cls, kwargs, own)
            if "sde_type" in config:
                refuse_unknown_meaning(config, but=own)
                # a file doesn't hold them
                if "_use_default_values" not in config:
                    config = dict.fromkeys(cls._none_by_default()) | config
            else:
                config = from_stock_config(config, own)
            if kwargs.get("sde_type", config["sde_type"]) != config["sde_type"]:
                config = {name: value for name, value in config.items() if name != "beta_schedule"}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _none_by_default(cls):
        return [name for name, each in inspect.signature(cls).parameters.items() if each.default is None]

    def to_json_string(self) -> str:
        """The config as a file holds it: without the arguments that are None by default, since None is no number to a
        stock scheduler."""
        values, left_out = json.loads(super().to_json_string()), self._none_by_default()
        values = {name: value for name, value in values.items() if value is not None or name not in left_out}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def register_to_config(self, **kwargs):
        """As of every scheduler of diffusers. A `prediction_type`, which training scripts set so, is then the
        network's."""
        if "prediction_type" in kwargs and "parameterization" in vars(self):
            allowed = PREDICTIONS if self.parameterization.domain is None else ("score",)
            check_choice("prediction_type", kwargs["prediction_type"], allowed)
            self.parameterization = replace(self.parameterization, prediction_type=kwargs["prediction_type"])
        super().register_to_config(**without_given(type(self), kwargs))

    def _hand_on(self):
        """Let stock schedulers that are made from this config find in it what they need: diffusers leaves out what it
        thinks was left at a default."""
        if "_use_default_values" in self.config:
            names = HANDED_ON | {*FLOW} if self.config.sde_type == "linear" else HANDED_ON
            handed_on = {name for name in names if self.config.get(name) is not None}
            left_out = set(self.config["_use_default_values"])
            self.register_to_config(_use_default_values=sorted(left_out - handed_on))

    @property
    def config(self) -> Any:
        """The arguments, as a mapping with attributes: `scheduler.config.sde_type`."""
        return super().config
