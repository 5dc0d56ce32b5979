"""All that a run must remember from step to step."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TrainState:
    """Made anew each step; the data position is `step` times the global batch, in sequences."""

    step: int = 0
    """Finished optimizer steps."""
    tokens: int = 0
    """Target tokens trained on."""
    skipped_steps: int = 0
    """Steps whose update was left out."""
    attempt: int = 1
    """Number of this start of the run."""

    def advance(self, *, tokens: int, skipped: bool = False) -> "TrainState":
        """The state after one more step on `tokens` targets."""
        return replace(
            self, step=self.step + 1, tokens=self.tokens + tokens, skipped_steps=self.skipped_steps + int(skipped)
        )
