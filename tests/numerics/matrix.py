"""The parity matrix: the layouts and models that are compared with a dense process.

The full product of the axes has a million cases. Most faults show with one value or with two values together. Therefore
the cases cover every pair of values, and every three values of the axes that decide how gradients travel (`CORE`).
`make_plan` decides whether values fit together: a combination that it refuses is no case, and one that it accepts must
be exact.
"""

import functools
import itertools
import random
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from allpairspy import AllPairs

from stack.errors import LayoutError
from stack.plan.layout import make_plan
from stack.plan.policies import SCHEDULES
from tests.helpers.tiny import FAMILIES, SHAPE, family_settings, tiny_config

#: The axes that decide whether a layout is legal. They come first, so that a search rejects illegal layouts early.
LAYOUT: dict[str, tuple[Any, ...]] = {
    "schedule": ("1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"),
    "zero": (3, 2, 1, 0),
    "checkpoint": ("full", "none", "every_k", "selective"),
    "reduce": ("step", "microbatch"),
    "pipeline": (2, 4, 1),
    "ranks": (4, 2, 1),
    "gather": ("step", "microbatch"),
    "split": ("auto", "hand"),
    "micro": (1, 2),
}
AXES: dict[str, tuple[Any, ...]] = {
    **LAYOUT,
    "family": tuple(FAMILIES),
    "tied": (False, True),
    "kind": ("padded", "packed", "full"),
    "optimizer": ("adamw", "sgd"),
    "clip": (0.5, 0.0),
}
#: Axes of which every legal combination of three values is in some case.
CORE = ("schedule", "zero", "pipeline", "ranks", "reduce", "gather", "tied")
#: Number of cases that `make test` runs.
FAST = 25

#: Values of some axes: (axis, value) pairs in the order of `AXES`.
Values = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Case:
    """One value of each axis."""

    schedule: str
    zero: int
    checkpoint: str
    reduce: str
    pipeline: int
    ranks: int
    gather: str
    split: str
    micro: int
    family: str
    tied: bool
    kind: str
    optimizer: str
    clip: float

    @property
    def name(self) -> str:
        words = [
            self.family,
            f"zero{self.zero}",
            f"pp{self.pipeline}",
            f"of{self.ranks}",
            self.schedule,
            f"reduce_{self.reduce}",
            f"gather_{self.gather}",
            f"keep_{self.checkpoint}",
            "tied" if self.tied else "untied",
            f"split_{self.split}",
            self.kind,
            f"micro{self.micro}",
            self.optimizer,
            f"clip{self.clip}",
        ]
        return "-".join(words)

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `tiny_config`."""
        virtual = 2 if SCHEDULES[self.schedule].virtual else 1
        stages = self.pipeline * virtual
        return {
            **self.model_settings,
            "parallel__schedule": self.schedule,
            "parallel__virtual_stages": virtual,
            "parallel__zero": self.zero,
            "parallel__reduce": self.reduce,
            "parallel__pipeline": self.pipeline,
            "parallel__gather": self.gather,
            # One layer on each stage and the rest on the last. This differs from `auto`, which gives the last stage
            # fewer layers because it has the head.
            "parallel__split": "auto" if self.split == "auto" else list(range(stages)),
            "activation__checkpoint": self.checkpoint,
        }

    @property
    def model_settings(self) -> dict[str, Any]:
        """The settings that a dense process has too."""
        layers = SHAPE["num_hidden_layers"]
        stages = self.pipeline * (2 if SCHEDULES[self.schedule].virtual else 1)
        return {
            **family_settings(self.family, tied=self.tied),
            # Every stage needs a layer.
            "shape__num_hidden_layers": layers if stages <= layers else stages + 1,
            "batch__micro_size": self.micro,
            "optim__kind": self.optimizer,
            "optim__grad_clip": self.clip,
        }

    def combinations(self, axes: tuple[str, ...], size: int) -> Iterator[Values]:
        """All combinations of `size` values of this case on the given axes."""
        return itertools.combinations([(axis, getattr(self, axis)) for axis in axes], size)


@functools.cache
def legal(case: Case) -> bool:
    """Whether `make_plan` accepts the case."""
    try:
        make_plan(tiny_config(**case.settings), case.ranks)
    except LayoutError:
        return False
    return True


def completion(values: Values, shuffle: random.Random | None = None) -> Case | None:
    """A legal case with these values, or None where there is none.

    All layouts are searched. Of each other axis only one value is tried, because `make_plan` refuses only layouts.

    Args:
        values: the values that the case must have.
        shuffle: makes the order of the search random, so that different calls give different cases; None for the order
            of `AXES`.
    """
    fixed = dict(values)
    choices = []
    for axis, all_values in AXES.items():
        order = all_values if shuffle is None else shuffle.sample(all_values, len(all_values))
        choices.append((fixed[axis],) if axis in fixed else order if axis in LAYOUT else order[:1])
    return next((case for found in itertools.product(*choices) if legal(case := Case(*found))), None)


def legal_combinations(axes: tuple[str, ...], size: int) -> list[Values]:
    """All combinations of `size` values of different axes that occur in a legal case."""
    return [
        values
        for chosen in itertools.combinations(axes, size)
        for values in itertools.product(*([(axis, value) for value in AXES[axis]] for axis in chosen))
        if completion(values) is not None
    ]


@functools.cache
def cases() -> tuple[Case, ...]:
    """All cases of the matrix, in the same order in every session."""

    @functools.cache
    def extends(prefix: tuple[Any, ...]) -> bool:
        return completion(tuple(zip(AXES, prefix, strict=False))) is not None

    found = [Case(*row) for row in AllPairs(OrderedDict(AXES), filter_func=lambda prefix: extends(tuple(prefix)))]
    # AllPairs ends at the first row that adds no pair. With illegal combinations that may be too early, so the missing
    # combinations are added here.
    goals = [*legal_combinations(tuple(AXES), 2), *legal_combinations(CORE, 3)]
    covered = {values for case in found for values in _covered(case)}
    for goal in goals:
        if goal not in covered:
            case = completion(goal, random.Random(len(found)))
            assert case is not None
            found.append(case)
            covered.update(_covered(case))
    return tuple(found)


def _covered(case: Case) -> set[Values]:
    return {*case.combinations(tuple(AXES), 2), *case.combinations(CORE, 3)}


@functools.cache
def fast_cases() -> tuple[Case, ...]:
    """`FAST` cases, chosen greedily: together they have every value of every axis, and many pairs of layout values."""
    chosen: list[Case] = []
    seen: set[Values] = set()
    pairs: set[Values] = set()
    for _ in range(FAST):

        def gain(case: Case) -> tuple[int, int]:
            values, together = case.combinations(tuple(AXES), 1), case.combinations(tuple(LAYOUT), 2)
            return len(set(values) - seen), len(set(together) - pairs)

        best = max(cases(), key=gain)
        chosen.append(best)
        seen.update(best.combinations(tuple(AXES), 1))
        pairs.update(best.combinations(tuple(LAYOUT), 2))
    return tuple(chosen)
