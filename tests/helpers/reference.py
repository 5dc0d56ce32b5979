"""Trains a model in one ordinary process with plain transformers and torch. Only the initial weights are `stack`'s."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from stack.config.schema import Config
from stack.models.build import build_stages
from stack.plan.layout import make_plan
from tests.helpers.tiny import STEPS, global_batch


@dataclass(frozen=True)
class Curve:
    """The results of a run."""

    losses: list[float]
    """Mean token loss of each step, in nats."""
    norms: list[float]
    """Gradient norm of each step, before clipping."""
    gradients: dict[str, torch.Tensor]
    """Hugging Face name -> gradient of the first step, before clipping."""
    parameters: dict[str, torch.Tensor]
    """Hugging Face name -> parameter after the last step."""
    tied: tuple[str, str] | None
    """The two names of a tied weight: the embedding's, under which the other fields have it, and the head's."""


def initial_weights(cfg: Config) -> dict[str, torch.Tensor]:
    """Hugging Face name -> initial fp32 weight, for the whole model."""
    one = copy.deepcopy(cfg)
    one.parallel = type(cfg.parallel)(pipeline=1, zero=0)
    one.precision = type(cfg.precision)(dtype="fp32")
    [stage] = build_stages(one, make_plan(one, 1), 0, device=torch.device("cpu"))
    return {name: parameter.detach() for name, parameter in stage.model.named_parameters()}


def dense_model(cfg: Config) -> transformers.PreTrainedModel:
    """The model as transformers builds it, with our initial weights."""
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = transformers.AutoConfig.for_model(cfg.model.name, **cfg.model.config, **ids, use_cache=False)
    config._attn_implementation = cfg.model.attention
    model = transformers.AutoModelForCausalLM.from_config(config)
    missing = model.load_state_dict(initial_weights(cfg), strict=not config.tie_word_embeddings)
    assert len(missing.missing_keys) <= int(config.tie_word_embeddings)
    return model.train()


def dense_run(cfg: Config, kind: str) -> Curve:
    """Trains the transformers model with a plain loop: the whole batch at once, clipped gradients, torch's optimizer.

    A mixture of experts gets one microbatch after another, because its auxiliary loss is defined for a microbatch.
    """
    model = dense_model(cfg)
    optimizer = _optimizer(model, cfg)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        ids, labels, positions = map(torch.from_numpy, global_batch(cfg, step, kind))
        rows = cfg.batch.micro_size if hasattr(model.config, "router_aux_loss_coef") else len(ids)
        targets = (labels != -100).sum()
        total = 0.0
        for part in zip(ids.split(rows), labels.split(rows), positions.split(rows), strict=True):
            cross_entropy, auxiliary = _losses(model, *part)
            ((cross_entropy + auxiliary) / targets).backward()
            total += cross_entropy.item() / targets.item()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        # In fp64, because clip_grad_norm_ on a CPU has an error of 1e-5 for a million elements.
        norm = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm().float()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.optim.grad_clip or float("inf"), norm)
        norms.append(norm.item())
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Curve(losses, norms, gradients, parameters, _tied_names(model))


def _tied_names(model: transformers.PreTrainedModel) -> tuple[str, str] | None:
    if not model.config.tie_word_embeddings:
        return None
    shared = model.get_input_embeddings().weight
    embedding, head = [name for name, p in model.named_parameters(remove_duplicate=False) if p is shared]
    return embedding, head


def _losses(
    model: transformers.PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the token losses, and the auxiliary loss times the number of targets."""
    config = model.config
    moe = {"output_router_logits": True} if hasattr(config, "router_aux_loss_coef") else {}
    output = model(input_ids=ids, position_ids=positions, **moe)
    loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    if not moe:
        return loss, torch.zeros(())
    mask = (labels != -100).long()
    layers = [
        load_balancing_loss_func((logits,), config.num_local_experts, config.num_experts_per_tok, mask)
        for logits in output.router_logits
    ]
    return loss, config.router_aux_loss_coef * torch.stack(layers).mean() * mask.sum()


def _optimizer(model: torch.nn.Module, cfg: Config) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": cfg.optim.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if cfg.optim.kind == "sgd":
        return torch.optim.SGD(groups, lr=cfg.optim.lr, momentum=cfg.optim.momentum)
    return torch.optim.AdamW(groups, lr=cfg.optim.lr, betas=tuple(cfg.optim.betas), eps=cfg.optim.eps)
