"""The trained model's tokens: their texts, and how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from agl_grpc.learner.checkpoints.model_folder import model_config
from agl_grpc.sample import Decode


def decoder(model: Path) -> Decode:
    """Text of token ids, special tokens included, by the model folder's tokenizer; loaded when first used."""

    @cache
    def tokenizer() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model)

    def decode(ids: Sequence[int]) -> str:
        # Cleaning up would make texts equal that are not.
        return str(tokenizer().decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode


def vocabulary_size(model: Path) -> int:
    """Rows of the model's embedding: every token id is below it. 0 = its configuration does not say."""
    config = model_config(model)
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 0)
