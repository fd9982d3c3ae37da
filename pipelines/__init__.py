"""Diffusion pipelines, installed as `score_sde.pipelines`."""

from .pipeline_score_sde import ScoreSDEPipeline
from .pipeline_score_sde_inverse import ScoreSDEInversePipeline
from .pipeline_score_sde_text import ScoreSDETextPipeline, show_text


__all__ = ["ScoreSDEInversePipeline", "ScoreSDEPipeline", "ScoreSDETextPipeline", "show_text"]
