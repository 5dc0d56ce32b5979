"""Builds one pipeline stage of a Hugging Face model.

The whole model is built on the meta device, and only the stage's own modules are materialised. Stand-ins replace the
modules of other stages. Every stage then runs the class's own forward: only hidden states cross between stages, each
stage computes masks and rotary tables, and every parameter keeps its Hugging Face name.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from stack.config.kernels import loss_kernel
from stack.config.model_folder import model_fields
from stack.config.schema import Config
from stack.data.batches import IGNORE
from stack.models.documents import Documents, known
from stack.models.families import FAMILIES, Parts, parts_of
from stack.models.kernels import LossHead, put_in_liger, require
from stack.models.router import Router
from stack.models.weights import Weights
from stack.plan.layout import Plan

#: A function that is called with each unit as soon as the unit is materialised.
Place = Callable[[nn.Module], None]


class Stage(nn.Module):
    """Decoder layers `plan.layers_of(stage)`; also the embedding on the first stage, and norm and head on the last.

    forward(x, positions, labels, bounds=None):
        x: int64 token ids [micro_size, seq_len] on the first stage, else hidden states
            [micro_size, seq_len, hidden] in the compute dtype.
        positions: int64 [micro_size, seq_len]; they start at 0 in every document, and attention stays inside it.
        labels: int64 [micro_size, seq_len], already shifted, `IGNORE` where there is no target.
        bounds: int32 [1, bounds] of the microbatch, for kernels that use them (`stack.models.documents`).
        Returns hidden states [micro_size, seq_len, hidden], or on the last stage the sum of the token losses
        (0-dimensional fp32).
    """

    def __init__(self, model: Any, plan: Plan, stage: int, *, loss: str):
        """
        Args:
            model: the whole model, on the meta device.
            plan: the layout.
            stage: number of the stage, from 0.
            loss: `logits`, `chunked` or `liger`, as `stack.config.kernels.loss_kernel` returns.
        """
        super().__init__()
        self.first, self.last = stage == 0, stage == plan.stages - 1
        self.parts = parts_of(model)
        self.model = model
        self.router = Router(model.config) if hasattr(model.config, "router_aux_loss_coef") else None
        self._own = [f"{self.parts.layers}.{index}" for index in plan.layers_of(stage)]
        self._leave_out(plan)
        head = model.get_submodule(self.parts.head)
        self._loss_head = LossHead(head, loss) if self.last and loss != "logits" else None
        self.documents: Documents | None = None
        """The documents of the current batch. With None transformers finds packed sequences itself."""

    @property
    def layers(self) -> list[nn.Module]:
        """This stage's decoder layers."""
        return [layer for _, layer in self.numbered_layers()]

    def numbered_layers(self) -> list[tuple[int, nn.Module]]:
        """This stage's decoder layers with their numbers in the model."""
        return [(int(path.rpartition(".")[2]), self.model.get_submodule(path)) for path in self._own]

    def tied_weight(self) -> torch.Tensor:
        """The tied weight of this stage: the token embedding on the first stage, the head on the last. Shape
        [vocabulary, hidden]. Only for models that tie the two."""
        path = self.parts.embedding if self.first else self.parts.head
        return self.model.get_parameter(f"{path}.weight")

    def table_dtypes(self) -> dict[str, torch.dtype]:
        """{"rotary tables": dtype}, or empty for a model without rotary tables."""
        tables = [buffer.dtype for name, buffer in self.model.named_buffers() if name.endswith("inv_freq")]
        return {"rotary tables": tables[0]} if tables else {}

    def units(self) -> Iterator[tuple[str, nn.Module]]:
        """Paths and modules of the units, in the order of the forward. Units are materialised one at a time, and ZeRO-3
        gathers one unit with one collective."""
        ahead = self.parts.before if self.first else ()
        behind = (*self.parts.after, self.parts.head) if self.last else ()
        for path in (*ahead, *self._own, *behind):
            unit = self.model.get_submodule(path)
            if next(unit.parameters(), None) is not None:
                yield path, unit

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor, bounds: torch.Tensor | None = None
    ) -> torch.Tensor:
        inputs: dict[str, Any] = {"input_ids": x} if self.first else {"inputs_embeds": x}
        inputs["position_ids"] = positions
        if bounds is not None and self.documents is not None:
            longest = self.documents.longest
            inputs |= {"cu_seq_lens_q": bounds[0], "cu_seq_lens_k": bounds[0]}
            inputs |= {"max_length_q": longest, "max_length_k": longest}
        if self.router is not None:
            inputs["output_router_logits"] = True
        if self._loss_head is not None:
            self._loss_head.labels = labels
        # The outer class has the head, and in some families caps or scales the logits.
        with known(self.documents.packed if self.documents else None):
            outputs = (self.model if self.last else self.model.base_model)(**inputs)
        if self._loss_head is not None:
            output = outputs.logits
        elif self.last:
            logits = outputs.logits.float().flatten(0, -2)
            output = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
        else:
            output = outputs.last_hidden_state
        if self.router is not None and self.training:
            output = self.router.attach(output, outputs.router_logits, labels)
        return output

    def _leave_out(self, plan: Plan) -> None:
        """Replaces the modules of other stages by stand-ins."""
        others = [f"{self.parts.layers}.{index}" for index in range(plan.shape.layers)]
        absent = [path for path in others if path not in self._own]
        if not self.first:
            absent += self.parts.before
            for attribute in FAMILIES[self.model.config.model_type].multipliers:
                setattr(self.model.base_model, attribute, 1.0)
        if not self.last:
            absent += [*self.parts.after, self.parts.head]
        for path in absent:
            self.model.set_submodule(path, _Nothing() if path in self.parts.added else _Through())


class _Through(nn.Module):
    """Stand-in for a module of another stage: returns the hidden states unchanged."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden


class _Nothing(nn.Module):
    """Stand-in on later stages for a module whose output is added to the hidden states: returns zero."""

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=positions.device)


def build_stages(
    cfg: Config,
    plan: Plan,
    pipe_rank: int,
    *,
    device: torch.device,
    place: Place | None = None,
    empty: bool = False,
) -> list[Stage]:
    """Builds and initialises the stages of one rank of the pipe.

    Parameters are drawn on the CPU in fp32, from a generator that is seeded by `run.seed` and the module's Hugging Face
    path, so every layout and device starts from equal weights. With model.init=pretrained they are read from the model
    folder. Then they are cast to the compute dtype.

    Args:
        cfg: the config.
        plan: the layout.
        pipe_rank: this rank's place in its pipe group.
        device: device of the finished stages.
        place: called with each unit (embedding, a decoder layer, norm, head) as soon as it is on the device. ZeRO-3
            shards the unit there, so that no rank holds more than one whole unit.
        empty: leave the parameters zero, because a checkpoint will fill them.

    Raises:
        ConfigError: a kernel's library is not installed, or there are no weights under `model.name`.
        LayoutError: this host cannot run the chosen kernels.
        CheckpointError: the weights in the model folder are damaged or not of this model.
    """
    require(cfg, device)
    values = _Values.of(cfg, empty=empty)
    loss = loss_kernel(cfg)
    stages = [Stage(_skeleton(cfg), plan, stage, loss=loss) for stage in plan.stages_of(pipe_rank)]
    for stage in stages:
        for path, unit in stage.units():
            if plan.shape.tied and path == stage.parts.head:
                if stages[0].first:
                    unit.weight = stages[0].tied_weight()
                    continue
                unit.weight = nn.Parameter(_tied_weight(cfg, stage.parts, values))
            else:
                _materialise(stage.model, path, unit, values)
            unit.to(device=device, dtype=compute_dtype(cfg))
            if place is not None:
                place(unit)
        # The modules still on meta have no parameters, only buffers: rotary tables, in fp32.
        for path, module in stage.model.named_modules():
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                _initialise(stage.model, path, module, values)
                module.to(device)
    return stages


def compute_dtype(cfg: Config) -> torch.dtype:
    """Dtype of the parameters that the forward uses and of the hidden states (`precision.dtype`)."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.precision.dtype]


def hugging_face_config(cfg: Config) -> transformers.PretrainedConfig:
    """The model's Hugging Face config, with `use_cache` off, no special token ids, and the chosen attention."""
    fields: dict[str, Any] = {k: v for k, v in model_fields(cfg.model).items() if k not in ("torch_dtype", "dtype")}
    # The default ids of the class may exceed this vocabulary, and torch does not train the embedding of a padding id.
    fields |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "use_cache": False}
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    config._attn_implementation = cfg.model.attention
    return config


def whole_model(cfg: Config) -> Any:
    """The whole model as transformers builds it, on the meta device."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(hugging_face_config(cfg))


def parameter_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape, for all parameters of the whole model; tied parameters occur once."""
    return {name: tuple(parameter.shape) for name, parameter in whole_model(cfg).named_parameters()}


def open_weights(cfg: Config) -> Weights | None:
    """The weights for model.init=pretrained, whose tensor names are checked against the model; None with scratch.

    Raises:
        ConfigError: there are no weights under `model.name`.
        CheckpointError: the files are damaged, or not the weights of this model.
    """
    if cfg.model.init != "pretrained":
        return None
    return Weights(cfg.model.name, whole_model(cfg), changed=bool(cfg.model.config))


@dataclass(frozen=True)
class _Values:
    """The source of initial values: drawn from `seed` if `draw`, else read from `weights`, else zero."""

    seed: int
    draw: bool
    weights: Weights | None

    @classmethod
    def of(cls, cfg: Config, *, empty: bool) -> "_Values":
        weights = None if empty else open_weights(cfg)
        return cls(cfg.run.seed, draw=not empty and weights is None, weights=weights)


def _skeleton(cfg: Config) -> Any:
    model = whole_model(cfg)
    put_in_liger(model, cfg)
    return model


def _tied_weight(cfg: Config, parts: Parts, values: _Values) -> torch.Tensor:
    """Initial values of the token embedding, fp32 [vocabulary, hidden] on the CPU, for a tied head on another rank."""
    model = _skeleton(cfg)
    embedding = model.get_submodule(parts.embedding)
    _materialise(model, parts.embedding, embedding, values)
    return embedding.weight.detach()


def _materialise(model: Any, path: str, unit: nn.Module, values: _Values) -> None:
    # Children before parents, as in transformers, because some parents draw the weights of a child again.
    for name, module in reversed(list(unit.named_modules())):
        _initialise(model, f"{path}.{name}", module, values)
    if values.weights is not None:
        values.weights.fill(path, unit)
    unset = [name for name, p in (*unit.named_parameters(), *unit.named_buffers()) if p.isnan().any()]
    if unset:
        raise RuntimeError(f"{type(model).__name__} does not initialise {path}.{unset[0]}")


def _initialise(model: Any, path: str, module: nn.Module, values: _Values) -> None:
    """Materialises the module's own parameters (fp32) and buffers on the CPU, without those of its children.

    With `values.draw` the class draws the parameters. Otherwise they become zeros, and stay on meta until the class has
    set the buffers, so that nothing is drawn.
    """
    if values.draw:
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(_unset(parameter, torch.float32)))
    for name, buffer in list(module.named_buffers(recurse=False)):
        persistent = name not in module._non_persistent_buffers_set
        module.register_buffer(name, _unset(buffer, buffer.dtype), persistent=persistent)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{values.seed}:{path}".encode()))
        model._init_weights(module)
    if not values.draw:
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.zeros(parameter.shape, device="cpu")))


def _unset(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor of NaN (0 for integers) in the shape of `like`. A remaining NaN shows that a value was not set."""
    return torch.full(like.shape, torch.nan if dtype.is_floating_point else 0, dtype=dtype, device="cpu")
