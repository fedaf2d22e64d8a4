"""What the reflecting model is told.

Places: ``{name}`` of the prompt at hand, its text ``{prompt}``, all prompts ``{prompts}``,
``{experiments}``, and ``{engine}`` and ``{places}`` of the template.
"""

from __future__ import annotations

from agl_grpc.algorithm.prompt.rewriting import RULES

SYSTEM = (
    "You improve the prompts of an AI agent by reflecting on what it did with them. A higher reward is "
    "better."
)

REFLECTION = (
    """An agent works with these prompts:

{prompts}

This is what it did on some tasks, with notes and rewards:

{experiments}

Write the prompt `{name}` anew so that the agent does better on tasks of this kind. First think about what the
tasks have in common, which knowledge about their domain the traces and notes reveal, and which strategy
earned reward where it was earned; put all of that into the prompt, because the agent will not see these
examples again.
"""
    + RULES
)
