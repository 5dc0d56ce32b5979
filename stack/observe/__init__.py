"""What a run says about itself: metrics.jsonl, the console, Weights & Biases and the loss curve."""
