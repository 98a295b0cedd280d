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

# A file imports only files of a lower floor (the decimals are steps within one floor). Files of one sub-package
# (scores, models, data, report) may import each other. A new file must be given its floor here: that is the purpose.
FLOORS: dict[str, float] = {
    "errors": 0,
    "groups": 0,
    "labels": 0,
    "calls": 1,
    "answers": 1.05,
    "meta": 1,
    "cost": 1,
    "surgery": 1,
    "ties": 1,
    "events": 1,
    "movement": 1.1,
    "mixing": 1.1,
    "products": 1.05,
    "ops": 1.2,
    "staging": 2.05,
    "recording": 2.1,
    "collecting": 2.15,
    "solving": 2.2,
    "probing": 2.3,
    "editing": 2.25,
    "tracing": 2.4,
    "planning": 2.4,
    "narrowing": 2.9,
    "measuring": 3,
    "forgetting": 3,
    "constants": 3,
    "sites": 3.05,
    "folding": 3.07,
    "choosing": 3.1,
    "compactor": 3.1,
    "shrinking": 3.2,
    "scores": 3.1,
    "storage": 3.1,
    "resrep": 4,
    # Outside the core: the network zoo, data, files, figures.
    "models": 5,
    "data": 5,
    "export": 5,
    "bench": 5,
    "report": 5,
    "config": 5,
    "checkpoints": 5,
    "runs": 5,
    "train": 6,
    "workflow": 7,
    "cli": 8,
    "__main__": 9,
}
OUTSIDE_THE_CORE = {name for name, floor in FLOORS.items() if floor >= 5}
CORE_PACKAGES = {"torch", "numpy", "scipy", "safetensors"}
FAST = {"numba"}  # of use to the core where it is there
EXTRAS = "numba timm torchvision accelerate rich jsonargparse sklearn yaml PIL onnx onnxscript onnxruntime"
OPTIONAL_PACKAGES = set(EXTRAS.split())
MAX_CORE_LINES = 6500  # a ratchet, set anew when verify learnt of products of activations: the goal is 2500
MAX_FILE_LINES = 400

FILES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """The name in FLOORS that a file stands under: its module, or its sub-package; "" for narrower/__init__.py."""
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


def test_there_are_files_and_each_has_a_floor() -> None:
    assert FILES, f"no Python files under {PACKAGE}"
    unknown = {unit(path) for path in FILES} - FLOORS.keys() - {""}
    assert not unknown, f"give these files a floor in {Path(__file__).name}: {sorted(unknown)}"


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
        elif other not in FLOORS:  # a name of the face itself, `from narrower import trace`, or `import narrower`
            ok = own in OUTSIDE_THE_CORE
        else:
            ok = other == own or FLOORS[other] < FLOORS[own]
        if not ok:
            wrong.append(f"{ids(path)}:{line} imports {name}")
    assert not wrong, "imports must point to a lower floor:\n" + "\n".join(wrong)


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


def test_the_core_is_small() -> None:
    sizes = {
        ids(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in FILES
        if unit(path) not in OUTSIDE_THE_CORE
    }
    assert sum(sizes.values()) < MAX_CORE_LINES, f"the core has {sum(sizes.values())} lines: {sizes}"


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
