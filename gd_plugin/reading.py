"""YAML and JSON that others wrote: plain data, no larger than they look, or one line that says why not."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import yaml

__all__ = ["load_json", "load_yaml"]

_MAX_CHARACTERS = 1_000_000  # of YAML, of which PyYAML reads some 100,000 a second
_MAX_VALUES = 100_000  # in a YAML document, a value behind an alias as often as it is used


class _Loader(yaml.SafeLoader):
    """Refuses what a file can hide: a key given twice, of which YAML takes the last, and a bomb of aliases."""

    def construct_document(self, node: yaml.Node) -> Any:
        _check(node, {}, 0)
        return super().construct_document(node)


def _check(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """The number of values in ``node``; ``counts`` has those of the nodes so far, 0 of one that is not done."""
    if depth > 100:
        raise ValueError("it is nested too deeply")
    if counts.get(id(node)) == 0:
        raise ValueError(f"line {node.start_mark.line + 1}: an alias stands inside of what it stands for")
    if id(node) in counts:
        return counts[id(node)]
    counts[id(node)] = 0
    children = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is given twice; keep one")
                seen.add(key.value)
            children += [key, value]
    counts[id(node)] = 1 + sum(_check(child, counts, depth + 1) for child in children)
    if counts[id(node)] > _MAX_VALUES:
        raise ValueError(f"its aliases stand for more than {_MAX_VALUES:,} values")
    return counts[id(node)]


def load_yaml(data: bytes | str) -> Any:
    """The one document of a YAML file.

    Raises:
        ValueError: it is none, or more than plain data; one line.
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data
        if len(text) > _MAX_CHARACTERS:
            raise ValueError(f"it is longer than {_MAX_CHARACTERS:,} characters")
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:  # PyYAML's: !!bool perhaps
        raise ValueError(f"a value is not of the type of its tag ({type(error).__name__}: {error})") from error


def load_json(data: bytes | str) -> Any:
    """JSON, of which no key may be given twice in one object.

    Raises:
        ValueError: it is none; one line.
    """
    try:
        return json.loads(data, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} is given twice; keep one")
    return values
