"""The token loss of a head, in chunks of tokens: the logits of a whole microbatch are never there.

Plain cross entropy holds them twice and more, in fp32: with a vocabulary of 128000 and 8192 tokens 4 GB each time.
"""

from typing import Any

import torch
import torch.nn.functional as F

from stack.data.batches import IGNORE

#: Tokens of a chunk, by the type of device. For each weight a chunk reads and writes 8 bytes of the gradient's sum and
#: computes 6 operations a token, so their number decides whether memory or products set the pace, whatever the shape.
#: By an H100's data sheet 1024 give memory a quarter of the products' time. On a CPU 256 were as fast as all at once.
CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Sum of the cross entropies of softmax(hidden @ weight.T + bias), 0-dimensional fp32.

    Products are in the dtype of `hidden`, as in a linear module. Softmax, loss and sums over tokens are in fp32, save
    the gradient of the bias, which is summed over chunks in fp64: its terms cancel, and torch's matrix-vector product
    on a CPU adds one token after another, which is off by 1e-4 for 131,072 tokens.
    Gradients are computed in the forward, while a chunk's logits are there, and scaled in the backward: section 3.2 of
    Liger Kernel (Hsu et al. 2024, arXiv 2410.10989).

    Args:
        hidden: [tokens, width] in the compute dtype.
        weight: [vocabulary, width], same dtype.
        bias: [vocabulary], same dtype, or None.
        labels: int64 [tokens]; `IGNORE` has no loss and no gradient.
    """
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden, weight, bias, labels)
    losses = [
        F.cross_entropy(logits.float(), labels[part], ignore_index=IGNORE, reduction="sum")
        for part, logits in _chunks(hidden, weight, bias)
    ]
    return torch.stack(losses).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the gradients of its inputs for an upstream gradient of 1. That of `hidden` is in its dtype, that of the
    weight in fp32 and that of the bias in fp64 until they are scaled, so each is rounded once, as plain products round
    it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        for_hidden = torch.empty_like(hidden)
        for_weight = torch.zeros_like(weight, dtype=torch.float32)
        for_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float64)
        losses = []
        for part, logits in _chunks(hidden, weight, bias):
            loss, trained, probabilities = _chunk_loss(logits, labels[part])
            losses.append(loss.sum())
            # The gradient at the logits, but for the tokens without a target: they are left out of what it is
            # multiplied by, which is narrower.
            probabilities.scatter_add_(1, labels[part, None].clamp(min=0), -torch.ones_like(loss)[:, None])
            if for_bias is not None:
                for_bias.add_(probabilities.t() @ trained)
            gradient, kept = probabilities.to(hidden.dtype), trained[:, None].to(hidden.dtype)
            torch.mul(gradient @ weight, kept, out=for_hidden[part])
            _add_product(for_weight, gradient.t(), hidden[part] * kept)
        ctx.save_for_backward(for_hidden, for_weight, for_bias)
        ctx.dtype = weight.dtype
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Not in place: a backward in two parts, inputs first and weights later, comes here twice.
        for_hidden, for_weight, for_bias = ctx.saved_tensors
        [scale] = upstream
        return (
            for_hidden * scale,
            _scaled(for_weight, scale, ctx.dtype),
            None if for_bias is None else _scaled(for_bias, scale, ctx.dtype),
            None,
        )


def _chunks(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """Slices of the tokens with their logits [chunk, vocabulary] in the compute dtype."""
    size = CHUNK_TOKENS[hidden.device.type]
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        yield part, F.linear(hidden[part], weight, bias)


def _chunk_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token losses fp32 [chunk]; 1 where there is a target and 0 where not, fp32 [chunk]; and the softmax of the
    logits, fp32 [chunk, vocabulary]."""
    logits = logits.float()
    trained = (labels != IGNORE).float()
    target = logits.gather(1, labels[:, None].clamp(min=0))[:, 0]
    probabilities = logits.softmax(dim=-1)
    # log(sum(exp)) by the largest logit and its probability, which cannot underflow as the target's can.
    normalizer = logits.amax(dim=-1) - probabilities.amax(dim=-1).log()
    return (normalizer - target) * trained, trained, probabilities


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total (fp32) += left @ right, whose products are summed in fp32."""
    if total.device.type == "cuda" and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    elif left.dtype == torch.bfloat16:
        # On a CPU there is no such product, but a fast one that rounds each chunk's sum; fp16 could overflow there.
        total.add_(left @ right)
    else:
        total.addmm_(left.float(), right.float())


def _scaled(gradient: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))
