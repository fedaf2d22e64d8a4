"""The tokenizer of the tiny model: byte-level BPE that keeps numbers whole, with a chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Numbers up to 99 are one token, longer ones are split in pairs from the right (137 = 1 37): copying them
# is what the model has to learn, and it does not emerge from single bytes in the time there is.
PATTERN = r"</?[a-z]+>|\d{1,2}(?=(?:\d{2})*(?!\d))| ?[+\-*/=] ?|: ?| ?[A-Za-z]+|\s|[^\sA-Za-z\d]"
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Prefix-stable over turns: a message is rendered in the same way whatever follows it, and an assistant's
# content is kept to the letter, so the next prompt begins with the tokens of this one and its answer.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

WORDS = (
    "State the final answer to the following arithmetic problem: 1 + 2 - 3 = ",
    "user\nassistant\ntool\nsystem\n",
    "Answer: 1\nAnswer: -1\nNo answer\nerror\n",
    "<calc>1 * 2 / 3</calc>",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same on every machine."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    numbers = [f"{i}\n{i:02d}\n" for i in range(100)]
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=1,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*WORDS, *numbers] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
