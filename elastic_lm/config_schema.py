"""The configuration as a JSON Schema: what an editor needs to complete names, show meanings and mark mistakes.

Invariant: every field has a description, the docstring under it in config.py. Trade-off: rules between fields are not in it;
`elastic-lm config validate` has them all.
"""

from __future__ import annotations

from typing import Any

from elastic_lm.config import RunConfig
from elastic_lm.config_text import as_yaml_says

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TITLE = "elastic-lm run"


def schema() -> dict[str, Any]:
    """JSON Schema of a run's YAML file."""
    found = _in_yaml_words(RunConfig.model_json_schema())
    return {"$schema": DIALECT, **found, "title": TITLE, "description": "A training run of elastic-lm."}


def _in_yaml_words(node: Any) -> Any:
    """Descriptions in one line and in YAML's words; pydantic's titles, which only repeat a field's name, left out."""
    if isinstance(node, list):
        return [_in_yaml_words(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {name: _in_yaml_words(value) for name, value in node.items()}
    if isinstance(kept.get("description"), str):
        kept["description"] = as_yaml_says(kept["description"])
    if isinstance(kept.get("title"), str):
        del kept["title"]
    return kept
