"""Networks: the Diffusion Transformer, the U-Nets of score matching, and a classifier of noisy samples."""

from .noise_conditional_classifier import NoiseConditionalClassifier
from .transformer_score_dit import DiTModel
from .unet_score import ScoreUNetModel


__all__ = ["DiTModel", "NoiseConditionalClassifier", "ScoreUNetModel"]
