"""The dense run: one process, plain transformers forward, plain torch, no code of ours but the initial weights."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers

from stack.config.schema import Config
from stack.models.build import build_stage
from stack.plan.layout import make_plan
from tests.helpers.tiny import STEPS, global_batch


@dataclass(frozen=True)
class Curve:
    """What a run gave: per step (loss, grad_norm), the gradients of the first step, parameters at the end."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]


def initial_weights(cfg: Config) -> dict[str, torch.Tensor]:
    """fp32 weights of the whole model by Hugging Face name."""
    one = Config(**{**cfg.__dict__})
    one.parallel = type(cfg.parallel)(pipeline=1, zero=0)
    one.precision = type(cfg.precision)(dtype="fp32")
    stage = build_stage(one, make_plan(one, 1), 0, device=torch.device("cpu"))
    return {name: parameter.detach() for name, parameter in stage.named_parameters()}


def dense_run(cfg: Config, *, padded: bool) -> Curve:
    """Trains the transformers model as any tutorial would: whole batch at once, clip_grad_norm_, AdamW."""
    config = transformers.LlamaConfig(**cfg.model.config, use_cache=False)
    config._attn_implementation = "sdpa"
    model = transformers.LlamaForCausalLM(config)
    missing = model.load_state_dict(initial_weights(cfg), strict=not config.tie_word_embeddings)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": cfg.optim.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.optim.lr, betas=tuple(cfg.optim.betas), eps=cfg.optim.eps)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        ids, labels = map(torch.from_numpy, global_batch(cfg, step, padded=padded))
        logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.grad_clip or float("inf")).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return Curve(losses, norms, gradients, {name: p.detach().clone() for name, p in model.named_parameters()})
