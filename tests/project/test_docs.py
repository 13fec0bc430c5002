"""The documentation is true: its Python runs, its names and signatures exist, its tables equal the dataclasses.

Blocks tagged `python` of one file run in order, in a temporary folder and in one module of their own, so that later
blocks see the names of earlier ones. Tables are recognised by their first header cell: Class, Data and Function say
where a name lives, Call lists calls with their parameters and defaults.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import shlex
import sys
import types
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_omni import errors, registry
from vllm_omni.config.document import ConfigDocument, ResourcesGroup, SchedulerGroup
from vllm_omni.config.loader import load_config
from vllm_omni.config.schema import (
    DiTCacheConfig,
    EdgeConfig,
    LimitsConfig,
    LoRAConfig,
    PromptsConfig,
    RayConfig,
    RayStageConfig,
    StageConfig,
    StreamConfig,
    VoicesConfig,
)
from vllm_omni.config.shipped import supported_checkpoints
from vllm_omni.engine.ar.options import AROptions, Speculation, Tap
from vllm_omni.engine.ar.prompt import DEFAULT_MAX_TOKENS
from vllm_omni.engine.ar.prompt_template import PromptTemplate, TemplateImages
from vllm_omni.engine.diffusers.options import DiffusersOptions
from vllm_omni.engine.diffusion.options import DiTOptions
from vllm_omni.entrypoints.cli import build_parser
from vllm_omni.errors import InvalidRequestError
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.layers.sampler import SamplingRow
from vllm_omni.models.ace_step.prompt.options import REQUEST_KEYS, MusicPromptOptions
from vllm_omni.models.qwen_image import trajectory as qwen_image
from vllm_omni.models.wan import trajectory as wan
from vllm_omni.models.wan.text.options import UMT5Options
from vllm_omni.models.z_image import trajectory as z_image
from vllm_omni.params import DiffusionParams, SamplingParams

ROOT = Path(__file__).parents[2]
API = sorted((ROOT / "docs" / "api").glob("*_api.md"))
PAGES = [ROOT / "README.md", ROOT / "docs" / "stage_configs.md", ROOT / "docs" / "api" / "README.md", *API]
SECTIONS = [
    "1 Module overview",
    "2 Core classes and interfaces",
    "3 Public API methods",
    "4 Configuration",
    "5 Error handling",
    "6 Examples",
]
METHOD_GROUPS = ["Initialization", "Core operations", "Configuration", "Lifecycle", "Monitoring"]

Row = list[str]
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
by_api = pytest.mark.parametrize("page", API, ids=lambda page: page.stem)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def section(text: str, title: str) -> str:
    """What stands below a heading, up to the next of the same or a higher level."""
    found = re.search(rf"^(#+) {re.escape(title)}$", text, flags=re.MULTILINE)
    assert found, f"no heading {title!r}"
    end = re.search(rf"^#{{1,{len(found[1])}}} ", text[found.end() :], flags=re.MULTILINE)
    return text[found.end() : found.end() + end.start()] if end else text[found.end() :]


def tables(text: str) -> Iterator[tuple[Row, list[Row]]]:
    """(header, rows) of every table."""
    for block in re.findall(r"(?:^\|.*\n)+", without_code(text) + "\n", flags=re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        yield lines[0], lines[2:]


def first_cells(text: str, header: str) -> list[str]:
    return [row[0].strip("`") for head, rows in tables(text) if head[0] == header for row in rows]


def documented(text: str) -> dict[str, Any]:
    """Name -> the object, for every row of the tables that say where a name lives."""
    found = {}
    for head, rows in tables(text):
        if head[0] in ("Class", "Data", "Function"):
            for row in rows:
                name = row[0].strip("`")
                found[name] = getattr(import_module(row[1].strip("`")), name)
    return found


# Python blocks


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for table, rows in registry.TABLES.items():
        monkeypatch.setitem(registry.TABLES, table, dict(rows))


@by_name
def test_python_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_registry: None, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType(f"{page.stem.lower()}_of_{page.parent.name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    text = read(page)
    for found in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        first_line = text[: found.start()].count("\n") + 1
        exec(compile("\n" * first_line + found[1], str(page), "exec"), module.__dict__)


@by_api
def test_every_api_page_has_examples_of_three_kinds(page: Path) -> None:
    for kind in ("Basic", "Advanced", "Integration"):
        assert "```python\n" in section(section(read(page), "6 Examples"), kind)


# Names and signatures


@by_api
def test_an_api_page_has_the_sections_of_the_template(page: Path) -> None:
    text = without_code(read(page))
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == SECTIONS
    assert re.findall(r"^### (.*)$", section(text, SECTIONS[2]), flags=re.MULTILINE) == METHOD_GROUPS
    for words in ("**Purpose.**", "**Responsibilities.**", "**Dependencies.**", "**Integration points.**"):
        assert words in section(text, SECTIONS[0])


def rendered(function: Any, skip_first: bool) -> str:
    """Names of parameters with their defaults, as the tables write them."""
    parameters = list(inspect.signature(function).parameters.values())[1 if skip_first else 0 :]
    words: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not any(word.startswith("*") for word in words):
            words.append("*")
        stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
        default = parameter.default
        named = inspect.isclass(default) or callable(default)
        shown = default.__name__.replace("<lambda>", "...") if named else repr(default)
        value = "" if default is parameter.empty else f"={shown}"
        words.append(f"{stars}{parameter.name}{value}")
    return f"({', '.join(words)})"


def actual_call(call: str, names: Mapping[str, Any]) -> str:
    """The call as the code has it; raises when there is no such name."""
    found = re.fullmatch(r"(\w+)(?:\.(\w+))?(\(.*\))?", call)
    assert found, f"cannot be read: {call}"
    owner = names[found[1]]
    if found[2] is None:
        return found[1] + rendered(owner.__init__ if inspect.isclass(owner) else owner, inspect.isclass(owner))
    name = f"{found[1]}.{found[2]}"
    member = inspect.getattr_static(owner, found[2])
    if isinstance(member, classmethod | staticmethod):
        return name + rendered(member.__func__, isinstance(member, classmethod))
    return name + rendered(member, True) if inspect.isfunction(member) else name


@pytest.mark.parametrize("page", [*API, ROOT / "docs" / "api" / "README.md"], ids=lambda page: page.stem)
def test_every_call_exists_with_these_parameters_and_defaults(page: Path) -> None:
    names, calls = documented(read(page)), first_cells(read(page), "Call")
    assert len(calls) > 10
    assert calls == [actual_call(call, names) for call in calls]
    assert len(calls) == len(set(calls))


@pytest.mark.parametrize("page", [*API, ROOT / "docs" / "api" / "README.md"], ids=lambda page: page.stem)
def test_every_public_method_of_a_documented_class_is_listed(page: Path) -> None:
    """Fields of dataclasses are listed elsewhere; what a base that is documented too declares is listed there."""
    names = documented(read(page))
    listed = {call.split("(")[0] for call in first_cells(read(page), "Call")}
    for name, found in names.items():
        bases = [base for base in names.values() if inspect.isclass(base) and base is not found]
        for member, value in vars(found).items() if inspect.isclass(found) else ():
            is_method = isinstance(value, (classmethod, staticmethod, property)) or inspect.isfunction(value)
            inherited = any(base in found.__mro__ and member in vars(base) for base in bases)
            if is_method and not member.startswith("_") and not inherited:
                assert f"{name}.{member}" in listed
        assert not inspect.isfunction(found) or name in listed


@by_name
def test_listed_fields_are_the_fields_of_the_dataclass(page: Path) -> None:
    names = documented(read(page))
    for head, rows in tables(read(page)):
        for row in rows if head[0] == "Data" else ():
            fields = re.findall(r"`([a-z_]\w*)`", row[2])  # other names are those of classes
            assert fields == [field.name for field in dataclasses.fields(names[row[0].strip("`")])]


@by_api
def test_every_exception_exists_and_every_config_key_is_a_key(page: Path) -> None:
    exceptions = first_cells(section(read(page), SECTIONS[4]), "Exception")
    assert exceptions and all(issubclass(getattr(errors, name), errors.OmniError) for name in exceptions)
    keys = {"cache.policy", *(f"cache.{field.name}" for _, field in STEP_CACHE_KEYS)}
    keys |= {f"outputs.<port>.{key}" for key in field_names(Tap)}
    keys |= {f"speculation.{key}" for key in field_names(Speculation)}
    for title, (found, _) in CONFIG_GROUPS.items():
        keys |= {f"{title.strip('`')}.{key}" if title.startswith("`") else key for key in field_names(found)}
    assert set(first_cells(section(read(page), SECTIONS[3]), "Key")) <= keys


# Config tables


def field_names(found: Any) -> list[str]:
    return [field.metadata.get("key", field.name) for field in dataclasses.fields(found)]


CONFIG_GROUPS: dict[str, tuple[Any, frozenset[str]]] = {
    "Top level": (ConfigDocument, frozenset()),
    "`scheduler`": (SchedulerGroup, frozenset()),
    "`resources`": (ResourcesGroup, frozenset()),
    "`dit_cache`": (DiTCacheConfig, frozenset()),
    "`limits`": (LimitsConfig, frozenset()),
    "`prompts`": (PromptsConfig, frozenset()),
    "`ray`": (RayConfig, frozenset()),
    "Keys of every stage": (StageConfig, frozenset({"name", "options"})),
    "What a stage asks of Ray": (RayStageConfig, frozenset()),
    "Conditional edges": (EdgeConfig, frozenset()),
    "Streamed edges": (StreamConfig, frozenset()),
    "Keys of an `ar` stage": (AROptions, frozenset()),
    "Keys of a `dit` stage": (DiTOptions, frozenset()),
    "LoRA": (LoRAConfig, frozenset()),
    "Voices": (VoicesConfig, frozenset()),
    "Keys of a `music_prompt` stage": (MusicPromptOptions, frozenset()),
    "Keys of a `umt5` stage": (UMT5Options, frozenset()),
    "Keys of a `diffusers` stage": (DiffusersOptions, frozenset()),
}
STEP_CACHE_KEYS = [
    (policy, field)
    for policy in registry.TABLES["step cache"]
    for field in dataclasses.fields(registry.resolve("step cache", policy).options_type)
]


def config_tables(title: str) -> list[list[Row]]:
    return [rows for head, rows in tables(section(read(PAGES[1]), title)) if head[0] == "Key"]


def plain(value: Any) -> Any:
    """As YAML would say it."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def check_config_row(row: Row, field: dataclasses.Field[Any]) -> None:
    assert row[0] == f"`{field.metadata.get('key', field.name)}`"
    assert row[1] == type_words(field.type), field.name
    default = default_of(field)
    if default is dataclasses.MISSING:
        assert row[2] == "—", field.name
    elif dataclasses.is_dataclass(default):
        assert row[2] == "see below", field.name
    else:
        assert yaml.safe_load(row[2].strip("`")) == plain(default), field.name
    for choice in choices_of(field.type):
        assert f"`{choice}`" in row[-1], field.name


def choices_of(annotation: Any) -> list[str]:
    """`Literal['a', 'b'] | None` -> "a", "b"."""
    listed = re.findall(r"Literal\[([^]]*)\]", str(annotation))
    return re.findall(r"'(\w+)'", " ".join(listed))


def type_words(annotation: Any) -> str:
    """`Sequence[int] | None` -> "list"; what a reader who knows YAML and no Python expects."""
    words = {"int": "integer", "float": "number", "str": "string", "bool": "boolean", "Any": "any"}
    words |= {"Mapping": "mapping", "Sequence": "list", "tuple": "list", "Image": "image", "DType": "string"}
    words |= {"SchedulerType": "string", "Literal": "string", "Speculation": "mapping", "PromptTemplate": "mapping"}
    words |= {"TemplateImages": "mapping"}
    found: list[str] = []
    for part in re.sub(r"\[[^|]*\]", "", str(annotation)).split(" | "):
        word = words.get(part, "mapping" if part.endswith(("Group", "Config")) else part)
        found += [] if part == "None" or word in found else [word]
    return " or ".join(found)


@pytest.mark.parametrize("title", CONFIG_GROUPS)
def test_every_config_key_stands_in_its_table_with_its_type_and_default(title: str) -> None:
    found, hidden = CONFIG_GROUPS[title]
    fields = dict(zip(field_names(found), dataclasses.fields(found), strict=True))
    fields = {name: field for name, field in fields.items() if name not in hidden}
    rows = config_tables(title)[0]
    assert sorted(row[0].strip("`") for row in rows) == sorted(fields)
    for row in rows:
        check_config_row(row, fields[row[0].strip("`")])


@pytest.mark.parametrize(("index", "found"), [(1, Speculation), (2, PromptTemplate), (3, TemplateImages)])
def test_the_keys_of_a_mapping_of_an_ar_stage_stand_in_their_table(index: int, found: type) -> None:
    for row, field in zip(config_tables("Keys of an `ar` stage")[index], dataclasses.fields(found), strict=True):
        check_config_row(row, field)


def test_the_keys_of_a_port_of_an_ar_stage_stand_in_their_table() -> None:
    rows, fields = config_tables("Keys of an `ar` stage")[4], dataclasses.fields(Tap)
    assert [choices_of(field.type) for field in fields] == [[], ["prompt", "completion", "followed"]]
    for row, field in zip(rows, fields, strict=True):
        check_config_row(row, field)


def test_every_step_cache_and_every_key_of_one_stands_in_a_table() -> None:
    (policy,) = config_tables("Keys of a `dit` stage")[1]
    assert policy[:3] == ["`policy`", "string", "`none`"]
    assert re.findall(r"`(\w+)`", policy[-1]) == list(registry.TABLES["step cache"])
    found = tables(section(read(PAGES[1]), "Keys of a `dit` stage"))
    (rows,) = [rows for head, rows in found if head[0] == "Policy"]
    for row, (name, field) in zip(rows, STEP_CACHE_KEYS, strict=True):
        assert row[0] == f"`{name}`"
        check_config_row(row[1:], field)


def test_every_config_that_is_picked_for_a_checkpoint_is_named() -> None:
    (paragraph,) = re.findall(r"^\*\*Finding a file\*\*.*?^$", read(PAGES[1]), flags=re.MULTILINE | re.DOTALL)
    assert set(supported_checkpoints().values()) <= set(re.findall(r"`(\w+)`", paragraph))


def test_every_request_key_of_music_has_a_row() -> None:
    rows = first_cells(section(read(PAGES[1]), "Keys of a `music_prompt` stage"), "Request key")
    assert len(rows) == len(set(rows)) and set(rows) == REQUEST_KEYS


PARAMS = {"SamplingParams": SamplingParams, "DiffusionParams": DiffusionParams}
PARAM_ROWS = [
    pytest.param(params, row, id=row[0].strip("`"))
    for params in PARAMS.values()
    for title in [f"Parameters of `{'ar' if params is SamplingParams else 'dit'}` stages: `{params.__name__}`"]
    for row in config_tables(title)[0]
]


def test_every_parameter_has_a_row() -> None:
    rows = [(case.values[0], case.values[1][0].strip("`")) for case in PARAM_ROWS]
    assert rows == [(params, name) for params in PARAMS.values() for name in field_names(params)]


@pytest.mark.parametrize(("params", "row"), PARAM_ROWS)
def test_a_parameters_type_and_range_are_those_that_are_checked(params: Any, row: Row) -> None:
    name = row[0].strip("`")
    (field,) = [field for field in dataclasses.fields(params) if field.name == name]
    assert field.default is None and type_words(field.type) == row[1]
    found = re.fullmatch(r"(at least |above )?(-?[\d.]+)(?: to (\d+))?", row[2])
    if found is None:
        assert row[2] == ""
        return
    low, high = yaml.safe_load(found[2]), found[3] and int(found[3])
    accepted = [low + 1 if found[1] == "above " and high is None else high or low + 1]
    refused = [low if found[1] == "above " else low - 1]
    if high is not None:
        refused.append(high + 1)
    if found[1] != "above ":
        accepted.append(low)
    for value in accepted:
        assert getattr(params(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(InvalidRequestError, match=name):
            params(**{name: value})


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"])
def test_a_sampling_fallback_is_what_an_unset_parameter_does(name: str) -> None:
    (row,) = [case.values[1] for case in PARAM_ROWS if case.values[1][0] == f"`{name}`"]
    stated = yaml.safe_load(row[3].strip("`"))
    unset, given = (SamplingRow(params, [], []) for params in (SamplingParams(), SamplingParams(**{name: stated})))
    if name != "repetition_penalty":
        unset, given = unset.settings, given.settings
    assert getattr(unset, name) == getattr(given, name) == stated


def test_the_other_stated_fallbacks_are_those_of_the_code() -> None:
    stated = {case.values[1][0].strip("`"): case.values[1][3] for case in PARAM_ROWS}
    assert stated["max_tokens"] == f"`{DEFAULT_MAX_TOKENS}`"
    assert f"Z-Image: `{z_image.DEFAULT_STEPS}`" in stated["num_inference_steps"]
    assert f"Z-Image: `{z_image.DEFAULT_GUIDANCE}`" in stated["guidance_scale"]
    assert f"Qwen-Image: `{qwen_image.DEFAULT_STEPS}`" in stated["num_inference_steps"]
    assert f"Wan: `{wan.DEFAULT_STEPS}`" in stated["num_inference_steps"]
    assert f"Wan: `{wan.DEFAULT_GUIDANCE}`" in stated["guidance_scale"]
    assert f"Qwen-Image: `{qwen_image.DEFAULT_GUIDANCE}`" in stated["guidance_scale"]


# Pages as a whole


@by_name
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", without_code(read(page))):
        assert "://" in target or (page.parent / target).exists(), target


@by_name
def test_yaml_blocks_with_stages_are_configs_that_load(page: Path, tmp_path: Path) -> None:
    for index, block in enumerate(re.findall(r"^```yaml\n(.*?)^```$", read(page), flags=re.MULTILINE | re.DOTALL)):
        path = tmp_path / f"{index}.yaml"
        path.write_text(block, encoding="utf-8")
        Pipeline(load_config(path))


def shell_lines(page: Path) -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", read(page), flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def test_commands_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = shell_lines(ROOT / "README.md")
    assert {line[0] for line in lines} == {"make", "pip", "python", "vllm-omni"}
    lines += [["make", target] for target in re.findall(r"`make ([\w-]+)`", read(ROOT / "README.md"))]
    for command, *arguments in lines:
        if command == "vllm-omni":
            build_parser().parse_args(arguments)
        elif command == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, flags=re.MULTILINE)
        elif command == "python" and arguments[0] == "-m":
            assert find_spec(arguments[1])
        elif command == "python":
            assert (ROOT / arguments[0]).is_file()


def test_the_readme_lists_the_folders_that_there_are() -> None:
    listed = {cell.rstrip("/") for cell in first_cells(read(ROOT / "README.md"), "Folder")}
    parts = {f"vllm_omni/{path.name}" for path in (ROOT / "vllm_omni").iterdir() if path.is_dir()}
    assert all((ROOT / folder).is_dir() for folder in listed)
    assert {part for part in parts if not part.endswith("__pycache__")} <= listed


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_example_configs_load(path: Path) -> None:
    Pipeline(load_config(path))
