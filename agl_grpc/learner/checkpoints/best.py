"""Which of a run's checkpoints had the best validation score: written down beside the checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from agl_grpc.learner.errors import ConfigError

BEST_FILE = "best.json"


@dataclass(frozen=True)
class BestCheckpoint:
    """A checkpoint's name, the step that it was saved after, and its validation score: the mean reward."""

    checkpoint: str
    step: int
    score: float

    def write(self, checkpoints: Path) -> None:
        """Writes it into the folder of the checkpoints, at once or not at all."""
        draft = checkpoints / f".{BEST_FILE}.new"
        draft.write_bytes(orjson.dumps(asdict(self)))
        draft.replace(checkpoints / BEST_FILE)


def read_best(checkpoints: Path) -> BestCheckpoint | None:
    """The best of the checkpoints in a folder; None when none was scored, ConfigError for a broken file."""
    file = checkpoints / BEST_FILE
    if not file.is_file():
        return None
    try:
        return BestCheckpoint(**orjson.loads(file.read_bytes()))
    except (orjson.JSONDecodeError, TypeError) as error:
        raise ConfigError(f"{file} does not name a best checkpoint: {error}") from error
