"""What all JSON objects of requests have in common.

Invariant: nothing is silently ignored. A field that is not declared is refused with its path, unless it is known to
change nothing: it is null, or a no-op for any server without accounts, or asks for what happens anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

_NO_OPS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "include_obfuscation"})


class RequestModel(BaseModel):
    """A JSON object of a request. Strict: "16" is no number. Null means that the field was not given."""

    model_config = ConfigDict(extra="forbid", strict=True)

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """Undeclared fields, with the values that ask for nothing."""

    no_ops: ClassVar[frozenset[str]] = frozenset()
    """Undeclared fields that ask for nothing, whatever they hold."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if not cls._asks_for_nothing(name, value)}

    @classmethod
    def _asks_for_nothing(cls, name: str, value: Any) -> bool:
        if value is None or name in cls.model_fields:
            return value is None
        # With the type, as 0 equals False.
        neutral = any(type(value) is type(each) and value == each for each in cls.neutral.get(name, ()))
        return neutral or name in _NO_OPS | cls.no_ops

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Describes what is dropped: nulls of whatever is not required, no-ops, and values that ask for nothing."""
        schema = handler.resolve_ref_schema(handler(core))
        properties = schema.setdefault("properties", {})
        for name in properties.keys() - set(schema.get("required", ())):
            properties[name] = _or_null(properties[name])
        ignored: dict[str, Any] = {name: {} for name in _NO_OPS | cls.no_ops}
        ignored |= {name: {"enum": [*values, None]} for name, values in cls.neutral.items()}
        schema["properties"] = properties | {name: ignored[name] for name in sorted(ignored.keys() - properties.keys())}
        schema["additionalProperties"] = {"type": "null"}
        return schema


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if {"type": "null"} in schema.get("anyOf", ()):
        return schema
    outside: dict[str, Any] = {name: schema.pop(name) for name in ("title", "description", "default") if name in schema}
    return {"anyOf": [schema, {"type": "null"}], **outside}


def with_examples(*examples: dict[str, Any]) -> ConfigDict:
    """For the OpenAPI description: requests that can be sent as they are."""
    return ConfigDict(json_schema_extra={"examples": list(examples)})
