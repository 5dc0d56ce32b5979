"""All that a run must remember from step to step."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from stack.errors import CheckpointError


@dataclass(frozen=True)
class TrainState:
    """Made anew each step. The rest of a step follows from it: the learning rate, and with `run.seed` which sequences
    come next and what dropout draws."""

    step: int = 0
    """Finished optimizer steps."""
    tokens: int = 0
    """Target tokens trained on."""
    sequences: int = 0
    """Training sequences seen: the position in the data."""
    skipped_steps: int = 0
    """Steps whose update was left out."""
    attempt: int = 1
    """Number of this start of the run."""

    def advance(self, *, tokens: int, sequences: int, skipped: bool = False) -> "TrainState":
        """The state after one more step on `tokens` targets in `sequences` sequences."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            sequences=self.sequences + sequences,
            skipped_steps=self.skipped_steps + int(skipped),
        )

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: all but the attempt, so that equal states are equal files."""
        return {name: value for name, value in asdict(self).items() if name != "attempt"}

    @classmethod
    def restored(cls, saved: dict[str, Any], *, attempt: int) -> Self:
        """The inverse of `saved`.

        Raises:
            CheckpointError: it is none.
        """
        if saved.keys() != cls().saved().keys() or not all(type(value) is int for value in saved.values()):
            raise CheckpointError("its state of training is none that a run has saved")
        return cls(**saved, attempt=attempt)
