"""Peer: DeepSpeed's own PipelineModule and PipelineEngine, ZeRO-1, over the layers of the Hugging Face model."""

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.contestants import common
from benchmarks.work import Work
from stack.data.batches import Batch


class Embedding(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens)


class Decoder(nn.Module):
    """A decoder layer with its own copy of the positions, since only hidden states are passed between layers."""

    def __init__(self, layer: nn.Module, rotary: nn.Module, seq_len: int):
        super().__init__()
        self.layer = layer
        weight = next(layer.parameters())
        positions = torch.arange(seq_len, device=weight.device)[None]
        # The rotary tables have the dtype of the weights, as in the model's own forward.
        cos, sin = rotary(weight, positions)
        for name, value in (("positions", positions), ("cos", cos), ("sin", sin)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # Without a mask, transformers asks sdpa for causal attention.
        return self.layer(
            hidden,
            attention_mask=None,
            position_ids=self.positions,
            position_embeddings=(self.cos, self.sin),
            use_cache=False,
        )


class Head(nn.Module):
    """Hidden states to logits."""

    def __init__(self, norm: nn.Module, head: nn.Module):
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(hidden))


def main() -> None:
    """Entry of a rank."""
    arguments = common.parser()
    arguments.add_argument("--stages", type=int, default=2)
    arguments.add_argument("--compile", action="store_true", help="decoder layers through torch.compile")
    args = common.start(arguments)
    if args.work.tied:
        arguments.error("this peer does not support tied embeddings; use --set tied=false")
    model = common.whole_model(args.work)
    if args.compile:
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
    module = _pipeline_module(model, args.work, stages=args.stages)
    # The bucket holds a whole stage, as ours does.
    bucket = common.bucket(args.work)
    zero_optimization = {"stage": 1, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=[p for p in module.parameters() if p.requires_grad],
        config=common.peer_config(args.work, zero_optimization),
    )

    def train_step(batch: Batch) -> torch.Tensor:
        return engine.train_batch(data_iter=zip(*common.on_device(batch), strict=True))

    common.measure(
        train_step,
        args,
        replica=engine.grid.get_data_parallel_rank(),
        replicas=dist.get_world_size() // args.stages,
        # Layer 0 is the embedding.
        split=[max(0, int(first) - 1) for first in module.parts[:-1]],
    )


def _pipeline_module(model: LlamaForCausalLM, work: Work, *, stages: int) -> PipelineModule:
    layers = [
        LayerSpec(Embedding, model.model.embed_tokens),
        *(LayerSpec(Decoder, layer, model.model.rotary_emb, work.seq_len) for layer in model.model.layers),
        LayerSpec(Head, model.model.norm, model.lm_head),
    ]
    return PipelineModule(
        layers=layers,
        num_stages=stages,
        loss_fn=lambda logits, labels: F.cross_entropy(logits.float().flatten(0, -2), labels.flatten()),
        # The head costs about as much as a layer. Counting the head as a layer gives the split of our planner.
        partition_method="type:Decoder|Head",
        activation_checkpoint_interval=1 if work.checkpoint == "full" else 0,
        checkpointable_layers=["Decoder"],
    )


if __name__ == "__main__":
    main()
