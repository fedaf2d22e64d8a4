"""A random Qwen2 with a real byte-level tokenizer and a chat template, made in a second.

Run with the engine environment's Python: ``python tiny_model.py FOLDER [tiny|larger]``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "system user assistant",
    "hello world 0 1 2 3 4 5 6 7 8 9",
    "What is the answer? The answer is yes. no maybe",
    "You are a helpful assistant.",
]

SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    # For benchmarks: 82 million parameters, with a vocabulary over which a softmax costs something.
    "larger": {
        "vocab_size": 16384,
        "hidden_size": 640,
        "intermediate_size": 2560,
        "num_hidden_layers": 10,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
    },
}


def make(folder: str, seed: int = 0, size: str = "tiny") -> None:
    """Write model and tokenizer to `folder`."""
    import torch
    from transformers import Qwen2ForCausalLM

    tokenizer = make_tokenizer(size)
    torch.manual_seed(seed)
    Qwen2ForCausalLM(make_config(tokenizer, size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(size: str = "tiny", more: Sequence[str] = ()) -> Any:
    """The tokenizer, with `more` special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        CORPUS * 20,
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if size != "tiny":
        # The corpus gives no more than some hundred tokens; the rest are words that nobody writes.
        missing = SIZES[size]["vocab_size"] - raw.get_vocab_size()
        raw.add_tokens([f" word{number}" for number in range(missing)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_config(tokenizer: Any, size: str = "tiny") -> Any:
    """The language model's shape."""
    from transformers import Qwen2Config

    return Qwen2Config(
        **SIZES[size],
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


if __name__ == "__main__":
    make(sys.argv[1], size=sys.argv[2] if len(sys.argv) > 2 else "tiny")
