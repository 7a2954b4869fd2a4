"""Packages that stand aside: they are imported only when something uses them.

torch._dynamo, torch's compiler, brings sympy and torch's distributed tensors: a third of all imported modules.
Libraries ask it small things (whether a module is compiled, how DDP is optimised), or mark functions that it shall
leave alone. So with torch's symbolic shapes, which are asked about shapes of plain numbers. What holds their place
answers as they do if nothing is compiled. Whatever else is asked imports them, and from then on they answer
themselves. scipy, which diffusers imports for a few schedulers, has no answers: it is imported when one of them uses
it.

Other packages stay closed: each of diffusers' folders of models imports all models in it when one is imported.
"""

import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
INDEX = f"{COMPILER}._trace_wrapped_higher_order_op"  # transformers takes a context manager from it
SHAPES = "torch.fx.experimental.symbolic_shapes"  # torch._check asks it for shapes, which may be symbols elsewhere
OF_BOOL = ("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious", "statically_known_true")


class Aside(ModuleType):
    """Holds a module's place, with some answers; any other attribute is the module's own, which is imported then."""

    def __init__(self, name: str, **answers: Any):
        super().__init__(name)
        vars(self).update(answers)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # inspect and importlib look at every module that there is
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(real(self.__name__), name)


class Finder:
    """Imports a whole package that stands aside before one of its submodules, which may come with it."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: object = None) -> Any:
        """None, for the other finders to go on, or a module that came with its package."""
        if not isinstance(sys.modules.get(name.rpartition(".")[0]), Aside):
            return None
        real(name.rpartition(".")[0])
        found = sys.modules.pop(name, None)  # else importlib would execute it again; it puts it back
        return None if found is None else importlib.util.spec_from_loader(name, Present(found))


class Closed(ModuleType):
    """A package whose submodules can be imported, while its own code runs only when something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if name.startswith("__") or spec is None or spec.loader is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
        return getattr(self, name)


class Present(importlib.abc.Loader):
    """A loader of a module that is there."""

    def __init__(self, module: ModuleType):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """The module as it is."""
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing but to give it its own spec back."""
        module.__spec__ = self.spec


def real(name: str) -> ModuleType:
    """The module itself, imported now if it was not."""
    root = name
    while isinstance(sys.modules.get(parent := root.rpartition(".")[0]), Aside):
        root = parent
    for each, module in list(sys.modules.items()):
        if isinstance(module, Aside) and f"{each}.".startswith(f"{root}."):
            sys.modules.pop(each, None)
    return importlib.import_module(name)


def set_aside(name: str, **answers: Any) -> None:
    """Puts a module aside, unless it has been imported already or is not there."""
    parent = sys.modules.get(name.rpartition(".")[0])
    path = vars(parent).get("__path__") if parent is not None else None
    spec = None if name in sys.modules else importlib.machinery.PathFinder.find_spec(name, path)
    if spec is None:
        return
    where: dict[str, Any] = dict(__spec__=spec, __file__=spec.origin)
    if spec.submodule_search_locations is not None:
        where["__path__"] = spec.submodule_search_locations
    sys.modules[name] = Aside(name, **where, **answers)
    if parent is not None:
        setattr(parent, name.rpartition(".")[2], sys.modules[name])
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)


def keep_closed(name: str) -> None:
    """Puts a package there without running its code, unless it has been imported already or is not there."""
    parent = importlib.import_module(name.rpartition(".")[0])
    spec = None if name in sys.modules else importlib.machinery.PathFinder.find_spec(name, parent.__path__)
    if spec is None:
        return
    module: Any = importlib.util.module_from_spec(spec)
    module.__class__, sys.modules[name] = Closed, module
    setattr(parent, name.rpartition(".")[2], module)


def set_compiler_aside() -> None:
    """Puts torch's compiler aside."""

    def context(*args: Any) -> Any:
        return real(INDEX).TransformGetItemToIndex(*args)

    set_aside(
        COMPILER,
        allow_in_graph=_as_it_is,
        assume_constant_result=_as_it_is,
        disable=_as_it_is,
        graph_break=lambda *args, **options: None,
        config=Aside(f"{COMPILER}.config"),
        eval_frame=Aside(f"{COMPILER}.eval_frame", OptimizedModule=type("OptimizedModule", (), {})),
        trace_rules=Aside(f"{COMPILER}.trace_rules", clear_lru_cache=lambda: None),
        utils=Aside(f"{COMPILER}.utils", get_optimize_ddp_mode=lambda: "no_optimization"),
    )
    set_aside(
        SHAPES,
        **{name: _for((bool,), name, lambda value: value) for name in OF_BOOL},
        is_nested_int=_for((int,), "is_nested_int", lambda value: False),
        sym_eq=_for((int, tuple), "sym_eq", operator.eq),
    )
    if isinstance(sys.modules.get(COMPILER), Aside):
        set_aside(INDEX, TransformGetItemToIndex=context)


def _as_it_is(function: Callable | None = None, *args: object, **options: object) -> Any:
    """What marks a function for the compiler, called with it or, as a decorator with options, for it."""
    return (lambda marked: marked) if function is None else function


def _for(kinds: tuple[type, ...], name: str, answer: Callable) -> Callable:
    """A function of SHAPES that answers for values of `kinds`, and leaves all others to the module's own."""

    def function(*values: Any, **options: Any) -> Any:
        is_plain = not options and all(isinstance(value, kinds) for value in values)
        return answer(*values) if is_plain else getattr(real(SHAPES), name)(*values, **options)

    return function


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """Imports make a million objects and hardly any garbage: looking for it takes a seventh of their time.

    What is there at the end is not looked at again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
