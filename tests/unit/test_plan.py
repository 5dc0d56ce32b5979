"""The layout arithmetic: rank grid, split into stages, batch sizes, and the messages where they do not fit."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stack.config.compose import compose
from stack.errors import LayoutError
from stack.plan.layout import balanced_split, make_plan
from stack.plan.report import render
from stack.plan.shape import ModelShape, model_shape

#: The messages below are computed for these sizes, so that they do not depend on the recipe of the quickstart.
BATCH = {"batch.global_size": 32, "batch.micro_size": 4}


def config_of(*overrides: str):
    given = {override.split("=")[0] for override in overrides}
    recipe = "experiment" in given
    return compose([*overrides, *(f"{k}={v}" for k, v in BATCH.items() if k not in given and not recipe)])


def plan_of(*overrides: str, world_size: int | None = 4):
    return make_plan(config_of(*overrides), world_size)


def test_pipe_is_the_outermost_axis():
    plan = plan_of("parallel.pipeline=2", "batch.global_size=64", world_size=8)
    assert [plan.pipe_rank_of(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [plan.replica_of(rank) for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert all(plan.rank_of(plan.pipe_rank_of(rank), plan.replica_of(rank)) == rank for rank in range(8))


def test_stages_are_dealt_round_or_folded():
    dealt = plan_of("parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=3", "parallel.reduce=step")
    assert [dealt.stages_of(pipe_rank) for pipe_rank in range(2)] == [(0, 2, 4), (1, 3, 5)]
    folded = plan_of("parallel=zero1_zero_bubble", "activation=none")
    assert [folded.stages_of(pipe_rank) for pipe_rank in range(2)] == [(0, 3), (1, 2)]
    assert [folded.holder_of(stage) for stage in range(4)] == [0, 1, 1, 0]


def test_a_tied_embedding_counts_twice_only_where_it_is_twice():
    tied = "model.config.tie_word_embeddings=true"
    apart, folded = plan_of(tied), plan_of(tied, "parallel=zero1_zero_bubble", "activation=none")
    assert (apart.tied_apart, folded.tied_apart) == (True, False)
    copy = apart.shape.head_params
    assert sum(map(apart.stage_params, range(apart.stages))) == apart.shape.total_params + copy
    assert sum(map(folded.stage_params, range(folded.stages))) == folded.shape.total_params


def test_fewer_microbatches_than_stages_where_the_schedule_can():
    few = ["batch.global_size=8", "batch.micro_size=4"]
    assert plan_of("parallel.schedule=gpipe", *few).microbatches == 1
    assert plan_of("parallel=zero3_interleaved", *few).microbatches == 1


def test_every_layer_is_on_exactly_one_stage():
    for stages in range(1, 7):
        plan = plan_of(f"parallel.pipeline={stages}", "batch.global_size=96", world_size=stages)
        layers = [layer for stage in range(stages) for layer in plan.layers_of(stage)]
        assert layers == list(range(plan.shape.layers))
        assert sum(plan.stage_params(stage) for stage in range(stages)) == plan.shape.total_params


def test_split_is_the_best_of_all_contiguous_splits():
    shape = ModelShape(9, 64, 2048, False, 2048 * 64, 64, layer_params=45440, layer_weights=45312, attention_width=64)

    def largest(starts: tuple[int, ...]) -> float:
        ends = (*starts[1:], shape.layers)
        cost = [(end - start) * shape.layer_flops(32) for start, end in zip(starts, ends, strict=True)]
        cost[-1] += shape.head_flops
        return max(cost)

    for stages in range(1, 6):
        every = [(0, *rest) for rest in itertools.combinations(range(1, 9), stages - 1)]
        best = min(map(largest, every))
        # The cost also contains a hundredth of the parameters, to choose between splits of equal FLOPs.
        assert largest(balanced_split(shape, stages, 32)) <= best * 1.02


def test_a_large_head_takes_layers_from_the_last_stage():
    plan = plan_of("model.config.vocab_size=65536", "data.vocab_size=4096")
    assert len(plan.layers_of(1)) < len(plan.layers_of(0))


@pytest.mark.parametrize("name", ["quickstart", "1b", "8b", "70b", "405b_plan"])
def test_analytic_parameters_equal_the_hugging_face_model(name):
    import torch

    from stack.models.build import _skeleton

    cfg = compose([f"experiment={name}", "model.attention=sdpa"])
    shape = model_shape(cfg.model)
    with torch.device("meta"):
        model = _skeleton(cfg)
    assert sum(p.numel() for p in model.parameters()) == shape.total_params
    assert sum(p.numel() for p in model.model.layers[0].parameters()) == shape.layer_params


def test_training_flops_of_a_known_model():
    # Llama 3 8B at 8,192 tokens: 6 x (parameters without the embedding) + 6 x layers x width x length (causal).
    shape = model_shape(compose(["experiment=8b"]).model)
    assert shape.training_flops(8192) == pytest.approx(6 * (8.03e9 - 0.525e9) + 6 * 32 * 4096 * 8192, rel=2e-3)


def test_world_size_comes_from_the_recipe_when_nobody_launched():
    plan = plan_of("experiment=70b", world_size=None)
    assert (plan.world_size, plan.stages, plan.replicas) == (64, 8, 8)


BAD_LAYOUTS = [
    (["parallel.pipeline=3"], 8, "parallel.pipeline=3 does not divide 8 ranks; use 1, 2, 4 or 8"),
    (["parallel.pipeline=7"], 7, "parallel.pipeline=7 is more than model.config.num_hidden_layers=6"),
    (["parallel.data=3"], 4, "use parallel.data=2 (or auto), or start 6 ranks"),
    (["batch.global_size=30"], 4, "nearest: global_size=32 micro_size=4 (4 microbatches)"),
    (["batch.global_size=8"], 4, "parallel.schedule=1f1b needs one for each of 2 stages"),
    (["parallel.split=[0,9]"], 4, "use for example [0, 3]"),
    (["parallel.split=[0]"], 4, "first of 6 layers for each of 2 stages"),
    (["parallel.virtual_stages=2"], 4, "use parallel.schedule=interleaved_1f1b or parallel.virtual_stages=1"),
    (["parallel.schedule=interleaved_1f1b"], 4, "use parallel.virtual_stages=2"),
    (["parallel.schedule=zbv", "parallel.virtual_stages=3", "parallel.zero=1"], 4, "use parallel.virtual_stages=2"),
    (["parallel.schedule=zbv", "parallel.virtual_stages=2"], 4, "use parallel.zero=1 or parallel.schedule=interleaved"),
    (
        ["parallel.schedule=zbv", "parallel.virtual_stages=2", "parallel.zero=1", "activation=full"],
        4,
        "use activation.checkpoint=none",
    ),
    (
        ["parallel.schedule=zbv", "parallel.virtual_stages=2", "parallel.zero=1", "precision=fp16"],
        4,
        "use precision.dtype=bf16 or parallel.schedule=interleaved_1f1b",
    ),
    (
        ["parallel.schedule=zbv", "parallel.virtual_stages=2", "parallel.zero=1", "precision.compile=true"],
        4,
        "use precision.compile=false or parallel.schedule=interleaved_1f1b",
    ),
    (["parallel.zero=0", "parallel.offload.optimizer=cpu"], 4, "use parallel.zero=1 or offload.optimizer=none"),
    (["parallel.zero=2", "parallel.offload.params=cpu"], 4, "use parallel.zero=3 or offload.params=none"),
    (["parallel.zero=2", "parallel.offload.optimizer=nvme"], 4, "use offload.optimizer=cpu or parallel.zero=3"),
    (["parallel.offload.optimizer=nvme"], 4, "needs parallel.offload.folder, for example /local/nvme"),
    (
        [
            "parallel.offload.optimizer=nvme",
            "parallel.offload.folder=/x",
            "model.config.tie_word_embeddings=true",
        ],
        4,
        "use offload.optimizer=cpu or tie_word_embeddings=false",
    ),
    (["parallel.hpz=4", "parallel.gather=microbatch"], 4, "a group would cross stages; use parallel.hpz=2"),
    (["parallel.hpz=2"], 4, "use parallel.zero=3 gather=microbatch, or parallel.hpz=1"),
    (["parallel.quantized_weights=true", "parallel.zero=2"], 4, "use parallel.zero=3 or quantized_weights=false"),
    (
        ["parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=2", "parallel.reduce=microbatch"],
        4,
        "use parallel.reduce=step",
    ),
    (
        ["parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=2", "batch.global_size=40"],
        4,
        "runs them in equal rounds of 2 or more; nearest: global_size=32 micro_size=4",
    ),
    (
        ["parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=4"],
        4,
        "every stage needs a layer; use at most virtual_stages=3",
    ),
    (["model.config.vocab_size=1000"], 4, "use model.config.vocab_size=4096"),
    (["model.config.num_attention_heads=7"], 4, "does not divide hidden_size=192; use 6"),
    (["model.config.num_key_value_heads=4"], 4, "does not divide num_attention_heads=6; use 3"),
    (["parallel.zero=1", "parallel.reduce=microbatch"], 4, "use parallel.reduce=step or parallel.zero=2"),
]


@pytest.mark.parametrize(("overrides", "world_size", "message"), BAD_LAYOUTS, ids=lambda value: str(value)[:40])
def test_a_bad_layout_is_one_line_with_what_works(overrides, world_size, message):
    with pytest.raises(LayoutError) as caught:
        plan_of(*overrides, world_size=world_size)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    assert message in str(caught.value)


def test_every_batch_an_error_offers_is_legal():
    with pytest.raises(LayoutError) as caught:
        plan_of("batch.global_size=7", "batch.micro_size=3")
    offers = str(caught.value).split("nearest: ")[1].split("; ")
    assert len(offers) == 3
    for offer in offers:
        size, micro, *_ = offer.split()
        assert plan_of(f"batch.{size}", f"batch.{micro}").microbatches >= 2


def test_the_printed_plan_gives_a_reason_for_each_number():
    text = render(plan_of(), config_of())
    assert "batch.global_size 32 / (micro_size 4 x 2 replicas)" in text
    assert "4 ranks / 2 stages" in text
    assert text.count("\n") < 30


def test_planning_imports_neither_torch_nor_deepspeed():
    code = (
        "import sys; from stack.cli.main import main; main(['plan', 'experiment=405b_plan']);"
        "print({'torch', 'deepspeed', 'transformers'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("set()")


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "conf").rglob("*.yaml")), ids=lambda file: file.stem
)
def test_the_plan_that_a_file_of_conf_names_can_be_made(file):
    for overrides in re.findall(r"^# stack plan ([^;\n]+)", file.read_text(), re.MULTILINE):
        make_plan(compose(overrides.split()))
