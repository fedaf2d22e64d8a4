"""The learner process: takes a training run up, runs verl's trainer on it, and ends it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from agl_grpc.client import StoreError
from agl_grpc.dataset import DatasetError, JsonlTasks, dataset_digest
from agl_grpc.evaluation import Pass
from agl_grpc.learner.checkpoints.best import read_best
from agl_grpc.learner.checkpoints.checkpoint import (
    Checkpoints,
    LearnerState,
    check_fits,
    hugging_face_folder,
    resume_keys,
)
from agl_grpc.learner.errors import ConfigError, StoppedError
from agl_grpc.learner.progress import SAID
from agl_grpc.learner.run_config import RunConfig
from agl_grpc.learner.stopping import Waits, heed_stop, stoppable
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.learner.training_run import TRAINING_LABEL, TrainingRun, batch_groups, frozen_rewards
from agl_grpc.learner.verl.ray_runtime import common_environment, local_ray, worker_environment
from agl_grpc.manifest.describe import CONTRACT, LEARNER_PACKAGES, git_state, hardware, now, versions_here
from agl_grpc.model.enums import ResourceBinding, TrainingRunStatus
from agl_grpc.model.reward import PRIMARY
from agl_grpc.sample import SampleRules

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from agl_grpc.learner.hooks import Validation
    from agl_grpc.learner.reporting import Reporting, TrajectorySamples
    from agl_grpc.learner.trainer import AglTrainer
    from agl_grpc.learner.verl.local_queue import LocalQueue
    from agl_grpc.learner.verl.reward_loop import RewardLoop


def say(text: str) -> None:
    """A line of progress for people and for whoever started this process."""
    print(f"{SAID}{text}", flush=True)


def tell(training: TrainingRun, text: str) -> None:
    """A line of progress that those who follow the training run in the store see too."""
    say(text)
    training.log(text)


def choose_device(wanted: str) -> str:
    """``cpu`` or ``cuda``."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run(config: RunConfig, store: str, *, sft: bool = False) -> None:
    """Trains until the configured number of steps, or until somebody asks to stop.

    Args:
        config: the run's configuration.
        store: ``host:port``.
        sft: supervised, on what the run's rollouts did well, instead of reinforcement learning.

    Raises:
        LearnerError: anything a person has to know; the training run is then FAILED in the store.
    """
    # Some packages read these when they are imported, and choosing a device imports torch.
    os.environ.update(common_environment())
    if config.visible_devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = config.visible_devices
    device = choose_device(config.device)
    output = Path(config.output_dir).expanduser().resolve()
    output.mkdir(parents=True, exist_ok=True)
    os.environ["TENSORBOARD_DIR"] = str(output / "tensorboard")
    link = StoreLink(store, config.run_id, patience=config.deadlines.store)
    try:
        training = TrainingRun.acquire(link, config.training_run_id, "sft" if sft else config.algorithm)
        tell(
            training,
            f"training run {training.identity.training_run_id}, epoch {training.identity.trainer_epoch}",
        )
        with _reported_end(training, output / "checkpoints"), stoppable():
            (_tune if sft else _train)(config, device, output, link, training)
    finally:
        link.close()


@contextmanager
def _reported_end(training: TrainingRun, checkpoints: Path) -> Iterator[None]:
    """Ends the training run in the store as this process ends."""
    try:
        yield
    except (StoppedError, KeyboardInterrupt):
        training.finish(TrainingRunStatus.STOPPED, result=_result(training, checkpoints))
        raise
    except BaseException as error:
        _finish_failed(training, error)
        raise
    stopped = training.stop_requested
    status = TrainingRunStatus.STOPPED if stopped else TrainingRunStatus.SUCCEEDED
    if not stopped and (cancelled := training.cancel_unfinished()):
        tell(training, f"cancelled {cancelled} unfinished rollouts that were asked for ahead")
    training.finish(status, result=_result(training, checkpoints))


def _result(training: TrainingRun, checkpoints: Path) -> dict[str, Any] | None:
    """Where the last committed checkpoint and its model lie, and which was best; None before the first."""
    if not training.checkpoint_id:
        return None
    last, best = checkpoints / training.checkpoint_id, read_best(checkpoints)
    result: dict[str, Any] = {"checkpoint": str(last), "model": str(hugging_face_folder(last))}
    return result if best is None else {**result, "best": asdict(best)}


def _finish_failed(training: TrainingRun, error: BaseException) -> None:
    try:
        training.finish(TrainingRunStatus.FAILED, error)
    except StoreError as second:
        # The first error is the one to raise; this one only says that the store does not know of it.
        say(f"could not tell the store that the training run failed: {second}")


def _verl_config(
    config: RunConfig, device: str, output: Path, resume: dict[str, Any], store: str = ""
) -> DictConfig:
    """verl's configuration; ``store`` is the address that engines which verl starts are told."""
    from agl_grpc.learner.verl.config import compose
    from agl_grpc.learner.verl.keys import check_best_of

    backend = config.engines.backend
    told: dict[str, Any] = {}
    if config.engines.hybrid and store:
        # NCCL refuses a group of two processes on one GPU.
        backend = "gloo"
        served = {"store": store, "run_id": config.run_id, "model": config.model.name}
        # In a cluster each serves at the address of its own node.
        host = "" if config.ray_address else config.engines.host
        told = {**served, "spool": str(output / "spool"), "host": host}
    fixed: dict[str, Any] = {
        "data": {
            "train_files": str(Path(config.train_tasks).expanduser()),
            "val_files": str(Path(config.val_tasks or config.train_tasks).expanduser()),
            "seed": config.seed,
            "agl_rollouts_per_task": config.rollouts_per_task,
        },
        "actor_rollout_ref": {
            "model": {"path": str(Path(config.model.path).expanduser())},
            "rollout": {
                "checkpoint_engine": {
                    "engine_kwargs": {"agl": {"host": config.engines.host, "collective": backend}}
                }
            },
        },
        "trainer": {
            "default_local_dir": str(output / "checkpoints"),
            "experiment_name": config.training_run_id or config.run_id,
            **resume,
        },
    }
    composed = compose(config.verl, device=device, fixed=fixed, hybrid=told)
    if config.best_of.keep:
        check_best_of(composed)
    return composed


def _train(config: RunConfig, device: str, output: Path, link: StoreLink, training: TrainingRun) -> None:
    from agl_grpc.learner.verl.config import validate

    for message in (".*engine is not available.*", "Disabled critic.*", ".*set_vital.*"):
        # verl and torchdata say these of themselves at every start; none of them is about this run.
        warnings.filterwarnings("ignore", message=message)
    if config.engines.hybrid and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engines.hybrid: verl cannot start vLLM, which is not installed here; run the learner in the "
            "hybrid environment (`agl-grpc env create hybrid`)"
        )
    resume, step = _taken_up(config, output, training)
    verl = _verl_config(config, device, output, resume, link.address)
    gpus = int(verl.trainer.n_gpus_per_node) * int(verl.trainer.nnodes)
    if resume:
        check_fits(Path(resume["resume_from_path"]), Path(config.model.path).expanduser(), gpus)
    manifest = {"config": verl, **_made_by(config, device), **_datasets(config, output)}
    _write_manifest(output / f"learner-{training.identity.trainer_epoch}.json", manifest)
    tell(training, "importing verl")
    os.environ.update(worker_environment(device))
    # Not beside Ray's start, although both take seconds: what verl imports adds to Ray's usage tags, which
    # Ray's start walks through.
    importlib.import_module("agl_grpc.learner.trainer")
    from agl_grpc.learner.verl.reward_loop import take_rewards

    rewards = take_rewards(verl, config.reward_endpoint)
    # The rollouts that it follows are judged by the learner that asks for them.
    rewards = None if config.follows else rewards
    tell(training, "starting Ray")
    others = rewards.reward.num_workers if rewards is not None else 0
    queue_in_ray = bool(verl.transfer_queue.enable)
    with local_ray(device=device, gpus=gpus, address=config.ray_address, others=others, queue=queue_in_ray):
        from agl_grpc.learner.reporting import Reporting, TrajectorySamples
        from agl_grpc.learner.verl.local_queue import row_queue

        validate(verl)
        samples = TrajectorySamples(output, config.trajectories, config.model.path, say)
        about = {
            "algorithm": config.algorithm,
            "run": config.run_id,
            "seed": config.seed,
            "model": config.model.name,
        }
        with (
            row_queue(verl) as queue,
            closing(Reporting(training, output, config.alarms, about, say)) as reporting,
            closing(samples),
            _reward_loop(config, rewards, link) as judging,
        ):
            trainer, manager = _assemble(
                config, verl, output, link, training, step, reporting, samples, queue
            )
            if judging is not None:
                judging.start(manager.deliver)
            tell(training, "starting verl's workers, loading the model, publishing its weights")
            trainer.init()
            tell(training, f"training {trainer.total_training_steps} steps: waiting for the first rollouts")
            trainer.fit(manager)


@contextmanager
def _reward_loop(
    config: RunConfig, rewards: DictConfig | None, link: StoreLink
) -> Iterator[RewardLoop | None]:
    """verl's reward workers, where its configuration asks for them."""
    if rewards is None:
        yield None
        return
    from agl_grpc.learner.batch.tokens import decoder
    from agl_grpc.learner.verl.reward_loop import RewardLoop

    decode = decoder(Path(config.model.path).expanduser())
    with closing(RewardLoop(link, rewards, config.reward_endpoint, decode)) as judging:
        yield judging


def _tune(config: RunConfig, device: str, output: Path, link: StoreLink, training: TrainingRun) -> None:
    """Supervised fine-tuning: reads, trains, saves one checkpoint."""
    from agl_grpc.learner.supervised import sft

    verl = _verl_config(config, device, output, {})
    _write_manifest(
        output / f"learner-{training.identity.trainer_epoch}.json",
        {"config": verl, **_made_by(config, device), "sft": asdict(config.sft)},
    )
    found = sft.collect(link, config.run_id, _rules(link, config.run_id, config), config.sft)
    tell(training, f"{found.kept} of {found.seen} rollouts are good enough: {len(found.rows)} rows")
    os.environ.update(worker_environment(device))

    def on_step(step: int, total: int, metrics: dict[str, float]) -> bool:
        say(f"step {step}/{total}  loss {metrics['sft/loss']:.4f}  tokens {metrics['tokens/trained']:.0f}")
        training.report(step, metrics)
        return training.stop_requested

    worker, step = sft.train(verl, config.sft, found, config.seed, on_step)
    saved = sft.save(worker, output / "checkpoints", step, training.identity.origin)
    training.commit(saved.name, [], step)


def _taken_up(config: RunConfig, output: Path, training: TrainingRun) -> tuple[dict[str, Any], int]:
    """Where this trainer begins: verl's keys for it and the step, 0 = the first prompt."""
    resume: dict[str, Any] = {}
    step = 0
    if config.resume and training.checkpoint_id:
        resume = resume_keys(output / "checkpoints", training.checkpoint_id)
        state = LearnerState.read(Path(resume["resume_from_path"]))
        training.go_on_from(state.origin)
        step = state.step
        tell(training, f"continuing from checkpoint {training.checkpoint_id}")
    elif config.resume:
        training.go_on_from(1)
        tell(training, "no committed checkpoint: starting from the beginning")
    cancelled = training.discard_leftovers(step, alone=not config.followers)
    if cancelled:
        tell(training, f"cancelled {cancelled} unfinished rollouts of an earlier trainer")
    return resume, step


def _made_by(config: RunConfig, device: str) -> dict[str, Any]:
    """What this trainer's results depend on beside verl's configuration."""
    return {
        "device": device,
        "seed": config.seed,
        "started": now(),
        "contract": CONTRACT,
        "versions": {"learner": versions_here(LEARNER_PACKAGES)},
        "git": git_state(),
        "hardware": hardware(),
        "rollouts_per_task": config.rollouts_per_task,
        "curriculum": asdict(config.curriculum),
    }


def _datasets(config: RunConfig, output: Path) -> dict[str, Any]:
    """Numbers of tasks and digests, unless the run's manifest has them."""
    if (output / "manifest.json").is_file():
        return {}
    files = {"train": config.train_tasks, "val": config.val_tasks}
    try:
        found = {name: dataset_digest(JsonlTasks(path)) for name, path in files.items() if path}
    except DatasetError as error:
        raise ConfigError(str(error)) from error
    return {"datasets": found}


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    from omegaconf import OmegaConf

    plain = {**manifest, "config": OmegaConf.to_container(manifest["config"], resolve=True)}
    path.write_bytes(orjson.dumps(plain, option=orjson.OPT_INDENT_2))


def _assemble(
    config: RunConfig,
    verl: DictConfig,
    output: Path,
    link: StoreLink,
    training: TrainingRun,
    step: int,
    reporting: Reporting,
    samples: TrajectorySamples,
    queue: LocalQueue | None,
) -> tuple[AglTrainer, Any]:
    """Trainer and manager, wired to the store."""
    from agl_grpc.learner.batch.checks import LogprobLimits
    from agl_grpc.learner.batch.tokens import decoder, vocabulary_size
    from agl_grpc.learner.hooks import Hooks
    from agl_grpc.learner.publication import Publisher, lineage_of
    from agl_grpc.learner.rollouts.curriculum import TaskOrder, begin_with, stored_rewards
    from agl_grpc.learner.rollouts.followed_source import FollowedSource, leaders_origin
    from agl_grpc.learner.rollouts.store_source import StoreSource
    from agl_grpc.learner.trainer import AglTrainer
    from agl_grpc.learner.verl.manager import RolloutManager

    identity = training.identity
    lineage = lineage_of(link, config.model.name, identity.training_run_id, step)
    replay = training.released(step) if identity.is_resumed else {}
    rollout = verl.actor_rollout_ref.rollout
    model = Path(config.model.path).expanduser()
    name, origin = identity.training_run_id, identity.origin
    seed = config.seed if config.request_seeds else None
    # An engine that verl starts has its address published only once it serves.
    binding = ResourceBinding.AT_LEASE if config.engines.hybrid else None
    make_source: Callable[..., StoreSource] = partial(StoreSource, seed=seed, binding=binding)
    if config.follows:
        name = config.follows
        origin = leaders_origin(link, identity.run_id, name, config.deadlines.sample)
        make_source = partial(FollowedSource, leader=name, labels={TRAINING_LABEL: f"{name}/{origin}"})
    rules = _rules(link, identity.run_id, config)
    source = make_source(
        link,
        identity,
        rules=config.rollouts,
        samples=rules,
        lineage=lineage,
        rewards=frozen_rewards(replay, rules),
        decode=decoder(model),
    )
    manager = RolloutManager(
        source,
        group_size=int(rollout.n),
        validation_size=int(rollout.val_kwargs.n),
        temperature=float(rollout.temperature),
        keep_empty=bool(config.follows),
        vocabulary=vocabulary_size(model),
        queue=queue,
    )
    source.start(manager.deliver)
    engines, receivers = _engines(config, verl)
    waits = Waits(link)
    publisher = Publisher(
        link,
        identity,
        model=config.model.name,
        engines=engines,
        receivers_per_engine=receivers,
        deadline=config.deadlines.publish,
        engine_deadline=config.deadlines.engines,
        lineage=lineage,
        partners=config.followers,
        partner_deadline=config.deadlines.sample,
        waits=waits,
    )
    if config.follows or config.followers:
        link.start(heed_stop(training, manager, waits))
    checkpoints = Checkpoints(output / "checkpoints", training.commit, keep=config.keep_checkpoints)
    note = checkpoints.note_score if config.validation.keep_best else lambda _step, _score: False

    def on_metrics(at: int, metrics: dict[str, float]) -> bool:
        return reporting.step(at, trainer.total_training_steps, metrics)

    def order(dataset: Any) -> TaskOrder:
        made = TaskOrder(config.curriculum, len(dataset), config.seed, manager)
        manager.keep_rewards = True
        if step == 0:
            known = begin_with(made, dataset, stored_rewards(link, config.curriculum.runs))
            say(f"curriculum: {known} of {len(dataset)} tasks were tried before")
        return made

    hooks = Hooks(
        source=source,
        publication=publisher,
        checkpoints=checkpoints,
        run_name=f"{name.replace('_', '-')}.t{origin}",
        origin=identity.origin,
        best_of=config.best_of,
        queue=queue,
        leaders_batch=source.ask_for_batch if isinstance(source, FollowedSource) else None,
        replay={at: [batch_groups(batch) for batch in batches] for at, batches in replay.items()},
        limits=LogprobLimits(config.checks.logprob_max, config.checks.logprob_mean),
        deadlines=config.deadlines,
        failure_limit=config.failure_limit,
        order=order if config.curriculum.enabled else None,
        on_metrics=on_metrics,
        is_stopping=lambda: waits.released,
        on_rollouts=samples.step,
        validation=_validation(config, rollout, link, training, note, waits),
        on_error=lambda at, name: training.report(at, {f"errors/{name}": 1.0}),
        say=lambda text: tell(training, text),
    )
    trainer = AglTrainer(verl, hooks)
    return trainer, manager


def _validation(
    config: RunConfig,
    rollout: DictConfig,
    link: StoreLink,
    training: TrainingRun,
    note: Callable[[int, float], bool],
    waits: Waits,
) -> Validation:
    """How the weights are scored during training: by the leader, where there are several models."""
    from agl_grpc.learner.validation import FollowedValidation, StoreValidation, sampling_of

    val = config.validation
    if config.follows:
        deadline = val.timeout + config.deadlines.sample
        return FollowedValidation(link, config.follows, note, waits=waits, deadline=deadline)
    plan = Pass(
        name=config.training_run_id or config.run_id,
        samples=int(rollout.val_kwargs.n),
        sampling=sampling_of(rollout.val_kwargs, val.max_tokens or None, val.seed),
        queue=val.queue or None,
        config=config.rollouts,
        timeout=val.timeout,
    )
    identity = training.identity
    prefix = f"{identity.training_run_id.replace('_', '-')}.t{identity.trainer_epoch}"
    return StoreValidation(link, prefix, plan, note, models=(config.model.name, *config.followers))


def _engines(config: RunConfig, verl: DictConfig) -> tuple[int, int]:
    """How many engines there are, and how many workers of each take weights."""
    if not config.engines.hybrid:
        return config.engines.count, config.engines.receivers
    rollout = verl.actor_rollout_ref.rollout
    each = int(rollout.tensor_model_parallel_size) * int(rollout.pipeline_model_parallel_size)
    ranks = int(verl.trainer.n_gpus_per_node) * int(verl.trainer.nnodes)
    return ranks // each, each


def _rules(link: StoreLink, run_id: str, config: RunConfig) -> SampleRules:
    """What is trained; where the configuration says nothing of rewards, the run's graders do."""
    samples = config.samples
    if not samples.reward_weights and samples.reward_name == PRIMARY:
        run = link.run(link.client.get_run_by_id(run_id))
        if run is not None and run.reward_weights:
            samples = replace(samples, reward_weights=run.reward_weights)
    return samples.rules(config.model.name)
