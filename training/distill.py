"""Distil a diffusion model: a student that needs one to four network evaluations for what its teacher does in twenty.

    score-sde distill --teacher runs/dit/pipeline --latents runs/latents --method flow_map --output_dir runs/student

The student begins with the teacher's weights, on its path and in its latents. Training, checkpoints, and what is
written are those of `score-sde train`, whose --method learns the same from the data alone.
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

from score_sde.pipelines.wording import unknown
from score_sde.sharing.convert.starting_point import starting_point, weights_hash
from score_sde.training.parts.config import one_of, option
from score_sde.training.parts.few_steps import DENOISING, FEW_STEP_METHODS, GROUP
from score_sde.training.parts.loop import make_accelerator
from score_sde.training.parts.options import one_line_errors, parse
from score_sde.training.parts.run_folder import open_run
from score_sde.training.train import TrainConfig, train


@dataclass
class DistillConfig(TrainConfig):
    """Distil a diffusion model into one that needs one to four network evaluations."""

    configs = "distillation"
    other_kinds: ClassVar[dict] = {}
    start_option = "teacher"

    teacher: str | None = option(
        None,
        "Who is distilled, a folder or repo on the Hub: a pipeline of this package, a DiTPipeline, a pipeline around a "
        "UNet2DModel, or a network alone. The student begins with its weights.",
        GROUP,
        common=True,
    )
    teacher_revision: str | None = option(None, "Branch, tag or commit of that repo.", GROUP)
    method: str = option(
        "flow_map", f"How: {one_of(FEW_STEP_METHODS)}; score_sde.losses says what they are.", GROUP, common=True
    )

    def problems(self):
        if self.teacher is None:
            yield "teacher: say which model is distilled, a folder or a repo on the Hub"
            return
        if self.data_kind != "image":
            yield f"data_kind {self.data_kind!r} is not distilled, images are: `score-sde train --method`"
            return
        if given := sorted({"init_from", "init_revision"} & self.given):
            yield f"{', '.join(given)}: a student begins with the weights of its teacher: leave it out"
            return
        if self.method == DENOISING:
            yield f"method {DENOISING} follows no teacher: choose one of {', '.join(FEW_STEP_METHODS)}"
            return
        if self.method not in FEW_STEP_METHODS:
            yield unknown("method", self.method, FEW_STEP_METHODS)
            return
        self.init_from, self.init_revision = self.teacher, self.teacher_revision
        yield from super().problems()

    def few_step_problems(self, stated):
        """As of training, and of the teacher, which a resumed run needs again."""
        try:
            self.teaching = self.start or starting_point(self.teacher, self.teacher_revision, self.outside())
            if self.start is None and weights_hash(self.teaching.network) != self.origin["weights"]:
                raise ValueError("its weights are not those that the run began with: a student has one teacher")
        except ValueError as error:
            yield f"teacher {self.teacher!r}: {error}"
            return
        for problem in self.teacher_problems():
            yield f"teacher {self.teacher!r}: {problem}"
        yield from super().few_step_problems(stated)


def main(argv=None):
    config = parse(DistillConfig, sys.argv[1:] if argv is None else argv)
    accelerator = make_accelerator(config)
    with open_run(config, accelerator) as run:
        train(config, accelerator, run)


if __name__ == "__main__":
    with one_line_errors():
        main()
