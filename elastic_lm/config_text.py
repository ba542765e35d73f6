"""A configuration as people write it: YAML and `a.b=value` overrides on the way in, sentences about mistakes on the way out.

Nothing here knows a field by name; what a field means comes from its docstring in `config.py`.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from elastic_lm.errors import ConfigError

MAX_DEPTH = 20
SHOWN_CHARACTERS = 60


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number (YAML 1.1 wants 3.0e-4) and a name written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1 and name != "<<":
                line = node.start_mark.line + 1
                raise ConfigError(f"{name!r} is written twice in the section that begins on line {line}; remove one")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as the same values."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def dump(values: dict[str, Any]) -> str:
    """YAML of plain values, in their order; `parse` of it gives equal ones."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def inline(value: Any) -> str:
    """A plain value as YAML in one line, to be written behind `name: `."""
    return yaml.dump([value], Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf).strip()[1:-1]


def parse(text: str, source: str) -> Any:
    """YAML text as plain values.    Raises: ConfigError naming `source` and the place."""
    with _told(source):
        return yaml.load(text, Loader=_Loader)


def is_yaml(address: str) -> bool:
    """Whether a name or an address is that of a YAML file."""
    return address.endswith((".yaml", ".yml"))


def beside(file: str, address: str) -> str:
    """What a relative address in a file means; `..` is the folder above. Object storage knows none, so that is resolved here.

    Raises: ConfigError when it leads out of a bucket.
    """
    if "://" in address or address.startswith(("/", "~")):
        return os.path.expanduser(address)
    folder, slash, _ = file.rpartition("/")
    scheme, mark, place = folder.partition("://")
    if not mark or scheme == "file":
        return f"{folder}{slash}{address}"
    parts = place.split("/")
    for part in address.split("/"):
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
        if not parts:
            raise ConfigError(
                f"{file}: {address} leads out of the bucket {place.partition('/')[0]}; write its whole address, "
                f"{scheme}://BUCKET/PATH"
            )
    return f"{scheme}://{'/'.join(parts)}"


def documents(text: str, source: str) -> list[Any]:
    """The same of a stream of documents."""
    with _told(source):
        return list(yaml.load_all(text, Loader=_Loader))


@contextlib.contextmanager
def _told(source: str) -> Iterator[None]:
    """What a YAML parser raises as ConfigError."""
    try:
        yield
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    except (ValueError, OverflowError, RecursionError) as error:  # dates that do not exist, endless digits or brackets
        raise ConfigError(f"{source} holds a value that cannot be read: {error}") from error


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in the YAML file at `path`.    Raises: ConfigError."""
    return mapping(text_of(path, "config"), os.fspath(path))


def text_of(path: str | os.PathLike[str], what: str) -> str:
    """The text of the YAML file at `path`. `what`: it is to hold, for the error.    Raises: ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"cannot read the {what} {os.fspath(path)}: {reason}; give the path of a YAML file"
        ) from error


def mapping(text: str, source: str) -> dict[str, Any]:
    """The mapping that a whole config is, out of its text.    Raises: ConfigError naming `source`."""
    values = parse(text, source)
    if not isinstance(values, dict):
        found = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{source} is {found}; a config is a mapping with name:, storage:, data: and so on")
    _check_names(values, source)
    return values


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=value` entered; values are YAML.    Raises: ConfigError."""
    merged = _copy(values)
    for text in overrides:
        name, separator, value = text.partition("=")
        path = name.strip().split(".")
        if not separator or not all(path):
            raise ConfigError(f"override {_shown(text)} is not a.b=value; write e.g. optimizer.learning_rate=3e-4")
        section = merged
        for part in path[:-1]:
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                raise ConfigError(f"override {_shown(text)}: {part} holds a value, not a section")
        section[path[-1]] = parse(value, f"the value of override {name}")
    _check_names(merged, "the overrides")
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted name, value before, value after) of what is not the same, by name; None for what is not there."""
    was, now = flatten(before), flatten(after)
    return [(n, was.get(n), now.get(n)) for n in sorted({*was, *now}) if was.get(n) != now.get(n)]


def as_yaml_says(meaning: str) -> str:
    """A field's docstring in one line, with YAML's word for nothing."""
    return re.sub(r"\bNone\b", "null", " ".join(meaning.split()))


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    values: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        section = values
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return values


def sentences(error: ValidationError, root: type[BaseModel]) -> str:
    """One line per mistake: field, value, rule, remedy."""
    return "\n".join(_sentence(details, root) for details in error.errors(include_url=False))


def hint(name: str, known: Iterable[str]) -> str:
    """`, did you mean x?` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _sentence(details: ErrorDetails, root: type[BaseModel]) -> str:
    path = [str(part) for part in details["loc"]]
    name = ".".join(path)
    section, field = _find(root, path)
    if details["type"] == "extra_forbidden":
        return f"{name} is not a field of the config{_unknown_hint(path, section, root)}; remove it or correct its name"
    meaning = " ".join((field.description or "").split()) if field else ""
    if details["type"] == "missing":
        return f"{name} is missing; add it. {meaning}{_remedy(details, path, field)}"
    if details["type"] in ("model_type", "dict_type"):
        return f"{name}={_shown(details['input'])} is not a section; write its fields indented below it. {meaning}".rstrip()
    rule = _rule(details)
    return f"{name}={_shown(details['input'])} {rule}. {meaning}{_remedy(details, path, field)}".rstrip()


def _rule(details: ErrorDetails) -> str:
    if details["type"] == "value_error":
        return str(details["ctx"]["error"])
    message = details["msg"]
    for start, plain in (
        ("Input should be a valid integer", "is not a whole number"),
        ("Input should be a valid number", "is not a number"),
        ("Input should be a finite number", "is not a finite number"),
        ("Input should be a valid string", "is not text; put quotes around it"),
        ("Input should be a valid boolean", "is neither true nor false"),
        ("Input should be a valid tuple", "is not a list"),
        ("Input should be a valid dictionary", "is not a section"),
    ):
        if message.startswith(start):
            return plain
    return message.replace("Input should", "should").replace("String should", "should").replace("'", "")


def _remedy(details: ErrorDetails, path: list[str], field: FieldInfo | None) -> str:
    value = details["input"]
    if details["type"] == "value_error":
        return ""  # our own rules say it themselves
    if details["type"].startswith("int") and isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f" Write {path[-1]}: {int(value)}"
    example = _example(path, field)
    return f" For example {example}" if example else ""


def _example(path: list[str], field: FieldInfo | None) -> str:
    if field is None:
        return ""
    value = field.examples[0] if field.examples else field.default
    if value is PydanticUndefined or value is None or isinstance(value, BaseModel):
        return ""
    return f"{_field_name(path)}: {list(value) if isinstance(value, tuple) else value}"


def _field_name(path: list[str]) -> str:
    """The last name of the field itself: `betas` of `optimizer.betas.1`."""
    return next((name for name in reversed(path) if not name.isdigit()), path[-1])


def _find(root: type[BaseModel], path: list[str]) -> tuple[type[BaseModel], FieldInfo | None]:
    """The innermost section on the way to `path`, and the field there: for an item of a list or mapping, that field."""
    section, field = root, None
    for part in path:
        field = section.model_fields.get(part)
        if field is None or not is_section(field):
            return section, field
        section = field.annotation  # type: ignore[assignment]
    return section, field


def is_section(field: FieldInfo) -> bool:
    """Whether the field is a part of the config with fields of its own."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _unknown_hint(path: list[str], section: type[BaseModel], root: type[BaseModel]) -> str:
    near = hint(path[-1], section.model_fields)
    if near:
        return near
    places = [name for name in _all_names(root) if name.rpartition(".")[2] == path[-1]]
    if places:
        return f" (did you mean {' or '.join(places)}?)"
    return hint(".".join(path), [name for name in _all_names(root) if not ".".join(path).startswith(f"{name}.")])


def _all_names(root: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in root.model_fields.items():
        names.append(prefix + name)
        if is_section(field):
            names += _all_names(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
    return names


def _shown(value: Any) -> str:
    """A value for a message: short, and without what stands before an @ or behind a ? in an address."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4300 digits
        return "<a number too long to print>"
    text = re.sub(r"://[^/@\s]*@", "://***@", text)
    text = re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1?***", text)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) if isinstance(value, dict) else value for name, value in values.items()}


def _check_names(values: Any, source: str, depth: int = 0) -> None:
    """Every name is text, and nothing is nested deeper than a config can be (an alias may contain itself)."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"{source} is nested deeper than {MAX_DEPTH} levels; a config has two")
    if isinstance(values, dict):
        for name in values:
            if not isinstance(name, str):
                raise ConfigError(f"{source}: the name {_shown(name)} is not text; put quotes around it or correct it")
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            _check_names(value, source, depth + 1)
