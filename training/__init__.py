"""Training and evaluation, installed as `score_sde.training`: one module for each command, made of `parts`."""
