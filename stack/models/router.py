"""The auxiliary loss of a mixture of experts, which every stage adds for its own layers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from stack.data.batches import IGNORE


class Router:
    """Load balancing of the experts of one stage's layers.

    The loss of a layer is that of Switch Transformers (Fedus et al. 2021, equations 4 to 6) over the tokens of a
    microbatch that are trained on; the model's is the mean over its layers times `router_aux_loss_coef`, and the
    step's the mean over its microbatches, weighted by their targets. So no stage needs another's routing, and the sum
    over stages is the same in every layout.
    """

    def __init__(self, config: transformers.PretrainedConfig):
        self._coefficient = config.router_aux_loss_coef / config.num_hidden_layers
        self._top_k = config.num_experts_per_tok
        #: The gradient, at the loss of the step, of a token loss in any microbatch; the engine knows it.
        self.scale: Callable[[], float] = lambda: 1.0
        self._losses: list[torch.Tensor] = []

    def take(self) -> list[torch.Tensor]:
        """Auxiliary losses of the microbatches since the last call, each times its targets."""
        taken, self._losses = self._losses, []
        return taken

    def attach(self, output: torch.Tensor, logits: tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """`output`, whose backward will also start one at the auxiliary loss.

        Args:
            output: what the stage returns, any shape.
            logits: router logits [tokens, experts] of each layer.
            labels: of the microbatch; `IGNORE` does not count.
        """
        trained = (labels.flatten() != IGNORE).float()
        mean = sum(load_balancing(layer, trained, self._top_k) for layer in logits)
        loss = self._coefficient * mean * trained.sum()
        self._losses.append(loss.detach())
        return _Attach.apply(output, loss, self.scale)


def load_balancing(logits: torch.Tensor, trained: torch.Tensor, top_k: int) -> torch.Tensor:
    """experts x sum over experts of (share of the choices x mean probability), 0-dimensional fp32.

    Args:
        logits: [tokens, experts].
        trained: fp32 [tokens], 1 where the token counts and 0 where not.
    """
    probabilities = logits.float().softmax(dim=-1)
    chosen = F.one_hot(probabilities.topk(top_k, dim=-1).indices, logits.shape[-1]).sum(dim=1).float()
    count = trained.sum().clamp(min=1)
    # Not `trained @ probabilities`: a matrix-vector product on a CPU adds one token after another, a sum in a tree.
    choices, mean = ((trained[:, None] * values).sum(dim=0) / count for values in (chosen, probabilities))
    return logits.shape[-1] * (choices * mean).sum()


class _Attach(torch.autograd.Function):
    """The identity on `output`; in its backward `loss` gets `scale()` as its gradient, whatever came for `output`."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, _loss: torch.Tensor, scale: Callable[[], float]) -> torch.Tensor:
        ctx.scale = scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return gradients[0], torch.full((), ctx.scale(), device=gradients[0].device), None
