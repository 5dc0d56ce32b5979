"""Optional kernels: the chunked loss against torch's, the choice of `auto`, and refused combinations."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from stack.config.check import to_config
from stack.config.compose import compose
from stack.config.families import FAMILIES
from stack.config.kernels import liger_parts, loss_kernel
from stack.data.batches import IGNORE
from stack.errors import ConfigError, LayoutError
from stack.models import kernels, loss
from stack.models.build import build_stages
from stack.models.loss import linear_cross_entropy
from stack.plan.layout import make_plan
from tests.helpers.liger import interpret, needs_interpreter, needs_liger
from tests.helpers.tiny import FAMILIES as TINY
from tests.helpers.tiny import family_settings, global_batch, tiny_config

CPU = torch.device("cpu")
WIDTH = 24


def inputs(tokens: int, vocabulary: int, *, bias: bool, dtype: torch.dtype = torch.float32, ignored: float = 0.3):
    draw = torch.Generator().manual_seed(tokens + vocabulary)
    hidden, weight = (torch.randn(size, WIDTH, generator=draw).to(dtype) for size in (tokens, vocabulary))
    shift = torch.randn(vocabulary, generator=draw).to(dtype) if bias else None
    labels = torch.randint(vocabulary, (tokens,), generator=draw)
    labels[torch.rand(tokens, generator=draw) < ignored] = IGNORE
    return [hidden, weight, shift], labels


def gradients(function, tensors, labels, *, scale: float, dtype: torch.dtype | None = None):
    """The loss, and its gradients times `scale`, in fp64."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    found = function(*leaves, labels)
    (found * scale).backward()
    return [found.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf is not None)]


def exact(hidden, weight, bias, labels):
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=IGNORE, reduction="sum")


def plain(hidden, weight, bias, labels):
    return exact_of_logits(F.linear(hidden, weight, bias).float(), labels)


def exact_of_logits(logits, labels):
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def worst(found, expected) -> float:
    return max(
        ((f - e).abs().max() / e.abs().max().clamp(min=1e-12)).item() for f, e in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "vocabulary", "chunk"), [(64, 96, 16), (37, 101, 10), (5, 3, 256), (1, 97, 1)])
def test_chunked_loss_and_gradients_are_exact(monkeypatch, tokens, vocabulary, chunk, bias):
    monkeypatch.setitem(loss.CHUNK_TOKENS, "cpu", chunk)
    tensors, labels = inputs(tokens, vocabulary, bias=bias)
    found = gradients(linear_cross_entropy, tensors, labels, scale=0.37)
    assert worst(found, gradients(exact, tensors, labels, scale=0.37, dtype=torch.float64)) < 2e-6


def test_what_has_no_target_has_no_loss_and_no_gradient(monkeypatch):
    monkeypatch.setitem(loss.CHUNK_TOKENS, "cpu", 4)
    tensors, labels = inputs(11, 32, bias=True)
    found = gradients(linear_cross_entropy, tensors, torch.full_like(labels, IGNORE), scale=3.0)
    assert all(not value.any() for value in found)


def test_a_target_whose_probability_underflows_has_its_loss():
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[300.0, 0.0], [-300.0, 0.0]])
    assert gradients(linear_cross_entropy, [hidden, weight, None], torch.tensor([1]), scale=1.0)[0].item() == 600


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_truth_as_plain_logits(monkeypatch, dtype):
    monkeypatch.setitem(loss.CHUNK_TOKENS, "cpu", 32)
    tensors, labels = inputs(160, 200, bias=True, dtype=dtype)
    truth = gradients(exact, tensors, labels, scale=1 / 128, dtype=torch.float64)
    found = worst(gradients(linear_cross_entropy, tensors, labels, scale=1 / 128), truth)
    assert found < 1.5 * worst(gradients(plain, tensors, labels, scale=1 / 128), truth)


def test_an_fp16_sum_over_tokens_cannot_overflow_before_it_is_scaled():
    hidden, weight = torch.full((300, 2), 500.0).half(), torch.zeros(4, 2).half()
    labels = torch.zeros(300, dtype=torch.int64)
    _, _, for_weight = gradients(linear_cross_entropy, [hidden, weight, None], labels, scale=1e-3)
    assert for_weight[0, 0].item() == pytest.approx(-0.75 * 300 * 500 * 1e-3, rel=1e-3)


def test_sums_over_many_tokens_are_as_exact_as_over_few():
    tensors, labels = inputs(2**15, 32, bias=True)
    found = gradients(linear_cross_entropy, tensors, labels, scale=1.0)
    assert worst(found, gradients(exact, tensors, labels, scale=1.0, dtype=torch.float64)) < 2e-6


def test_without_gradients_only_the_loss_is_computed(monkeypatch):
    monkeypatch.setitem(loss.CHUNK_TOKENS, "cpu", 8)
    tensors, labels = inputs(60, 50, bias=False)
    expected = linear_cross_entropy(*(t if t is None else t.requires_grad_() for t in tensors), labels)
    with torch.no_grad(), _Sizes() as seen:
        found = linear_cross_entropy(*tensors, labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert max(seen.elements) < 60 * 50


def test_a_second_backward_gets_the_same_gradients():
    # A backward in two parts, first for inputs and later for weights, calls the function's backward twice.
    tensors, labels = inputs(30, 50, bias=True)
    leaves = [t.requires_grad_() for t in tensors]
    found = linear_cross_entropy(*leaves, labels) * 0.1
    first = torch.autograd.grad(found, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(found, leaves), strict=True))


class _Sizes(TorchDispatchMode):
    """Records the number of elements of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.elements += [t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result


@pytest.mark.parametrize(("kernel", "whole"), [("chunked", False), ("logits", True)])
@pytest.mark.parametrize("training", [True, False])
def test_the_logits_of_a_microbatch_are_never_there(monkeypatch, kernel, whole, training):
    monkeypatch.setitem(loss.CHUNK_TOKENS, "cpu", 4)
    settings = {"shape__num_hidden_layers": 1, "shape__vocab_size": 640}
    cfg = tiny_config(**settings, parallel__pipeline=1, parallel__zero=0, kernels__loss=kernel)
    [stage] = build_stages(cfg, make_plan(cfg, 1), 0, device=CPU)
    ids, labels, positions = map(torch.from_numpy, global_batch(cfg, 0, "padded"))
    with torch.set_grad_enabled(training), _Sizes() as seen:
        found = stage(ids[:4], positions[:4], labels[:4])
        if training:
            found.backward()
    weights = 640 * 32
    assert weights < 4 * 16 * 640
    assert (max(seen.elements) >= 4 * 16 * 640) == whole


@pytest.mark.parametrize("family", TINY)
def test_auto_is_chunked_where_the_class_leaves_its_logits_alone(family):
    """Replaces the head by a function that returns a known tensor: the class leaves its logits alone if its output is
    this very tensor."""
    cfg = tiny_config(**family_settings(family, tied=False), parallel__pipeline=1, parallel__zero=0)
    expected = loss_kernel(cfg)
    cfg.kernels.loss = "logits"
    [stage] = build_stages(cfg, make_plan(cfg, 1), 0, device=CPU)
    ids, labels, positions = map(torch.from_numpy, global_batch(cfg, 0, "full"))
    mark, found = torch.full((8, 16, 128), 0.5), []
    stage.model.get_submodule(stage.parts.head).forward = lambda _hidden: mark
    stage.model.register_forward_hook(lambda *call: found.append(call[-1].logits))
    stage(ids, positions, labels)
    assert expected == ("chunked" if torch.equal(found[0], mark) else "logits")


@pytest.mark.parametrize(
    ("family", "fields", "kernel"),
    [
        ("llama", {}, "chunked"),
        ("granite", {}, "chunked"),
        ("granite", {"logits_scaling": 8.0}, "logits"),
        ("cohere", {}, "logits"),
        ("gemma2", {}, "logits"),
        ("gemma2", {"final_logit_softcapping": None}, "chunked"),
        ("gemma3_text", {}, "chunked"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "logits"),
    ],
)
def test_auto_follows_the_fields(family, fields, kernel):
    cfg = to_config({"model": {"name": family, "attention": "eager", "config": fields}})
    assert loss_kernel(cfg) == kernel
    assert liger_parts(cfg) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.name=cohere", "kernels.loss=chunked"],
            "kernels.loss=chunked: it cannot change logits after the head, as model.config.logit_scale=0.0625 requires",
        ),
        (["model.name=cohere", "kernels.loss=liger"], "kernels.loss=liger: it cannot change logits"),
        (["model.name=cohere", "kernels.rope=liger"], "kernels.rope=liger: Liger's kernels for cohere are none"),
        (
            ["model.name=gemma3_text", "model.config.final_logit_softcapping=null", "kernels.swiglu=liger"],
            "kernels.swiglu=liger: Liger's kernels for gemma3_text are rms_norm, rope; use torch",
        ),
        (["model.config.hidden_act=gelu", "kernels.swiglu=liger"], "kernels.swiglu=liger: its kernel computes silu"),
        (["precision.compile=true", "kernels.rms_norm=liger"], "kernels.rms_norm=liger: precision.compile=true"),
        (["activation=selective", "kernels.rope=liger"], "kernels.rope=liger: its kernel writes over the projections"),
    ],
)
def test_kernels_that_a_model_cannot_have_are_refused(overrides, words):
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_host_without_gpus_plans_liger_and_refuses_to_start_it(monkeypatch):
    cfg = tiny_config(kernels__rope="liger", parallel__zero=0)
    plan = make_plan(cfg, 2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _name: object())
    with pytest.raises(LayoutError, match=r"kernels.rope=liger on a host without NVIDIA GPUs.*kernels.rope=torch"):
        build_stages(cfg, plan, 0, device=CPU)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _name: None)
    cfg.kernels.rope, cfg.kernels.loss = "torch", "liger"
    with pytest.raises(ConfigError, match=r"liger-kernel is not installed.*kernels.loss=chunked"):
        build_stages(cfg, plan, 0, device=CPU)


def test_eight_bit_gathers_are_planned_anywhere_and_refused_on_a_cpu():
    cfg = tiny_config(parallel__quantized_weights=True)
    plan = make_plan(cfg, 4)
    with pytest.raises(LayoutError, match=r"quantized_weights=true on a host without NVIDIA GPUs.*=false"):
        build_stages(cfg, plan, 0, device=CPU)


def test_a_backward_in_two_parts_and_liger_are_refused():
    folded = {"parallel__schedule": "zbv", "parallel__virtual_stages": 2, "activation__checkpoint": "none"}
    cfg = tiny_config(**folded, parallel__zero=0, kernels__rms_norm="liger")
    with pytest.raises(LayoutError, match=r"kernels.rms_norm=liger"):
        make_plan(cfg, 2)


# Liger's kernels in Triton's interpreter. TRITON_INTERPRET=1 must be set before triton is imported.


@needs_liger
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_that_liger_has_for_a_family(family):
    import inspect

    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(family)
    known = inspect.signature(apply).parameters if apply else ()
    assert set(FAMILIES[family].liger) <= set(known)


def _grown(family: str, **chosen: str) -> dict[str, torch.Tensor]:
    """Loss and gradients of a model of two layers on packed sequences, with the given kernels."""
    settings = {**family_settings(family, tied=False), "shape__num_hidden_layers": 2}
    settings |= {f"kernels__{part}": kernel for part, kernel in chosen.items()}
    cfg = tiny_config(**settings, parallel__pipeline=1, parallel__zero=0)
    [stage] = build_stages(cfg, make_plan(cfg, 1), 0, device=CPU)
    ids, labels, positions = map(torch.from_numpy, global_batch(cfg, 0, "packed"))
    found = stage(ids[:2], positions[:2], labels[:2])
    (found / 32).backward()
    return {"loss": found.detach(), **{name: p.grad for name, p in stage.model.named_parameters()}}


@pytest.fixture
def interpreter(monkeypatch):
    interpret(monkeypatch)


@needs_interpreter
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("family", "part"), [(family, part) for family in FAMILIES for part in (*FAMILIES[family].liger, "loss", "all")]
)
def test_liger_computes_what_torch_does(family, part):
    if part == "loss" and loss_kernel(tiny_config(**family_settings(family, tied=False))) == "logits":
        pytest.skip("the class changes its logits after the head")
    parts = FAMILIES[family].liger if part == "all" else (part,)
    expected = _grown(family, loss="logits")
    found = _grown(family, **{"loss": "logits", **dict.fromkeys(parts, "liger")})
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-5 * value.abs().max().clamp(min=1e-12), name
