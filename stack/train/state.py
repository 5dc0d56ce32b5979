"""The state of the training loop, which a checkpoint keeps."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from stack.errors import CheckpointError


@dataclass(frozen=True)
class TrainState:
    """Counters of the training loop; a new object for each step. With the config they determine the rest of a step: the
    learning rate, the sequences of the batch, and dropout."""

    step: int = 0
    """Finished optimizer steps."""
    tokens: int = 0
    """Target tokens trained on."""
    sequences: int = 0
    """Training sequences seen, which is the position in the data."""
    skipped_steps: int = 0
    """Steps whose update was skipped because of an overflow in fp16."""
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
        """The fields that a checkpoint keeps: all except `attempt`, so that equal states make equal files."""
        return {name: value for name, value in asdict(self).items() if name != "attempt"}

    @classmethod
    def restored(cls, saved: dict[str, Any], *, attempt: int) -> Self:
        """The inverse of `saved`.

        Raises:
            CheckpointError: a field is missing, unknown or no integer.
        """
        if saved.keys() != cls().saved().keys() or not all(type(value) is int for value in saved.values()):
            raise CheckpointError("its state of training is not one that a run has saved")
        return cls(**saved, attempt=attempt)
