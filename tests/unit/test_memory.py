"""Compares the memory plan with counts of real tensors: live storages, and storages that autograd saves."""

import contextlib
import gc
import itertools
import re
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stack.config.compose import compose
from stack.plan.activations import layer_activations
from stack.plan.layout import make_plan
from stack.plan.memory import in_flight, plan_memory
from stack.plan.report import render
from tests.helpers.tiny import FAMILIES, replica_batch, tiny_config

#: A model so wide that norms and padding are small compared with matrices.
WIDE = {
    "shape__hidden_size": 64, "shape__intermediate_size": 192, "shape__vocab_size": 512, "shape__num_hidden_layers": 2,
    "data__seq_len": 8, "batch__global_size": 4,
}  # fmt: skip
GIB = 2**30


def settings(zero: int, reduce: str = "step", gather: str = "step", dtype: str = "bf16", **more: Any) -> dict[str, Any]:
    return {
        **WIDE, "parallel__pipeline": 1, "parallel__zero": zero, "parallel__reduce": reduce,
        "parallel__gather": gather, "precision__dtype": dtype, "parallel__overlap": False, **more,
    }  # fmt: skip


STATES = {
    "zero0 fp32": settings(0, dtype="fp32"),
    "zero0": settings(0),
    "zero1 fp32": settings(1, dtype="fp32"),
    "zero1": settings(1),
    "zero2": settings(2),
    "zero2 microbatch": settings(2, "microbatch"),
    "zero3": settings(3),
    "zero3 fp32": settings(3, dtype="fp32"),
    "zero3 gather=microbatch": settings(3, "step", "microbatch"),
    "zero3 microbatch": settings(3, "microbatch", "microbatch"),
    "zero3 sgd": settings(3, "microbatch", "microbatch", optim__kind="sgd"),
    "zero1 offload": settings(1, parallel__offload__optimizer="cpu"),
    "zero3 offload": settings(3, parallel__offload__optimizer="cpu"),
    "zero3 microbatch offload": settings(3, "microbatch", "microbatch", parallel__offload__optimizer="cpu"),
    "zero3 pp2": settings(3, parallel__pipeline=2),
}


def count_states(given: dict[str, Any]) -> tuple[int, int]:
    """Called on every rank: bytes of live tensors in a step before gradients are reduced, and before the update."""
    import torch
    import torch.distributed as dist

    from stack.parallel.engine import Engine
    from stack.parallel.mesh import make_mesh

    cfg = tiny_config(**given)
    plan = make_plan(cfg, dist.get_world_size())
    mesh = make_mesh(plan, timeout=timedelta(seconds=30))
    gc.collect()
    # Excludes the objects that exist already from the count.
    gc.freeze()
    engine = Engine(cfg, plan, mesh)
    rank_engine, found = engine.rank_engine, []
    accumulate, update = rank_engine.accumulate, rank_engine.step

    def count() -> None:
        gradients = [p.grad for p in rank_engine.parameters if p.grad is not None]
        counts = []
        for _ in range(5):
            # A gloo thread frees a buffer only some time after the wait for it, hence the smallest of several counts.
            counts.append(sum(_storages(torch, gradients).values()))
            time.sleep(0.05)
        found.append(min(counts))

    @contextlib.contextmanager
    def count_and_reduce() -> Iterator[None]:
        with accumulate():
            yield
            count()

    def count_and_update(lr: float) -> Any:
        count()
        return update(lr)

    for step in range(2):
        if step == 1:
            rank_engine.accumulate, rank_engine.step = count_and_reduce, count_and_update
        batch = replica_batch(cfg, step, replica=mesh.replica, replicas=mesh.replicas, kind="full")
        engine.train_batch(batch, lr=1e-3)
    gc.unfreeze()
    return found[0], found[1]


def _storages(torch: Any, more: Iterable[Any] = ()) -> dict[int, int]:
    """Address -> bytes, for the storage of each live tensor that Python knows, and of each tensor in `more`."""
    gc.collect()
    return _sizes([*(t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)), *more])


def _sizes(tensors: Iterable[Any]) -> dict[int, int]:
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


@pytest.mark.parametrize("name", STATES)
def test_states_are_those_that_are_counted(ranks, name):
    cfg = tiny_config(**STATES[name])
    counted = ranks(2).run(count_states, STATES[name])
    plan = make_plan(cfg, 2)
    for rank, (reduce, update) in enumerate(counted):
        memory = plan_memory(cfg, plan)[plan.pipe_rank_of(rank)]
        states = memory.parameters + memory.masters + memory.moments + memory.host
        states += memory.bucket
        held = memory.gathered if cfg.parallel.gather == "step" else 0
        assert states + memory.gradients + held == pytest.approx(reduce, rel=0.04)
        # The flat copy is made inside the update, where ZeRO-3 also releases the gathered parameters.
        offloaded = cfg.parallel.offload.optimizer != "none"
        shards = memory.update // 2 if plan.zero and not offloaded else memory.update if plan.zero < 3 else 0
        assert states + shards + held == pytest.approx(update, rel=0.04)


#: Settings with which states, activations and loss all have a visible share of the memory.
STEP = {
    "shape__hidden_size": 128, "shape__intermediate_size": 344, "shape__num_hidden_layers": 4,
    "shape__vocab_size": 1024, "shape__max_position_embeddings": 128, "data__seq_len": 128, "data__pack": False,
    "batch__micro_size": 2, "batch__global_size": 4, "parallel__pipeline": 1, "parallel__overlap": False,
    "precision__dtype": "bf16", "activation__checkpoint": "none", "kernels__loss": "logits", "parallel__zero": 0,
}  # fmt: skip
PEAKS = {
    "logits": {},
    "chunked": {"kernels__loss": "chunked"},
    "full": {"activation__checkpoint": "full"},
    "selective, fp32": {"activation__checkpoint": "selective", "precision__dtype": "fp32"},
    "deep": {"activation__checkpoint": "full", "shape__vocab_size": 256, "shape__num_hidden_layers": 12},
    "zero1": {"parallel__zero": 1, "activation__checkpoint": "full"},
    "zero3": {"parallel__zero": 3, "activation__checkpoint": "full"},
    "zero3 microbatch": {
        "parallel__zero": 3, "parallel__reduce": "microbatch", "parallel__gather": "microbatch",
        "activation__checkpoint": "full",
    },
}  # fmt: skip


def count_peak(given: dict[str, Any]) -> int:
    """Called on every rank: the largest sum of live storages in bytes after any operation of the second step, temporary
    tensors included."""
    import torch
    import torch.distributed as dist
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from stack.parallel.engine import Engine
    from stack.parallel.mesh import make_mesh

    class Watch(TorchDispatchMode):
        peak, at_most = 0, 0

        def __init__(self) -> None:
            super().__init__()
            self.live: dict[int, tuple[Any, int]] = {}

        def add(self, tensor: torch.Tensor) -> None:
            storage, size = StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()
            if storage.cdata not in self.live:
                self.live[storage.cdata] = (storage, size)
                self.at_most += size

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.add(leaf)
            if self.at_most > self.peak:
                # Removing freed storages from the sum takes time, so it is done only when a new peak is possible.
                self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
                self.at_most = sum(size for _, size in self.live.values())
                self.peak = max(self.peak, self.at_most)
            return result

    cfg = tiny_config(**given)
    plan = make_plan(cfg, dist.get_world_size())
    gc.collect()
    gc.freeze()
    engine = Engine(cfg, plan, make_mesh(plan, timeout=timedelta(seconds=30)))
    first, second = (replica_batch(cfg, step, replica=0, replicas=1, kind="full") for step in range(2))
    engine.train_batch(first, lr=1e-3)
    watch = Watch()
    gc.collect()
    for tensor in gc.get_objects():
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
            watch.add(tensor)
    with watch:
        engine.train_batch(second, lr=1e-3)
    gc.unfreeze()
    return watch.peak


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_is_the_one_that_is_counted(ranks, name):
    given = {**STEP, **PEAKS[name]}
    [counted] = ranks(1).run(count_peak, given)
    cfg = tiny_config(**given)
    [memory] = plan_memory(cfg, make_plan(cfg, 1))
    assert memory.peak == pytest.approx(counted, rel=0.1), memory.phases


def count_saved(given: dict[str, Any], kind: str = "full") -> int:
    """Bytes for each token that the first of two stages keeps after a forward, without its parameters."""
    import torch

    from stack.models.build import build_stages
    from stack.parallel.activation import apply_checkpointing

    cfg = tiny_config(**given)
    [stage] = build_stages(cfg, make_plan(cfg, 2), 0, device=torch.device("cpu"))
    apply_checkpointing(stage, cfg.activation)
    batch = replica_batch(cfg, 0, replica=0, replicas=1, kind=kind)
    ids, labels, positions = map(torch.from_numpy, (batch.input_ids[0], batch.labels[0], batch.positions[0]))
    # `selective` keeps tensors in a Python dictionary, which the hook for saved tensors does not see.
    unseen = cfg.activation.checkpoint == "selective"
    before, saved = _storages(torch) if unseen else {}, {}
    before |= {t.untyped_storage().data_ptr(): 0 for t in (*stage.parameters(), *stage.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = stage(ids, positions, labels)
    live = _storages(torch, saved.values()) if unseen else _sizes(saved.values())
    own = {output.untyped_storage().data_ptr(), *before}
    return sum(size for address, size in live.items() if address not in own) // ids.numel()


def layers_only(checkpoint: str, attention: str, dtype: str, **more: Any) -> tuple[int, Any]:
    """Counted bytes for each token of one more layer, and the config with that layer."""
    shared = {
        "shape__hidden_size": 64, "shape__intermediate_size": 160, "shape__num_attention_heads": 8,
        "shape__num_key_value_heads": 2, "shape__num_hidden_layers": 5, "data__seq_len": 64,
        "parallel__zero": 0, "batch__micro_size": 2, "activation__checkpoint": checkpoint,
        "model__attention": attention, "precision__dtype": dtype,
    }  # fmt: skip
    kind = more.pop("kind", "full")
    one, three = ({**shared, **more, "parallel__split": [0, layers]} for layers in (1, 3))
    return (count_saved(three, kind) - count_saved(one, kind)) // 2, tiny_config(**three)


@pytest.mark.parametrize(
    ("checkpoint", "attention", "dtype"),
    [*itertools.product(["none", "full"], ["sdpa", "eager"], ["fp32", "bf16"]),
     *itertools.product(["selective"], ["sdpa", "eager"], ["bf16"])],
)  # fmt: skip
def test_a_layer_keeps_what_autograd_saves(checkpoint, attention, dtype):
    counted, cfg = layers_only(checkpoint, attention, dtype, data__pack=False)
    planned = layer_activations(cfg, make_plan(cfg, 2))
    assert planned.kept == pytest.approx(counted, rel=0.02)
    assert planned.whole >= planned.kept


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_mixture_keeps_the_products_of_its_experts(family, attention):
    own = {**FAMILIES[family], "shape__moe_intermediate_size": 80} if family == "qwen3_moe" else FAMILIES[family]
    counted, cfg = layers_only("selective", attention, "bf16", data__pack=False, model__name=family, **own)
    assert layer_activations(cfg, make_plan(cfg, 2)).kept == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_mask_costs_what_autograd_saves(dtype):
    counted, cfg = layers_only("none", "sdpa", dtype, kind="packed")
    assert layer_activations(cfg, make_plan(cfg, 2)).kept == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt_neox", "olmo2"])
def test_other_families_are_close(family):
    own = {"gpt2": {"shape__intermediate_size": None, "shape__num_key_value_heads": None,
                    "shape__resid_pdrop": 0.0, "shape__embd_pdrop": 0.0, "shape__attn_pdrop": 0.0},
           "gpt_neox": {"shape__num_key_value_heads": None}, "qwen3": {"shape__head_dim": 8}}  # fmt: skip
    counted, cfg = layers_only("none", "sdpa", "bf16", data__pack=False, model__name=family, **own.get(family, {}))
    assert layer_activations(cfg, make_plan(cfg, 2)).kept == pytest.approx(counted, rel=0.25)


@pytest.mark.parametrize(("schedule", "virtual"), [("interleaved_1f1b", 2), ("interleaved_1f1b", 3),
                                                   ("interleaved_zero_bubble", 2), ("zbv", 2)])  # fmt: skip
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 16)])
def test_microbatches_in_flight_are_those_of_torch(schedule, virtual, ranks, microbatches):
    from torch.distributed.pipelining import schedules

    names = {"interleaved_1f1b": "Interleaved1F1B", "interleaved_zero_bubble": "InterleavedZeroBubble",
             "zbv": "ZBVZeroBubble"}  # fmt: skip
    rounds = max(1, microbatches // ranks)
    torchs = SimpleNamespace(
        pp_group_size=ranks, n_local_stages=virtual, _n_microbatches=microbatches, num_stages=ranks * virtual,
        microbatches_per_round=microbatches // rounds, number_of_rounds=rounds,
    )  # fmt: skip
    plan = SimpleNamespace(pipeline=ranks, stages=ranks * virtual, microbatches=microbatches, schedule=schedule)
    ends = (schedules.FULL_BACKWARD, schedules.BACKWARD_WEIGHT)
    for rank in range(ranks):
        order = getattr(schedules, f"Schedule{names[schedule]}")._calculate_single_rank_operations(torchs, rank)
        held, most = 0, 0
        for action in filter(None, order):
            if action.microbatch_index < microbatches:
                kind = action.computation_type
                held += 1 if kind == schedules.FORWARD else -1 if kind in ends else 0
                most = max(most, held)
        assert in_flight(plan, rank) == most


def test_1f1b_holds_less_the_later_the_stage():
    plan = make_plan(tiny_config(parallel__pipeline=4), 4)
    assert [in_flight(plan, rank) for rank in range(4)] == [4, 3, 2, 1]


def of(*overrides: str, world_size: int = 1) -> Any:
    cfg = compose(["experiment=1b", *overrides])
    return plan_memory(cfg, make_plan(cfg, world_size))


def test_a_billion_parameters_on_one_device():
    """Compares with numbers computed by hand: 1.50 B parameters, bf16, ZeRO-1 on one rank."""
    [memory] = of(
        "model.config.tie_word_embeddings=true", "data.pack=false", "batch.micro_size=1", "kernels.loss=logits"
    )
    params = 1_235_814_400
    assert memory.parameters == 2 * params
    assert (memory.masters, memory.moments, memory.whole_gradients) == (4 * params, 8 * params, 4 * params)
    assert memory.loss == 2 * 4 * 4096 * 128256
    assert memory.kept > 16 * 4096 * 2048 * 2


def test_the_levers_pull_the_right_way():
    base = ["parallel.zero=3", "batch.micro_size=1", "batch.global_size=64"]

    def peak(*overrides: str) -> int:
        return of(*base, *overrides, world_size=8)[0].peak

    assert peak("parallel.reduce=microbatch", "parallel.gather=microbatch") < peak("parallel.gather=microbatch")
    assert peak("parallel.gather=microbatch") < peak() < peak("activation=selective") < peak("activation=none")
    assert peak("parallel.offload.optimizer=cpu") < peak()
    assert of(*base, "parallel.offload.optimizer=cpu", world_size=8)[0].host > 0


def test_the_plan_prints_it():
    cfg = compose(["experiment=70b"])
    text = render(make_plan(cfg), cfg)
    plan = make_plan(cfg)
    largest = max(memory.peak for memory in plan_memory(cfg, plan))
    assert f"{largest / GIB:.2f}" in text.partition("memory: GiB")[2]


#: Name of a recipe -> the comment at its beginning.
SAID = {
    recipe.stem: " ".join(line.removeprefix("#") for line in recipe.read_text().splitlines() if line.startswith("#"))
    for recipe in sorted((Path(__file__).parents[2] / "conf/experiment").glob("*.yaml"))
}


@pytest.mark.parametrize("recipe", [recipe for recipe, said in SAID.items() if re.search("needs|GB GPU", said)])
def test_what_a_recipe_says_of_memory_is_what_the_plan_says(recipe):
    cfg = compose([f"experiment={recipe}"])
    largest = max(memory.peak for memory in plan_memory(cfg, make_plan(cfg)))
    for needed in re.findall(r"needs ([\d.]+) +GiB", SAID[recipe]):
        assert needed == f"{largest / GIB:.1f}"
    for size in re.findall(r"(\d+) GB GPU", SAID[recipe]):
        # A tenth is left for the memory of CUDA and NCCL.
        assert largest < 0.9 * int(size) * 1e9
