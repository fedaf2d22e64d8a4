"""`agl-grpc eval`: how good a checkpoint is on a dataset, and whether it is better than another."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agl_grpc_cli.errors import EXIT_INTERRUPTED, CliError
from agl_grpc_cli.options import JsonOption
from agl_grpc_cli.output import print_json, print_table

if TYPE_CHECKING:
    from agl_grpc.evaluation import Comparison, Evaluation, Sampling
    from agl_grpc.trainer import Trainer

app = typer.Typer(help="Evaluate a checkpoint on a dataset.")

_API_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class _Settings:
    """The command line, once for each model that is evaluated."""

    dataset: Any
    agent: str
    n: int
    sampling: Sampling
    ks: tuple[int, ...]
    success: float
    weights: dict[str, float]
    graders: list[str]
    fields: list[str]
    find_answer: str
    endpoint: str
    model: str
    engine_arguments: list[str]
    engine_python: str | None
    runners: int
    concurrency: int
    timeout: float
    run_dir: Path
    resume: bool


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A run's folder, a checkpoint, a model in Hugging Face form, or an evaluation.json. "
            "With --endpoint: the dataset.",
        ),
    ],
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="[DATASET]",
            help="Tasks: JSONL, Parquet, a saved dataset, or module:name.",
            show_default=False,
        ),
    ] = "",
    agent: Annotated[str, typer.Option(metavar="MODULE:NAME", help="The agent that does the tasks.")] = "",
    n: Annotated[int, typer.Option("--n", help="Answers to each task.")] = 1,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 = the likeliest token.")] = 1.0,
    top_p: Annotated[float | None, typer.Option(help="Of sampling.", show_default=False)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer of one call, in tokens.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the requests: the same seed asks the same.")] = 0,
    k: Annotated[
        list[int] | None, typer.Option("--k", help="The k of pass@k; repeatable. Default: 1, 2, 4, … n.")
    ] = None,
    success: Annotated[float, typer.Option(help="The reward from which an answer is right.")] = 1.0,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WEIGHT", help="Of a named reward; repeatable. Default: the primary reward."
        ),
    ] = None,
    grader: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:NAME", help="Judges answers in the agent's place; repeatable."),
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="A key that every task must have; repeatable.")
    ] = None,
    find_answer: Annotated[
        str, typer.Option(metavar="MODULE:NAME", help="Finds the final answer in a text, for maj@n.")
    ] = "",
    compare: Annotated[
        str, typer.Option(metavar="OTHER", help="A checkpoint or an evaluation.json to compare with.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report; default: the run's.", show_default=False)
    ] = None,
    run: Annotated[str, typer.Option("--run", metavar="NAME", help="Name of this evaluation.")] = "",
    run_dir: Annotated[Path, typer.Option(help="Where evaluations lie.")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with --run, which was broken off.")] = False,
    endpoint: Annotated[
        str, typer.Option(metavar="URL", help="A model that is served already, instead of CHECKPOINT.")
    ] = "",
    model: Annotated[str, typer.Option(help="Its name there.")] = "",
    engine_argument: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ARGUMENT", help="One of vLLM's arguments; repeatable: --engine-argument=--dtype."
        ),
    ] = None,
    engine_python: Annotated[
        str | None, typer.Option(help="Python of the engine environment.", show_default=False)
    ] = None,
    runners: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    concurrency: Annotated[int, typer.Option(help="Rollouts at once in each.")] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds for the whole evaluation.")] = 3600.0,
    as_json: JsonOption = False,
) -> None:
    """Have each task answered n times and say how good that was, and how surely.

    Starts store, engine and workers by itself. Nothing of it is ever trained. CHECKPOINT and --compare may
    both be evaluations that were made before: then nothing is started.

    \b
    Examples:
      agl-grpc eval runs/mine tasks/test.jsonl --agent my_agent:agent --n 8 --temperature 0.7
      agl-grpc eval runs/mine tasks/test.jsonl --agent my_agent:agent --n 8 --compare models/start
      agl-grpc eval tasks/test.jsonl --agent my_agent:agent --endpoint http://127.0.0.1:8000/v1 --model m
      agl-grpc eval runs/eval-b/evaluation.json --compare runs/eval-a/evaluation.json
    """
    from agl_grpc.evaluation import EvaluationError, Sampling
    from agl_grpc.evaluation import compare as compare_two
    from agl_grpc.trainer.errors import TrainerError

    if endpoint:
        checkpoint, dataset = "", checkpoint
    name = run or time.strftime("eval-%Y%m%d-%H%M%S")
    try:
        settings = _Settings(
            dataset=dataset,
            agent=agent,
            n=n,
            sampling=Sampling(temperature, top_p, max_tokens, seed),
            ks=tuple(k or _powers(n)),
            success=success,
            weights=_weights(weight or []),
            graders=grader or [],
            fields=field or [],
            find_answer=find_answer,
            endpoint=endpoint,
            model=model,
            engine_arguments=engine_argument or [],
            engine_python=engine_python,
            runners=runners,
            concurrency=concurrency,
            timeout=timeout,
            run_dir=run_dir,
            resume=resume,
        )
        # What is shown on the way goes beside JSON, not into it.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            other = _evaluation(compare, f"{name}-other", settings, None) if compare else None
            found = _evaluation(checkpoint, name, settings, output)
        comparison = compare_two(other, found, seed) if other else None
        folder = _write(output or run_dir / name, found, other, comparison)
    except (TrainerError, EvaluationError) as error:
        raise CliError(str(error)) from error
    except KeyboardInterrupt:
        again = f"; go on with --run {name} --resume" if agent else ""
        raise CliError(f"interrupted; everything was stopped{again}", exit_code=EXIT_INTERRUPTED) from None
    _show([*([other] if other else []), found], comparison, folder, as_json)


def _evaluation(what: str, name: str, settings: _Settings, output: Path | None) -> Evaluation:
    """An evaluation that was made before, or one that is made now."""
    from agl_grpc.evaluation import Evaluation
    from agl_grpc.trainer.errors import TrainerError
    from agl_grpc.trainer.files import read_dataset

    path = Path(what) if what else None
    if path is not None and (path.suffix == ".json" or (path / "evaluation.json").is_file()):
        return Evaluation.read(path)
    if not settings.dataset or not settings.agent:
        lacking = "DATASET" if not settings.dataset else "--agent MODULE:NAME"
        raise TrainerError(f"{what or settings.endpoint} is to be evaluated: give {lacking}")
    tasks = read_dataset("DATASET", settings.dataset) or ()
    return _trainer(name, settings, served=not what).evaluate(
        settings.agent,
        tasks,
        checkpoint=what or None,
        n=settings.n,
        sampling=settings.sampling,
        ks=settings.ks,
        success=settings.success,
        weights=settings.weights,
        fields=settings.fields,
        find_answer=settings.find_answer,
        output=output,
    )


def _trainer(name: str, settings: _Settings, *, served: bool) -> Trainer:
    from agl_grpc.trainer import EngineOptions, Trainer
    from agl_grpc.trainer.evaluation_session import endpoint
    from agl_grpc_cli.graders import load_graders

    llm: Any = EngineOptions(arguments=settings.engine_arguments)
    if served:
        llm = endpoint(settings.endpoint, settings.model, os.environ.get(_API_KEY))
    # A second evaluation of the same command may not have begun when the first was broken off.
    begun = (settings.run_dir / name / "manifest.json").is_file()
    return Trainer(
        llm_proxy=llm,
        runner={"concurrency": settings.concurrency},
        n_runners=settings.runners,
        run_name=name,
        run_dir=settings.run_dir,
        resume=settings.resume and begun,
        validation={"timeout_seconds": settings.timeout},
        engine_python=settings.engine_python,
        graders=load_graders(settings.graders) if settings.graders else None,
    )


def _write(
    folder: Path, found: Evaluation, other: Evaluation | None, comparison: Comparison | None
) -> Path | None:
    """Writes the report of a comparison; answers the folder in which a report lies."""
    from agl_grpc.evaluation import write_report

    if other is None or comparison is None:
        return folder if (folder / "report.html").is_file() else None
    for line in write_report(folder, [other, found], comparison):
        typer.echo(line, err=True)
    return folder


def _show(
    evaluations: list[Evaluation], comparison: Comparison | None, folder: Path | None, as_json: bool
) -> None:
    if as_json:
        summaries = [each.summary() for each in evaluations]
        compared = comparison.to_dict() if comparison else None
        print_json({"evaluations": summaries, "comparison": compared, "folder": str(folder or "")})
        return
    from agl_grpc.evaluation.report import figures_table

    heads, rows = figures_table(evaluations)
    print_table([head.upper() for head in heads], rows, empty="nothing was evaluated")
    if comparison is not None:
        typer.echo(comparison.sentence)
    if folder is not None:
        typer.echo(f"report: {folder / 'report.html'}")


def _powers(n: int) -> list[int]:
    """1, 2, 4, … below n, and n."""
    return [*(2**power for power in range(max(n, 1).bit_length()) if 2**power < n), max(n, 1)]


def _weights(texts: list[str]) -> dict[str, float]:
    weights = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            raise typer.BadParameter(f"--weight {text!r}: write NAME=NUMBER") from None
    return weights
