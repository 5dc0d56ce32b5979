"""The corpus. `stack data` writes it into token shards once; batches are then a pure function of (step, replica)."""
