"""A random Idefics3: a tiny Llama with eyes for pictures of 56 by 56 pixels, four tokens each.

One of the architectures whose image processor needs no torchvision.
"""

from __future__ import annotations

from tests.support.tiny_model import SIZES, make_tokenizer

IMAGE_ID = 4
"""The token that stands in the prompt for each part of a picture."""

IMAGE_TOKENS = 4
_SPECIAL = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
_SIDE, _PATCH, _SCALE = 56, 14, 2


def make(folder: str, seed: int = 0) -> None:
    """Write model, tokenizer and image processor to `folder`."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = make_tokenizer(more=_SPECIAL)
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_ID
    assert (_SIDE // _PATCH // _SCALE) ** 2 == IMAGE_TOKENS
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Idefics3Config(
        vision_config=Idefics3VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=_SIDE,
            patch_size=_PATCH,
        ),
        text_config={"model_type": "llama", **SIZES["tiny"], **ends, "max_position_embeddings": 2048},
        image_token_id=IMAGE_ID,
        scale_factor=_SCALE,
        tie_word_embeddings=False,
        dtype="float32",
        **ends,
    )
    torch.manual_seed(seed)
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": _SIDE}, max_image_size={"longest_edge": _SIDE}, do_image_splitting=False
    )
    processor = Idefics3Processor(
        images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=tokenizer.chat_template
    )
    processor.save_pretrained(folder)
