"""TOML file + dotted overrides -> nested frozen dataclasses, and back. Knows no field: each dataclass lives beside
its code, and its type hints say what is valid.

    dataclass defaults  <  file.toml  <  "optim.lr=1e-3" "data.images=cats,dogs"

Types: int, float (takes an int), str, bool, tuple[X, ...] (takes one value), tuple[X, Y], X | None (written "none"
in TOML, which has no null), nested dataclasses, dict[str, X].
"""

import dataclasses
import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Text:
    """The right side of an override, not parsed yet: only the field's type says how (name=2024 may be a string)."""

    raw: str


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """cls from the TOML file at path (None: its defaults) with "a.b=value" overrides; ValueError says what is wrong."""
    data = read_toml(Path(path)) if path is not None else {}
    for override in overrides:
        apply_override(data, override)
    return from_dict(cls, data)


def override(config: T, overrides: Sequence[str]) -> T:
    """The config with "a.b=value" overrides; ValueError says what is wrong."""
    data = to_dict(config)
    for text in overrides:
        apply_override(data, text)
    return from_dict(type(config), data)


def from_dict(cls: type[T], data: dict[str, Any]) -> T:
    """cls from nested plain values, every key and type checked; what data leaves out keeps its default."""
    return build(cls, data, cls, "", None)


def to_dict(config: Any) -> Any:
    """The config as JSON's types: dict, list, str, int, float, bool, None; from_dict's inverse."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return [to_dict(value) for value in config] if isinstance(config, list | tuple) else config


def to_toml(config: Any) -> str:
    """The config as TOML text, every field written out; load_config's inverse."""
    return "\n".join(toml_lines(to_dict(config), ())).strip() + "\n"


# ---- reading ----


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables; ValueError in one line if it is missing or not TOML."""
    if not path.is_file():
        folder = path.parent
        names = sorted(p.name for p in folder.glob("*.toml")) if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 3, 0.5) or names[:8]
        there = f"{folder} has {', '.join(near)}" if near else f"{folder} has no .toml file"
        raise ValueError(f"no config file {path}: {there if folder.is_dir() else f'there is no folder {folder}'}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 (byte {error.start}): save it as UTF-8") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what = str(error).replace("at end of document", f"at line {len(text.splitlines())}, the end of the file")
        raise ValueError(f"{path} is not valid TOML: {what}") from None


def apply_override(data: dict[str, Any], override: str) -> None:
    """Puts "a.b=value" into the nested data, in place."""
    name, equals, raw = override.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not equals or not all(keys):
        raise ValueError(f"override {override!r} is not of the form a.b=value, such as optim.lr=1e-3")
    for i, key in enumerate(keys[:-1]):
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise ValueError(f"override {override!r}: {'.'.join(keys[: i + 1])} is a value, it has no names inside")
    data[keys[-1]] = Text(raw.strip())


def parse(text: str) -> Any:
    """The text as a TOML value, or as a plain string where it is none."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text  # a newline could smuggle in a second key


# ---- plain values -> types ----


def build(tp: Any, value: Any, root: type, path: str, default: Any) -> Any:
    """value as type tp; default is what the field would hold, so that a partial table changes only what it names."""
    if isinstance(value, Text):
        value = untext(tp, value.raw)
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in args if a is not type(None)]
        assert len(inner) == 1 and len(args) == 2, f"{path}: only X | None is a supported union, not {tp}"
        return None if value is None or value == "none" else build(inner[0], value, root, path, default)
    if dataclasses.is_dataclass(tp) and isinstance(value, dict):
        return build_dataclass(tp, value, root, path, default)
    if origin is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        hints = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
        if len(items) == len(hints):
            return tuple(build(hint, v, root, f"{path}[{i}]", None) for i, (hint, v) in enumerate(zip(hints, items)))
    elif origin is dict and isinstance(value, dict):
        assert args[0] is str, f"{path}: a dict's keys must be str, not {args[0]}"
        return {key: build(args[1], v, root, f"{path}.{key}", None) for key, v in value.items()}
    elif tp is float and type(value) is int:
        return float(value)
    elif tp in (int, float, str, bool) and type(value) is tp:  # type(): a bool is no int here
        return value
    assert origin in (tuple, dict) or tp in (int, float, str, bool) or dataclasses.is_dataclass(tp), (
        f"{path}: no rule for the type {tp}"
    )
    raise ValueError(f"{path or tp.__name__} must be {type_name(tp)}, got {plain(value)!r}")


def build_dataclass(cls: type, data: dict[str, Any], root: type, path: str, default: Any) -> Any:
    """A cls of data over default's values (else over the class's own)."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in data:
        if key not in fields:
            raise ValueError(unknown_key(key, list(fields), root, path))
    values = {}
    for name, field in fields.items():
        full = f"{path}.{name}" if path else name
        old = getattr(default, name) if isinstance(default, cls) else default_of(field)
        if name in data:
            values[name] = build(hints[name], data[name], root, full, old)
        elif old is not dataclasses.MISSING:
            values[name] = old
        else:
            raise ValueError(f"{full} is missing: set it to a {type_name(hints[name])} in the file or by {full}=...")
    try:
        return cls(**values)
    except ValueError as error:  # from the class's own __post_init__, which may not know where it stands
        known = not path or str(error).startswith(f"{path}.")
        raise ValueError(str(error) if known else f"{path}: {error}") from None


def default_of(field: dataclasses.Field) -> Any:
    """The field's default value, or dataclasses.MISSING."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def untext(tp: Any, raw: str) -> Any:
    """An override's text as the plain value that tp wants: a string stays one, a tuple may be a,b,c."""
    args, value = typing.get_args(tp), parse(raw)
    if type(None) in args and raw not in ("none", '"none"'):
        return untext(next(a for a in args if a is not type(None)), raw)
    if tp is str:
        return value if isinstance(value, str) else raw
    if typing.get_origin(tp) is tuple and not isinstance(value, list):
        return [Text(part.strip()) for part in raw.split(",") if part.strip()]
    return value


def plain(value: Any) -> Any:
    """value for a message: an override's text stands for itself."""
    if isinstance(value, Text):
        return value.raw
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def unknown_key(key: str, names: list[str], root: type, path: str) -> str:
    """The message for a key that is no field: the nearest sibling, else the same name elsewhere, else all names."""
    full = f"{path}.{key}" if path else key
    near = difflib.get_close_matches(key, names, 1)
    if near:
        return f"unknown key {full}: did you mean {f'{path}.{near[0]}' if path else near[0]}?"
    elsewhere = [name for name in paths(root) if name.rpartition(".")[2] == key]
    if elsewhere:
        return f"unknown key {full}: did you mean {' or '.join(elsewhere)}?"
    return f"unknown key {full}: valid {f'in {path}' if path else 'names'} are {', '.join(names)}"


def paths(tp: Any, path: str = "") -> Iterator[str]:
    """The dotted names of all fields below the dataclass tp."""
    for a in typing.get_args(tp) if typing.get_origin(tp) in (typing.Union, types.UnionType) else [tp]:
        if dataclasses.is_dataclass(a):
            for name, hint in typing.get_type_hints(a).items():
                yield f"{path}{name}"
                yield from paths(hint, f"{path}{name}.")


def type_name(tp: Any) -> str:
    """int, tuple[int, ...], or for a nested dataclass 'a table (OptimConfig)'."""
    if dataclasses.is_dataclass(tp):
        return f"a table ({tp.__name__})"
    return tp.__name__ if typing.get_origin(tp) is None else str(tp)


# ---- writing ----


def toml_lines(table: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """The lines of one table: its header, its plain values, then its tables."""
    if path:
        yield f"\n[{'.'.join(map(toml_key, path))}]"
    for key, value in table.items():
        if not isinstance(value, dict):
            yield f"{toml_key(key)} = {toml_value(value)}"
    for key, value in table.items():
        if isinstance(value, dict):
            yield from toml_lines(value, (*path, key))


def toml_key(key: str) -> str:
    """A bare key where TOML allows one, else a quoted one."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def toml_value(value: Any) -> str:
    """One value on one line."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")  # JSON's other escapes are TOML's too
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    assert isinstance(value, dict), f"TOML has no {type(value).__name__}"
    return "{" + ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
