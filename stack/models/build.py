"""One pipeline stage of a Hugging Face model: built on meta, only the stage's own modules kept and materialised.

Modules stay at their Hugging Face paths, so every parameter keeps its Hugging Face name. Only the model-level
forward is replaced: hidden states are all that crosses a cut; positions and rotary tables are made on each stage.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.masking_utils import create_causal_mask

from stack.config.schema import Config
from stack.data.batches import IGNORE
from stack.models.families import FAMILIES, Family
from stack.plan.layout import Plan
from stack.plan.shape import model_fields


class Stage(nn.Module):
    """Decoder layers `plan.layers_of(stage)`, with the embedding on the first stage, norm and head on the last.

    forward(x, labels):
        x: int64 token ids [micro_size, seq_len] on the first stage, else hidden states
            [micro_size, seq_len, hidden] in the compute dtype.
        labels: int64 [micro_size, seq_len], already shifted, `IGNORE` where there is no target; last stage only.
        Returns hidden states [micro_size, seq_len, hidden], or on the last stage the sum of the token losses
        (0-dimensional fp32).
    """

    def __init__(self, skeleton: transformers.PreTrainedModel, family: Family, plan: Plan, stage: int):
        super().__init__()
        self.config = skeleton.config
        self.first, self.last = stage == 0, stage == plan.stages - 1
        self.family = family
        if self.first:
            _attach(self, family.embedding, skeleton.get_submodule(family.embedding))
        all_layers = skeleton.get_submodule(family.layers)
        own = {str(index): all_layers.get_submodule(str(index)) for index in plan.layers_of(stage)}
        _attach(self, family.layers, nn.ModuleDict(own))
        if self.last:
            _attach(self, family.norm, skeleton.get_submodule(family.norm))
            _attach(self, family.head, skeleton.get_submodule(family.head))
        #: Called with each unit before its forward; ZeRO-3 waits there for the unit's parameters.
        self.before_unit: Callable[[nn.Module], None] | None = None
        # Its buffers are not persistent and not on meta: made again from the config.
        self.rotary = type(skeleton.get_submodule(family.rotary))(config=skeleton.config)

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.get_submodule(self.family.layers).children())

    def units(self) -> Iterator[tuple[str, nn.Module]]:
        """Paths and modules that are materialised, and gathered, one at a time."""
        if self.first:
            yield self.family.embedding, self.get_submodule(self.family.embedding)
        for index, layer in self.get_submodule(self.family.layers).named_children():
            yield f"{self.family.layers}.{index}", layer
        if self.last:
            yield self.family.norm, self.get_submodule(self.family.norm)
            yield self.family.head, self.get_submodule(self.family.head)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self._use(self.family.embedding)(x) if self.first else x
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        # None wherever the attention kernel knows causality by itself (sdpa, flash). Padding is on the right, so
        # no real token sees it and no padding mask is needed.
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=None
        )
        rotary = self.rotary(hidden, positions)
        for path, _ in self.get_submodule(self.family.layers).named_children():
            layer = self._use(f"{self.family.layers}.{path}")
            hidden = layer(
                hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary, use_cache=False
            )
        if not self.last:
            return hidden
        if labels is None:
            raise ValueError("the last stage needs labels")
        logits = self._use(self.family.head)(self._use(self.family.norm)(hidden))
        return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum")

    def _use(self, path: str) -> nn.Module:
        unit = self.get_submodule(path)
        if self.before_unit is not None:
            self.before_unit(unit)
        return unit


def build_stage(
    cfg: Config, plan: Plan, stage: int, *, device: torch.device, place: Callable[[nn.Module], None] | None = None
) -> Stage:
    """Builds and initialises one stage.

    Parameters are drawn on the CPU in fp32 from a generator seeded by `run.seed` and the module's Hugging Face path,
    so any layout and any device start from equal weights; then cast to the compute dtype.

    Args:
        place: called with each unit (embedding, a decoder layer, norm, head) as soon as it is materialised; ZeRO-3
            shards it there, so no rank ever holds more than one unit in full.
    """
    family = FAMILIES["llama"]
    skeleton = _skeleton(cfg, family)
    module = Stage(skeleton, family, plan, stage)
    dtype = compute_dtype(cfg)
    for path, unit in module.units():
        if plan.shape.tied and plan.stages == 1 and path == family.head:
            unit.weight = module.get_submodule(family.embedding).weight
            continue
        _materialise(skeleton, path, unit, seed=cfg.run.seed)
        unit.to(device=device, dtype=dtype)
        if place is not None:
            place(unit)
    module.rotary.to(device)
    return module


def compute_dtype(cfg: Config) -> torch.dtype:
    """Dtype of the parameters in use and of the hidden states."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.precision.dtype]


def hugging_face_config(cfg: Config, family: Family) -> transformers.PretrainedConfig:
    """The family's Hugging Face config, without a cache and with the chosen attention."""
    fields: dict[str, Any] = {
        k: v for k, v in model_fields(cfg.model).items() if k not in ("model_type", "torch_dtype")
    }
    config = getattr(transformers, family.config_class)(**fields)
    config.use_cache = False
    config._attn_implementation = cfg.model.attention
    return config


def _skeleton(cfg: Config, family: Family) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return getattr(transformers, family.model_class)(hugging_face_config(cfg, family))


def _materialise(skeleton: transformers.PreTrainedModel, path: str, unit: nn.Module, *, seed: int) -> None:
    for name, module in unit.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        for key, parameter in own.items():
            module.register_parameter(key, nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{seed}:{path}.{name}".encode()))
            skeleton._init_weights(module)


def _attach(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)
