"""Decides when ZeRO-3 parameters are gathered from their shards, and when the whole parameters are released.

DeepSpeed decides this from a trace of the modules that one forward and one backward visit. It discards the trace when
forwards and backwards interleave, as they do in every step of a pipeline. Here the order is known without a trace: a
forward visits the units of a stage in order and a backward in reverse, so the next unit can be gathered while one
computes.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

#: Starts to gather parameters, and returns a handle whose `wait` must be called before they are used.
Ask = Callable[[list[Any]], Any]
#: Releases whole parameters.
Release = Callable[[list[Any]], None]


class Gathers:
    """Gathers and releases the units (embedding, a decoder layer, norm, head) of a rank's stages."""

    def __init__(self, stages: list[list[nn.Module]], *, ask: Ask, release: Release):
        """
        Args:
            stages: the units of each stage in the order of its forward.
            ask: starts to gather parameters.
            release: releases parameters.
        """
        self._ask, self._release = ask, release
        self._parameters: dict[nn.Module, list[Any]] = {unit: list(unit.parameters()) for s in stages for unit in s}
        self._in_flight: dict[nn.Module, Any] = {}
        self._held: set[nn.Module] = set()
        #: `id` of a parameter -> number of units that hold it. A tied weight may be held by two units.
        self._holders: Counter[int] = Counter()

    def ask(self, unit: nn.Module) -> None:
        """Starts to gather a unit that is not held. On a GPU the gather runs beside the work that is queued later."""
        if unit in self._held:
            return
        self._held.add(unit)
        parameters = self._parameters[unit]
        missing = [parameter for parameter in parameters if not self._holders[id(parameter)]]
        self._holders.update(map(id, parameters))
        if missing:
            self._in_flight[unit] = self._ask(missing)

    def need(self, unit: nn.Module) -> None:
        """Waits until the parameters of the unit can be used."""
        self.ask(unit)
        self._arrive(unit)
        # The gather of a tied weight may have been started for the other unit.
        for other in [u for u in self._in_flight if not self._apart(u, unit)]:
            self._arrive(other)

    def let_go(self, units: Iterable[nn.Module]) -> None:
        """Releases the parameters of units, except those that another held unit shares."""
        for unit in units:
            if unit in self._held:
                self._arrive(unit)
                self._held.remove(unit)
                parameters = self._parameters[unit]
                self._holders.subtract(map(id, parameters))
                if unheld := [parameter for parameter in parameters if not self._holders[id(parameter)]]:
                    self._release(unheld)

    def let_all_go(self) -> None:
        """Releases all units."""
        self.let_go(list(self._held))

    def ask_all(self) -> None:
        """Starts to gather all units in the order of the forward."""
        for unit in self._parameters:
            self.ask(unit)

    def arrive_all(self) -> None:
        """Waits for all gathers that were started."""
        for unit in list(self._in_flight):
            self._arrive(unit)

    def _arrive(self, unit: nn.Module) -> None:
        if (handle := self._in_flight.pop(unit, None)) is not None:
            handle.wait()

    def _apart(self, one: nn.Module, other: nn.Module) -> bool:
        return {id(p) for p in self._parameters[one]}.isdisjoint(map(id, self._parameters[other]))


def arrive_with_forward(gathers: Gathers, stages: list[list[nn.Module]]) -> None:
    """Sets the hooks for `parallel.gather=step`: all gathers are started at the beginning of a step, and the first
    forward that reaches a unit waits for the unit."""
    for unit in (unit for units in stages for unit in units):
        unit.register_forward_pre_hook(lambda module, _args: gathers.need(module))


def follow_microbatches(gathers: Gathers, stages: list[list[nn.Module]], *, ahead: bool) -> None:
    """Sets the hooks for `parallel.gather=microbatch`: each unit is gathered for its forward, and again for its
    backward.

    At most three units of a rank are whole at a time: the unit that computes, the next unit if `ahead`, and one that a
    stage keeps. A stage keeps its last unit after a forward, because the backward that usually follows begins there. In
    the same way it keeps its first unit after a backward, for the next forward.
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
        # When the gradient of this unit's output is computed, autograd has finished the units after this one.
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
    """Makes autograd save the place of a weight (parameter, size, stride, offset) instead of a view of the weight.

    A matrix product saves a view of its weight, which would keep the gathered memory alive until the backward, for each
    microbatch in flight. Units that are recomputed do not need this, since they save only their input.
    """
    forward = unit.forward

    def forward_that_saves_places(*args: Any, **kwargs: Any) -> Any:
        whole = {p.untyped_storage().data_ptr(): p for p in unit.parameters() if not p.storage_offset()}

        def pack(tensor: torch.Tensor) -> Any:
            parameter = whole.get(tensor.untyped_storage().data_ptr())
            if parameter is None:
                # Detached, because a saved output that is not detached would hold a reference to itself.
                return tensor.detach()
            return parameter, tensor.size(), tensor.stride(), tensor.storage_offset()

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return forward(*args, **kwargs)

    unit.forward = forward_that_saves_places  # type: ignore[method-assign]


def _unpack(saved: Any) -> torch.Tensor:
    """The saved tensor, or a view of a weight, which is gathered again when its backward runs."""
    if isinstance(saved, torch.Tensor):
        return saved
    parameter, size, stride, offset = saved
    return parameter.data.as_strided(size, stride, offset)
