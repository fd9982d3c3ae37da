"""The template of the model card, installed as `score_sde.model_cards`."""
