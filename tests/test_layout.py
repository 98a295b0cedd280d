"""The layout of the package: who may import whom, what the core may depend on, and how large things may get.

Everything is read with `ast`; nothing of narrower is imported here except in a fresh interpreter at the end.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "narrower"

# A package (or a module at the top) imports only those of a lower level. A new one must be given its level here.
LEVELS: dict[str, int] = {
    "errors": 0,
    "preconditions": 1, "extras": 1,
    "graph": 2, "inputs": 2,
    "planning": 3, "surgery": 3,
    "batchnorm": 4, "tracing": 4,
    "measuring": 5, "narrowing": 5,
    "centripetal": 6, "repair": 6, "resrep": 6, "soft": 6, "storage": 6,
    "allocation": 7, "deployment": 7, "distillation": 7, "scores": 7, "sharing": 7,
    # Outside the core: networks, data, training, the command line.
    "data": 8, "lightning": 8, "models": 8,
    "report": 9, "training": 9,
    "app": 10,
    "__main__": 11,
}
# What is above the core: networks, data, training, the command line. The core must work without them and their packages.
OUTSIDE_THE_CORE = {name for name, level in LEVELS.items() if level >= 8}
# Third-party packages: those that the core needs, one that it uses where it is installed, and those of the extra `cli`.
CORE_PACKAGES = {"torch", "numpy", "scipy", "safetensors"}
FAST = {"numba"}
OPTIONAL_PACKAGES = {"numba", "timm", "jsonargparse", "torchvision", "accelerate", "rich", "sklearn", "yaml", "PIL", "onnx",
                     "onnxscript", "onnxruntime", "openvino", "lightning", "pytorch_lightning", "matplotlib", "huggingface_hub",
                     "jinja2"}
# Limits that keep the code readable.
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 7
MAX_TOP_MODULES = 10
# Public functions with more options than that: keyword-only, and each documented in the docstring.
PUBLIC_OPTIONS = {"planning/plan.py plan", "resrep/trainer.py __init__", "distillation/tuning.py tune",
                  "allocation/measure.py sensitivity",
                  "soft/soft_pruning.py __init__", "centripetal/centripetal_sgd.py __init__",
                  "deployment/tabulating.py measure_latency"}
# Modules without a test file of their own, and where they are tested. All others have `tests/<package>/test_<module>.py`.
TESTED_ELSEWHERE = {
    "__main__.py": "app/test_cli.py",
    "app/config.py": "app/test_cli.py: a setting is a flag of the command line",
    "app/networks.py": "app/test_cli.py",
    "app/prune.py": "app/test_cli.py",
    "app/resrep_run.py": "app/test_cli.py",
    "data/decoding.py": "data/test_sources.py",
    "data/seeding.py": "data/test_streams.py: an epoch comes again as it was",
    "models/densenet.py": "models/test_models.py",
    "models/googlenet.py": "models/test_models.py",
    "models/layers.py": "models/test_models.py",
    "models/mobilenet.py": "models/test_models.py",
    "models/resnet.py": "models/test_models.py",
    "models/vgg.py": "models/test_models.py",
    "report/facts.py": "report/test_sections.py",
    "scores/matrix_rank_numba.py": "scores/test_matrix_rank.py: both forms pass the same tests",
    "tracing/probe.py": "tracing/test_trials.py: a probe is one trial",
    "training/evaluate.py": "training/test_train.py",
    "training/config.py": "app/test_cli.py: a setting is a flag of the command line",
}

FILES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """The name in LEVELS that a file stands under: its module, or its sub-package; "" for narrower/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and absolute dotted name of everything that a file imports, at any depth, also within functions."""
    package = ("narrower", *path.relative_to(PACKAGE).parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join((*package[: len(package) - node.level + 1], *filter(None, [base])))
            # `from narrower import data` names a module of the package, `from narrower.data import f` does too.
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def ids(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_there_are_files_and_each_has_a_level() -> None:
    assert FILES, f"no Python files under {PACKAGE}"
    unknown = {unit(path) for path in FILES} - LEVELS.keys() - {""}
    assert not unknown, f"give these a level in {Path(__file__).name}: {sorted(unknown)}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_point_downwards(path: Path) -> None:
    own = unit(path)
    wrong = []
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "narrower":
            continue
        other = parts[1] if len(parts) > 1 else ""
        if own == "":  # the package's face: everything of the core, nothing above it
            ok = other not in OUTSIDE_THE_CORE
        elif other not in LEVELS:  # a name of the face itself, `from narrower import trace`, or `import narrower`
            ok = own in OUTSIDE_THE_CORE
        else:
            ok = other == own or LEVELS[other] < LEVELS[own]
        if not ok:
            wrong.append(f"{ids(path)}:{line} imports {name}")
    assert not wrong, "imports must point to a lower level:\n" + "\n".join(wrong)


def module_of(path: Path) -> str:
    parts = ("narrower", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_make_no_circles() -> None:
    """Within a package files may import each other freely, but for circles. Imports inside functions count too."""
    modules = {module_of(path): path for path in FILES}
    inits = {name for name, path in modules.items() if path.name == "__init__.py"}

    def imported(name: str) -> str:
        """The module that an imported name comes from."""
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    waiting = {name: {imported(target) for _, target in imports(path)} - {"", name} - inits
               for name, path in modules.items() if name not in inits}
    while free := [name for name, needed in waiting.items() if not needed & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting, f"these import each other in a circle: {sorted(waiting)}"


def test_the_top_of_the_package_has_few_modules() -> None:
    top = [path.name for path in PACKAGE.glob("*.py")]
    assert len(top) <= MAX_TOP_MODULES, top


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=ids)
def test_every_package_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_third_party_imports_are_allowed(path: Path) -> None:
    allowed = {"narrower", *sys.stdlib_module_names, *CORE_PACKAGES, *FAST}
    if unit(path) in OUTSIDE_THE_CORE:
        allowed |= OPTIONAL_PACKAGES
    wrong = [f"{ids(path)}:{line} imports {name}" for line, name in imports(path) if name.split(".")[0] not in allowed]
    assert not wrong, "packages that this part may not depend on:\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{ids(path)} has {lines} lines; split it by purpose"


def functions(path: Path) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function and method of a file, with its place."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(f"{ids(path)}:{n.lineno} {n.name}", n) for n in ast.walk(tree)
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_functions_are_short(path: Path) -> None:
    long = [where for where, n in functions(path) if (n.end_lineno or 0) - n.lineno + 1 > MAX_FUNCTION_LINES]
    assert not long, f"over {MAX_FUNCTION_LINES} lines: {long}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_functions_take_few_parameters(path: Path) -> None:
    """Keyword-only ones of public functions are options, each documented, and do not count."""
    many = []
    for where, n in functions(path):
        given = [a.arg for a in (*n.args.posonlyargs, *n.args.args) if a.arg not in ("self", "cls")]
        options = [] if f"{ids(path)} {n.name}" in PUBLIC_OPTIONS else [a.arg for a in n.args.kwonlyargs]
        if len(given) + len(options) > MAX_PARAMETERS:
            many.append(where)
    assert not many, f"over {MAX_PARAMETERS} parameters: {many}"


def test_every_module_has_a_test_file() -> None:
    tests = PACKAGE.parent / "tests"
    modules = {ids(path): path for path in FILES if path.name != "__init__.py"}
    mirrored = {name for name, path in modules.items()
                if (tests / path.relative_to(PACKAGE)).with_name(f"test_{path.name}").is_file()}
    missing = modules.keys() - mirrored - TESTED_ELSEWHERE.keys()
    assert not missing, f"these need a test file: {sorted(missing)}"
    stale = TESTED_ELSEWHERE.keys() - modules.keys() | TESTED_ELSEWHERE.keys() & mirrored
    assert not stale, f"take these off the lists: {sorted(stale)}"
    assert all((tests / where.split(":")[0].split("; ")[-1]).is_file() for where in TESTED_ELSEWHERE.values())


def test_modules_are_not_named_like_exported_functions() -> None:
    """`narrower.trace` must be the function: a module of that name would shadow it when imported."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    exported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert not exported & {unit(path) for path in FILES}


def test_the_core_imports_without_the_extras() -> None:
    """`import narrower` in an interpreter in which every optional package is missing."""
    program = (
        "import sys\n"
        f"missing = {sorted(OPTIONAL_PACKAGES - {'yaml', 'PIL'})!r}\n"  # torch itself looks for those two
        "sys.modules.update(dict.fromkeys(missing))\n"  # None in sys.modules: ImportError on import
        "import narrower\n"
        "assert narrower.__all__\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
