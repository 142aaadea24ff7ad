"""Weights as quantized Hugging Face checkpoints hold them: a file for each format, all read into codes and scales."""
