"""Bundles: saved, checked, opened, described on a card, converted, and exchanged with the Hub."""

from .hub import load_bundle, push_to_hub, save_bundle


__all__ = ["load_bundle", "push_to_hub", "save_bundle"]
