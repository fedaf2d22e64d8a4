"""Checkpoints: written beside, synced, renamed, and only then committed in the store.

The store, not a file on this disk, says which checkpoint is the last one: ``CommitBatches`` names it together
with the batches that it contains.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from agl_grpc.learner.checkpoints.best import BestCheckpoint, read_best
from agl_grpc.learner.checkpoints.integrity import stamp, verify
from agl_grpc.learner.checkpoints.model_folder import ADAPTER, fold_adapter, model_config, state_dtype
from agl_grpc.learner.errors import ConfigError

if TYPE_CHECKING:
    from agl_grpc.learner.trainer import AglTrainer

STATE_FILE = "learner.json"
ORDER_FILE = "curriculum.npz"
# What makes the weights of one model unusable for another, in its ``config.json``.
_SHAPE_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
CHECKPOINT_PREFIX = "global_step_"


@dataclass
class LearnerState:
    """What a checkpoint holds beside verl's own files.

    ``prompts_fetched`` counts prompts taken from the dataset since the start; ``outstanding`` are prompts
    that were fetched and not trained, as place in the order of prompts and dataset index: a resumed run
    begins with them. ``origin`` is the trainer epoch that began from the first prompt; group ids hold it.
    """

    step: int
    prompts_fetched: int
    outstanding: list[tuple[int, int]] = field(default_factory=list)
    batch_ids: list[str] = field(default_factory=list)
    origin: int = 1

    @staticmethod
    def read(folder: Path) -> LearnerState:
        """The state of a checkpoint folder; ConfigError when it is none."""
        file = folder / STATE_FILE
        if not file.is_file():
            raise ConfigError(f"{folder} is not a checkpoint of the learner: it holds no {STATE_FILE}")
        return LearnerState(**orjson.loads(file.read_bytes()))


def checkpoint_id(step: int) -> str:
    """Name of a step's checkpoint: the folder's and the store's."""
    return f"{CHECKPOINT_PREFIX}{step}"


def sync_tree(folder: Path) -> None:
    """Brings every file and folder below ``folder`` to disk."""
    for base, _, names in os.walk(folder, topdown=False):
        for name in (*names, ""):
            descriptor = os.open(os.path.join(base, name) if name else base, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def write_checkpoint(folder: Path, name: str, fill: Callable[[Path], LearnerState]) -> Path:
    """Makes a checkpoint's folder, whole or not at all, under its name.

    Args:
        folder: where checkpoints lie.
        name: the checkpoint's; an older one of that name is replaced.
        fill: writes verl's files into the folder that it is given; answers what is kept beside them.
    """
    final, unfinished = folder / name, folder / f".unfinished-{name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    state = fill(unfinished)
    (unfinished / STATE_FILE).write_bytes(orjson.dumps(asdict(state), option=orjson.OPT_INDENT_2))
    fold_adapter(hugging_face_folder(unfinished), adapter_folder(unfinished))
    state_dtype(hugging_face_folder(unfinished))
    stamp(unfinished)
    sync_tree(unfinished)
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)
    sync_tree_entry(folder)
    return final


class Checkpoints:
    """``CheckpointStore``: folders ``global_step_N`` in one place.

    Args:
        folder: where checkpoints lie.
        commit: called by ``commit`` with checkpoint id, batch ids and step; the store's ``CommitBatches``.
        keep: how many finished checkpoints stay, the newest; None = all. The one with the best validation
            score stays besides.
    """

    def __init__(
        self, folder: Path, commit: Callable[[str, list[str], int], None], *, keep: int | None = None
    ) -> None:
        self._folder = folder
        self._commit = commit
        self._keep = keep
        # What was saved and not committed yet.
        self._unnamed: tuple[str, list[str], int] | None = None
        self._best = read_best(folder)

    def note_score(self, step: int, score: float) -> bool:
        """Notes a validation score; answers whether it is the best so far: then its checkpoint is kept."""
        if self._best is not None and score <= self._best.score:
            return False
        self._best = BestCheckpoint(checkpoint_id(step), step, score)
        return True

    def path(self, name: str) -> Path:
        """Folder of a checkpoint."""
        return self._folder / name

    def save(self, trainer: AglTrainer) -> None:
        """Saves model, optimiser, data order and what is outstanding; ``commit`` makes it the last one."""
        import torch

        step = int(trainer.global_steps)
        name = checkpoint_id(step)
        batch_ids = [batch.batch_id for batch in trainer.uncommitted]

        def fill(place: Path) -> LearnerState:
            trainer.actor_rollout_wg.save_checkpoint(str(place / "actor"), None, step, max_ckpt_to_keep=None)
            if trainer.use_critic:
                trainer.critic_wg.save_checkpoint(str(place / "critic"), None, step, max_ckpt_to_keep=None)
            torch.save(trainer.train_dataloader.state_dict(), place / "data.pt")
            if trainer.order is not None:
                (place / ORDER_FILE).write_bytes(trainer.order.curriculum.state())
            outstanding = trainer.outstanding_prompts()
            return LearnerState(step, trainer.prompts_fetched, outstanding, batch_ids, trainer.hooks.origin)

        write_checkpoint(self._folder, name, fill)
        self._unnamed = (name, batch_ids, step)

    def commit(self, trainer: AglTrainer) -> None:
        """Names the checkpoint that was saved in the store, with the batches trained since the one before.

        A trainer that ends before this goes on from the one before, and trains those batches again.
        """
        if self._unnamed is None:
            return
        self._commit(*self._unnamed)
        self._unnamed = None
        trainer.uncommitted.clear()
        if self._best is not None and self.path(self._best.checkpoint).is_dir():
            self._best.write(self._folder)
        self._prune()

    def _prune(self) -> None:
        if self._keep is None:
            return
        steps = sorted(
            int(entry.name.removeprefix(CHECKPOINT_PREFIX))
            for entry in self._folder.glob(f"{CHECKPOINT_PREFIX}*")
        )
        for step in steps[: -self._keep]:
            if self._best is not None and step == self._best.step:
                continue
            shutil.rmtree(self.path(checkpoint_id(step)))


def sync_tree_entry(folder: Path) -> None:
    """Brings a folder's list of names to disk, so that a rename in it lasts."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hugging_face_folder(checkpoint: Path) -> Path:
    """Where a checkpoint's model lies in the form that ``transformers`` loads."""
    return checkpoint / "actor" / "huggingface"


def adapter_folder(checkpoint: Path) -> Path:
    """Where the adapter of a model that was trained with LoRA lies, in peft's form."""
    return checkpoint / "actor" / ADAPTER


def check_fits(checkpoint: Path, model: Path, ranks: int) -> None:
    """Raises ConfigError when a checkpoint is another model's, or was saved by another number of ranks."""
    mine, its = model_config(model), model_config(hugging_face_folder(checkpoint))
    for key in _SHAPE_KEYS:
        if key in mine and key in its and mine[key] != its[key]:
            raise ConfigError(
                f"checkpoint {checkpoint} is another model's: its {key} is {its[key]!r}, that of {model} is "
                f"{mine[key]!r}; use the model that the run began with, or begin a new run"
            )
    saved = list((checkpoint / "actor").glob("model_world_size_*_rank_*.pt"))
    if saved and len(saved) != ranks:
        raise ConfigError(
            f"checkpoint {checkpoint} was saved by {len(saved)} ranks, and this run has {ranks}: use as many "
            "(trainer.n_gpus_per_node, trainer.nnodes), or begin a new run from its Hugging Face form"
        )


def resume_keys(folder: Path, name: str) -> dict[str, Any]:
    """verl's keys that make it continue from a checkpoint."""
    path = folder / name
    LearnerState.read(path)
    verify(path)
    return {"resume_mode": "resume_path", "resume_from_path": str(path)}
