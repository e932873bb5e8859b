"""The command `sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import numbers
from .options import Out, RecipePath, Set
from .running import reported, start

if TYPE_CHECKING:
    from ..align import PairsSummary

__all__ = ["sample"]


def sample(
    recipe: RecipePath,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="New .jsonl file of the pairs.")],
    prompts: Annotated[list[str], typer.Option("--prompts", metavar="PATH", help="Records with a prompt; repeatable.")],
    overrides: Set = None,
    out: Out = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="Hugging Face folder, not the run's newest student.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option("--reward", metavar="NAME", help="answer (default), code, model, column or a plugin's."),
    ] = None,
    reward_model: Annotated[
        Path | None, typer.Option("--reward-model", metavar="DIR", help="Hugging Face folder, for --reward model.")
    ] = None,
    answers: Annotated[
        int | None, typer.Option("--answers", metavar="N", help="Answers per prompt; 4 by default.")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", metavar="T", help="1 by default.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="SHARE", help="Nucleus sampling; 1 by default.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", help="Per answer; 512 by default.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Prompts to answer; all by default.")
    ] = None,
) -> None:
    """Sample answers to prompts, rate them, and write the best and the worst as preference pairs."""
    from ..align import AnswerSettings
    from ..run import sample_pairs

    loaded, topology = start(recipe, overrides, out)
    given: dict[str, Any] = {
        "prompts": tuple(prompts),
        "reward": reward,
        "reward_model": reward_model,
        "answers": answers,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "limit": limit,
    }
    settings = AnswerSettings(**{key: value for key, value in given.items() if value is not None})
    with reported(loaded, topology) as listener:
        summary = sample_pairs(loaded, topology, settings, to, model=model, listener=listener)
    if topology.rank == 0:
        _print(summary, to)


def _print(summary: PairsSummary, to: Path) -> None:
    pairs, prompts = numbers.counted(summary["pairs"], "pair"), numbers.counted(summary["prompts"], "prompt")
    print(f"{pairs} of {prompts} -> {to}")
    print(f"mean reward {summary['mean_reward']:.4g}, of the best answers {summary['mean_best']:.4g}")
    print(f"prompts whose answers all have the same reward: {summary['all_equal']}")
    if summary["ended"] is not None:
        print(f"answers that ended by themselves: {summary['ended']:.1%}")
