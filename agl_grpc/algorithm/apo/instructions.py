"""What the critic is told: three ways to judge, two ways to rewrite.

Places: ``{name}`` of the prompt at hand, its text ``{prompt}``, all prompts ``{prompts}``,
``{experiments}`` (what the agent did with them), and for rewriting ``{critique}``.
"""

from __future__ import annotations

from agl_grpc.algorithm.prompt.rewriting import RULES

SYSTEM = (
    "You improve the prompts of an AI agent. You see what the agent did with its prompts and how well it was "
    "rewarded; a higher reward is better. Be concrete, and stay with what the experiments show."
)

_CONTEXT = """The agent works with these prompts:

{prompts}

Experiments with them:

{experiments}
"""

CRITIQUES = (
    _CONTEXT
    + """
Look at the experiments with a low reward. Which words of the prompt `{name}`, or which missing words, led the
agent astray? Name at most four causes, the costliest first, each with the experiment that shows it and
with the kind of change that would have prevented it. Do not write the new prompt.
""",
    _CONTEXT
    + """
Compare the experiments that went well with those that did not. What does the prompt `{name}` leave to
chance that
decides between the two? Say in at most four points what it should state, forbid or ask for, as general
rules that also hold for tasks not seen here. Do not write the new prompt.
""",
    _CONTEXT
    + """
Read the prompt `{name}` as somebody who has to obey it literally. Where is it vague, contradictory, too
long, or
silent about the form of the answer, and where do the experiments show the harm? List at most four defects
in order of their harm, each with a remedy in one sentence. Do not write the new prompt.
""",
)

EDITS = (
    """The prompt `{name}` of an agent:
```
{prompt}
```

A critic says of it:

{critique}

Rewrite the prompt so that this criticism no longer applies. Change what the criticism names and keep the
rest."""
    + RULES,
    """An agent works with the prompt `{name}`:
```
{prompt}
```

What is wrong with it, according to its results:

{critique}

Write the prompt anew from its purpose, with this in mind: clear order, plain rules, no examples that only
fit a single task. It may differ from the old one as much as is useful."""
    + RULES,
)
