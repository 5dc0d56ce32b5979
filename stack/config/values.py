"""Checks single values against the specs of their keys. An error is one line: what was set, why it is refused, and what
works."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass
from difflib import SequenceMatcher, get_close_matches
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

from stack.errors import ConfigError

_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_PLURALS = {int: "integers", float: "numbers", str: "strings"}
_LONGEST = 100
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Spec:
    """The legal values of one key."""

    kind: type
    """int, float, bool or str: the type of the value, or of the items if `is_list`."""
    example: Any = None
    """A legal value, for messages."""
    is_list: bool = False
    nullable: bool = False
    """Whether null is legal too."""
    auto: bool = False
    """Whether the word `auto` is legal too."""
    choices: tuple[Any, ...] = ()
    """The legal values; empty if any value of the type is legal."""
    low: float | None = None
    """Inclusive lower bound."""
    above: float | None = None
    """Exclusive lower bound."""
    high: float | None = None
    """Inclusive upper bound."""
    below: float | None = None
    """Exclusive upper bound."""
    length: int | None = None
    """Required length of a list."""

    def __str__(self) -> str:
        """Type, choices and bounds on one line, as tests/unit/goldens/config_surface.txt lists them."""
        words = f"list of {self.kind.__name__}" if self.is_list else self.kind.__name__
        if self.auto:
            words += " or auto"
        if self.nullable:
            words += " or null"
        if self.choices:
            words += " in " + ", ".join(map(show, self.choices))
        signs = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
        bounds = [f"{sign} {getattr(self, name)}" for name, sign in signs.items() if getattr(self, name) is not None]
        return " ".join([words, *bounds])


def spec_of(field: Field[Any], hint: Any) -> Spec:
    """The spec of a field of the schema, from its type hint, default and metadata.

    Raises:
        TypeError: the field has a type for which there is no rule.
    """
    metadata = dict(field.metadata)
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    example = metadata.pop("example", default)
    auto = metadata.pop("auto", None)
    hint = auto or hint
    nullable = get_origin(hint) in (Union, UnionType)
    if nullable:
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
    is_list = get_origin(hint) is list
    kind = get_args(hint)[0] if is_list else hint
    if kind not in _KINDS:
        raise TypeError(f"schema field {field.name}: no rule for type {hint}")
    return Spec(kind=kind, example=example, is_list=is_list, nullable=nullable, auto=auto is not None, **metadata)


def check_value(path: str, value: Any, spec: Spec) -> Any:
    """Checks a value against a spec, and returns it in the type of the spec. The only conversion is int to float.

    Args:
        path: dotted key, for messages.
        value: the value as it was parsed.
        spec: the legal values.

    Raises:
        ConfigError: the value is missing, of another type, or out of bounds.
    """
    if value == "???":
        refuse(path, value, f"a value is needed{_for_example(spec)}")
    if value is None:
        if not spec.nullable:
            refuse(path, value, f"{_wanted(spec)} is needed{_for_example(spec)}")
        return None
    if spec.auto and value == "auto":
        return value
    if not spec.is_list:
        return _check_scalar(path, value, spec)
    if not isinstance(value, list):
        hint = f"; write {path}=[{show(value)}]" if spec.kind is str and isinstance(value, str) else ""
        refuse(path, value, f"{_wanted(spec)} is needed{hint or _for_example(spec)}")
    if spec.length is not None and len(value) != spec.length:
        refuse(path, value, f"{spec.length} values are needed{_for_example(spec)}")
    return [_check_scalar(f"{path}[{i}]", item, spec) for i, item in enumerate(value)]


def refuse(path: str, value: Any, why: str) -> NoReturn:
    """Raises the ConfigError for `path=value` with the reason `why`."""
    raise ConfigError(f"{path}={show(value)}: {why}")


def show(value: Any, longest: int = _LONGEST) -> str:
    """A value as a user would write it in an override: one line of at most `longest` characters."""
    return _shorten(_show(value), longest)


def one_line(text: object) -> str:
    """The text of an error of another library, without line breaks and control characters, at most 300 characters."""
    words = " ".join(str(text).split())
    return _shorten(printable(words), 3 * _LONGEST)


def printable(text: str) -> str:
    """The text with control characters escaped, which would steer the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def closest(word: str, choices: Sequence[str], cutoff: float = 0.5) -> str | None:
    """The choice that is most similar to `word`, ignoring case; None if the similarity is below `cutoff` (0 to 1)."""
    by_lower = {choice.lower(): choice for choice in choices}
    matches = get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[matches[0]] if matches else None


def closest_path(path: str, known: Sequence[str]) -> str | None:
    """The dotted key that is most similar to `path`; None if no key is similar enough.

    The last part counts most. Compared as whole strings, `parallel.foo` would be similar to every key in `parallel`,
    and `lr` to none.
    """

    def likeness(candidate: str) -> float:
        group, _, name = path.rpartition(".")
        candidate_group, _, candidate_name = candidate.rpartition(".")
        return 0.3 * _ratio(group, candidate_group) + 0.7 * _ratio(name, candidate_name)

    best = max(known, key=likeness)
    return best if likeness(best) >= 0.65 else None


def _ratio(a: str, b: str) -> float:
    return SequenceMatcher(None, a.lower(), b.lower()).ratio()


def _check_scalar(path: str, value: Any, spec: Spec) -> Any:
    if not _is_a(value, spec.kind):
        refuse(path, value, _wrong_type(value, spec))
    # Refuses inf, nan, and integers that are too large for a float.
    if spec.kind is float and not abs(value) <= sys.float_info.max:
        refuse(path, value, f"must be finite{_for_example(spec, item=True)}")
    if spec.kind is int and not -(2**63) <= value < 2**63:
        refuse(path, value, f"must fit in 64 bits{_for_example(spec, item=True)}")
    if spec.choices:
        _check_choice(path, value, spec)
    elif spec.kind is str:
        _check_text(path, value, spec)
    elif spec.kind is not bool:
        _check_range(path, value, spec)
    return spec.kind(value)


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _wrong_type(value: Any, spec: Spec) -> str:
    needed = f"{_wanted(spec, item=True)} is needed"
    if spec.choices:
        return _choices(value, spec.choices)
    if spec.kind is int and isinstance(value, float) and value.is_integer():
        return f"{needed}; write {int(value)}"
    if spec.kind is not str and isinstance(value, str) and _NUMBER.fullmatch(value):
        return f"{needed}, and this is text; drop the quotes"
    if spec.kind is str and isinstance(value, bool | int | float):
        return f"{needed}; quote it past the shell: '\"{show(value)}\"'"
    if spec.kind is bool:
        return needed
    return needed + _for_example(spec, item=True)


def _check_choice(path: str, value: Any, spec: Spec) -> None:
    if value not in spec.choices:
        refuse(path, value, _choices(value, spec.choices))


def _choices(value: Any, choices: tuple[Any, ...]) -> str:
    listed = f"must be one of {', '.join(map(show, choices))}"
    if isinstance(choices[0], str):
        meant = closest(show(value), choices)
        return f"{listed}; did you mean {meant}?" if meant else listed
    if _is_a(value, float):
        return f"{listed}; the nearest is {min(choices, key=lambda choice: abs(choice - value))}"
    return listed


def _check_text(path: str, value: str, spec: Spec) -> None:
    if not value.strip():
        why = "must not be empty" + ("; write null for none" if spec.nullable else _for_example(spec, item=True))
        refuse(path, value, why)
    if any(ord(char) < 32 or ord(char) == 127 for char in value):
        refuse(path, value, "must be one line without control characters")
    # A saved config.yaml would read ${ as the start of an interpolation.
    if "${" in value:
        refuse(path, value, "must not contain ${ after interpolation")


def _check_range(path: str, value: float, spec: Spec) -> None:
    if spec.low is not None and value < spec.low:
        refuse(path, value, f"must be at least {spec.low}")
    if spec.above is not None and value <= spec.above:
        refuse(path, value, f"must be above {spec.above}{_for_example(spec, item=True)}")
    if spec.high is not None and value > spec.high:
        refuse(path, value, f"must be at most {spec.high}")
    if spec.below is not None and value >= spec.below:
        refuse(path, value, f"must be below {spec.below}{_for_example(spec, item=True)}")


def _wanted(spec: Spec, item: bool = False) -> str:
    word = f"a list of {_PLURALS[spec.kind]}" if spec.is_list and not item else _KINDS[spec.kind]
    return f"auto or {word}" if spec.auto and not (item and spec.is_list) else word


def _for_example(spec: Spec, item: bool = False) -> str:
    example = spec.example
    if item and spec.is_list and example:
        example = example[-1]
    return "" if example is None or example == [] else f", for example {show(example)}"


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_show(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_show, value)) + "]"
    text = str(value)
    return text if text.isprintable() else repr(text)


def _shorten(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
