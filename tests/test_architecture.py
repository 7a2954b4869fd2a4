"""The shape of utils/: who imports whom, what is imported when, and who knows torchrun's variables."""

import ast
import re
from functools import cache

from tests.helpers.script import ROOT, run_python

UTILS = ROOT / "utils"

# What each package imports of the others; everybody may import errors, values and the names in utils/__init__.py.
PACKAGES: dict[str, set[str]] = {
    "preflight": {"run", "training", "data", "models", "files", "runtime"},
    "run": {"training", "data", "models", "files", "runtime"},
    "training": {"data", "models", "kernels", "runtime"},
    "evaluation": {"run.lineage", "models", "files", "runtime"},
    "data": {"models", "files", "photos", "runtime"},
    "models": {"kernels", "files", "runtime"},
    "kernels": {"runtime.gpu", "runtime.private"},
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
    "before_launch": {"arguments", "command_line", "evaluation", "files", "preflight", "run", "runtime"},
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
    "command_line": {"utils.runtime.ranks": "torch: only where one of several ranks has a mistake to tell"},
    "dataset": {"torch": TORCH},
    "models.base": {
        "huggingface_hub": "only for a name of the Hub; 300 ms",
        "huggingface_hub.errors": "the same",
        "utils.models.importing": TORCH,
    },
    "models.weight_files": {"safetensors.torch": TORCH, "torch": TORCH},
    "photos.formats": {
        "pillow_heif": MAY_BE_MISSING,
        "pillow_jxl": MAY_BE_MISSING,
    },
    "preflight.checks": dict.fromkeys(
        ["utils.preflight.resources", "utils.preflight.sources"],
        "numpy, Pillow, 150 ms: complaints about folders come before them",
    ),
    "preflight.resources": {"torch": TORCH, "utils.training.packed": TORCH},
    "run.logs": {"torch.utils.tensorboard": "only --report_to needs it; 177 modules, 200 ms"},
    "run.resume": {"utils.runtime.colossal": "takes as long as the base's hashing in a thread, which is waited for"},
    "runtime.gpu": {"torch": TORCH},
    "runtime.process": {"tqdm": "--help and complaints show no bars; 15 ms"},
    "runtime.ranks": dict.fromkeys(
        ["torch.distributed", "torch.distributed.elastic.multiprocessing.errors"], "torchrun itself: no rank needs it"
    ),
    "runtime.libraries": dict.fromkeys(["diffusers.utils", "torch", "transformers.utils"], KNOWS_HOW),
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
    "values",
    "evaluation.arguments",
    "evaluation.plan",
    "evaluation.prompts",
    "evaluation.samples",
]

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
        allowed = {room, "errors", "values", *PACKAGES.get(room, ()), *IN_THE_OPEN.get(room, ())}
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
    for name in sorted(wanted):
        code += f"importlib.import_module('utils.{name}'); assert 'torch' not in sys.modules, '{name} imports torch'\n"
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_the_libraries_are_imported_by_one_module_first():
    """Elsewhere they would come with what they import because it is there, and with their warnings."""
    later = {"training.build"}  # only the script imports it, after data/, which has imported models/
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


# With an underscore, but documented, or keys of files.
PUBLIC = {"_asdict", "_exit", "_fields", "_replace"} | {"_class_name", "_diffusers_version", "_name_or_path"}
ASKS = ("getattr", "hasattr", "setattr")
# Undocumented, and used as methods where nothing else can be: Triton's mode for compiling in threads.
METHODS = {"kernels.ahead_of_time": {"run", "submit"}}
MOST_PRIVATE_NAMES = 35


def table_of_private_names() -> set[str]:
    """The names in utils/runtime/private.py."""
    assigned = [node.value for node in modules()["runtime.private"].body if isinstance(node, ast.Assign)]
    nodes = [each for value in assigned for each in ast.walk(value)]
    return {each.value for each in nodes if isinstance(each, ast.Constant)}


def private_names(tree: ast.Module) -> set[str]:
    """Names that begin with an underscore and are an attribute, an import, or text that names an attribute."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {part for alias in node.names for part in alias.name.split(".")}
            found |= set((getattr(node, "module", None) or "").split("."))
        elif isinstance(node, ast.Tuple | ast.List | ast.Set) or ast.unparse(getattr(node, "func", node)) in ASKS:
            texts = [each.value for each in ast.iter_child_nodes(node) if isinstance(each, ast.Constant)]
            found |= {text for text in texts if isinstance(text, str) and text.isidentifier()}
    return {name for name in found if name.startswith("_") and not name.endswith("_") and name not in PUBLIC}


def defined(tree: ast.Module) -> set[str]:
    """Names that the module gives to functions, classes, variables and attributes of its own."""
    nodes = list(ast.walk(tree))
    found = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    found |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    found |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"}
    return found


def test_one_module_knows_the_private_names_of_libraries():
    table = table_of_private_names()
    theirs = {name: private_names(tree) - defined(tree) for name, tree in modules().items()}
    assert {name: found for name, found in theirs.items() if found and name != "runtime.private"} == {}
    packages = {name for name in table if name.islower() and "_" not in name}  # peft, say
    for name, tree in modules().items():
        words = {getattr(node, kind, None) for node in ast.walk(tree) for kind in ("attr", "name")}
        assert name == "runtime.private" or not words & (table - packages), name


def test_there_are_few_of_them_each_with_a_version():
    assert len(table_of_private_names()) + sum(map(len, METHODS.values())) <= MOST_PRIVATE_NAMES
    for name, methods in METHODS.items():
        assert methods <= {node.attr for node in ast.walk(modules()[name]) if isinstance(node, ast.Attribute)}
    lines = (UTILS / "runtime/private.py").read_text().split('"""')[2].strip().split("\n")
    groups = [number for number, line in enumerate(lines) if line.startswith("#")]
    assert all(re.match(r"# \w+ \d+\.\d+", lines[number]) for number in groups) and groups[0] == 0
