"""The token loss of a head, computed in chunks of tokens, so that the logits of a whole microbatch are never in memory.

Plain cross entropy holds two or more fp32 copies of the logits. With a vocabulary of 128000 and 8192 tokens, each copy
takes 4 GB.
"""

from typing import Any

import torch
import torch.nn.functional as F

from stack.data.batches import IGNORE

#: Tokens of a chunk, by type of device. For each weight, a chunk reads and writes the gradient's sum (8 bytes) and does
#: 6 operations a token. Therefore the chunk size alone decides whether memory traffic or computation takes longer,
#: whatever the shape of the head. By the data sheet of an H100, with 1024 tokens memory traffic takes a quarter of the
#: time of the products. On a CPU chunks of 256 tokens were as fast as all tokens at once.
CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Sum of the cross entropies of softmax(hidden @ weight.T + bias), 0-dimensional fp32.

    Products are in the dtype of `hidden`, as in a linear module. Softmax, loss and sums over tokens are in fp32. The
    gradient of the bias is summed over chunks in fp64, because its terms cancel, and torch's matrix-vector product on a
    CPU adds one token after another, with an error of 1e-4 for 131,072 tokens.
    The forward computes the gradients while it holds a chunk's logits, and the backward scales them, as in section 3.2
    of Liger Kernel (Hsu et al. 2024, arXiv 2410.10989).

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
    """Saves the gradients of its inputs for an upstream gradient of 1; the backward multiplies them by the upstream.

    The saved gradient of `hidden` has the dtype of `hidden`, that of the weight is fp32 and that of the bias fp64.
    Weight and bias are rounded to their own dtype after the multiplication, so each gradient is rounded only once, as
    with plain products.
    """

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
            # Makes `probabilities` the gradient with respect to the logits. Tokens without a target are masked in the
            # factors of the products below, which are smaller than [chunk, vocabulary].
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
        # Not in place: a backward in two parts, first for the inputs and later for the weights, calls this twice.
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
    """Three fp32 tensors: token losses [chunk]; 1 for tokens with a target and 0 for others [chunk]; softmax of the
    logits [chunk, vocabulary]."""
    logits = logits.float()
    trained = (labels != IGNORE).float()
    target = logits.gather(1, labels[:, None].clamp(min=0))[:, 0]
    probabilities = logits.softmax(dim=-1)
    # log(sum(exp(logits))) from the largest logit and its probability. The target's probability could underflow.
    normalizer = logits.amax(dim=-1) - probabilities.amax(dim=-1).log()
    return (normalizer - target) * trained, trained, probabilities


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total (fp32) += left @ right, accumulated in fp32."""
    if total.device.type == "cuda" and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    elif left.dtype == torch.bfloat16:
        # A CPU has no product of bf16 matrices with an fp32 result. This one is fast, and rounds the sum of each chunk
        # to bf16. It is not used for fp16, where the sum could overflow.
        total.add_(left @ right)
    else:
        total.addmm_(left.float(), right.float())


def _scaled(gradient: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))
