"""A tiny model that really calls a tool: asked anything it calls `get_weather`, then it says what it heard.

It is trained in seconds, so its two sentences come with near certainty, whatever the frameworks put around
the question. Run with the engine environment's Python: ``python -m tests.frameworks.tool_model FOLDER``.
"""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ANSWER = "It is sunny in Paris."
# As Qwen's: tools and system prompt first (their beginnings: so small a model needs short contexts), a call
# as JSON, a result in a turn of the user.
TEMPLATE = """\
{%- if messages[0].role in ('system', 'developer') or tools %}<|im_start|>system
{% if messages[0].role in ('system', 'developer') %}{{ messages[0].content[:200] }}{% endif %}
{%- for tool in tools or [] %}
{{ (tool | tojson)[:200] }}{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages if m.role not in ('system', 'developer') %}
{%- if m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CORPUS = (
    CALL,
    ANSWER,
    "system user assistant tool function type object properties string description required parameters",
    "What is the weather in Paris today? You are a helpful agent. Use your tools to find the answer.",
)
WORDS = (*CALL.split("\n")[1].split(), "get_weather", ANSWER, *ANSWER.split())
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
STEPS = 120
BATCH = 8
IGNORED = -100


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE; the marks of a tool call are tokens of their own, as in Qwen."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    raw.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = TEMPLATE
    return made


def transcript(made: PreTrainedTokenizerFast, rng: random.Random) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation in which all but the assistant's two sentences is noise."""
    ids: list[int] = []
    labels: list[int] = []

    def say(text: str, *, learn: bool = False) -> None:
        new = made.encode(text)
        ids.extend(new)
        labels.extend(new if learn else [IGNORED] * len(new))

    def noise(longest: int) -> None:
        # Random tokens, and words of what it shall say, which prompts contain too: only marks tell it.
        length = int(rng.random() ** 2 * longest) + 1
        new = [rng.randrange(3, len(made) - len(MARKS)) for _ in range(length)]
        for word in rng.sample(WORDS, 3):
            at = rng.randrange(length)
            new[at:at] = made.encode(word)
        ids.extend(new)
        labels.extend([IGNORED] * len(new))

    for role in rng.choice((["system", "user"], ["user"])):
        say(f"<|im_start|>{role}\n")
        noise(400)
        say("<|im_end|>\n")
    say("<|im_start|>assistant\n")
    say(f"{CALL}<|im_end|>", learn=True)
    say("\n<|im_start|>user\n<tool_response>\n")
    noise(40)
    say("\n</tool_response><|im_end|>\n")
    if rng.random() < 0.5:
        say("<|im_start|>user\n")
        noise(200)
        say("<|im_end|>\n")
    say("<|im_start|>assistant\n")
    say(f"{ANSWER}<|im_end|>", learn=True)
    return ids, labels


def make(folder: str, seed: int = 0) -> float:
    """Trains and writes the model; the last loss."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    made, rng = tokenizer(), random.Random(seed)
    size: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    config = Qwen2Config(
        **size,
        vocab_size=len(made),
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    loss = torch.tensor(0.0)
    for step in range(STEPS):
        rows = [transcript(made, rng) for _ in range(BATCH)]
        width = max(len(ids) for ids, _ in rows)
        inputs = torch.full((BATCH, width), made.pad_token_id)
        labels = torch.full((BATCH, width), IGNORED)
        for index, (ids, wanted) in enumerate(rows):
            inputs[index, : len(ids)] = torch.tensor(ids)
            labels[index, : len(wanted)] = torch.tensor(wanted)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / STEPS)
        loss = model(
            input_ids=inputs, attention_mask=(inputs != made.pad_token_id).long(), labels=labels
        ).loss
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return loss.item()


if __name__ == "__main__":
    print(make(sys.argv[1]))
