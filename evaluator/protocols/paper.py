"""Protocol `paper`: ask zero-shot, let the model write, read the answer by LLM-Adapters' rule and by a corrected one.

Source: LLM-Adapters' `evaluate.py` and `commonsense_evaluate.py` (Hu et al. 2023, arXiv 2304.01933). What the
model writes after a second "### Response:" is cut, as there. Special tokens are left out of the text; for math
LLM-Adapters keeps them, which changes no answer of a tokenizer whose end token has no digit and no capital A to E.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutelage.data.prompts import prompt_ids, prompt_text
from tutelage.errors import ConfigurationError
from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.models.base import Engine, Sampling
from tutelage.evaluator.protocols.base import Prompt, require_room, text_hash
from tutelage.evaluator.scoring.extraction import score
from tutelage.evaluator.tasks.base import Item, Task

METRIC = "accuracy"
_RESPONSE = "### Response:"


def sampling_of(task: Task, settings: EvaluationSettings) -> Sampling:
    """The task's limit unless the settings have one."""
    return Sampling(settings.sampling_temperature, settings.max_new_tokens or task.max_new_tokens)


def seeds_of(seed: int) -> tuple[int, ...]:
    """One answer an item, by the evaluation's seed."""
    return (seed,)


def template_of(settings: EvaluationSettings) -> str:
    """Name of the prompt template."""
    return settings.prompt


def prepare(task: Task, item: Item, engine: Engine, settings: EvaluationSettings, seed: int = 0) -> Prompt:
    """The item's prompt as token ids.

    Raises:
        ConfigurationError: the template is the model's chat template, and it has none.
        InvalidRequest: prompt and answer do not fit into the model's context.

    """
    if settings.prompt == "chat" and not engine.tokenizer.chat_template:
        raise ConfigurationError("the model has no chat template; choose another one, such as alpaca", "prompt")
    text = prompt_text(settings.prompt, item.conversation, engine.tokenizer)
    ids = prompt_ids(settings.prompt, text, engine.tokenizer)
    require_room(len(ids), sampling_of(task, settings), engine)
    return Prompt(item, seed, ids, text_hash(text))


def answer(
    task: Task, questions: Sequence[Prompt], engine: Engine, settings: EvaluationSettings
) -> list[dict[str, Any]]:
    """What of the rows this protocol knows, one a question."""
    seeds = [question.generation_seed(task) for question in questions]
    completions = engine.generate([question.prompt_ids for question in questions], seeds, sampling_of(task, settings))
    assert task.extraction is not None
    rows = []
    for question, completion in zip(questions, completions, strict=True):
        # A model that goes on asks itself the next question; LLM-Adapters cuts there as well.
        output = completion.text.split(_RESPONSE)[0].strip()
        extracted, corrected = task.extraction.paper(output), task.extraction.corrected(output)
        target = question.item.target
        rows.append(
            {
                "sampling_temperature": settings.sampling_temperature,
                "output": output,
                "extracted": extracted,
                "extracted_corrected": corrected,
                "score": score(task.extraction, extracted, target),
                "score_corrected": score(task.extraction, corrected, target),
                "prompt_tokens": question.tokens,
                "output_tokens": completion.tokens,
                "finish_reason": completion.finish_reason,
            }
        )
    return rows
