"""Answers that aren't free text: tool calls and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from modelfleet_serving.simulator.requests import BadRequestError, ChatRequest, Message
from modelfleet_serving.simulator.text import instance
from modelfleet_serving.simulator.tokens import encode


@dataclass(frozen=True)
class Script:
    """A text that is decided before it is said."""

    tokens: list[int]
    tool: str | None = None
    """The function that is called, if it is a call's arguments."""

    def call(self, request_id: str, arguments: str) -> dict[str, Any]:
        """The call as it stands in a message."""
        function = {"name": self.tool, "arguments": arguments}
        return {"id": f"call-{request_id}", "type": "function", "function": function}


def script_for(request: ChatRequest) -> Script | None:
    """What a chat has to be answered with, or ``None`` for free text.

    A tool is called when ``tool_choice`` demands it, or when it is left to the model and the last message
    is the user's and has the tool's name in it. Arguments are the smallest value that the schema allows.
    """
    tool = _tool(request)
    if tool is not None:
        arguments = instance(tool.get("parameters") or {"type": "object"})
        return Script(encode(json.dumps(arguments, ensure_ascii=False)), tool=str(tool["name"]))
    answer = request.response_format or {}
    if answer.get("type") == "json_schema":
        schema = (answer.get("json_schema") or {}).get("schema")
        if not isinstance(schema, dict):
            raise BadRequestError("response_format.json_schema.schema must be an object", "response_format")
        return Script(encode(json.dumps(instance(schema), ensure_ascii=False)))
    if answer.get("type") == "json_object":
        return Script(encode(json.dumps({"answer": "text"})))
    return None


def _tool(request: ChatRequest) -> dict[str, Any] | None:
    functions: list[dict[str, Any]] = [
        tool["function"] for tool in request.tools or [] if isinstance(tool.get("function"), dict)
    ]
    functions = [function for function in functions if function.get("name")]
    choice = request.tool_choice
    if choice == "none" or (not functions and choice in {None, "auto"}):
        return None
    if isinstance(choice, dict):
        name = (choice.get("function") or {}).get("name")
        for function in functions:
            if function["name"] == name:
                return function
        raise BadRequestError(f"tool_choice names {name!r}, which is not among the tools", "tool_choice")
    if choice == "required":
        if not functions:
            raise BadRequestError("tool_choice is required, and there are no tools", "tool_choice")
        return functions[0]
    text = _text(request.messages[-1]) if request.messages and request.messages[-1].role == "user" else ""
    return next((function for function in functions if function["name"] in text), None)


def _text(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return " ".join(str(part.get("text", "")) for part in message.content or [])
