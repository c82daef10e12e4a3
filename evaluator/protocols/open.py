"""Protocol `open`: instruction following as MiniLLM measures it (Gu et al. 2024, arXiv 2306.08543).

Each item is asked with the clean Alpaca prompt and answered five times, by sampling at temperature 1 with the seeds
10, 20, 30, 40, 50; an answer's score is ROUGE-L (F1, with stemming) against the best of its references, by Google's
`rouge-score`. There is one row an answer; summaries average the five before they average the items.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from tutelage.data.prompts import Template, prompt_ids, prompt_text
from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.models.base import Engine, Sampling
from tutelage.evaluator.protocols.base import Prompt, TooLong, require_room, text_hash
from tutelage.evaluator.tasks.base import Item, Task

METRIC = "rougeL"
_TEMPLATE: Template = "alpaca"
# MiniLLM's scripts/gpt2/eval/run_eval.sh.
SEEDS = (10, 20, 30, 40, 50)
_TEMPERATURE = 1.0
_MAX_PROMPT_TOKENS = 256


def sampling_of(task: Task, settings: EvaluationSettings) -> Sampling:
    """At temperature 1, with the task's limit unless the settings have one."""
    return Sampling(_TEMPERATURE, settings.max_new_tokens or task.max_new_tokens)


def seeds_of(seed: int) -> tuple[int, ...]:
    """MiniLLM's five, whatever the evaluation's."""
    return SEEDS


def template_of(settings: EvaluationSettings) -> str:
    """Name of the prompt template."""
    return _TEMPLATE


def prepare(task: Task, item: Item, engine: Engine, settings: EvaluationSettings, seed: int) -> Prompt:
    """The item's prompt as token ids.

    Raises:
        InvalidRequest: prompt and answer do not fit into the model's context.
        TooLong: the prompt has more than 256 tokens; MiniLLM leaves such items out.

    """
    text = prompt_text(_TEMPLATE, item.conversation, engine.tokenizer)
    ids = prompt_ids(_TEMPLATE, text, engine.tokenizer)
    if len(ids) > _MAX_PROMPT_TOKENS:
        raise TooLong(f"the prompt has {len(ids)} tokens; this protocol asks with at most {_MAX_PROMPT_TOKENS}")
    require_room(len(ids), sampling_of(task, settings), engine)
    return Prompt(item, seed, ids, text_hash(text))


def answer(
    task: Task, questions: Sequence[Prompt], engine: Engine, settings: EvaluationSettings
) -> list[dict[str, Any]]:
    """What of the rows this protocol knows, one a question."""
    sampling = sampling_of(task, settings)
    seeds = [question.generation_seed(task) for question in questions]
    completions = engine.generate([question.prompt_ids for question in questions], seeds, sampling)
    return [
        {
            "sampling_temperature": _TEMPERATURE,
            "output": completion.text.strip(),
            "score": rouge_l(completion.text.strip(), question.item.references),
            "prompt_tokens": question.tokens,
            "output_tokens": completion.tokens,
            "finish_reason": completion.finish_reason,
        }
        for question, completion in zip(questions, completions, strict=True)
    ]


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(output: str, references: Sequence[str]) -> float | None:
    """The best F1 over the references, in [0, 1]; None without a reference."""
    if not references:
        return None
    return max(float(_scorer().score(reference, output)["rougeL"].fmeasure) for reference in references)
