"""Host buffers of a save in the background."""

from types import SimpleNamespace

import torch

from stack.checkpoint.staging import Staging
from stack.checkpoint.storage import Slice
from tests.helpers.fake_cuda import fake_cuda


def _slices(*values: list[float]) -> dict[str, Slice]:
    return {str(number): Slice(torch.tensor(value), 0, len(value)) for number, value in enumerate(values)}


def test_copies_do_not_change_with_the_states_and_share_one_buffer():
    staging, live = Staging(), _slices([1.0, 2.0, 3.0], [4.0])
    before = [part.tensor for part in live.values()]
    staging.copy(0, live)
    for tensor in before:
        tensor.zero_()
    assert [part.tensor.tolist() for part in live.values()] == [[1.0, 2.0, 3.0], [4.0]]
    assert len({part.tensor.untyped_storage().data_ptr() for part in live.values()}) == 1


def test_later_saves_reuse_the_buffers_and_groups_have_buffers_of_their_own():
    staging = Staging()
    places = []
    for values in ([1.0, 2.0], [3.0, 4.0]):
        first, second = _slices(values), _slices(values)
        staging.copy(0, first)
        staging.copy(1, second)
        assert first["0"].tensor.tolist() == second["0"].tensor.tolist() == values
        places.append((first["0"].tensor.data_ptr(), second["0"].tensor.data_ptr()))
    assert places[0] == places[1]
    assert places[0][0] != places[0][1]


def test_states_of_a_gpu_are_copied_to_locked_pages_of_exactly_their_size():
    class OnGpu(torch.Tensor):
        is_cuda = True

    slices = {name: SimpleNamespace(tensor=torch.ones(size).as_subclass(OnGpu)) for name, size in (("a", 5), ("b", 3))}
    staging = Staging()
    with fake_cuda(0) as cuda:
        staging.copy(0, slices)
        staging.copy(0, slices)
    assert cuda.calls == [("register", 8 * 4)]
