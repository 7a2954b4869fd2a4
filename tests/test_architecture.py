"""The shape of utils/: who imports whom, what is imported when, and who knows torchrun's variables."""

import ast
import subprocess
import sys
from functools import cache

from tests.helpers.script import ROOT

UTILS = ROOT / "utils"

# What each package imports of the others; everybody may import errors and the names in utils/__init__.py.
PACKAGES: dict[str, set[str]] = {
    "preflight": {"run", "training", "data", "models", "files", "runtime"},
    "run": {"training", "data", "models", "files", "runtime"},
    "training": {"data", "models", "kernels", "runtime"},
    "evaluation": {"run.lineage", "models", "files", "runtime"},
    "data": {"models", "files", "photos", "runtime"},
    "models": {"kernels", "files", "runtime"},
    "kernels": {"runtime.gpu"},
    "photos": set(),
    "files": set(),
    "runtime": set(),
}
# The modules beside the packages: which packages import them, and what they import themselves.
IN_THE_OPEN = {
    "preflight": {"concepts", "dataset"},
    "run": {"arguments", "concepts", "dataset"},
    "training": {"diffusion"},
    "evaluation": {"command_line", "concepts", "dataset"},
    "data": {"concepts", "dataset", "diffusion"},
    "concepts": {"dataset", "files"},
    "dataset": {"photos"},
    "arguments": {"command_line", "files", "flags_of_others", "models"},
    "before_launch": {"arguments", "command_line", "evaluation", "preflight"},
    "command_line": {"files", "runtime"},
    "doctor": {"command_line", "runtime"},
    "export": {"command_line", "files", "models", "run.lineage"},
    "share": {"command_line", "files", "models"},
}
# What is imported inside functions, and why: --help, complaints and the preflight are quick. Nothing is added here.
TORCH = "torch takes longer than the whole preflight, which has this module"
MAY_BE_MISSING = "may be missing, and the photo that needs it says so"
KNOWS_HOW = "this module decides in which order the libraries are imported, and what they find"
LATE_IMPORTS = {
    "dataset": {"torch": TORCH},
    "models.base": {"utils.models.importing": TORCH},
    "models.folder": {"torch": TORCH},
    "photos.formats": {
        "PIL.TiffImagePlugin": "only a TIFF needs it; 17 modules, 12 ms",
        "pillow_heif": MAY_BE_MISSING,
        "pillow_jxl": MAY_BE_MISSING,
    },
    "preflight.checks": {"utils.preflight.sources": "numpy, Pillow, 150 ms: complaints about folders come before it"},
    "preflight.resources": {"torch": TORCH, "utils.training.host_memory": TORCH},
    "run.logs": {"torch.utils.tensorboard": "only --report_to needs it; 177 modules, 200 ms"},
    "run.resume": {"utils.runtime.colossal": "takes as long as the base's hashing in a thread, which is waited for"},
    "runtime.gpu": {"torch": TORCH},
    "runtime.libraries": dict.fromkeys(["diffusers.utils", "torch", "transformers.utils"], KNOWS_HOW)
    | {"utils.runtime.warm_up": KNOWS_HOW},
    "runtime.warm_up": {"triton.runtime.cache": "a thread imports it beside the libraries, if there is one"},
}

# Imported before torch, whose import takes longer than all that these do.
WITHOUT_TORCH = [
    "arguments",
    "command_line",
    "dataset",
    "errors",
    "files",
    "photos",
    "preflight",
    "evaluation.arguments",
    "evaluation.plan",
    "evaluation.prompts",
    "evaluation.samples",
]
WITH_TORCH = {"files.safetensors_writer"}

TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
TORCHRUN |= {"TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of utils/ by its name without "utils."; a package's __init__ has the package's."""
    names = {path: ".".join(path.relative_to(UTILS).with_suffix("").parts) for path in sorted(UTILS.rglob("*.py"))}
    return {name.removesuffix(".__init__"): ast.parse(path.read_text()) for path, name in names.items()}


def imported(node: ast.AST) -> set[str]:
    """Names of the modules that the import statements in `node` import."""
    found = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            found |= {alias.name for alias in each.names}
        elif isinstance(each, ast.ImportFrom):
            for alias in each.names:
                name = f"{each.module}.{alias.name}".removeprefix("utils.")
                found.add(f"utils.{name}" if each.module.startswith("utils") and name in modules() else each.module)
    return found


def imported_by_name(node: ast.AST) -> set[str]:
    """Names of the modules that importlib.import_module imports in `node`."""
    calls = [each for each in ast.walk(node) if isinstance(each, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func).endswith("import_module")]
    return {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}


def own(names: set[str]) -> set[str]:
    """Those that are modules of utils/, without "utils."."""
    return {name.removeprefix("utils.") for name in names if name.startswith("utils.")}


@cache
def arrows() -> dict[str, set[str]]:
    return {name: own(imported(tree)) for name, tree in modules().items()}


def test_imports_go_down_only():
    upwards = set()
    for name, targets in arrows().items():
        room = name.partition(".")[0]
        allowed = {room, "errors", *PACKAGES.get(room, ()), *IN_THE_OPEN.get(room, ())}
        upwards |= {(name, to) for to in targets if to not in allowed and to.partition(".")[0] not in allowed}
    assert upwards == set()


def test_there_is_no_circle():
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(arrows().get(name, ())):
                walk(target, (*path, name))
            done.add(name)

    for name in arrows():
        walk(name, ())


def test_imports_are_at_the_top_of_the_file():
    late = {}
    for name, tree in modules().items():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        if found := set().union(*map(imported, functions), *map(imported_by_name, functions)):
            late[name] = found
    assert late == {name: reasons.keys() for name, reasons in LATE_IMPORTS.items()}


def test_what_is_quick_does_not_import_torch():
    wanted = [name for name in modules() if any(f"{name}.".startswith(f"{quick}.") for quick in WITHOUT_TORCH)]
    code = "import importlib, sys\n"
    for name in sorted(set(wanted) - WITH_TORCH):
        code += f"importlib.import_module('utils.{name}'); assert 'torch' not in sys.modules, '{name} imports torch'\n"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_the_libraries_are_imported_by_one_module_first():
    """Elsewhere they would come with what they import because it is there, and with their warnings."""
    later = {"training.learning_rates"}  # only training/build.py imports it, after models/
    for name in set(modules()) - later:
        imports = [node for node in modules()[name].body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [found for node in imports for found in imported(node)]
        roots = [found if found.startswith("utils.runtime.libraries") else found.split(".")[0] for found in names]
        for library in {"diffusers", "transformers"} & set(roots):
            assert "utils.runtime.libraries" in roots[: roots.index(library)], (name, library)


def test_nothing_is_exempt_from_the_linter():
    assert [str(path) for path in UTILS.rglob("*.py") if "noqa" in path.read_text()] == []


def test_one_module_knows_torchruns_variables():
    def knows(tree: ast.Module) -> bool:
        return any(isinstance(node, ast.Constant) and node.value in TORCHRUN for node in ast.walk(tree))

    assert {name for name, tree in modules().items() if knows(tree)} == {"runtime.environment"}
