"""Holds what was rendered to the schema of whoever reads it.

Ray ships the schema of its cluster files. KubeRay's custom resources are checked against a table
of their fields, ``kuberay_fields.json``, which says where it is from.
"""

import functools
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIELDS = Path(__file__).with_name("kuberay_fields.json")


def check_ray_up(values: Mapping[str, Any]) -> None:
    """Checks the values of a cluster file for ``ray up``.

    Raises:
        ValueError: If Ray would refuse them; with the place and the rule.
    """
    _check(values, _ray_schema(), "the cluster file")
    nodes = values.get("available_node_types", {})
    head = values.get("head_node_type")
    if nodes and head not in nodes:
        raise ValueError(f"head_node_type must be one of {', '.join(nodes)}, but got {head!r}")
    most = values.get("max_workers", 0)
    for name, node in nodes.items():
        low, high = node.get("min_workers", 0), node.get("max_workers", 0)
        if not low <= high <= most:
            raise ValueError(
                f"node type {name!r} must have min_workers <= max_workers <= {most}, but got "
                f"{low} and {high}"
            )


def check_kubernetes(values: Mapping[str, Any]) -> None:
    """Checks a RayCluster, a RayJob or a ConfigMap.

    Raises:
        ValueError: If the kind is another one, or a field is unknown, missing or of another type.
    """
    kind, types = str(values.get("kind")), _field_table()
    if kind not in ("RayCluster", "RayJob", "ConfigMap"):
        raise ValueError(f"kind must be RayCluster, RayJob or ConfigMap, but got {kind!r}")
    definitions = {name: _object_schema(fields) for name, fields in types.items()}
    schema = {"$ref": f"#/definitions/{kind}", "definitions": definitions}
    _check(values, schema, f"the {kind}")
    spec = values.get("spec", {})
    cluster = spec.get("rayClusterSpec", spec)
    for group in cluster.get("workerGroupSpecs", []):
        if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            raise ValueError(
                f"worker group {group['groupName']!r} must have minReplicas <= replicas <= "
                f"maxReplicas, but got {group['minReplicas']}, {group.get('replicas', 0)} and "
                f"{group['maxReplicas']}"
            )


def _check(values: Any, schema: Mapping[str, Any], what: str) -> None:
    import jsonschema

    validator = jsonschema.Draft7Validator(schema)
    for error in sorted(validator.iter_errors(values), key=lambda error: list(error.path)):
        place = ".".join(str(part) for part in error.absolute_path) or "its top"
        raise ValueError(f"{what} is wrong at {place}: {error.message}")


@functools.cache
def _ray_schema() -> dict[str, Any]:
    """Reads Ray's schema without importing Ray."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "autoscaler" / "ray-schema.json"
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return schema


@functools.cache
def _field_table() -> dict[str, dict[str, str]]:
    types: dict[str, dict[str, str]] = json.loads(FIELDS.read_text(encoding="utf-8"))["types"]
    return types


def _object_schema(fields: Mapping[str, str]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name.rstrip("!") for name in fields if name.endswith("!")],
        "properties": {name.rstrip("!"): _type_schema(kind) for name, kind in fields.items()},
    }


def _type_schema(kind: str) -> dict[str, Any]:
    if kind == "any":
        return {}
    if kind == "map":
        return {"type": "object", "additionalProperties": {"type": "string"}}
    if kind in ("string", "integer", "number", "boolean"):
        return {"type": kind}
    if kind.startswith("["):
        return {"type": "array", "items": _type_schema(kind[1:-1])}
    if kind.startswith("{"):
        return {"enum": kind[1:-1].split("|")}
    return {"$ref": f"#/definitions/{kind}"}
