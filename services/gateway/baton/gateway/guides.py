"""The request fields that constrain an output: OpenAI's `response_format` and vLLM's own."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from baton.client import Guide, GuideKind, InvalidRequest
from baton.gateway.unsupported_fields import refuse_unsupported


class JsonSchemaFormat(BaseModel):
    """`response_format.json_schema`; the output keeps to the schema, `strict` or not."""

    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(BaseModel):
    """`response_format`."""

    type: str = "text"
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    """The schema where llama.cpp and others put it."""

    def guide(self) -> Guide | None:
        """The guide requested; None for plain text.

        Raises:
            InvalidRequest: the type is not supported, or the schema is missing or contradicted.
        """
        nested = self.json_schema.schema_ if self.json_schema else None
        schema = self.schema_ if nested is None else nested
        if None not in (nested, self.schema_) and nested != self.schema_:
            raise InvalidRequest("response_format has two schemas; leave out one of them")
        match self.type:
            case "text" if schema is None:
                return None
            case "text":
                raise InvalidRequest("response_format.type must be json_schema for a schema")
            case "json_object" if schema is None:
                return Guide.json_object()
            case "json_object" | "json_schema" if schema is not None:
                return Guide.json_schema(schema)
            case "json_schema":
                raise InvalidRequest("response_format.json_schema.schema must be set")
        raise InvalidRequest(
            "response_format.type must be text, json_object or json_schema; "
            "for other grammars see structured_outputs"
        )


class StructuredOutputs(BaseModel):
    """`structured_outputs` of vLLM."""

    model_config = ConfigDict(extra="allow", frozen=True)

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: Any = None

    def guides(self) -> list[Guide]:
        """All guides requested.

        Raises:
            InvalidRequest: a field is not supported.
        """
        refuse_unsupported(self.model_extra or {}, (), "structured_outputs.")
        if self.structural_tag is not None:
            raise InvalidRequest("structured_outputs.structural_tag is not supported")
        found = (
            None if self.json_ is None else _schema(self.json_),
            Guide.json_object() if self.json_object else None,
            None if self.regex is None else Guide.regex(self.regex),
            None if self.choice is None else Guide.choice(self.choice),
            None if self.grammar is None else Guide.lark(self.grammar),
        )
        return [guide for guide in found if guide is not None]


class GuideBody(BaseModel):
    """The fields that request a guide."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    """This and the following are vLLM's older names of the fields of `structured_outputs`."""
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def guide(self) -> Guide | None:
        """The guide of the output; None when it is free.

        Raises:
            InvalidRequest: the request has more than one guide, or one that is not supported.
        """
        older = StructuredOutputs(
            json=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
        )
        found = older.guides()
        if self.structured_outputs is not None:
            found += self.structured_outputs.guides()
        of_format = self.response_format.guide() if self.response_format else None
        if of_format is not None:
            found.append(of_format)
        if len(found) > 1:
            raise InvalidRequest(
                "ask for one of response_format, structured_outputs and guided_*, and once only"
            )
        return found[0] if found else None


def _schema(schema: dict[str, Any] | str) -> Guide:
    if isinstance(schema, str):
        return Guide(GuideKind.JSON_SCHEMA, schema)
    return Guide.json_schema(schema)
