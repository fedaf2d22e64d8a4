"""An agent whose reward is easy to see through, and a critic that knows how to raise it."""

from __future__ import annotations

import re

from agl_grpc import NamedResources, PromptTemplate, emit_message, prompt_rollout, rollout

WORDS = ("brief", "polite", "exact", "numbered")
FIRST = PromptTemplate(template="Answer {question}.")


@prompt_rollout
def wordy(task: dict[str, str], prompt_template: PromptTemplate) -> float:
    """The share of the good words that the prompt holds."""
    prompt = prompt_template.format(question=task["question"])
    emit_message(f"prompt was: {prompt}")
    return sum(word in prompt for word in WORDS) / len(WORDS)


@rollout
def two_prompts(task: dict[str, str], resources: NamedResources) -> float:
    """The first two words belong into the plan, the others into the answer."""
    plan, answer = resources["plan"], resources["answer"]
    assert isinstance(plan, PromptTemplate)
    assert isinstance(answer, PromptTemplate)
    texts = (plan.format(question=task["question"]), answer.format(question=task["question"]))
    return sum(word in texts[place // 2] for place, word in enumerate(WORDS)) / len(WORDS)


def helpful(model: str, message: str) -> str:
    """The critic names the first word that is missing, the editor adds it."""
    if model == "critic":
        prompts = "".join(re.findall(r"```\n(.*?)\n```", message, re.DOTALL))
        missing = [word for word in WORDS if word not in prompts]
        return f"It should be {missing[0]}." if missing else "Nothing is missing."
    found = re.search(r"```\n(.*?)\n```", message, re.DOTALL)
    assert found is not None
    word = re.search(r"It should be (\w+)\.", message)
    return f"Here it is:\n```\n{found[1]} {'Be ' + word[1] + '.' if word else ''}\n```"
