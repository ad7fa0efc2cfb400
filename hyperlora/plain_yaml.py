"""YAML as people write it: mappings with text keys, lists, texts and numbers, and nothing that YAML adds to them.

Tags (which can name Python objects), aliases (a kilobyte of which can stand for gigabytes), keys given twice and
several documents are refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

#: Bytes of a file and nested levels; the longest recipe that ships with the package has 2 KiB and three levels.
LARGEST, DEEPEST = 256 * 1024, 20


def load(text: str) -> Any:
    """The content of a YAML document.

    Raises:
        ValueError: it is no such document; says where and why.
    """
    if len(text) > LARGEST:
        raise ValueError(f"{len(text):,} characters, more than {LARGEST:,}")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(f"character {error.position}: {error.reason} (U+{int(error.character):04X})") from error


def _refused(problem: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, as everybody who types a learning rate expects."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refused("an alias; write the value out", event)
        if getattr(event, "tag", None) is not None:
            raise _refused(f"the tag {event.tag}; remove it", event)
        if self._depth >= DEEPEST:
            raise _refused(f"more than {DEEPEST} levels", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                raise _refused(f"the key {shown} is no text", key)
            if key.value in seen:
                raise _refused(f"{key.value!r} is given twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# A date stays the text that it is.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "int", "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# Nor is 012 ten, and 1:30 ninety: those stay texts, which no number of a recipe takes.
_INT = re.compile(r"^[-+]?(0|[1-9][0-9_]*)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_FLOAT = re.compile(
    r"^[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$"
    r"|^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
