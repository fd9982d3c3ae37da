"""The loss of a diffusion model on rows of data: clean samples, what the network is told of them, times and noise."""

from functools import partial

from score_sde.losses import drop_conditions, hybrid_loss
from score_sde.pipelines.conditions import null_conditions


class DiffusionLoss:
    """The loss by which a network is trained, in training and wherever it is measured.

    Args:
        objective: a `score_sde.losses.Objective`.
        data: a `CleanSamples`.
        model: the network itself, which says what stands for "none" of its conditions.
        conditions: those of `data.told` that it is told.
        labels: the network's label of every class of the data (N,), where they are others; None where they are the
            same.
        vlb_weight: of the variational bound, by which a variance is learned, too; 0 without.
    """

    def __init__(self, objective, data, model, conditions, labels=None, vlb_weight=0.0):
        self.objective, self.data, self.model = objective, data, model
        self.conditions, self.labels, self.vlb_weight = conditions, labels, vlb_weight

    def __call__(self, network, batch, draws, dropout_prob=0.0, progress=1.0):
        """The loss of each sample of a batch (B,), whose times are then draws.times. `network` is the one to call,
        which may be wrapped; `dropout_prob` is the chance that a sample's conditions are left out; `progress` is the
        share of the training that is done, for losses that change with it."""
        return self.of_mirrored(network, self.data.mirrored(batch, draws), draws, dropout_prob, progress)

    def of_mirrored(self, network, batch, draws, dropout_prob=0.0, progress=1.0):
        """The same of a batch that is mirrored already."""
        x0 = self.data.draw(batch, draws)
        t = draws.times = self.objective.times(draws.stratified())
        noise, conditions = draws.normal(x0.shape[1:]), self.conditions_of(batch, draws)
        if dropout_prob > 0:  # for guidance
            null_of = partial(null_conditions, self.model)
            conditions = drop_conditions(conditions, null_of, draws.chance(dropout_prob))
        if self.vlb_weight > 0:
            scheduler, discretized = self.objective.scheduler, self.data.discretized
            return hybrid_loss(network, scheduler, x0, noise, t, conditions, self.vlb_weight, discretized=discretized)
        return self.objective(network, x0, noise, t, conditions)

    def conditions_of(self, batch, draws):
        """What the network is told of a batch, {keyword of its forward: tensor (B, ...)}."""
        given = self.data.conditions(batch, draws)
        conditions = {name: given[name] for name in self.conditions}
        if self.labels is not None:
            conditions["class_labels"] = self.labels[conditions["class_labels"]]
        return conditions
