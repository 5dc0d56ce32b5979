"""Train Hugging Face transformers with ZeRO-3, pipeline stages and activation checkpointing in one run."""

__version__ = "0.1.0"
