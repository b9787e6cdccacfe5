"""The house's own rules: floors, sizes, docstrings, errors, configs and cards, start-up times.

The floors are those of the README's tree: a module imports its own room and the floors below it,
never sideways, never up, and not inside a function to dodge that.
"""

import ast
import doctest
import importlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hybridzoo

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hybridzoo"
MODULES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SCRIPTS = [*sorted((ROOT / "scripts").rglob("*.sh")), ROOT / ".ci" / "run"]

FLOORS = {
    "errors": 0,
    # below the rest of their floor: each of them may read options
    **dict.fromkeys(["options", "launcher"], 0.5),
    **dict.fromkeys(["pattern", "sharding", "comm", "tokenizer", "kernels"], 1),
    "layers": 2,
    **dict.fromkeys(["config", "recompute"], 3),
    "block": 3.5,
    **dict.fromkeys(["model", "describe"], 4),
    **dict.fromkeys(["inference", "parallel", "checkpoint"], 5),
    **dict.fromkeys(["zoo", "train", "eval", "plan", "serve", "show"], 6),
    **dict.fromkeys(["compat", "hf", "arguments", "cli"], 7),
}
# HybridLM's one-line methods, the only imports that may point up
UPWARD = {"generate", "from_pretrained", "save_pretrained", "push_to_hub"}

Scopes = tuple[ast.AST, ...]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def walk(node: ast.AST, scopes: Scopes = ()) -> Iterator[tuple[ast.AST, Scopes]]:
    """Every node with the classes and functions around it."""
    for child in ast.iter_child_nodes(node):
        yield child, scopes
        is_scope = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from walk(child, (*scopes, child) if is_scope else scopes)


def imported(node: ast.AST, path: Path) -> Iterator[str]:
    """The dotted names that a node imports, also by a string such as "hybridzoo.zoo:load"."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module_name(path).split(".")
            package = package if path.name == "__init__.py" else package[:-1]
            above = package[: len(package) - node.level + 1]
            base = ".".join([*above, *([base] if base else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        name = node.value.partition(":")[0]
        if name.startswith("hybridzoo.") and name.isprintable() and is_module(name):
            yield name


def room_of(target: str) -> str | None:
    """The room that a dotted name lies in; None outside hybridzoo and for its version."""
    head, _, rest = target.partition(".")
    if head != "hybridzoo" or rest == "__version__":
        return None
    return rest.split(".")[0]


def upward_imports(path: Path) -> Iterator[tuple[str, Scopes]]:
    """Each import of a module that its floor forbids, as a sentence, with its scopes."""
    own = module_name(path).split(".")[1]
    for node, scopes in walk(ast.parse(path.read_text())):
        for target in imported(node, path):
            room = room_of(target)
            if room is None or room == own:
                continue
            if room not in FLOORS or FLOORS[room] >= FLOORS[own]:
                yield f"{relative(path)}:{node.lineno} imports {target}", scopes


def test_every_room_has_a_floor():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert rooms - {"__init__"} <= set(FLOORS)


def test_imports_point_down():
    offences = []
    for path in set(MODULES) - {PACKAGE / "__init__.py", PACKAGE / "cli.py"}:
        for sentence, scopes in upward_imports(path):
            names = [scope.name for scope in scopes]
            is_listed = path.name == "model.py" and names[:1] == ["HybridLM"]
            if not (is_listed and len(names) == 2 and names[1] in UPWARD):
                offences.append(sentence)
    assert not offences, "\n".join(sorted(offences))


def test_upward_methods_of_the_model_are_one_line():
    for _, scopes in upward_imports(PACKAGE / "model.py"):
        method = scopes[-1]
        has_docstring = ast.get_docstring(method) is not None
        kinds = [type(statement) for statement in method.body[has_docstring:]]
        assert kinds in ([ast.ImportFrom, ast.Return], [ast.ImportFrom, ast.Expr]), method.name


def test_forbidden_imports_are_seen(tmp_path, monkeypatch):
    """The check itself: each way of writing an import up or sideways is caught."""
    layer = tmp_path / "hybridzoo" / "layers" / "mlp.py"
    layer.parent.mkdir(parents=True)
    (tmp_path / "hybridzoo" / "model.py").touch()
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    ways = ["import hybridzoo.model", "from hybridzoo import HybridLM", "from ..model import x"]
    ways += ["from hybridzoo.config import x", 'name = "hybridzoo.model:HybridLM"']
    ways += ["def f():\n    from hybridzoo.model import HybridLM"]
    for way in ways:
        layer.write_text(way)
        assert len(list(upward_imports(layer))) == 1, way
    layer.write_text("from .base import x\nfrom hybridzoo.errors import y\nimport torch")
    assert not list(upward_imports(layer))


def test_files_and_functions_are_short():
    """A docstring does not count towards its function: the longest ones say the most."""
    offences = []
    for path in MODULES:
        text = path.read_text()
        limit = 600 if "kernels" in path.parts else 300
        if (n_lines := len(text.splitlines())) > limit:
            offences.append(f"{relative(path)}: {n_lines} lines, at most {limit}")
        for node, _ in walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n_lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    n_lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                if n_lines > 40:
                    where = f"{relative(path)}:{node.lineno} {node.name}"
                    offences.append(f"{where}: {n_lines} lines, at most 40")
    assert not offences, "\n".join(offences)


def test_no_error_is_swallowed_and_nothing_is_printed():
    offences = []
    for path in MODULES:
        for node, _ in walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                if not caught or {"Exception", "BaseException"} & set(
                    caught.strip("()").split(", ")
                ):
                    offences.append(f"{relative(path)}:{node.lineno} except {caught}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                offences.append(f"{relative(path)}:{node.lineno} print(")
    assert not offences, "\n".join(offences)


def test_public_names_have_a_docstring():
    offences = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        if ast.get_docstring(tree) is None:
            offences.append(f"{relative(path)}: no docstring")
        for node in tree.body:
            is_definition = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if is_definition and node.name[0] != "_" and ast.get_docstring(node) is None:
                offences.append(f"{relative(path)}:{node.lineno} {node.name}")
    assert not offences, "\n".join(offences)


@pytest.mark.parametrize("path", [p for p in MODULES if ">>> " in p.read_text()], ids=module_name)
def test_examples_in_docstrings_are_true(path):
    result = doctest.testmod(importlib.import_module(module_name(path)))
    assert result.attempted > 0
    assert result.failed == 0


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_on_meta_with_the_parameters_it_claims(path):
    config = hybridzoo.HybridConfig.load(path)
    model = hybridzoo.HybridLM(config, device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == config.n_params()


def test_every_config_has_a_card_and_every_card_a_config():
    cards = {path.stem for path in (ROOT / "model_cards").glob("*.md")}
    assert cards == {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_shell_scripts_parse_and_stop_at_the_first_error(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert "\nset -euo pipefail\n" in path.read_text()


def seconds(*arguments: str) -> float:
    """Processor time of a fresh interpreter: other work on the machine does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def best(limit: float, *arguments: str, tries: int = 3) -> float:
    """The least of some tries, as a cold or busy cache only adds; stops once under limit."""
    least = float("inf")
    for _ in range(tries):
        least = min(least, seconds(*arguments))
        if least < limit:
            break
    return least


CLI = "from hybridzoo.cli import main; main()"


@pytest.mark.parametrize("module", ["hybridzoo", "hybridzoo.cli"])
def test_import_leaves_torch_alone(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_import_is_quick():
    assert best(0.25, "-c", "import hybridzoo") < 0.25


def test_help_is_quick():
    assert best(0.6, "-c", CLI, "--help") < 0.6


def test_info_of_a_large_model_is_quick():
    limit = 1.5 + best(0, "-c", "import torch")
    assert best(limit, "-c", CLI, "info", "configs/jamba-v0.1.yaml") < limit
