"""What the interceptor relies on inside vLLM, read from vLLM's source text without importing it.

``python -m tests.interceptor.vllm_signatures FOLDER VERSION`` (a folder that holds the package `vllm`, as a
wheel does) records it in `vllm_recorded/VERSION.json`: so versions that cannot be installed beside each other
can be checked all the same.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

RECORDED = Path(__file__).parent / "vllm_recorded"

ENGINE = "vllm/v1/engine"

CLASSES = {
    f"{ENGINE}/async_llm.py": ["AsyncLLM"],
    f"{ENGINE}/output_processor.py": ["OutputProcessor", "RequestState", "RequestOutputCollector"],
    f"{ENGINE}/logprobs.py": ["LogprobsProcessor"],
    f"{ENGINE}/detokenizer.py": ["IncrementalDetokenizer"],
    f"{ENGINE}/__init__.py": ["EngineCoreRequest", "EngineCoreOutput"],
    f"{ENGINE}/core_client.py": ["EngineCoreClient"],
    "vllm/outputs.py": ["CompletionOutput", "RequestOutput"],
    "vllm/sampling_params.py": ["SamplingParams"],
    "vllm/v1/metrics/stats.py": ["RequestStateStats"],
}
"""Where vLLM's classes that we use stand."""


def read(root: Path) -> dict[str, object]:
    """Methods with their parameters, and attributes, of the classes; and what is there or not."""
    found: dict[str, object] = {}
    for path, names in CLASSES.items():
        tree = ast.parse((root / path).read_text())
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name in names:
                found[node.name] = {"methods": _methods(node), "attributes": sorted(_attributes(node))}
    exceptions = ast.parse((root / "vllm/exceptions.py").read_text())
    found["exceptions"] = sorted(node.name for node in exceptions.body if isinstance(node, ast.ClassDef))
    engine = (root / ENGINE / "__init__.py").read_text()
    found["finish reasons"] = next(
        line for line in engine.splitlines() if line.startswith("FINISH_REASON_ST")
    )
    found["endpoint plugins"] = (root / "vllm/plugins/endpoint_plugins").is_dir()
    arguments = (root / "vllm/engine/arg_utils.py").read_text()
    found["general plugins are loaded by EngineArgs"] = "load_general_plugins()" in arguments
    found["our server entry"] = (root / "vllm/entrypoints/launchers/api_server/entry.py").is_file()
    return found


def _methods(node: ast.ClassDef) -> dict[str, list[str]]:
    """Parameters by method, positional ones first."""
    methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {
        each.name: [a.arg for a in [*each.args.posonlyargs, *each.args.args, *each.args.kwonlyargs]]
        for each in methods
    }


def _attributes(node: ast.ClassDef) -> set[str]:
    """Fields of the class, and what its methods set on `self`."""
    names = set()
    for each in ast.walk(node):
        match each:
            case ast.AnnAssign(target=ast.Name(id=name)) if each in node.body:
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def main() -> None:
    """Record one version."""
    root, version = Path(sys.argv[1]), sys.argv[2]
    RECORDED.mkdir(exist_ok=True)
    (RECORDED / f"{version}.json").write_text(json.dumps(read(root), indent=1) + "\n")


if __name__ == "__main__":
    main()
