"""The schedule of the learning rate: where it stands, in steps, also of a run that ends by the clock."""

import math


def position(before, progress, config, took=0.0):
    """Where the schedule stands that stood at a position `before`.

    Without max_train_seconds, and where all steps are in time, it stands at the steps that are done. Where those that
    are left are too many at the pace of the last one, of `took` seconds, it moves on by as much in each as lets it end
    with the time; never ahead of the share of the time that is over, so that a pause, or a step that took long, hurries
    nothing that is in time without.
    """
    limit = config.max_train_seconds or math.inf
    if took:
        # of what is left of the schedule the part that this step is of the time that is left; the step itself moves it
        # by one
        share = took / max(limit - progress["seconds"], took)
        before += max(0.0, share * (config.max_train_steps - before) - 1)
    return max(progress["step"], min(before, config.max_train_steps * min(1.0, progress["seconds"] / limit)))


def follow_schedule(config, accelerator, lr_scheduler, state):
    """Give the optimizer the learning rate that the options ask for at this step of a checkpoint's state, and say so
    where it jumps."""
    # the same share of the way, as far as another end would have it
    longer = config.max_train_steps / state["config"]["max_train_steps"]
    lr_scheduler.last_epoch = position(lr_scheduler.last_epoch * longer, state["progress"], config)
    groups, jumps = lr_scheduler.optimizer.param_groups, set()
    lr_scheduler.base_lrs = [config.learning_rate] * len(groups)
    for group, rate_at in zip(groups, lr_scheduler.lr_lambdas, strict=True):
        rate = config.learning_rate * rate_at(lr_scheduler.last_epoch)
        if rate != group["lr"]:
            jumps.add(f"the next step's learning rate was {group['lr']:.3g}, is {rate:.3g}")
        group["lr"], group["initial_lr"] = rate, config.learning_rate
    lr_scheduler._last_lr = [group["lr"] for group in groups]
    for jump in jumps:
        accelerator.print(f"{jump}: learning_rate, its schedule or its end changed since the checkpoint")
