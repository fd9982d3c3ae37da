"""Diffusion pipelines, installed as `score_sde.pipelines`."""

from .pipeline_score_sde import ScoreSDEPipeline
from .pipeline_score_sde_inverse import ScoreSDEInversePipeline


__all__ = ["ScoreSDEInversePipeline", "ScoreSDEPipeline"]
