"""What importing costs, and what the product's code may never do: read from its syntax trees and from sys.modules."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import REPO

CORE = sorted((REPO / "core").rglob("*.py"))
PLUGINS = sorted(p for p in (REPO / "plugins").rglob("*.py") if "build" not in p.parts)
HEAVY = ("numpy", "pydantic", "yaml", "pluggy", "rich", "torch", "tokenizers", "asyncio")
TORCH = "plugins/runner_torch/nanovllm_runner_torch"
PACKAGES = {p.name for p in (REPO / "plugins").glob("*/*") if (p / "__init__.py").exists()}


@pytest.mark.parametrize(
    "code",
    [
        "import nanovllm",
        "sys.argv = ['nanovllm', '--help']\nfrom nanovllm.cli import main\ntry: main()\nexcept SystemExit: pass",
    ],
    ids=["import nanovllm", "nanovllm --help"],
)
def test_what_costs_time_is_not_loaded(code: str) -> None:
    program = f"import sys\n{code}\nprint('loaded:', *[m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "loaded:"
    if "--help" in code:
        assert "Usage" in done.stdout


def test_every_public_name_loads_and_is_listed() -> None:
    import nanovllm

    for name in nanovllm.__all__:
        assert getattr(nanovllm, name) is not None
        assert name in dir(nanovllm)
    with pytest.raises(AttributeError, match="no attribute 'LLMS'"):
        _ = nanovllm.LLMS


# ------------------------------------------------------------------------------------ syntax trees


def trees(paths: list[Path]) -> Iterator[tuple[str, ast.Module]]:
    for path in paths:
        yield str(path.relative_to(REPO)), ast.parse(path.read_text("utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    """Top-level names of the packages that a module imports, wherever in it; relative imports are its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def offences(paths: list[Path], forbidden: set[str]) -> list[str]:
    return [f"{path} imports {name}" for path, tree in trees(paths) for name in imports(tree) if name in forbidden]


def test_there_is_something_to_look_at() -> None:
    assert len(CORE) > 20
    assert len(PLUGINS) > 10
    assert "nanovllm_models" in PACKAGES


def test_the_core_imports_no_plugin_no_backend_and_no_network() -> None:
    backends = {"torch", "onnx", "onnxruntime", "transformers", "tokenizers", "safetensors", "jinja2", "sentencepiece"}
    network = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "xmlrpc"}
    assert offences(CORE, PACKAGES | backends | network) == []


def test_nothing_is_ever_unpickled() -> None:
    picklers = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    assert offences(CORE + PLUGINS, picklers) == []


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call by its dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_text_is_ever_executed() -> None:
    found = [
        f"{path}:{node.lineno} calls {name}"
        for path, tree in trees(CORE + PLUGINS)
        for name, node in calls(tree)
        if name in {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "builtins.exec", "builtins.eval"}
    ]
    assert found == []


def test_no_file_format_that_can_carry_code_is_read_with_code_allowed() -> None:
    found = []
    for path, tree in trees(CORE + PLUGINS):
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        safe = {c.name for c in classes if "yaml.SafeLoader" in map(ast.unparse, c.bases)} | {"yaml.SafeLoader"}
        for node in ast.walk(tree):  # under another name, the calls below would not be seen
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("torch", "yaml"):
                found += [f"{path}:{node.lineno} imports {a.name}" for a in node.names if a.name in ("load", "jit")]
        for name, node in calls(tree):
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            loader = options.get("Loader") or "".join(map(ast.unparse, node.args[1:2]))
            if name == "yaml.load" and loader not in safe:
                found.append(f"{path}:{node.lineno} yaml.load without a safe loader")
            if name in {"yaml.unsafe_load", "yaml.full_load", "yaml.load_all"}:
                found.append(f"{path}:{node.lineno} {name}")
            # torch's own formats: one file opens programs, one reads weights, each after asking what was allowed.
            is_restricted = path == f"{TORCH}/conversion.py" and options.get("weights_only") == "True"
            if name == "torch.load" and not is_restricted:
                found.append(f"{path}:{node.lineno} {name}")
            if name in {"torch.jit.load", "torch.export.load"} and path != f"{TORCH}/archive.py":
                found.append(f"{path}:{node.lineno} {name}")
            if name.rpartition(".")[2] in {"load_pt2", "import_ir_module", "aoti_load_package", "load_inline"}:
                found.append(f"{path}:{node.lineno} {name}")
            if name in {"np.load", "numpy.load", "np.fromfile"} and options.get("allow_pickle", "False") != "False":
                found.append(f"{path}:{node.lineno} {name} with pickle")
            if "trust_remote_code" in options:
                found.append(f"{path}:{node.lineno} trust_remote_code")
    assert found == []


def test_torch_opens_nothing_before_it_was_asked_whether_that_is_allowed() -> None:
    """In the one function that opens programs, and in the one that converts weights before it reads any."""
    for file, function, opening in (
        ("archive.py", "open_archive", {"torch.jit.load", "torch.export.load"}),
        ("conversion.py", "convert", {"_read"}),
    ):
        [(_, tree)] = trees([REPO / TORCH / file])
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        lines = {name: node.lineno for name, node in calls(functions[function])}
        assert lines["check_allowed"] < min(lines[name] for name in opening)
        inside = {name for name, _ in calls(functions[function])} & opening
        assert inside == opening
        everywhere = [name for name, _ in calls(tree) if name in opening]
        assert sorted(everywhere) == sorted(opening), "it is called in another place too"


def test_no_module_keeps_mutable_state() -> None:
    """Two engines in one process: no `global`, and no empty container waiting at module level to be filled."""
    found = []
    for path, tree in trees(CORE):
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                found.append(f"{path}:{node.lineno} global")
        for statement in tree.body:
            value = getattr(statement, "value", None) if isinstance(statement, (ast.Assign, ast.AnnAssign)) else None
            is_empty = (isinstance(value, (ast.List, ast.Set)) and not value.elts) or (
                isinstance(value, ast.Dict) and not value.keys
            )
            if is_empty:
                found.append(f"{path}:{statement.lineno} an empty container at module level")
    assert found == []
