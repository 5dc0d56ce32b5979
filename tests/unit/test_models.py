"""A stage is a part of the Hugging Face model: same names, same values, same function."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from stack.models.build import build_stage
from stack.plan.layout import make_plan
from tests.helpers.tiny import global_batch, tiny_config

CPU = torch.device("cpu")


def stages(pipeline: int, **settings):
    cfg = tiny_config(parallel__pipeline=pipeline, parallel__zero=0, **settings)
    plan = make_plan(cfg, pipeline)
    return [build_stage(cfg, plan, stage, device=CPU) for stage in range(pipeline)]


def parameters(pipeline: int, **settings) -> dict[str, torch.Tensor]:
    return {name: p.detach() for stage in stages(pipeline, **settings) for name, p in stage.named_parameters()}


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
    ids, labels = map(torch.from_numpy, global_batch(cfg, 0, padded=True))

    hidden = ids
    for stage in stages(3, model__attention=attention):
        hidden = stage(hidden, labels) if stage.last else stage(hidden)

    expected = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert hidden.item() == pytest.approx(expected.item(), rel=1e-6)


def test_tied_weights_are_one_parameter():
    [stage] = stages(1, shape__tie_word_embeddings=True)
    assert stage.get_submodule("lm_head").weight is stage.get_submodule("model.embed_tokens").weight


def test_each_unit_is_placed_once_and_in_full():
    seen: list[int] = []
    cfg = tiny_config(parallel__pipeline=2)
    plan = make_plan(cfg, 2)
    for stage in range(2):
        build_stage(
            cfg, plan, stage, device=CPU, place=lambda unit: seen.append(sum(p.numel() for p in unit.parameters()))
        )
    assert sum(seen) == plan.shape.total_params
