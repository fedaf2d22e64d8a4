"""What the learner tells of each step: metrics to the store and to trackers, alarms, sample trajectories."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from agl_grpc.diagnosis import AlarmFile, AlarmLimits, AlarmWatch
from agl_grpc.diagnosis.sinks import MetricSinks
from agl_grpc.diagnosis.trajectories import Decode, choose, write_step
from agl_grpc.learner.progress import step_line, with_summary
from agl_grpc.learner.rollouts.groups import FinishedRollout
from agl_grpc.learner.training_run import TrainingRun

Say = Callable[[str], None]


class Reporting:
    """One learner's reports.

    Args:
        training: takes metrics and lines, and knows whether somebody asked to stop.
        folder: of the run.
        limits: of the alarms.
        config: a few words on the run for trackers.
        say: shows a line.
    """

    def __init__(
        self,
        training: TrainingRun,
        folder: Path,
        limits: AlarmLimits,
        config: Mapping[str, object],
        say: Say,
    ) -> None:
        self._training = training
        self._alarms = AlarmWatch(limits)
        self._alarm_file = AlarmFile(folder)
        self._say = say
        self._waiting: list[str] = []
        self._sinks = MetricSinks(folder, config, self._note)

    def _note(self, line: str) -> None:
        """A line that the training run's log has too, with the next step."""
        self._say(line)
        self._waiting.append(line)

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> bool:
        """Tells a step; answers whether it shall be the last one."""
        numbers = with_summary(metrics)
        for event in self._alarms.step(step, numbers):
            self._alarm_file.write(event)
            self._note(event.line)
        numbers |= self._alarms.numbers()
        self._say(step_line(step, total, numbers))
        self._sinks.write(step, numbers)
        stops = self._alarms.stops
        if stops:
            self._note(f"stopping after step {step}: alarm {stops} is in alarms.stop_on")
        lines, self._waiting = self._waiting, []
        self._training.report(step, numbers, lines)
        # What the store says of it is another's wish.
        self._training.stop_requested = self._training.stop_requested or bool(stops)
        return self._training.stop_requested

    def close(self) -> None:
        """Ends the trackers' runs."""
        self._sinks.close()


class TrajectorySamples:
    """Writes some of each step's rollouts down, in a thread of its own: the step does not wait.

    While the pages of an earlier step are being written, a step's are left out, and that is said.

    Args:
        folder: of the run.
        count: best, worst and random ones each; 0 = none.
        model: the folder with the tokenizer.
        say: shows a line.
    """

    def __init__(self, folder: Path, count: int, model: str, say: Say) -> None:
        self._folder = folder
        self._count = count
        self._model = model
        self._say = say
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="trajectories")
        self._writing: Future[None] | None = None
        self._decode: Decode | None = None
        self._loaded = False

    def step(self, step: int, rollouts: list[FinishedRollout]) -> None:
        """Takes a step's rollouts."""
        if not self._count:
            return
        if self._writing is not None and not self._writing.done():
            self._say(f"trajectories of step {step} are left out: those of an earlier step are being written")
            return
        chosen = choose(rollouts, self._count, seed=step)
        self._writing = self._writer.submit(self._write, step, chosen)

    def close(self) -> None:
        """Waits for what is being written."""
        self._writer.shutdown()

    def _write(self, step: int, chosen: list[tuple[str, FinishedRollout]]) -> None:
        try:
            if not self._loaded:
                self._decode, self._loaded = self._tokenizer(), True
            write_step(self._folder, step, chosen, self._decode)
        except Exception as error:  # nobody waits for this thread's result, and no page ends a run
            reason = (str(error).splitlines() or [""])[0]
            self._say(f"trajectories of step {step} could not be written: {type(error).__name__}: {reason}")

    def _tokenizer(self) -> Decode | None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._model)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self._say(f"trajectories show token ids, for the model has no tokenizer: {reason}")
            return None

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=False))

        return decode
