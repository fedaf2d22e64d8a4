"""The model that an evaluation serves: found, and known to fit its tokenizer before any engine starts."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agl_grpc.grader.conversation import Decode
from agl_grpc.learner.checkpoints.checkpoint import hugging_face_folder
from agl_grpc.learner.checkpoints.export import find_checkpoint
from agl_grpc.learner.checkpoints.integrity import verify
from agl_grpc.learner.checkpoints.model_folder import model_config
from agl_grpc.learner.errors import LearnerError
from agl_grpc.trainer.errors import TrainerError

_EMBEDDINGS = "embed_tokens.weight"


def find_model(path: str | Path) -> tuple[Path, str]:
    """Folder of the model in Hugging Face form, and its name for people.

    Args:
        path: that folder, a checkpoint of the learner, or a run's folder (its newest checkpoint).

    Raises:
        TrainerError: it is none of these, or a damaged checkpoint.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise TrainerError(f"no model at {path}: there is no such folder")
    if (folder / "config.json").is_file():
        return folder.absolute(), folder.name
    try:
        checkpoint = find_checkpoint(folder)
        verify(checkpoint)
    except LearnerError as error:
        raise TrainerError(f"no model at {path}: {error}") from error
    model = hugging_face_folder(checkpoint)
    if not (model / "config.json").is_file() or not _weights(model):
        raise TrainerError(
            f"{checkpoint} holds no model in Hugging Face form: make it with `agl-grpc checkpoint export`"
        )
    run = checkpoint.absolute().parent
    run = run.parent if run.name == "checkpoints" else run
    return model.absolute(), f"{run.name}/{checkpoint.name}"


def check_tokenizer(model: Path) -> None:
    """Refuses a model whose tokenizer is another model's.

    Every id of the tokenizer must have a row in the model's vocabulary, and the model's special tokens must
    be tokens of the tokenizer. A tokenizer without ``tokenizer.json`` is left to the engine.

    Raises:
        TrainerError: naming what does not fit.
    """
    try:
        config = model_config(model)
    except LearnerError as error:
        raise TrainerError(str(error)) from error
    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise TrainerError(f"{model} holds no tokenizer (tokenizer.json): save the model's beside it")
    config = config.get("text_config") or config
    rows = _embedding_rows(model)
    size = config.get("vocab_size")
    if rows is not None and size is not None and rows != size:
        raise TrainerError(
            f"{model} is not whole: config.json says vocab_size {size}, its weights have {rows} rows"
        )
    tokens = _tokens(model)
    size = rows if rows is not None else size
    if tokens is None or size is None:
        return
    largest = max(tokens.values(), default=-1)
    if largest >= size:
        raise TrainerError(
            f"the tokenizer in {model} is another model's: its largest token id is {largest}, and the model "
            f"knows {size} tokens (vocab_size)"
        )
    ids = set(tokens.values())
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        for number in _numbers(config.get(key)):
            if number not in ids:
                raise TrainerError(
                    f"the tokenizer in {model} is another model's: it has no token {number}, "
                    f"the model's {key}"
                )
    _check_end(model, config, tokens)


def _check_end(model: Path, config: dict[str, Any], tokens: dict[str, int]) -> None:
    """The token at which the tokenizer ends a text must be one at which the model ends one."""
    told = _read(model / "tokenizer_config.json").get("eos_token")
    name = told.get("content") if isinstance(told, dict) else told
    generation = _read(model / "generation_config.json")
    ends = {*_numbers(config.get("eos_token_id")), *_numbers(generation.get("eos_token_id"))}
    if isinstance(name, str) and ends and name in tokens and tokens[name] not in ends:
        raise TrainerError(
            f"the tokenizer in {model} is another model's: its end of text {name!r} is token {tokens[name]}, "
            f"the model's eos_token_id is {', '.join(map(str, sorted(ends)))}"
        )


def decoder(model: Path) -> Decode | None:
    """Token ids to text, special tokens left out; None without ``tokenizers`` or a ``tokenizer.json``."""
    file = model / "tokenizer.json"
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    if not file.is_file():
        return None
    tokenizer = Tokenizer.from_file(str(file))

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    return decode


def _tokens(model: Path) -> dict[str, int] | None:
    """All tokens of a ``tokenizer.json`` with their ids; None without one, or for an unknown form."""
    data = _read(model / "tokenizer.json")
    vocabulary = data.get("model", {}).get("vocab")
    if isinstance(vocabulary, list):  # unigram: pairs of token and score
        vocabulary = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict):
        return None
    added = {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
    return {**vocabulary, **added}


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int) and number >= 0]


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_bytes())
    except ValueError as error:
        raise TrainerError(f"{file} is not JSON: {error}") from error
    return data if isinstance(data, dict) else {}


def _weights(model: Path) -> list[Path]:
    return sorted([*model.glob("*.safetensors"), *model.glob("pytorch_model*.bin")])


def _embedding_rows(model: Path) -> int | None:
    """Rows of the token embeddings, from the headers of the weights; None when they are not found there."""
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise TrainerError(f"{path} is no safetensors file: it is too short")
            (length,) = struct.unpack("<Q", head)
            try:
                header: dict[str, Any] = json.loads(file.read(length))
            except (ValueError, OverflowError, MemoryError) as error:
                raise TrainerError(f"{path} is no safetensors file: its header cannot be read") from error
        for name, entry in header.items():
            if name.endswith(_EMBEDDINGS):
                return int(entry["shape"][0])
    return None
