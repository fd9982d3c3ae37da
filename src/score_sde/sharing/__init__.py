"""Bundles: saved, checked, opened, described on a card, converted, and exchanged with the Hub."""

from .bundles import load_bundle, save_bundle
from .hub import push_to_hub


__all__ = ["load_bundle", "push_to_hub", "save_bundle"]
