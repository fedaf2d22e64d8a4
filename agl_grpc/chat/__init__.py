"""Questions to models at OpenAI-compatible endpoints, for judges and critics; tokens and cost are counted."""

from __future__ import annotations

from agl_grpc.chat.endpoint import Answer, ChatEndpoint, ChatError, Usage, fenced

__all__ = ["Answer", "ChatEndpoint", "ChatError", "Usage", "fenced"]
