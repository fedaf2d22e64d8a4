"""A model behind an OpenAI-compatible endpoint that is asked one question at a time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_RETRIES = 5
_EMPTY_ANSWERS = 3


@dataclass(frozen=True)
class Usage:
    """Tokens of calls, and their price in US dollars; ``cost`` None = a price is not known."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = 0.0

    def __add__(self, other: Usage) -> Usage:
        cost = None if self.cost is None or other.cost is None else self.cost + other.cost
        return Usage(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            cost,
        )

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", {self.cost:.4f} USD"
        tokens = f"{self.prompt_tokens} prompt and {self.completion_tokens} answer tokens"
        return f"{self.calls} calls, {tokens}{cost}"

    def to_data(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "calls": self.calls,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": self.cost,
        }


@dataclass(frozen=True)
class Answer:
    """A text and what it took; the text may be empty when the model gave none."""

    text: str
    usage: Usage


class ChatError(Exception):
    """An endpoint cannot be asked; the message is one line for people."""


class ChatEndpoint:
    """Asks models at one endpoint. Its calls belong to no rollout, so they never become samples.

    Args:
        client: an ``openai.AsyncOpenAI``; None = one is made for ``endpoint`` when it is first needed.
        endpoint: base URL, for example ``http://127.0.0.1:8000/v1``; empty = ``OPENAI_BASE_URL``, else
            OpenAI's.
        api_key: empty = ``OPENAI_API_KEY``; endpoints that ask for none get a placeholder.
        prices: US dollars for a million prompt tokens and a million answer tokens, by model.
        concurrency: calls at once.
        timeout: seconds for one call.
        retries: of calls that were refused for the moment, or not answered.

    Attributes:
        role: what the model is for, in messages.
        extra: what to install when the package ``openai`` is missing.
        failure: what is raised.
    """

    role = "model"
    extra = "apo"
    failure: type[Exception] = ChatError

    def __init__(
        self,
        client: AsyncOpenAI | None = None,
        *,
        endpoint: str = "",
        api_key: str = "",
        prices: Mapping[str, tuple[float, float]] | None = None,
        concurrency: int = 16,
        timeout: float = 600.0,
        retries: int = _RETRIES,
    ) -> None:
        self._given = client
        self._endpoint = endpoint or os.environ.get("OPENAI_BASE_URL", "")
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY", "")
        self._prices = prices or {}
        self._slots = asyncio.Semaphore(concurrency)
        self._timeout = timeout
        self._retries = retries

    async def ask(
        self,
        model: str,
        system: str,
        prompt: str,
        temperature: float,
        max_tokens: int | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> Answer:
        """The model's answer; asked again while it is empty, three times in all.

        Args:
            model: The model's name at the endpoint.
            system: What comes before the question.
            prompt: The question.
            temperature: Of sampling.
            max_tokens: Most tokens of the answer; None = the endpoint's own limit.
            schema: A JSON schema to which the endpoint holds the answer; None = free text.

        Raises:
            ChatError: or what ``failure`` is: the endpoint is not there, refuses, or does not know the model.
        """
        options: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
        if schema is not None:
            form = {"name": "reply", "schema": dict(schema)}
            options["response_format"] = {"type": "json_schema", "json_schema": form}
        used = Usage()
        text = ""
        for _ in range(_EMPTY_ANSWERS):
            async with self._slots:
                text, usage = await self._call(model, system, prompt, temperature, options)
            used += usage
            if text:
                break
        return Answer(text, used)

    async def close(self) -> None:
        """Closes the connections of a client that was made here."""
        if self._made is not None:
            await self._made.close()
            self._made = None

    _made: AsyncOpenAI | None = None

    def _client(self) -> AsyncOpenAI:
        if self._given is not None:
            return self._given
        if self._made is None:
            try:
                import openai
            except ImportError:
                raise self.failure(
                    f"the {self.role} needs the package openai: pip install 'agl-grpc[{self.extra}]'"
                ) from None
            if not self._api_key and not self._endpoint:
                raise self.failure(
                    f"the {self.role} has no endpoint: give endpoint=…, or set OPENAI_API_KEY or "
                    "OPENAI_BASE_URL"
                )
            self._made = openai.AsyncOpenAI(
                base_url=self._endpoint or None,
                api_key=self._api_key or "none",
                max_retries=self._retries,
                timeout=self._timeout,
            )
        return self._made

    async def _call(
        self, model: str, system: str, prompt: str, temperature: float, options: Mapping[str, Any]
    ) -> tuple[str, Usage]:
        client = self._client()
        import openai

        messages: list[Any] = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        try:
            reply = await client.chat.completions.create(
                model=model,
                messages=messages,
                temperature=temperature,
                **options,
            )
        except openai.APIStatusError as error:
            said = " ".join(str(error.message).split())[:300]
            raise self.failure(
                f"the {self.role} at {client.base_url} refused model {model!r}: {error.status_code} {said}"
            ) from error
        except openai.APIError as error:
            raise self.failure(
                f"the {self.role} at {client.base_url} does not answer: {error.message} "
                "(the run can be resumed once it does)"
            ) from error
        text = _storable(reply.choices[0].message.content or "").strip() if reply.choices else ""
        given = reply.usage
        prompt_tokens, completion_tokens = (given.prompt_tokens, given.completion_tokens) if given else (0, 0)
        price = self._prices.get(model)
        cost = (
            None if price is None else (prompt_tokens * price[0] + completion_tokens * price[1]) / 1_000_000
        )
        return text, Usage(1, prompt_tokens, completion_tokens, cost)


def _storable(text: str) -> str:
    """The text without what no store takes: NUL characters and halves of characters."""
    return text.encode(errors="replace").decode().replace("\0", "\ufffd")


def fenced(text: str) -> str:
    """What stands between the first and the last line of three backquotes; without any, the whole text."""
    lines = text.strip().splitlines()
    marks = [place for place, line in enumerate(lines) if line.strip().startswith("```")]
    if len(marks) < 2:
        return text.strip()
    return "\n".join(lines[marks[0] + 1 : marks[-1]]).strip()
