"""What the class of a diffusers pipeline says of itself before anything is loaded: what it gives, and the libraries
that it cannot do without. Reads its source, runs none of it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, did_you_mean

# what a pipeline's output class calls what it makes; any other field is something that no stage can give
IMAGE_FIELDS = ("images", "image", "rgb")
AUDIO_FIELDS = ("audios", "audio")
VIDEO_FIELDS = ("frames", "video")
SHARED_DEPTH = 2  # diffusers.pipelines.x is what all pipelines share; theirs are diffusers.pipelines.flux.x
_OUTPUT_CLASS = re.compile(r"\w+Output\b")
# a pipeline calls these only after it has looked whether their library is there
_GUARDED = frozenset({"_clean_caption", "draw_kps", "process_face_embeddings"})
_AVAILABLE = re.compile(r"is_(\w+)_available")
_SHOWN_RATE = re.compile(r"export_to_\w+\([^)]*\bfps=(\d+(?:\.\d+)?)")


def pipeline_class(name: object, where: str = "pipeline") -> Any:
    """The class that diffusers exports by that name; ConfigError where there is none, or where a library is missing
    that it needs. where: how messages call the name.
    """
    import diffusers

    if not isinstance(name, str):
        raise ConfigError(f"{where}: got {brief(name)}, expected the name of a pipeline class; custom code is not run")
    known = [entry for entry in dir(diffusers) if entry.endswith("Pipeline") and entry != "DiffusionPipeline"]
    if name not in known:
        near = did_you_mean(name, known)
        hint = near if near.startswith(" (did") else ""
        raise ConfigError(f"{where}: got {name!r}, expected a pipeline class that diffusers exports{hint}")
    try:
        found: Any = getattr(diffusers, name)
    except Exception as error:  # an import inside diffusers that fails
        raise missing_library(name, error) from error
    if not issubclass(found, diffusers.DiffusionPipeline):
        try:
            found()  # a placeholder of diffusers, which names the library that is missing
        except ImportError as error:
            raise missing_library(name, error) from error
        except Exception:
            pass
        raise ConfigError(f"{where}: {name} is no DiffusionPipeline, and only those are hosted")
    missing = missing_libraries(found)
    if missing:
        raise ConfigError(f"{where}: {name} needs a library that is not installed: pip install {' '.join(missing)}")
    return found


def missing_library(name: str, error: Exception) -> ConfigError:
    return ConfigError(f"pipeline: {name} needs a library that is not installed: {error}")


def given_kind(pipeline: type) -> str | None:
    """ "image", "audio" or "video", None where the class does not say. ConfigError for what no stage can give."""
    fields = _output_fields(pipeline)
    if not fields:
        return None
    if any(field in VIDEO_FIELDS for field in fields):
        return "video"
    if any(field in IMAGE_FIELDS for field in fields):
        return "image"
    if any(field in AUDIO_FIELDS for field in fields):
        return "audio"
    raise ConfigError(
        f"pipeline: {pipeline.__name__} gives {', '.join(fields)}, which no stage can hand on; a `diffusers` stage"
        " gives pictures, sounds and videos"
    )


def gives_soundtrack(pipeline: type) -> bool:
    """Whether it makes sound beside its frames."""
    fields = _output_fields(pipeline)
    return any(field in VIDEO_FIELDS for field in fields) and any(field in AUDIO_FIELDS for field in fields)


def shown_frame_rate(pipeline: type) -> float | None:
    """At which rate the example in the docstring of its call saves its frames; None without one."""
    call: Any = pipeline.__call__
    found = _SHOWN_RATE.search(call.__doc__ or "")
    return None if found is None else float(found.group(1))


def part_names(pipeline: type) -> frozenset[str]:
    """What its constructor takes and an index names as [library, class]."""
    taken = inspect.signature(pipeline).parameters.values()
    needed = {each.name for each in taken if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD}
    optional: list[str] = getattr(pipeline, "_optional_components", [])
    return frozenset(needed.union(optional))


def missing_libraries(pipeline: type) -> list[str]:
    """Libraries that its module imports only where they are installed, and then uses without asking again."""
    missing: set[str] = set()
    for base in pipeline.__mro__:
        module = sys.modules.get(base.__module__)
        is_own = base.__module__.startswith("diffusers.") and base.__module__.count(".") > SHARED_DEPTH
        if module is not None and is_own:
            missing |= _unguarded_imports(module)
    return sorted(missing)


def _output_fields(pipeline: type) -> list[str]:
    """The fields of the output class that `__call__` returns or, of a pipeline of pipelines, names in its docstring."""
    call: Any = pipeline.__call__
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(call)))
    except (TypeError, OSError):  # a class that cannot be called, or whose source is not installed
        return []
    returned = [
        node.value.func.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
    ]
    named = [name for name in returned if name.endswith("Output")]
    for name in named or _OUTPUT_CLASS.findall(source):
        for module in (sys.modules[pipeline.__module__], importlib.import_module("diffusers.pipelines")):
            found = getattr(module, name, None)
            if dataclasses.is_dataclass(found):
                return [field.name for field in dataclasses.fields(found)]
    return []


@functools.cache
def _unguarded_imports(module: ModuleType) -> set[str]:
    """By the module's source: what it uses in some function though an `is_x_available` at its head may have left it
    out, and though it is not there.
    """
    tree = ast.parse(inspect.getsource(module))
    optional = dict(_optional_names(tree))
    absent = {name: library for name, library in optional.items() if not hasattr(module, name)}
    used = {
        node.id
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name not in _GUARDED
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and node.id in absent and not _asks_first(function, absent[node.id])
    }
    return {absent[name] for name in used}


def _optional_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, library) of every import that stands under an `is_x_available` without an `else`."""
    for node in tree.body:
        library = _asked_library(node.test) if isinstance(node, ast.If) and not node.orelse else None
        if library is None or not isinstance(node, ast.If):
            continue
        for line in node.body:
            if isinstance(line, (ast.Import, ast.ImportFrom)):
                for alias in line.names:
                    yield (alias.asname or alias.name).partition(".")[0], library


def _asks_first(function: ast.FunctionDef, library: str) -> bool:
    return any(
        isinstance(node, (ast.If, ast.IfExp)) and _asked_library(node.test) == library for node in ast.walk(function)
    ) or any(isinstance(node, ast.Assign) and _asked_library(node.value) == library for node in ast.walk(function))


def _asked_library(test: ast.expr) -> str | None:
    for node in ast.walk(test):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            match = _AVAILABLE.fullmatch(node.func.id)
            if match is not None:
                return match.group(1)
    return None
