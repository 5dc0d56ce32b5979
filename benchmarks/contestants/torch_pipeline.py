"""Peer: `torch.distributed.pipelining` with 1F1B, and FSDP2 over the data group of each stage, as torchtitan
combines them."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import LlamaForCausalLM

from benchmarks.contestants import common
from benchmarks.contestants.fsdp2 import adamw, shard
from stack.data.batches import Batch
from stack.parallel.mesh import local_device
from stack.plan.layout import make_plan


class Part(nn.Module):
    """A stage of the Hugging Face model: decoder layers, in the first stage the embedding, in the last norm and head.

    forward(x): int64 ids [micro_size, seq_len] or hidden states [micro_size, seq_len, hidden].
    Returns hidden states, or logits [micro_size, seq_len, vocab].
    """

    def __init__(self, model: LlamaForCausalLM, *, first_layer: int, end: int):
        super().__init__()
        inner = model.model
        self.embedding = inner.embed_tokens if first_layer == 0 else None
        self.layers = nn.ModuleList(inner.layers[first_layer:end])
        is_last = end == len(inner.layers)
        self.norm = inner.norm if is_last else None
        self.head = model.lm_head if is_last else None
        self.rotary = inner.rotary_emb

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        hidden = x if self.embedding is None else self.embedding(x)
        tables = self.rotary(hidden, positions)
        for layer in self.layers:
            # Without a mask, transformers asks sdpa for causal attention.
            hidden = layer(
                hidden, attention_mask=None, position_ids=positions, position_embeddings=tables, use_cache=False
            )
        return hidden if self.norm is None or self.head is None else self.head(self.norm(hidden))


def main() -> None:
    """Entry of a rank."""
    arguments = common.parser()
    arguments.add_argument("--stages", type=int, default=2)
    arguments.add_argument("--compile", action="store_true", help="each decoder layer through torch.compile")
    # A pipeline runs each layer once for every microbatch. By default torchtitan gathers parameters once for a step.
    arguments.add_argument("--reshard", action="store_true", help="free parameters after the forward of a layer")
    args = common.start(arguments)
    if args.work.tied:
        arguments.error("torch.distributed.pipelining does not support tied embeddings; use --set tied=false")
    replicas = dist.get_world_size() // args.stages
    mesh = init_device_mesh(local_device().type, (args.stages, replicas), mesh_dim_names=("pipe", "data"))
    # The split is that of our planner.
    plan = make_plan(common.config(args.work, replicas, pipeline=args.stages, zero=1), dist.get_world_size())
    index = mesh["pipe"].get_local_rank()
    layers = plan.layers_of(index)
    model = common.whole_model(args.work).float()
    if args.work.checkpoint == "full":
        model.activation_checkpointing_enable({"use_reentrant": False})
    part = Part(model, first_layer=layers.start, end=layers.stop)
    del model
    if args.compile:
        for layer in part.layers:
            layer.compile(dynamic=False)
    shard(part, part.layers, args.work, mesh=mesh["data"], reshard=args.reshard)
    stage = PipelineStage(part, index, args.stages, local_device(), group=mesh.get_group("pipe"))
    # The loss is a mean over a microbatch: the schedule divides the gradients by the microbatches (`scale_grads`), and
    # FSDP2 averages them over the replicas.
    schedule = Schedule1F1B(stage, n_microbatches=args.work.microbatches, loss_fn=_loss, scale_grads=True)
    optimizer = adamw(part.parameters())

    def train_step(batch: Batch) -> torch.Tensor:
        input_ids, labels = (sequences.flatten(0, 1) for sequences in common.on_device(batch))
        losses: list[torch.Tensor] = []
        target: dict[str, Any] = {"target": labels, "losses": losses} if stage.is_last else {}
        schedule.step(*([input_ids] if stage.is_first else []), return_outputs=False, **target)
        _clip(list(part.parameters()), mesh["pipe"])
        optimizer.step()
        optimizer.zero_grad()
        # Only the last stage has a loss. Multiplied by the stages, its mean over all ranks is the mean over replicas.
        return torch.stack(losses).mean().detach() * args.stages if losses else torch.zeros(())

    common.measure(
        train_step, args, replica=mesh["data"].get_local_rank(), replicas=replicas, split=list(plan.first_layers)
    )


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())


def _clip(parameters: list[nn.Parameter], pipe: DeviceMesh) -> None:
    """Clips by the norm over all stages, as torchtitan's `clip_grad_norm_` does."""
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    squared = norm**2
    dist.all_reduce(squared, group=pipe.get_group())
    clip_grads_with_norm_(parameters, common.GRAD_CLIP, squared.sqrt())


if __name__ == "__main__":
    main()
