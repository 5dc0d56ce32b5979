"""How far a run is from its reference, tensor by tensor; and the worst of the session, for the summary at its end."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tests.helpers.reference import Curve, dense_run
from tests.helpers.tiny import tiny_config
from tests.numerics.matrix import Case

#: fp32 against a dense process: the largest difference of a tensor over its largest magnitude.
FP32 = 1e-5
#: bf16 against the same run on one rank, where hidden states and microbatch gradients are the same bits: what remains
#: is the order of the fp32 sums.
BF16 = 1e-5
#: The same after an update: a master that differs in its last bits may round to the next bf16, 2**-8 from the other,
#: and one such weight moves the norm.
BF16_UPDATED = 1e-3


class Difference(NamedTuple):
    """A relative difference, and what differs; infinite where the two cannot be compared at all."""

    size: float
    what: str


#: Worst difference of each compared run of this session, by what it was compared for and the run's name.
COMPARED: dict[str, dict[str, Difference]] = {}


def record(group: str, name: str, differences: Iterable[Difference]) -> Difference:
    """The worst of the differences, remembered for the summary."""
    worst = max(differences)
    COMPARED.setdefault(group, {})[name] = worst
    return worst


@functools.cache
def _dense(settings: tuple[tuple[str, Any], ...], kind: str) -> Curve:
    return dense_run(tiny_config(**dict(settings)), kind)


def dense_of(case: Case) -> Curve:
    """The dense run of a case. Cases that a dense process cannot tell apart share it: microbatches matter only to the
    auxiliary loss of a mixture of experts."""
    settings = case.model_settings
    if "shape__router_aux_loss_coef" not in settings:
        del settings["batch__micro_size"]
    return _dense(tuple(settings.items()), case.kind)


def against_dense(results: list[dict[str, Any]], dense: Curve) -> Iterator[Difference]:
    """Everything a rank reports against the dense process: losses, norms before clipping, gradients of the first step
    before clipping, parameters after the last step. Every replica's copy, and both copies of a tied embedding."""
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
            # A stage that holds both has one tensor, by the embedding's name.
            names.add(head)
        if names != expected.keys():
            yield Difference(np.inf, f"{what}: names {sorted(names ^ expected.keys())}")
            continue
        for name, value in found:
            yield _difference(value, expected[name].numpy(), f"{what} of {name}")


def against_run(
    results: list[dict[str, Any]], single: dict[str, Any], *, steps: int | None = None
) -> Iterator[Difference]:
    """Losses and norms, of the first `steps` or of all, and gradients of the first step against the same run on one
    rank."""
    for result in results:
        for step, (found, expected) in enumerate(zip(result["steps"], single["steps"], strict=True)):
            if step == steps:
                break
            yield _difference(found[0], expected[0], f"loss of step {step}")
            yield _difference(found[1], expected[1], f"norm of step {step}")
        for name, value in result["gradients"].items():
            yield _difference(value, single["gradients"][name], f"gradients of {name}")


def _difference(found: Any, expected: Any, what: str) -> Difference:
    """Largest difference over the largest magnitude; a value that is not finite is infinitely far."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape or not np.isfinite(found).all():
        return Difference(np.inf, f"{what}: shape or value")
    return Difference(float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12)), what)
