"""Inference on transformers models over the prefix store."""
