"""Stages have the parameter names and initial values of the whole Hugging Face model, and compute the same function."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from stack.config import families as config_families
from stack.models import families
from stack.models.build import build_stages
from stack.plan.layout import make_plan
from tests.helpers.tiny import global_batch, tiny_config

CPU = torch.device("cpu")


def stages(pipeline: int, **settings):
    cfg = tiny_config(parallel__pipeline=pipeline, parallel__zero=0, **settings)
    plan = make_plan(cfg, pipeline)
    return [stage for rank in range(pipeline) for stage in build_stages(cfg, plan, rank, device=CPU)]


def parameters(pipeline: int, **settings) -> dict[str, torch.Tensor]:
    return {n: p.detach() for stage in stages(pipeline, **settings) for n, p in stage.model.named_parameters()}


def test_names_are_those_of_hugging_face():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_config().model.config))
    expected = {name: p.shape for name, p in model.named_parameters()}
    for pipeline in (1, 2, 4):
        assert {name: p.shape for name, p in parameters(pipeline).items()} == expected


def test_initial_weights_do_not_depend_on_the_layout():
    one, two, five = parameters(1), parameters(2), parameters(5)
    for name, value in one.items():
        assert torch.equal(value, two[name])
        assert torch.equal(value, five[name])


def test_initial_weights_follow_the_seed_and_the_family():
    first, again, other = parameters(1), parameters(1), parameters(1, run__seed=1)
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert first[name].std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(first["model.norm.weight"], torch.ones(32))
    assert not torch.equal(first[name], first["model.layers.3.mlp.up_proj.weight"])


def test_initialising_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    stages(2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_stages_in_a_row_equal_the_hugging_face_forward(attention):
    cfg = tiny_config(model__attention=attention)
    config = transformers.LlamaConfig(**cfg.model.config)
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(parameters(3))
    ids, labels, positions = map(torch.from_numpy, global_batch(cfg, 0, "padded"))

    hidden = ids
    for stage in stages(3, model__attention=attention):
        hidden = stage(hidden, positions, labels)

    expected = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert hidden.item() == pytest.approx(expected.item(), rel=1e-6)


def test_tied_weights_are_one_parameter():
    [stage] = stages(1, shape__tie_word_embeddings=True)
    assert stage.model.lm_head.weight is stage.model.model.embed_tokens.weight


def test_a_tied_head_on_another_rank_starts_as_the_embedding_does():
    first, last = stages(2, shape__tie_word_embeddings=True)
    assert first.tied_weight() is not last.tied_weight()
    assert torch.equal(first.tied_weight(), last.tied_weight())


def test_a_fold_of_the_pipe_brings_the_tied_pair_onto_one_rank():
    folded = {"parallel__schedule": "zbv", "parallel__virtual_stages": 2, "activation__checkpoint": "none"}
    first, *_, last = stages(2, shape__tie_word_embeddings=True, **folded)[:2]
    assert (first.first, last.last) == (True, True)
    assert first.tied_weight() is last.tied_weight()


def test_gpt_2_draws_its_residual_projections_as_transformers_does():
    drawn = {"shape__intermediate_size": None, "shape__num_key_value_heads": None, "shape__hidden_size": 64}
    found = parameters(1, model__name="gpt2", **drawn)
    narrow, wide = found["transformer.h.2.mlp.c_proj.weight"], found["transformer.h.2.mlp.c_fc.weight"]
    assert narrow.std().item() == pytest.approx(wide.std().item() / (2 * 5) ** 0.5, rel=0.05)


def test_each_unit_is_placed_once_and_in_full():
    seen: list[int] = []
    cfg = tiny_config(parallel__pipeline=2)
    plan = make_plan(cfg, 2)
    for rank in range(2):
        build_stages(
            cfg, plan, rank, device=CPU, place=lambda unit: seen.append(sum(p.numel() for p in unit.parameters()))
        )
    assert sum(seen) == plan.shape.total_params


def test_both_lists_of_families_have_the_same_names():
    assert set(families.FAMILIES) == set(config_families.FAMILIES)
