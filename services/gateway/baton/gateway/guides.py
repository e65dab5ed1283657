"""What an output must match, in OpenAI's words (`response_format`) and in vLLM's."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from baton.client import Guide, GuideKind, InvalidRequest


class JsonSchemaFormat(BaseModel):
    """`response_format.json_schema`. A schema is always kept to, `strict` or not."""

    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(BaseModel):
    """`response_format`."""

    type: str = "text"
    json_schema: JsonSchemaFormat | None = None

    def guide(self) -> Guide | None:
        """What it asks for; None for plain text.

        Raises:
            InvalidRequest: its type is not supported, or its schema is missing.
        """
        match self.type:
            case "text":
                return None
            case "json_object":
                return Guide.json_object()
            case "json_schema":
                if self.json_schema is None or self.json_schema.schema_ is None:
                    raise InvalidRequest("response_format.json_schema.schema must be set")
                return Guide.json_schema(self.json_schema.schema_)
        raise InvalidRequest(
            "response_format.type must be text, json_object or json_schema; "
            "for other grammars see structured_outputs"
        )


class StructuredOutputs(BaseModel):
    """VLLM's `structured_outputs`."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: Any = None

    def guides(self) -> list[Guide]:
        """All that it asks for.

        Raises:
            InvalidRequest: it asks for structural tags.
        """
        if self.structural_tag is not None:
            raise InvalidRequest("structured_outputs.structural_tag is not supported")
        found = []
        if self.json_ is not None:
            found.append(_schema(self.json_))
        if self.json_object:
            found.append(Guide.json_object())
        if self.regex is not None:
            found.append(Guide.regex(self.regex))
        if self.choice is not None:
            found.append(Guide.choice(self.choice))
        if self.grammar is not None:
            found.append(Guide.lark(self.grammar))
        return found


class GuideBody(BaseModel):
    """The fields of a body that ask for a guide."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    """This and those below are vLLM's older names of what is in `structured_outputs`."""
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def guide(self) -> Guide | None:
        """What the output must match.

        Raises:
            InvalidRequest: more than one is asked for, or one that is not supported.
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
