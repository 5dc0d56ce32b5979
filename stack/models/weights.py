"""Reads the parameters of a model from the safetensors of a model folder, one unit at a time.

The tensors of a folder may have other names than the parameters, or be parts of parameters, such as one tensor for each
expert. `transformers.core_model_loading` has the names and conversions. transformers itself would load all tensors;
here only those of one unit are read.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from stack.config.model_folder import INDEX, SINGLE, check_weights, local_folder
from stack.config.values import one_line
from stack.disk import parse_json, read_regular
from stack.errors import CheckpointError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class _Recipe:
    """Says how tensors of the files become one parameter, or several."""

    transform: WeightRenaming | WeightConverter
    """The conversion of transformers for the class. It is copied before each use, because it keeps the tensors."""
    target: str
    """Name of the first parameter that it makes."""
    sources: list[tuple[str, str]] = field(default_factory=list)
    """(source pattern of the transform, name of a tensor that matches it)."""


class Weights:
    """The weights of one model folder. The constructor reads only names; a file is opened when its tensors are read."""

    def __init__(self, name: str, model: Any, *, changed: bool):
        """
        Args:
            name: `model.name`: a folder, or a hub name, whose files are downloaded unless they are in the cache.
            model: the whole model of the folder's class, on the meta device.
            changed: whether `model.config` overrides fields of the folder's config.json; for the advice in messages.

        Raises:
            ConfigError: there are no weights under this name.
            CheckpointError: files are missing or damaged, a parameter is missing, or a tensor belongs to no parameter.
        """
        self._folder, self._model, self._changed = local_folder(name, weights=True), model, changed
        check_weights(name, self._folder)
        self._open: dict[str, Any] = {}
        self._file_of = self._tensors()
        # The files hold a tied parameter under one of its two names, or under both; then the tensors must be equal.
        self._tied: dict[str, str] = model.all_tied_weights_keys
        self._recipes = self._match()
        self._check_whole()

    def check_shapes(self) -> None:
        """Compares the shapes in the headers of the files with those of the model. Opens every file, reads no tensor.

        Raises:
            CheckpointError: a shape differs, or a file is damaged.
        """
        for name, parameter in self._model.named_parameters():
            for holder in self._holders(name):
                recipe = self._recipes[holder]
                for tensor, shape in self._wanted(recipe, holder, parameter).items():
                    found = self._header(tensor)
                    if found != shape:
                        self._refuse_shape(tensor, self._folder / self._file_of[tensor], found, shape)

    def fill(self, path: str, unit: nn.Module) -> None:
        """Reads the parameters of one unit into it.

        Args:
            path: module path of the unit in the model.
            unit: the module; its parameters are fp32 on the CPU.

        Raises:
            CheckpointError: a file is damaged, or a tensor has another shape, a quantized dtype, or values that are not
                finite.
        """
        with torch.no_grad():
            read: dict[str, torch.Tensor] = {}
            for inner, parameter in unit.named_parameters():
                name = f"{path}.{inner}"
                source, *others = self._holders(name)
                if source not in read:
                    read |= self._read(self._recipes[source])
                self._take(source, read.pop(source), parameter)
                for other in others:
                    self._check_equal(other, source, parameter)

    def _tensors(self) -> dict[str, str]:
        """Name of a tensor -> name of its file."""
        if (self._folder / SINGLE).is_file():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        index = self._folder / INDEX
        try:
            files = parse_json(read_regular(index))["weight_map"]
            there = {file: (self._folder / Path(file).name).is_file() for file in sorted(set(files.values()))}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged, it is no index of tensors; copy it again") from error
        for file, found in there.items():
            if not found:
                raise CheckpointError(f"{self._folder} has no {file}, which {INDEX} names; copy it again")
        return {tensor: Path(file).name for tensor, file in files.items()}

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self._folder / name
            try:
                self._open[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged or cut short ({error}); copy it again") from error
        return self._open[name]

    def _match(self) -> dict[str, _Recipe]:
        """Name of a parameter -> the recipe that makes it.

        Matches names as `convert_and_load_state_dict_in_model` of transformers does, but loads nothing.

        Raises:
            CheckpointError: a tensor belongs to no parameter, and is not one of those that transformers ignores.
        """
        mapping = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        own = dict(self._model.named_parameters(remove_duplicate=False))
        prefix = self._model.base_model_prefix
        recipes: dict[str, _Recipe] = {}
        others: dict[str, str] = {}
        for tensor in sorted(self._file_of, key=dot_natural_key):
            name, pattern = rename_source_key(tensor, renamings, converters, prefix, own)
            if name not in own and tensor in own:
                name, pattern = tensor, None
            if name not in own:
                others[name] = tensor
            elif pattern is None:
                recipes[name] = _Recipe(WeightRenaming(tensor, name), name, [(tensor, tensor)])
            else:
                converter = by_pattern[pattern]
                recipe = recipes.setdefault(name, _Recipe(converter, name))
                recipe.sources.append((pattern, tensor))
                first, *rest = converter.target_patterns
                recipes |= {name.replace(first, other): recipe for other in rest}
        self._check_others(others)
        return recipes

    def _check_others(self, others: dict[str, str]) -> None:
        """
        Args:
            others: name that transformers gives a tensor -> its name in the files, for tensors of no parameter.

        Raises:
            CheckpointError: transformers does not ignore one of them.
        """
        found = SimpleNamespace(missing_keys=set(), unexpected_keys=set(others))
        # Removes buffers that old versions saved, such as rotary tables and causal masks.
        self._model._adjust_missing_and_unexpected_keys(found)
        unknown = sorted((others[name] for name in found.unexpected_keys), key=dot_natural_key)
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise CheckpointError(
                f"{self._folder} holds tensors of no parameter of {type(self._model).__name__}: "
                f"{', '.join(unknown[:3])}{more}; give the folder of such a model, with its own config.json"
            )

    def _check_whole(self) -> None:
        """
        Raises:
            CheckpointError: the files lack a parameter, or a part of one.
        """
        lost: list[str] = []
        for name, parameter in self._model.named_parameters():
            holders = self._holders(name)
            if not holders:
                lost += revert_weight_conversion(self._model, {name: parameter})
            elif isinstance(self._recipes[holders[0]].transform, WeightConverter):
                lost += self._lost_parts(self._recipes[holders[0]], parameter)
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise CheckpointError(
                f"{self._folder} lacks {', '.join(lost[:3])}{more} of {type(self._model).__name__}; copy it again"
            )

    def _lost_parts(self, recipe: _Recipe, parameter: torch.Tensor) -> list[str]:
        """Names of the tensors that the files lack for a parameter made of several tensors."""
        if len(recipe.transform.target_patterns) > 1:
            return []
        wanted = revert_weight_conversion(self._model, {recipe.target: parameter})
        if len(recipe.sources) >= len(wanted):
            return []
        there = {tensor for _, tensor in recipe.sources}
        return [tensor for tensor in wanted if tensor not in there]

    def _holders(self, name: str) -> list[str]:
        """The names under which the files hold a parameter: one name, or two for a tied parameter."""
        heads = [head for head, embedding in self._tied.items() if embedding == name]
        return [holder for holder in (name, *heads) if holder in self._recipes]

    def _tensor(self, name: str) -> torch.Tensor:
        file = self._file_of[name]
        try:
            return self._file(file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._folder / file}: {name} cannot be read ({error}); copy it again") from error

    def _read(self, recipe: _Recipe) -> dict[str, torch.Tensor]:
        """Reads all parameters of a recipe: name -> tensor in the dtype of the files."""
        transform = deepcopy(recipe.transform)
        for pattern, tensor in recipe.sources:
            read: Callable[[], torch.Tensor] = partial(self._tensor, tensor)
            transform.add_tensor(recipe.target, tensor, pattern, read)  # type: ignore[arg-type]
        try:
            found = transform.convert(recipe.target, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise CheckpointError(
                f"{self._place(recipe.target)}: the parts of {recipe.target} do not fit together ({one_line(error)}); "
                f"copy it again"
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}

    def _wanted(self, recipe: _Recipe, name: str, parameter: torch.Tensor) -> dict[str, list[int]]:
        """Name of a tensor in the files -> the shape that it must have, where the parameter's shape determines it."""
        if not isinstance(recipe.transform, WeightConverter):
            return {tensor: list(parameter.shape) for _, tensor in recipe.sources}
        if len(recipe.transform.target_patterns) > 1:
            return {}
        parts = revert_weight_conversion(self._model, {name: parameter})
        there = {tensor for _, tensor in recipe.sources}
        return {tensor: list(part.shape) for tensor, part in parts.items() if tensor in there}

    def _header(self, name: str) -> list[int]:
        """Shape of a tensor in its file."""
        file = self._file_of[name]
        try:
            return list(self._file(file).get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._folder / file}: {name} cannot be read ({error}); copy it again") from error

    def _refuse_shape(self, name: str, file: Path, found: list[int], expected: list[int]) -> NoReturn:
        remedy = (
            "leave model.config as the folder's config.json has it"
            if self._changed
            else "the file does not fit its own config.json; copy or save it again"
        )
        raise CheckpointError(f"{file}: {name} is {found}, and in this model {expected}; {remedy}")

    def _place(self, name: str) -> Path:
        """Path of the file that holds the first tensor of a parameter."""
        return self._folder / self._file_of[self._recipes[name].sources[0][1]]

    def _take(self, name: str, value: torch.Tensor, parameter: torch.Tensor) -> None:
        """Copies a tensor into a parameter after checking it. Raises `CheckpointError` as `fill`."""
        place = f"{self._place(name)}: {name}"
        if value.shape != parameter.shape:
            self._refuse_shape(name, self._place(name), list(value.shape), list(parameter.shape))
        if value.dtype not in _DTYPES:
            raise CheckpointError(f"{place} is {value.dtype}, a quantized dtype; give the original weights")
        parameter.copy_(value)
        if not parameter.isfinite().all():
            raise CheckpointError(f"{place} has values that are not finite; give finite weights")

    def _check_equal(self, head: str, name: str, parameter: torch.Tensor) -> None:
        """Refuses tied parameters whose two tensors differ, since transformers would leave them untied."""
        other = self._read(self._recipes[head])[head]
        if other.shape != parameter.shape or not torch.equal(other.to(parameter.dtype), parameter):
            raise CheckpointError(
                f"{self._place(head)}: {head} differs from {name}, but tie_word_embeddings makes them one; add "
                f"model.config.tie_word_embeddings=false"
            )
