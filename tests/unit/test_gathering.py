"""Tests which units are gathered at which time."""

import torch
from torch import nn

from stack.parallel.gathering import Gathers, arrive_with_forward, follow_microbatches
from stack.parallel.schedule import order_1f1b


class Handle:
    def __init__(self, world: "World", parameters: list[nn.Parameter]):
        self._world, self._parameters = world, parameters

    def wait(self) -> None:
        self._world.whole.update(self._parameters)


class World:
    """Units whose parameters may only be used while they are gathered. Counts gathers and whole units."""

    def __init__(self, count: int, *, tied: bool = False):
        self.whole: set[nn.Parameter] = set()
        self.gathers = 0
        self.most = 0
        self.units = [nn.Linear(4, 4, bias=False) for _ in range(count)]
        if tied:
            self.units[-1].weight = self.units[0].weight
        for unit in self.units:
            unit.forward = self._checked(unit.forward, unit)  # type: ignore[method-assign]

    def _checked(self, forward, unit):
        world = self

        class Use(torch.autograd.Function):
            @staticmethod
            def forward(_ctx, x):
                assert unit.weight in world.whole, "used before it was gathered"
                world.most = max(world.most, len(world.whole))
                return x.view_as(x)

            backward = staticmethod(lambda ctx, gradient: (Use.forward(ctx, gradient),))

        # Applied before and after the unit, so that the first and the last use of the unit in a backward are checked.
        return lambda x: Use.apply(forward(Use.apply(x)))

    def ask(self, parameters: list[nn.Parameter]) -> Handle:
        assert not self.whole & set(parameters), "gathered twice"
        self.gathers += 1
        return Handle(self, parameters)

    def release(self, parameters: list[nn.Parameter]) -> None:
        assert set(parameters) <= self.whole, "released before it arrived"
        self.whole -= set(parameters)

    def made(self) -> Gathers:
        return Gathers([self.units], ask=self.ask, release=self.release)

    def forward(self) -> torch.Tensor:
        x = torch.ones(1, 4, requires_grad=True)
        for unit in self.units:
            x = unit(x)
        return x.sum()


def microbatches(world: World, *, ahead: bool) -> Gathers:
    gathers = world.made()
    follow_microbatches(gathers, [world.units], ahead=ahead)
    return gathers


def test_each_unit_is_whole_for_its_forward_and_its_backward_and_at_most_three_are():
    world = World(6)
    gathers = microbatches(world, ahead=True)
    world.forward().backward()
    assert world.most <= 3
    # The last unit is kept for the backward, so it is gathered only once.
    assert world.gathers == 11
    world.forward().backward()
    # The first unit is kept from the backward to the next forward.
    assert world.gathers == 21
    gathers.let_all_go()
    assert not world.whole


def test_without_overlap_nothing_is_gathered_ahead():
    world = World(6)
    microbatches(world, ahead=False)
    world.forward().backward()
    assert world.most <= 2
    assert world.gathers == 11


def test_forwards_in_a_row_and_their_backwards_in_a_row():
    world = World(4)
    gathers = microbatches(world, ahead=True)
    for loss in [world.forward() for _ in range(3)]:
        loss.backward()
    gathers.let_all_go()
    assert not world.whole
    assert world.most <= 3


def test_a_tied_weight_is_gathered_once_for_its_two_units():
    world = World(4, tied=True)
    gathers = microbatches(world, ahead=True)
    for _ in range(2):
        world.forward().backward()
    gathers.let_all_go()
    assert not world.whole


def test_evaluation_leaves_nothing_behind():
    world = World(3)
    gathers = microbatches(world, ahead=True)
    with torch.no_grad():
        world.forward()
    gathers.arrive_all()
    gathers.let_all_go()
    assert not world.whole


def test_with_gather_step_each_unit_is_gathered_once_a_step():
    world = World(4)
    gathers = world.made()
    arrive_with_forward(gathers, [world.units])
    gathers.ask_all()
    for _ in range(3):
        world.forward().backward()
    assert world.gathers == 4
    gathers.let_all_go()
    assert not world.whole


def test_1f1b_starts_a_backward_as_soon_as_a_gradient_can_be_there():
    orders = {rank: " ".join(str(action)[1:] for action in order_1f1b(rank, 3, 4)) for rank in range(3)}
    assert orders == {
        0: "F0 F1 F2 B0 F3 B1 B2 B3",
        1: "F0 F1 B0 F2 B1 F3 B2 B3",
        2: "F0 B0 F1 B1 F2 B2 F3 B3",
    }


def test_1f1b_with_fewer_microbatches_than_stages():
    assert [str(action) for action in order_1f1b(0, 4, 2)] == ["0F0", "0F1", "0B0", "0B1"]


def test_a_unit_that_is_let_go_is_in_nobodys_memory_until_its_backward():
    import torch.nn.functional as F
    from torch.multiprocessing.reductions import StorageWeakRef

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight, self.bias).tanh() @ self.weight

    units = [Unit(), Unit(), Unit()]
    shards = {p: p.detach().clone() for unit in units for p in unit.parameters()}
    gathered: list[StorageWeakRef] = []

    class Whole:
        def __init__(self, parameters: list[nn.Parameter]):
            for parameter in parameters:
                parameter.data = shards[parameter].clone()
                gathered.append(StorageWeakRef(parameter.untyped_storage()))

        def wait(self) -> None:
            pass

    def release(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data = torch.empty(0)

    x = torch.randn(2, 3, 4)
    expected = [p.grad for p in _gradients(units, x)]
    for parameter in shards:
        parameter.grad = None
    release(list(shards))
    gathers = Gathers([units], ask=Whole, release=release)
    follow_microbatches(gathers, [units], ahead=False)
    y = x
    for unit in units:
        y = unit(y)
    # The last unit is kept for the backward.
    assert [ref.expired() for ref in gathered] == [True] * 4 + [False] * 2
    y.sum().backward()
    for parameter, gradient in zip(shards, expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def _gradients(units: list[nn.Module], x: torch.Tensor) -> list[nn.Parameter]:
    for unit in units:
        x = unit(x)
    x.sum().backward()
    return [parameter for unit in units for parameter in unit.parameters()]
