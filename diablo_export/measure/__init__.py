"""Measuring: what was exported against what was trained."""
