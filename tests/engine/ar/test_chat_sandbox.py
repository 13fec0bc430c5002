"""Whatever a chat template does, it ends soon, in little memory, and nobody else notices."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.ar import CHAT_TEMPLATE, GREEDY, make_model_folder
from vllm_omni import AsyncOmni, Omni
from vllm_omni.engine.ar.chat.sandbox import START, TemplateSandbox
from vllm_omni.errors import InvalidRequestError

BIG = 10**12
SLOW = {
    "nested loops": "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
    "recursion that doubles": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a value that holds itself twice, sixty times over": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}"
    ),
    "one operation": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x*ns.x %}{% endfor %}",
    "words without end": "{{ lipsum(n=10**9) }}",
}
LARGE = {
    "a product": f"{{{{ 'a' * {BIG} }}}}",
    "a list": f"{{{{ [1] * {BIG} }}}}",
    "a join": "{{ range(100000) | join('x' * 10**5) }}",
    "a replacement": "{{ ('a' * 10**5) | replace('a', 'b' * 10**5) }}",
    "a centred text": f"{{{{ 'a' | center({BIG}) }}}}",
    "a format": f"{{{{ '%{BIG}s' % 'a' }}}}",
    "another format": f"{{{{ '{{:{BIG}}}'.format(1) }}}}",
    "a method": f"{{{{ 'a'.ljust({BIG}) }}}}",
    "an indented object": f"{{{{ [[1]] | tojson(indent={BIG}) }}}}",
    "what doubles": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "many pieces": "{% for i in range(10**5) %}{{ 'x' * 1000 }}{% endfor %}",
    "many pieces that are kept": "{% set t %}{% for i in range(10**5) %}{{ 'x' * 10**5 }}{% endfor %}{% endset %}",
    "a range": f"{{% for i in range({BIG}) %}}x{{% endfor %}}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "brackets": "{{ " + "(" * 50_000 + ")" * 50_000 + " }}",
    "a reach for Python": "{{ ''.__class__.__mro__ }}",
    "a name of Python's": "{% set ns = namespace(__class__=1) %}",
}
MODEST = "{{ messages[0].content }}"


@pytest.fixture(scope="module")
def sandbox() -> Any:
    sandbox = TemplateSandbox()
    yield sandbox
    sandbox.close()


def test_a_signal_to_all_processes_of_a_server_ends_no_rendering() -> None:
    """A service manager may send it: what runs has time to end."""
    sandbox = TemplateSandbox()
    sandbox.start()
    assert sandbox._process is not None
    os.kill(sandbox._process.pid, signal.SIGTERM)  # before it has imported anything
    assert sandbox.render(MODEST, {"messages": [{"content": "hello"}]}) == "hello"
    os.kill(sandbox._process.pid, signal.SIGTERM)
    assert sandbox.render(MODEST, {"messages": [{"content": "again"}]}) == "again"
    sandbox.close()


@pytest.mark.parametrize("name", SLOW)
def test_a_template_that_takes_too_long_is_ended(sandbox: TemplateSandbox, name: str) -> None:
    began = time.process_time()
    with pytest.raises(InvalidRequestError, match=r"1 s of processor time|memory"):
        sandbox.render(SLOW[name], {})
    assert time.process_time() - began < 0.5, "nothing of it was computed here"
    assert sandbox.render("{{ a }}", {"a": "next"}) == "next"


@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_wants_too_much_is_refused(sandbox: TemplateSandbox, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="chat template"):
        sandbox.render(LARGE[name], {})
    assert sandbox.render("{{ a }}", {"a": "next"}) == "next"


@pytest.mark.parametrize("text", ["", "é\n\u2028\x00", "\ud800", "x" * 1_000_000])
def test_text_goes_through_as_it_is(sandbox: TemplateSandbox, text: str) -> None:
    assert sandbox.render("{{ a }}", {"a": text}) == text


def test_threads_share_one_and_get_their_own_answers(sandbox: TemplateSandbox) -> None:
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = "".join(sandbox.render("{{ a }}", {"a": number}) for _ in range(20))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number) * 20 for number in range(8)}


def test_one_that_was_killed_is_replaced(sandbox: TemplateSandbox) -> None:
    sandbox.render("a", {})
    assert sandbox._process is not None
    os.kill(sandbox._process.pid, signal.SIGKILL)
    sandbox._process.wait()
    assert sandbox.render("b", {}) == "b"


def test_an_interrupt_leaves_no_answer_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = TemplateSandbox()
    sandbox.render("ready", {})
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        sandbox.render(SLOW["nested loops"], {})
    assert sandbox.render("next", {}) == "next"
    sandbox.close()


def test_no_process_is_left_when_it_is_closed_or_dropped() -> None:
    for ends_by in ("close", "drop"):
        sandbox = TemplateSandbox()
        sandbox.render("a", {})
        process = sandbox._process
        assert process is not None and process.poll() is None
        if ends_by == "close":
            sandbox.close()
            sandbox.close()
        else:
            del sandbox
            gc.collect()
        assert process.poll() is not None


def _config(folder: Path) -> dict[str, Any]:
    stage = {"kind": "ar", "model": str(folder), "max_model_len": 200, "num_blocks": 40}
    return {"stages": {"text": stage}, "outputs": ["text"], "device": "cpu", "dtype": "float32"}


HANGS = "{% if messages[0].content == 'hang' %}" + SLOW["nested loops"] + "{% endif %}" + CHAT_TEMPLATE


def test_a_request_whose_template_hangs_is_refused_and_the_next_answered(tmp_path: Path) -> None:
    with Omni(_config(make_model_folder(tmp_path / "model", template=HANGS)), progress=False) as omni:
        bad, good = omni.generate(["hang", "go on"], GREEDY)
        again = omni.generate("go on", GREEDY)[0]
    assert "processor time" in str(bad.error) and bad.status.value == "rejected"
    assert good.error is None and good.token_ids == again.token_ids


def test_a_template_that_hangs_holds_up_nobody_who_writes(tmp_path: Path) -> None:
    ended: list[str] = []

    async def hang(omni: AsyncOmni) -> None:
        output = await omni.generate("hang", GREEDY)
        ended.append(str(output.error))

    async def main() -> None:
        async with AsyncOmni(_config(make_model_folder(tmp_path / "model", template=HANGS))) as omni:
            hanging: asyncio.Task[None] | None = None
            async for output in omni.stream("go on", GREEDY):
                hanging = hanging or asyncio.create_task(hang(omni))
                if output.finished:
                    ended.append("the writer")
            assert hanging is not None
            await hanging

    asyncio.run(main())
    assert ended[0] == "the writer" and "processor time" in ended[1]


def test_a_closed_pipeline_has_ended_what_it_started(tmp_path: Path) -> None:
    before = _children()
    omni = Omni(_config(make_model_folder(tmp_path / "model")), progress=False)
    omni.generate("hi", GREEDY)
    assert _children() - before
    omni.close()
    assert not _children() - before


def _children() -> set[str]:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if not children.exists():
        pytest.skip("no /proc to read the children from")
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # the thread has just ended
            found.update((task / "children").read_text().split())
    return found


def test_where_the_system_sets_no_limits_the_parent_ends_a_template_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without = "import sys, signal; sys.modules['resource'] = None; del signal.setitimer; "
    monkeypatch.setattr(f"{TemplateSandbox.__module__}.START", without + START)
    monkeypatch.setattr(f"{TemplateSandbox.__module__}.MAX_WAIT_S", 3.0)
    sandbox = TemplateSandbox()
    assert sandbox.render(MODEST, {"messages": [{"content": "hello"}]}) == "hello"
    with pytest.raises(InvalidRequestError, match="no answer for 3 s"):
        sandbox.render(SLOW["nested loops"], {})
    with pytest.raises(InvalidRequestError, match="writes more than"):
        sandbox.render(LARGE["many pieces"], {})
    assert sandbox.render(MODEST, {"messages": [{"content": "next"}]}) == "next"
    sandbox.close()
