"""Trains a model in one ordinary process, for comparison with layouts.

Uses the plain transformers model, torch's optimizer and the whole batch. Only the initial weights come from the code
under test.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from stack.config.schema import Config, Parallel
from stack.data.batches import IGNORE
from stack.models.build import build_stages, compute_dtype, hugging_face_config
from stack.plan.layout import make_plan


@dataclass(frozen=True)
class Curve:
    """The results of a training run."""

    losses: list[float]
    """Mean token loss of each step, in nats."""
    norms: list[float]
    """Gradient norm of each step, before clipping."""
    parameters: dict[str, torch.Tensor]
    """Hugging Face name -> fp32 parameter after the last step. A tied parameter occurs under both of its names."""
    also: frozenset[str] = frozenset()
    """The second names of tied parameters. A stage that holds both ends of a tie has only one of the two names."""


#: Token ids, labels and positions of a global batch, each int64 [global_size, seq_len].
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def synthetic_rows(cfg: Config, step: int) -> Rows:
    """A global batch of random tokens. Sequences have random lengths, so that microbatches have different weights."""
    draw = np.random.default_rng([cfg.run.seed, step])
    size, length = cfg.batch.global_size, cfg.data.seq_len
    tokens = draw.integers(0, cfg.model.config["vocab_size"], (size, length + 1))
    ids, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    for row, kept in enumerate(draw.integers(1, length + 1, size)):
        labels[row, kept:] = IGNORE
        ids[row, kept:] = 0
    return ids, labels, np.broadcast_to(np.arange(length), ids.shape).copy()


def train_dense(cfg: Config, *, steps: int, device: torch.device) -> Curve:
    """Trains on `synthetic_rows` with a plain loop; half precision uses fp32 masters and gradient sums."""
    model = _model(cfg).to(device)
    masters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    _set(model, masters, compute_dtype(cfg))
    optimizer = _optimizer(list(masters.values()), cfg)
    losses, norms = [], []
    for step in range(steps):
        rows = [torch.from_numpy(values).to(device) for values in synthetic_rows(cfg, step)]
        losses.append(sum(_backward(model, masters, part, rows[1]) for part in _parts(cfg, model, rows)))
        norms.append(_clip(list(masters.values()), cfg.optim.grad_clip or float("inf")))
        optimizer.step()
        optimizer.zero_grad()
        _set(model, masters, compute_dtype(cfg))
    names = {id(p): name for name, p in model.named_parameters()}
    every = {name: masters[names[id(p)]].detach().cpu() for name, p in model.named_parameters(remove_duplicate=False)}
    return Curve(losses, norms, every, also=frozenset(every.keys() - masters.keys()))


def _model(cfg: Config) -> Any:
    """The model as transformers builds it, in fp32 on the CPU, with the initial weights that every layout has."""
    alone = replace(
        cfg, parallel=Parallel(pipeline=1, zero=0), precision=replace(cfg.precision, dtype="fp32", compile=False)
    )
    [stage] = build_stages(alone, make_plan(alone, 1), 0, device=torch.device("cpu"))
    config = hugging_face_config(cfg)
    model = transformers.AutoModelForCausalLM.from_config(config)
    first = {name: p.detach() for name, p in stage.model.named_parameters()}
    left = model.load_state_dict(first, strict=not config.tie_word_embeddings)
    if len(left.missing_keys) > int(config.tie_word_embeddings):
        raise RuntimeError(f"{config.model_type}: no first weights for {left.missing_keys}")
    return model.train()


def _set(model: torch.nn.Module, masters: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Sets the model's parameters to the masters in the compute dtype; rotary tables stay in fp32."""
    for name, parameter in model.named_parameters():
        parameter.data = masters[name].detach().to(dtype, copy=True)


def _parts(cfg: Config, model: Any, rows: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """The whole batch as one part, or the microbatches where a split changes more than the order of sums: the auxiliary
    loss of a mixture is defined for a microbatch, and half precision rounds the gradients of each microbatch."""
    by_parts = hasattr(model.config, "router_aux_loss_coef") or cfg.precision.dtype != "fp32"
    size = cfg.batch.micro_size if by_parts else len(rows[0])
    return zip(*(values.split(size) for values in rows), strict=True)


def _backward(
    model: Any, masters: dict[str, torch.Tensor], part: tuple[torch.Tensor, ...], labels: torch.Tensor
) -> float:
    """Adds the gradients of a part of the batch to those of the masters, in fp32. Returns the part's share of the mean
    token loss. `labels` are those of the whole batch."""
    targets = (labels != IGNORE).sum()
    cross_entropy, auxiliary = _losses(model, *part)
    ((cross_entropy + auxiliary) / targets).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad.float()
            masters[name].grad = grad if masters[name].grad is None else masters[name].grad + grad
            parameter.grad = None
    return (cross_entropy / targets).item()


def _clip(masters: list[torch.Tensor], limit: float) -> float:
    """Scales gradients in place so that their norm is at most `limit`, and returns the norm before. The norm is
    computed in fp64, because torch.nn.utils.clip_grad_norm_ on a CPU has an error of 1e-5 for a million elements."""
    norms = [master.grad.double().norm() for master in masters if master.grad is not None]
    norm = torch.stack(norms).norm().float()
    torch.nn.utils.clip_grads_with_norm_(masters, limit, norm)
    return norm.item()


def _losses(
    model: Any, ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the token losses, and the auxiliary loss times the number of targets."""
    config = model.config
    mixture = hasattr(config, "router_aux_loss_coef")
    output = model(input_ids=ids, position_ids=positions, **({"output_router_logits": True} if mixture else {}))
    logits = output.logits.float().flatten(0, 1)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    if not mixture:
        return loss, torch.zeros((), device=loss.device)
    mask = (labels != IGNORE).long()
    experts, top = config.num_local_experts, config.num_experts_per_tok
    layers: list[Any] = [load_balancing_loss_func((router,), experts, top, mask) for router in output.router_logits]
    return loss, config.router_aux_loss_coef * torch.stack(layers).mean() * mask.sum()


def _optimizer(parameters: list[torch.Tensor], cfg: Config) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": cfg.optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if cfg.optim.kind == "sgd":
        return torch.optim.SGD(groups, lr=cfg.optim.lr, momentum=cfg.optim.momentum)
    betas = (cfg.optim.betas[0], cfg.optim.betas[1])
    return torch.optim.AdamW(groups, lr=cfg.optim.lr, betas=betas, eps=cfg.optim.eps)
