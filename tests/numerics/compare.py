"""Compares a run with its reference, tensor by tensor, and remembers the largest differences for a summary."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tests.helpers.reference import Curve, dense_run
from tests.helpers.tiny import tiny_config
from tests.numerics.matrix import Case

#: Tolerance for fp32 against a dense process: the largest difference in a tensor over its largest magnitude.
FP32 = 1e-5
#: Tolerance for bf16 against the same run on one rank. Hidden states and gradients of microbatches have the same bits
#: there, and only the order of the fp32 sums differs.
BF16 = 1e-5
#: Tolerance for bf16 after an update. A master that differs in its last bits may round to the neighbouring bf16 number,
#: which differs by 2**-8, and one such weight changes the norm.
BF16_UPDATED = 1e-3


class Difference(NamedTuple):
    """A relative difference, infinite where the two values cannot be compared, and the name of the value."""

    size: float
    what: str


#: Group of comparisons -> name of a run -> its largest difference, for all runs of this session.
COMPARED: dict[str, dict[str, Difference]] = {}


def record(group: str, name: str, differences: Iterable[Difference]) -> Difference:
    """Returns the largest of the differences, and remembers it for the summary."""
    worst = max(differences)
    COMPARED.setdefault(group, {})[name] = worst
    return worst


@functools.cache
def _dense(settings: tuple[tuple[str, Any], ...], kind: str) -> Curve:
    return dense_run(tiny_config(**dict(settings)), kind)


def dense_of(case: Case) -> Curve:
    """The dense run of a case. Cases that are equal for a dense process share a run: the microbatch size matters only
    for the auxiliary loss of a mixture of experts."""
    settings = case.model_settings
    if "shape__router_aux_loss_coef" not in settings:
        del settings["batch__micro_size"]
    return _dense(tuple(settings.items()), case.kind)


def against_dense(results: list[dict[str, Any]], dense: Curve) -> Iterator[Difference]:
    """Compares all values that ranks report with the dense process: losses, norms before clipping, gradients of the
    first step before clipping, and parameters after the last step, on every replica, and both copies of a tied
    embedding.

    Args:
        results: of `run_layout`, one for each rank.
        dense: the dense run.
    """
    for result in results:
        losses, norms = zip(*result["steps"], strict=True)
        for step in range(len(losses)):
            yield _difference(losses[step], dense.losses[step], f"loss of step {step}")
            yield _difference(norms[step], dense.norms[step], f"norm of step {step}")
    for what, expected in (("gradients", dense.gradients), ("parameters", dense.parameters)):
        found = [(name, value) for result in results for name, value in result[what].items()]
        names = {name for name, _ in found}
        if dense.tied is not None:
            embedding, head = dense.tied
            expected = {**expected, head: expected[embedding]}
            copies = [value for name, value in found if name in dense.tied]
            if not all(np.array_equal(copy, copies[0]) for copy in copies):
                yield Difference(np.inf, f"{what}: copies of the tied embedding differ")
            # A stage that holds both has one tensor, under the embedding's name.
            names.add(head)
        if names != expected.keys():
            yield Difference(np.inf, f"{what}: names {sorted(names ^ expected.keys())}")
            continue
        for name, value in found:
            yield _difference(value, expected[name].numpy(), f"{what} of {name}")


def against_run(
    results: list[dict[str, Any]], single: dict[str, Any], *, steps: int | None = None
) -> Iterator[Difference]:
    """Compares losses and norms, of the first `steps` steps or of all, and the gradients of the first step with those
    of the same run on one rank."""
    for result in results:
        for step, (found, expected) in enumerate(zip(result["steps"], single["steps"], strict=True)):
            if step == steps:
                break
            yield _difference(found[0], expected[0], f"loss of step {step}")
            yield _difference(found[1], expected[1], f"norm of step {step}")
        for name, value in result["gradients"].items():
            yield _difference(value, single["gradients"][name], f"gradients of {name}")


def _difference(found: Any, expected: Any, what: str) -> Difference:
    """Largest difference over the largest magnitude; infinite for another shape or a value that is not finite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape or not np.isfinite(found).all():
        return Difference(np.inf, f"{what}: shape or value")
    return Difference(float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12)), what)
