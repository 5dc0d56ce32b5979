"""Outputs of a run: metrics.jsonl, the console, Weights & Biases and the loss curve."""
