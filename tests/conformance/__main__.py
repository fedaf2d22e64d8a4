"""`make conformance`: every vector in every language, as a matrix; what the stores hold is compared."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.conformance.languages import LANGUAGES
from tests.conformance.replay import vectors
from tests.conformance.stored import stored_state
from tests.support.store_process import StoreProcess


def main() -> int:
    """Replays all; 1 when a vector fails or a language leaves another state than Python."""
    outcomes: dict[str, dict[str, str]] = {}
    states: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, language in LANGUAGES.items():
            print(f"{name}: building and replaying", flush=True)
            language.make()
            with StoreProcess(Path(folder) / f"{name}.db") as store:
                outcomes[name] = language.outcomes(store.address)
                states[name] = stored_state(store.address)
    return _report(outcomes, states)


def _report(outcomes: dict[str, dict[str, str]], states: dict[str, Any]) -> int:
    width = max(len(path.stem) for path in vectors())
    print(f"\n{'':{width}}  " + "  ".join(outcomes))
    failed = 0
    for path in vectors():
        row = {name: found.get(path.stem, "not replayed") for name, found in outcomes.items()}
        print(
            f"{path.stem:{width}}  "
            + "  ".join(f"{'ok' if row[name] == 'ok' else 'FAILED':{len(name)}}" for name in row)
        )
        for name, outcome in row.items():
            if outcome != "ok":
                failed += 1
                print(f"  {name}: {outcome}")
    for name, state in states.items():
        same = state == states["python"]
        failed += not same
        print(f"stored state and span bytes, {name}: {'as Python leaves them' if same else 'DIFFER'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
