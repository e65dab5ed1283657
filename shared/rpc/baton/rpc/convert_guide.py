"""Between baton.v1.Guide and core's value."""

from __future__ import annotations

from baton.core.errors import InvalidRequest
from baton.core.guide import Guide, GuideKind
from baton.v1 import common_pb2


def guide_to_pb(guide: Guide) -> common_pb2.Guide:
    """The wire's form."""
    match guide.kind:
        case GuideKind.JSON_SCHEMA:
            return common_pb2.Guide(json_schema=guide.text)
        case GuideKind.JSON_OBJECT:
            return common_pb2.Guide(json_object=True)
        case GuideKind.REGEX:
            return common_pb2.Guide(regex=guide.text)
        case GuideKind.LARK:
            return common_pb2.Guide(lark=guide.text)
        case GuideKind.CHOICE:
            return common_pb2.Guide(choice=common_pb2.Choices(texts=guide.choices()))


def guide_from_pb(pb: common_pb2.Guide) -> Guide:
    """What an output must match; not checked yet.

    Raises:
        InvalidRequest: nothing is set.
    """
    match pb.WhichOneof("kind"):
        case "json_schema":
            return Guide(GuideKind.JSON_SCHEMA, pb.json_schema)
        case "json_object" if pb.json_object:
            return Guide(GuideKind.JSON_OBJECT)
        case "regex":
            return Guide(GuideKind.REGEX, pb.regex)
        case "lark":
            return Guide(GuideKind.LARK, pb.lark)
        case "choice":
            return Guide.choice(tuple(pb.choice.texts))
    names = ", ".join(kind.value for kind in GuideKind)
    raise InvalidRequest(f"guide must have exactly one of {names}")
