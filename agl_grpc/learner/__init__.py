"""The VERL learner: verl's own v1 trainer fed with sealed rollouts from the store.

Nothing heavy is imported here: torch, ray and verl are imported by the modules that need them, inside the
learner environment.
"""

from __future__ import annotations
