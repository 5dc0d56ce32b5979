"""The auxiliary loss of a mixture of experts. Every stage adds the loss of its own layers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from stack.data.batches import IGNORE


class Router:
    """Load-balancing loss of the experts in one stage's layers.

    The loss of a layer is that of Switch Transformers (Fedus et al. 2021, equations 4 to 6) over the tokens of a
    microbatch that have a target. The loss of a microbatch is the mean over all layers of the model, times
    `router_aux_loss_coef`. The loss of a step is the mean over its microbatches, weighted by their numbers of targets.
    Hence a stage does not need the routing of other stages, and the sum over stages is the same in every layout.
    """

    def __init__(self, config: transformers.PretrainedConfig):
        self._coefficient = config.router_aux_loss_coef / config.num_hidden_layers
        self._top_k = config.num_experts_per_tok
        #: Returns the gradient of the step's loss with respect to one token loss; the engine sets this function.
        self.scale: Callable[[], float] = lambda: 1.0
        self._losses: list[torch.Tensor] = []

    def take(self) -> list[torch.Tensor]:
        """The auxiliary losses of the microbatches since the last call, each times its number of targets: 0-dimensional
        fp32 tensors."""
        taken, self._losses = self._losses, []
        return taken

    def attach(self, output: torch.Tensor, logits: tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """`output`; its backward also starts a backward from the auxiliary loss.

        Args:
            output: the output of the stage, any shape.
            logits: router logits [tokens, experts] of each layer.
            labels: int64 [micro_size, seq_len] of the microbatch; tokens with label `IGNORE` are left out of the loss.
        """
        trained = (labels.flatten() != IGNORE).float()
        mean = sum(load_balancing(layer, trained, self._top_k) for layer in logits)
        loss = self._coefficient * mean * trained.sum()
        self._losses.append(loss.detach())
        return _Attach.apply(output, loss, self.scale)


def load_balancing(logits: torch.Tensor, trained: torch.Tensor, top_k: int) -> torch.Tensor:
    """experts x sum over experts of (choices per token x mean probability), 0-dimensional fp32.

    Equations 4 to 6 of Fedus et al. 2021, with `top_k` choices for each token.

    Args:
        logits: [tokens, experts].
        trained: fp32 [tokens], 1 for a token that has a target and 0 for others.
        top_k: experts that are chosen for each token.
    """
    probabilities = logits.float().softmax(dim=-1)
    chosen = F.one_hot(probabilities.topk(top_k, dim=-1).indices, logits.shape[-1]).sum(dim=1).float()
    count = trained.sum().clamp(min=1)
    # Not `trained @ probabilities`: a matrix-vector product on a CPU adds the tokens one after another, which is less
    # accurate than `sum`, which adds them in a tree.
    choices, mean = ((trained[:, None] * values).sum(dim=0) / count for values in (chosen, probabilities))
    return logits.shape[-1] * (choices * mean).sum()


class _Attach(torch.autograd.Function):
    """The identity on `output`. In its backward `loss` gets the gradient `scale()`, independently of the gradient of
    `output`."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, _loss: torch.Tensor, scale: Callable[[], float]) -> torch.Tensor:
        ctx.scale = scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return gradients[0], torch.full((), ctx.scale(), device=gradients[0].device), None
