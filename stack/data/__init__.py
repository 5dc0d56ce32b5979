"""The corpus: read once into token shards (`stack data`), then a pure function of (step, replica)."""
