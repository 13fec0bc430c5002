"""Rules that hold for every file, read from the syntax trees: direction of imports, devices, safety."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vllm_omni

PACKAGE = Path(vllm_omni.__file__).parent
# what a part of the package may import besides itself; everyone may import `errors`
BASE = {"config", "lora", "messages", "request", "output", "params", "payload", "registry", "utils", "voices"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "utils": set(),
    **dict.fromkeys(BASE - {"utils", "output"}, BASE),
    "output": {*BASE, "media"},  # in annotations
    "media": BASE,
    "core": {*BASE, "media"},
    "layers": {*BASE, "media"},
    "worker": {*BASE, "media", "layers", "core"},
    "engine": {*BASE, "media", "layers", "core", "worker"},
    "models": {*BASE, "media", "layers", "core", "worker", "engine"},
    "executor": {*BASE, "media", "layers", "core", "worker", "engine"},
    "entrypoints": {*BASE, "media", "layers", "core", "worker", "engine", "executor"},
    "__main__": {"entrypoints"},
}
NEVER_IN_CORE = {"threading", "time", "asyncio", "multiprocessing", "concurrent", "socket", "subprocess", "sched"}
OTHER_NAMES = {
    "qwen2_5_omni": ("qwen2_5omni", "token2wav"),
    "ace_step": ("acestep", "oobleck"),
}  # besides the folder's
ROPE_TYPES = {"llama3"}  # a value of `rope_parameters.rope_type`, in any family's config.json
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
DEVICE_MODULES = {"cuda", "mps", "xpu", "hpu", "npu"}
SINCE_3_11 = {
    *(f"asyncio.{name}" for name in ("Barrier", "Runner", "TaskGroup", "timeout")),
    *(f"typing.{name}" for name in ("LiteralString", "Never", "NotRequired", "Required", "Self", "Unpack", "override")),
    *("contextlib.chdir", "datetime.UTC", "enum.StrEnum", "hashlib.file_digest", "itertools.batched", "tomllib"),
}

Rule = Callable[[str, ast.AST], Iterator[str]]


def part_of(module: str) -> str:
    """'vllm_omni.config.loader' -> 'config'."""
    return module.split(".")[1] if "." in module else ""


def imported_modules(node: ast.AST) -> Iterator[str]:
    """Absolute names, also of imports inside functions and under TYPE_CHECKING."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import; write the whole name"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`a.b.c`; empty for what is no attribute of a name. `ast.unparse` of each would take most of the time."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if parts and isinstance(node, ast.Name) else ""


def wrong_direction(module: str, node: ast.AST) -> Iterator[str]:
    part = part_of(module)
    for name in imported_modules(node):
        if name.split(".")[0] == "vllm_omni" and part:
            target = part_of(name)
            is_own = target in {part, "errors", "__version__"}
            if not is_own and target not in ALLOWED[part]:
                yield f"{part} imports {name}"


def impure_core(module: str, node: ast.AST) -> Iterator[str]:
    if part_of(module) == "core":
        for name in imported_modules(node):
            if name.split(".")[0] in NEVER_IN_CORE:
                yield f"core imports {name}"


def device_names(module: str, node: ast.AST) -> Iterator[str]:
    if module == "vllm_omni.utils.device":
        return
    name = dotted(node)
    if name.rpartition(".")[2] in DEVICE_MODULES and name.rpartition(".")[0] in {"torch", "torch.backends"}:
        yield name
    if name == "torch.accelerator":
        yield name
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in DEVICE_MODULES:
        yield f".{node.func.attr}()"
    for name in imported_modules(node):
        if name.split(".")[0] == "torch" and set(name.split(".")[1:3]) & DEVICE_MODULES:
            yield f"import {name}"


def unpickling(module: str, node: ast.AST) -> Iterator[str]:
    for name in imported_modules(node):
        if name.split(".")[0] in UNPICKLERS:
            yield f"import {name}"
    if isinstance(node, ast.Call):
        heeded = {"weights_only", "allow_pickle", "trust_remote_code"}
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg in heeded}
        if dotted(node.func) == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if keywords.get("allow_pickle", "False") != "False":
            yield "allow_pickle"
        if keywords.get("trust_remote_code", "False") != "False":
            yield "trust_remote_code"
    if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
        yield "'trust_remote_code' as a key"


def unsafe_yaml(module: str, node: ast.AST) -> Iterator[str]:
    if dotted(node) in {
        "yaml.unsafe_load",
        "yaml.full_load",
        "yaml.UnsafeLoader",
        "yaml.FullLoader",
        "yaml.Loader",
    }:
        yield dotted(node)


def running_code(module: str, node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec", "compile"}:
        yield f"{node.func.id}()"


def tensor_work_in_core(module: str, node: ast.AST) -> Iterator[str]:
    """Core may say `Tensor` and count what is in one; step caches alone combine tensors."""
    if part_of(module) == "core" and not module.startswith("vllm_omni.core.diffusion.caches"):
        for name in imported_modules(node):
            if name.split(".")[0] == "torch" and name != "torch.Tensor":
                yield f"core imports {name}"


def newer_than_the_oldest_python(module: str, node: ast.AST) -> Iterator[str]:
    """What Python 3.10 lacks. Files that a compiler takes may still ask for it."""
    named = {*imported_modules(node), dotted(node)}
    yield from sorted(named & SINCE_3_11)


@functools.cache
def families() -> dict[str, set[str]]:
    """Folder of a family -> the words by which code could name it."""
    folders = [
        path.name for path in (PACKAGE / "models").iterdir() if path.is_dir() and (path / "__init__.py").exists()
    ]
    return {name: {name, name.replace("_", ""), name.replace("_", "-"), *OTHER_NAMES.get(name, ())} for name in folders}


def families_elsewhere(module: str, node: ast.AST) -> Iterator[str]:
    """A family is named in its own folder, in the registry and in the table of shipped configs alone."""
    if module in {"vllm_omni.registry", "vllm_omni.config.shipped"}:
        return
    words: list[str] = []
    if isinstance(node, ast.Name | ast.Attribute):
        words = [node.id if isinstance(node, ast.Name) else node.attr]
    elif isinstance(node, ast.ImportFrom):
        words = [node.module or "", *(alias.name for alias in node.names)]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not is_docstring_like(node.value):
        words = [node.value] if node.value not in ROPE_TYPES else []
    for word in words:
        for family in named_in(word):
            if not module.startswith(f"vllm_omni.models.{family}"):
                yield f"{module} names {family}"


@functools.cache
def named_in(word: str) -> tuple[str, ...]:
    """The families that a word names."""
    return tuple(family for family, names in families().items() if any(name in searched(word) for name in names))


def searched(word: str) -> str:
    """Without an English word that begins as a family is called."""
    return word.lower().replace("want", "")


def is_docstring_like(text: str) -> bool:
    """Prose may give an example."""
    return " " in text.strip()


RULES: list[Rule] = [
    wrong_direction,
    impure_core,
    tensor_work_in_core,
    families_elsewhere,
    device_names,
    unpickling,
    unsafe_yaml,
    running_code,
    newer_than_the_oldest_python,
]


HEEDED = (ast.Attribute, ast.Call, ast.Constant, ast.Import, ast.ImportFrom, ast.Name)  # of these nodes rules speak


def offences(rule: Rule, module: str, source: str) -> list[str]:
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, HEEDED))
    return [found for node in nodes for found in rule(module, node)]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def offences_of_package() -> dict[str, list[str]]:
    """By the name of the rule; every file is read once."""
    paths = sorted(PACKAGE.rglob("*.py"))
    assert len(paths) > 20
    found: dict[str, list[str]] = {rule.__name__: [] for rule in RULES}
    for path in paths:
        module = module_name(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, HEEDED):
                continue
            for rule in RULES:
                found[rule.__name__] += (f"{path}: {complaint}" for complaint in rule(module, node))
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_whole_package_keeps_the_rule(rule: Rule) -> None:
    assert not offences_of_package()[rule.__name__]


def test_every_part_of_the_package_has_its_place_in_the_order() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert parts - {"__init__"} <= set(ALLOWED)


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (wrong_direction, "vllm_omni.config.graph", "from vllm_omni.engine.base import StageEngine"),
        (wrong_direction, "vllm_omni.config.graph", "def f():\n    import vllm_omni.engine.base"),
        (wrong_direction, "vllm_omni.config.x", "if TYPE_CHECKING:\n    from vllm_omni.engine.base import StageEngine"),
        (wrong_direction, "vllm_omni.core.x", "from vllm_omni.worker.model_pool import ModelPool"),
        (wrong_direction, "vllm_omni.core.x", "from vllm_omni import layers"),
        (wrong_direction, "vllm_omni.models.x", "from vllm_omni.executor import inline"),
        (wrong_direction, "vllm_omni.utils.x", "from vllm_omni.params import SamplingParams"),
        (wrong_direction, "vllm_omni.executor.x", "from vllm_omni import Omni"),
        (tensor_work_in_core, "vllm_omni.core.routing.x", "import torch"),
        (tensor_work_in_core, "vllm_omni.core.ar.x", "from torch import cat"),
        (families_elsewhere, "vllm_omni.engine.x", "from vllm_omni.models.z_image.spec import ZImageSpec"),
        (families_elsewhere, "vllm_omni.engine.x", "is_speech = part == 'token2wav'"),
        (families_elsewhere, "vllm_omni.models.qwen3.x", "name = 'AceStepPipeline'"),
        (families_elsewhere, "vllm_omni.engine.x", "is_wanted = name == 'WanPipeline'"),
        (impure_core, "vllm_omni.core.x", "from time import monotonic"),
        (impure_core, "vllm_omni.core.diffusion.caches.x", "import concurrent.futures"),
        (device_names, "vllm_omni.worker.x", "torch.cuda.synchronize()"),
        (device_names, "vllm_omni.worker.x", "x = torch.backends.mps.is_available()"),
        (device_names, "vllm_omni.worker.x", "from torch import cuda"),
        (device_names, "vllm_omni.worker.x", "import torch.cuda.graphs"),
        (device_names, "vllm_omni.worker.x", "tensor.cuda()"),
        (newer_than_the_oldest_python, "vllm_omni.utils.x", "from datetime import UTC"),
        (newer_than_the_oldest_python, "vllm_omni.utils.x", "import tomllib"),
        (newer_than_the_oldest_python, "vllm_omni.utils.x", "asyncio.timeout(1)"),
        (unpickling, "vllm_omni.worker.x", "import pickle"),
        (unpickling, "vllm_omni.worker.x", "torch.load(path)"),
        (unpickling, "vllm_omni.worker.x", "torch.load(path, weights_only=False)"),
        (unpickling, "vllm_omni.worker.x", "numpy.load(path, allow_pickle=True)"),
        (unpickling, "vllm_omni.worker.x", "AutoModel.from_pretrained(x, trust_remote_code=flag)"),
        (unpickling, "vllm_omni.worker.x", "f(**{'trust_remote_code': True})"),
        (unsafe_yaml, "vllm_omni.config.x", "yaml.load(text, Loader=yaml.Loader)"),
        (running_code, "vllm_omni.models.x", "eval(text)"),
    ],
)
def test_a_broken_rule_is_noticed(rule: Rule, module: str, source: str) -> None:
    assert offences(rule, module, source)


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (wrong_direction, "vllm_omni.config.x", "from vllm_omni.payload import TensorSpec"),
        (wrong_direction, "vllm_omni.utils.x", "from vllm_omni.errors import ConfigError"),
        (wrong_direction, "vllm_omni.engine.x", "from vllm_omni import registry"),
        (wrong_direction, "vllm_omni", "from vllm_omni.entrypoints.omni import Omni"),
        (tensor_work_in_core, "vllm_omni.core.routing.x", "from torch import Tensor"),
        (tensor_work_in_core, "vllm_omni.core.diffusion.caches.x", "import torch"),
        (
            families_elsewhere,
            "vllm_omni.models.z_image.pipeline",
            "from vllm_omni.models.z_image.spec import ZImageSpec",
        ),
        (families_elsewhere, "vllm_omni.registry", "x = 'vllm_omni.models.qwen3.model:Qwen3'"),
        (impure_core, "vllm_omni.executor.x", "import time"),
        (device_names, "vllm_omni.utils.device", "torch.cuda.is_available()"),
        (device_names, "vllm_omni.worker.x", "x.is_cuda and stage.cuda"),
        (unpickling, "vllm_omni.worker.x", "torch.load(path, weights_only=True)"),
        (unsafe_yaml, "vllm_omni.config.x", "yaml.parse(text, Loader=yaml.SafeLoader)"),
        (running_code, "vllm_omni.models.x", "model.eval(); re.compile(x)"),
    ],
)
def test_honest_code_is_left_alone(rule: Rule, module: str, source: str) -> None:
    assert not offences(rule, module, source)
