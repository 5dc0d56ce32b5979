"""When the shards of ZeRO-3 parameters become whole parameters, and when they are let go again.

DeepSpeed decides that from a trace of the modules that one forward and one backward visit, and throws the trace away in
every step whose forwards and backwards interleave, which is every step of a pipeline. Here the order is known: the
units of a stage, forwards down and backwards up, so the next one is always gathered while this one computes.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

#: Starts to gather parameters; what it returns is waited for before they are used.
Ask = Callable[[list[Any]], Any]
#: Lets go of whole parameters.
Release = Callable[[list[Any]], None]


class Gathers:
    """The units (embedding, a decoder layer, norm, head) of a rank's stages, each gathered and let go as a whole."""

    def __init__(self, stages: list[list[nn.Module]], *, ask: Ask, release: Release):
        """
        Args:
            stages: the units of each stage in the order of its forward.
        """
        self._ask, self._release = ask, release
        self._parameters: dict[nn.Module, list[Any]] = {unit: list(unit.parameters()) for s in stages for unit in s}
        self._in_flight: dict[nn.Module, Any] = {}
        self._held: set[nn.Module] = set()
        #: Units that hold a parameter: a tied weight has two.
        self._holders: Counter[int] = Counter()

    def ask(self, unit: nn.Module) -> None:
        """Starts to gather a unit that is not held. On a GPU that runs beside what is queued after it."""
        if unit in self._held:
            return
        self._held.add(unit)
        parameters = self._parameters[unit]
        missing = [parameter for parameter in parameters if not self._holders[id(parameter)]]
        self._holders.update(map(id, parameters))
        if missing:
            self._in_flight[unit] = self._ask(missing)

    def need(self, unit: nn.Module) -> None:
        """Returns when the unit can be used."""
        self.ask(unit)
        self._arrive(unit)
        # A tied weight may be on its way for the other unit.
        for other in [u for u in self._in_flight if not self._apart(u, unit)]:
            self._arrive(other)

    def let_go(self, units: Iterable[nn.Module]) -> None:
        """Releases what none of the other units holds."""
        for unit in units:
            if unit in self._held:
                self._arrive(unit)
                self._held.remove(unit)
                parameters = self._parameters[unit]
                self._holders.subtract(map(id, parameters))
                if unheld := [parameter for parameter in parameters if not self._holders[id(parameter)]]:
                    self._release(unheld)

    def let_all_go(self) -> None:
        """Releases all."""
        self.let_go(list(self._held))

    def ask_all(self) -> None:
        """Starts to gather all units in the order of the forward."""
        for unit in self._parameters:
            self.ask(unit)

    def arrive_all(self) -> None:
        """Returns when nothing is on its way."""
        for unit in list(self._in_flight):
            self._arrive(unit)

    def _arrive(self, unit: nn.Module) -> None:
        if (handle := self._in_flight.pop(unit, None)) is not None:
            handle.wait()

    def _apart(self, one: nn.Module, other: nn.Module) -> bool:
        return {id(p) for p in self._parameters[one]}.isdisjoint(map(id, self._parameters[other]))


def arrive_with_forward(gathers: Gathers, stages: list[list[nn.Module]]) -> None:
    """`parallel.gather=step`: all units have been asked for, and the first forward that reaches one waits for it."""
    for unit in (unit for units in stages for unit in units):
        unit.register_forward_pre_hook(lambda module, _args: gathers.need(module))


def follow_microbatches(gathers: Gathers, stages: list[list[nn.Module]], *, ahead: bool) -> None:
    """`parallel.gather=microbatch`: each unit is gathered for its forward, and again for its backward.

    At most three units of the rank are whole at a time: the one that computes, the next one if `ahead`, and the last
    one of a stage from its forward on, since the backward that mostly follows begins there. So does the first one stay
    from a backward to the next forward.
    """
    for units in stages:
        for index, unit in enumerate(units):
            _follow(gathers, units, index, unit, ahead=ahead)
            if not getattr(unit, "gradient_checkpointing", False):
                _save_places(unit)


def _follow(gathers: Gathers, units: list[nn.Module], index: int, unit: nn.Module, *, ahead: bool) -> None:
    first, last = index == 0, index == len(units) - 1

    def before_forward(*_: Any) -> None:
        gathers.need(unit)
        if ahead and not last:
            gathers.ask(units[index + 1])

    def before_backward(_gradient: torch.Tensor) -> None:
        # Autograd has run all of a unit by the time that it comes to the unit before.
        gathers.let_go(units[index + 1 :])
        gathers.need(unit)
        if ahead and not first:
            gathers.ask(units[index - 1])

    def after_forward(_module: nn.Module, _args: Any, output: Any) -> None:
        if not last:
            gathers.let_go([unit])
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(before_backward)

    unit.register_forward_pre_hook(before_forward)
    unit.register_forward_hook(after_forward)


def _save_places(unit: nn.Module) -> None:
    """Has autograd keep where in a weight it will look, and not the weight: a product saves a view of it, which would
    keep all that was gathered in memory until the backward, for each microbatch in flight. A unit that is recomputed
    saves nothing but its input."""
    forward = unit.forward

    def forward_that_saves_places(*args: Any, **kwargs: Any) -> Any:
        whole = {p.untyped_storage().data_ptr(): p for p in unit.parameters() if not p.storage_offset()}

        def pack(tensor: torch.Tensor) -> Any:
            parameter = whole.get(tensor.untyped_storage().data_ptr())
            if parameter is None:
                # Detached, or an output that is saved would hold itself.
                return tensor.detach()
            return parameter, tensor.size(), tensor.stride(), tensor.storage_offset()

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return forward(*args, **kwargs)

    unit.forward = forward_that_saves_places  # type: ignore[method-assign]


def _unpack(saved: Any) -> torch.Tensor:
    """What was saved; a weight has been gathered again by now."""
    if isinstance(saved, torch.Tensor):
        return saved
    parameter, size, stride, offset = saved
    return parameter.data.as_strided(size, stride, offset)
