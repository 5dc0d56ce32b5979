"""Finds a rank's part of masters, optimizer state and reduced gradients in DeepSpeed's ZeRO optimizers.

DeepSpeed keeps the parameters of a group one after another in flat tensors. ZeRO-3 cuts each parameter into equal
parts, one for each rank. ZeRO-1 and 2 cut the whole group, so a rank's part may begin and end inside a parameter.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.utils import all_gather_dp_groups


@dataclass(frozen=True)
class Place:
    """The place of a rank's part of a parameter: elements [offset, offset + length) of this rank's flat tensors of the
    group are elements [start, start + length) of the flattened parameter."""

    parameter: Any
    start: int
    offset: int
    length: int


def masters(optimizer: Any, stage: int) -> list[torch.Tensor]:
    """This rank's flat fp32 masters, one tensor for each group; empty tensors while they are in files."""
    return optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups


@contextlib.contextmanager
def in_memory(optimizer: Any, group: int, stage: int) -> Iterator[None]:
    """A context in which the states of a group are in memory. States that are offloaded to files are read before and
    written back after it."""
    swapped = stage == 3 and optimizer._swappable_optimizer_subgroup(group)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(group)
    yield
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_out(group)


def places(optimizer: Any, group: int, stage: int, *, replica: int) -> list[Place]:
    """The parts of a group's parameters that this rank holds, without padding."""
    return _places_zero3(optimizer, group, replica) if stage == 3 else _places_zero12(optimizer, group, replica)


def _places_zero3(optimizer: Any, group: int, replica: int) -> list[Place]:
    found = []
    for parameter in optimizer.fp16_groups[group]:
        _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        length = min(size, parameter.ds_numel - replica * size)
        if length > 0:
            found.append(Place(parameter, replica * size, offset, length))
    return found


def _places_zero12(optimizer: Any, group: int, replica: int) -> list[Place]:
    size = optimizer.partition_size[group]
    begin, end = replica * size, (replica + 1) * size
    found = []
    parameters, offsets = optimizer.round_robin_bit16_groups[group], optimizer.round_robin_bit16_offsets[group]
    for parameter, at in zip(parameters, offsets, strict=True):
        first, last = max(at, begin), min(at + parameter.numel(), end)
        if first < last:
            found.append(Place(parameter, first - at, first - begin, last - first))
    return found


def take_over(optimizer: Any, group: int, stage: int, *, replica: int) -> None:
    """Casts a group's masters into this rank's part of the parameters in use."""
    if stage == 3:
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    else:
        mine = optimizer.parallel_partitioned_bit16_groups[group][replica]
        mine.data.copy_(optimizer.single_partition_of_fp32_groups[group].data)


def bring_to_users(optimizer: Any, stage: int) -> None:
    """Distributes the new parameters over the data group after `take_over`, as the end of DeepSpeed's step does.
    Collective over the data group."""
    if stage == 3:
        # The next gather makes the second copies of hpZ again.
        optimizer.invalidate_secondary_tensor()
        return
    all_gather_dp_groups(
        groups_flat=optimizer.bit16_groups_flat,
        partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
        dp_process_group=optimizer.real_dp_process_group,
        start_alignment_factor=optimizer.nccl_start_alignment_factor,
        allgather_bucket_size=optimizer.allgather_bucket_size,
    )


def reduced(optimizer: Any, stage: int) -> list[tuple[Any, torch.Tensor]]:
    """Pairs of a parameter and this rank's part of its reduced gradient, which is multiplied by the loss scale. With an
    offloaded optimizer the gradients are in the `grad` of the masters, on the CPU."""
    if stage == 3:
        return _reduced_zero3(optimizer)
    if optimizer.cpu_offload:
        optimizer._get_offload_gradient_dict()
    parts = optimizer.offload_gradient_dict if optimizer.cpu_offload else optimizer.averaged_gradients
    return [
        pair
        for index, group in enumerate(optimizer.params_in_partition)
        # The padding at the end of a rank's part belongs to no parameter.
        for pair in zip(group, (g for g in parts[index] if not getattr(g, "_zero_padding", False)), strict=False)
    ]


def _reduced_zero3(optimizer: Any) -> list[tuple[Any, torch.Tensor]]:
    parameters = [parameter for group in optimizer.fp16_groups for parameter in group]
    if not optimizer.offload_optimizer:
        groups = range(len(optimizer.fp16_groups))
        gradients = [gradient for index in groups for gradient in optimizer.averaged_gradients[index]]
    elif optimizer.swap_optimizer:
        # The `grad` of the masters are in files, but the reduced gradients are still in memory. These tensors may be
        # read, but changing them has no effect on the update.
        kept = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        gradients = [kept[parameter.ds_id] for parameter in parameters]
    else:
        places = [optimizer.grad_position[optimizer.get_param_id(parameter)] for parameter in parameters]
        gradients = [
            optimizer.fp32_partitioned_groups_flat[index].grad.narrow(0, offset, length)
            for index, offset, length in places
        ]
    return list(zip(parameters, gradients, strict=True))
