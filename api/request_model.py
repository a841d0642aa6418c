"""What all JSON objects of requests have in common.

Invariant: nothing is silently ignored. A field that is not declared is refused with its path, unless it is known to
change nothing: it is null, or a no-op for any server without accounts, or asks for what happens anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

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
        declared = cls.model_fields
        return {
            name: value
            for name, value in fields.items()
            if value is not None
            and (name in declared or (name not in _NO_OPS | cls.no_ops and value not in cls.neutral.get(name, ())))
        }


def encodable(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no text: better said here than by the tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, it holds half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(encodable)]
