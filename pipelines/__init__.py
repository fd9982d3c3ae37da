"""Diffusion pipelines, installed as `score_sde.pipelines`."""

from .pipeline_score_sde import ScoreSDEPipeline


__all__ = ["ScoreSDEPipeline"]
