"""Training on tokens that starts from weights: what comes with them."""

import os
from dataclasses import dataclass
from typing import ClassVar

from score_sde import DiscreteScoreScheduler
from score_sde.pipelines.writing import whole_folder
from score_sde.schedulers.discrete_paths import NOISES

from .config import option
from .starting import WeightsConfig, network_options, scheduler_options
from .text_data import open_tokenizer


# options of the process that are not the scheduler's alone
NAMED = ("process", "noise", "prediction_type")
# where a run keeps the tokenizer that came with the weights
KEPT_TOKENIZER = os.path.join("init_from", "tokenizer")


@dataclass
class TextStartConfig(WeightsConfig):
    init_from: str | None = option(
        None,
        "Pipeline of texts to start from, a folder or repo on the Hub; network, process and tokenizer come with it.",
        "start from weights",
        common=True,
    )

    adopted: ClassVar = ("network", "network_kwargs", *NAMED, "scheduler_kwargs", "length")
    scheduler_class: ClassVar = DiscreteScoreScheduler
    trained_on: ClassVar = {"alpha_min", "exponent", "sigma_min", "sigma_max"}
    noises: ClassVar = ("noise", NOISES)
    # the tokenizer of what is started from, None without
    known_tokenizer: ClassVar = None

    def begin_from_start(self):
        if not hasattr(self.start.opened, "tokenizer") or not hasattr(self.start.scheduler, "clean_log_probs"):
            raise ValueError("it is no pipeline of texts, with a tokenizer: images are --data_kind image")
        yield from self.adopt(options_of(self.start), repr(self.init_from))
        self.known_tokenizer = self.start.opened.tokenizer

    def go_on(self, before, folder):
        self.known_tokenizer = open_tokenizer(os.path.join(folder, KEPT_TOKENIZER))

    def keep_tokenizer(self, accelerator):
        """Write the tokenizer that came with the weights into the run's folder, for a run that is resumed."""
        if self.start is not None:
            if accelerator.is_main_process:
                with whole_folder(os.path.join(self.output_dir, KEPT_TOKENIZER)) as folder:
                    self.known_tokenizer.save_pretrained(folder)
            accelerator.wait_for_everyone()


def options_of(start):
    """{name of an option: value} that come with a pipeline of texts."""
    scheduler, network = start.scheduler, start.network
    # what its corrector makes it by itself is no option
    automatic = scheduler.config.corrector_steps == int(scheduler.config.corrector == "gibbs")
    left_out = ("vocab_size", *(["corrector_steps"] if automatic else []))
    length = network.config["sample_size"]
    return {
        **network_options(type(network), network.config),
        **scheduler_options(scheduler, NAMED, left_out),
        "length": length if isinstance(length, int) else length[0],
    }
