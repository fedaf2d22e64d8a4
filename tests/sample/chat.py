"""Chats through real templates and a real tokenizer: what an engine, a parser and an agent do between turns.

The templates are written here, in the style of three model families; the tokenizer is a byte-level BPE that
is trained on a few lines of text. What the "policy" samples is said by the test, down to the tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from agl_grpc.sample import AttemptSamples, SampleRules, build_attempt
from agl_grpc.v1.span_pb2 import StoredSpan
from tests.sample.calls import call, choice, record

FOLDER = Path(__file__).parent / "templates"
MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
)
TEXT = """The weather in Rome is sunny today and the weather in Oslo is cold.
Let me think about the weather before I call the function weather with the city Rome.
{"name": "weather", "arguments": {"city": "Rome", "days": 3}}
{"name": "weather", "parameters": {"city": "Oslo"}}
system user assistant tool_response tools function You are a helpful assistant. What is the weather like?
"""
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": "string", "days": "int"}}}


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE of about 500 tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(MARKERS), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT] * 4, trainer)
    return made


def encode(text: str) -> list[int]:
    """Canonical tokens of a text; markers are one token each."""
    return list(tokenizer().encode(text, add_special_tokens=False).ids)


def letters(text: str) -> list[int]:
    """The same text in other tokens: each character by itself, as a policy may well sample it."""
    return [token for character in text for token in encode(character)]


def decode(ids: Sequence[int]) -> str:
    """Text of tokens, markers included."""
    return str(tokenizer().decode(list(ids), skip_special_tokens=False))


@dataclass
class Chat:
    """A conversation of an agent with a policy behind a chat template.

    ``style`` is a template's name; ``thinking`` and ``date`` are what templates ask for.
    """

    style: str
    tools: bool = False
    thinking: bool = True
    date: str = "1 May 2025"
    messages: list[dict[str, Any]] = field(default_factory=list)
    spans: list[StoredSpan] = field(default_factory=list)

    @property
    def end(self) -> str:
        """The marker with which the policy ends its turn."""
        return "<|eot_id|>" if self.style == "llama3" else "<|im_end|>"

    def prompt(self) -> list[int]:
        """Tokens of the whole history, as an engine renders it for the next answer."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = json.dumps
        text = environment.from_string((FOLDER / f"{self.style}.jinja").read_text()).render(
            messages=self.messages,
            tools=[TOOL] if self.tools else None,
            thinking=self.thinking,
            date=self.date,
            add_generation_prompt=True,
        )
        return encode(text)

    def ask(self, content: str, role: str = "user") -> None:
        """A message of the user, or of a tool."""
        self.messages.append({"role": role, "content": content})

    def answer(self, sampled: str | list[int], *, finish: str = "stop") -> list[int]:
        """The policy's turn; the agent keeps what a parser makes of its text. Returns the prompt's tokens.

        Args:
            sampled: text, sampled in canonical tokens with the end marker behind, or the very tokens.
            finish: the engine's finish reason.
        """
        prompt = self.prompt()
        ids = sampled if isinstance(sampled, list) else encode(sampled + self.end)
        self.spans.append(call(prompt, choice(ids, finish=finish), at=len(self.spans) + 1))
        self.messages.append(parsed(decode(ids).removesuffix(self.end)))
        return prompt

    def samples(self, rules: SampleRules | None = None, *, known: bool = True) -> AttemptSamples:
        """What is trained of it, by a learner that knows the tokenizer or one that does not."""
        return build_attempt(record(*self.spans), rules or SampleRules(), decode if known else None)


_THINKING = re.compile(r"\s*<think>\n?(.*?)\n?</think>(.*)", re.DOTALL)
_CALL = re.compile(r"\n?<tool_call>\n?(.*?)\n?</tool_call>", re.DOTALL)


def parsed(text: str) -> dict[str, Any]:
    """An assistant's message as an engine's parsers give it to an agent: thinking and calls taken apart."""
    message: dict[str, Any] = {"role": "assistant"}
    if found := _THINKING.fullmatch(text):
        message["reasoning"], text = found[1], found[2]
    calls = [json.loads(each) for each in _CALL.findall(text)]
    if not calls and text.startswith("{"):
        calls, text = [json.loads(text)], ""
    if calls:
        message["tool_calls"] = [
            {"name": each["name"], "arguments": each.get("arguments", each.get("parameters"))}
            for each in calls
        ]
    message["content"] = _CALL.sub("", text)
    return message
