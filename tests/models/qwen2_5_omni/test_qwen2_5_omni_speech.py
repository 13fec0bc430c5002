"""Thinker and talker against transformers' generate, word by word and code by code: alone, in a crowd, in chunks, from
the prefix cache, and when the KV pool is too small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import assert_clean as assert_engine_clean
from support.ar import drain, is_busy
from support.speech import save_tiny_omni, tiny_reference
from support.speech_engines import TEXT, THINKER_PORTS, Case, Speech, make_case, make_engine, reference, submit_prompt
from torch import Tensor

from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.messages import StageDone, StageEvent, StageRows
from vllm_omni.params import SamplingParams
from vllm_omni.worker.ar.media_encoders import MediaEncoders
from vllm_omni.worker.ar.media_prompt import MediaItem, MediaPrompt
from vllm_omni.worker.model_pool import ModelPool

LONG = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)

CASES = {
    "text": make_case(""),
    "image": make_case("i", seed=1),
    "audio": make_case("a", seed=2),
    "video": make_case("v", seed=3),
    "all": make_case("aivi", seed=4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_omni(tmp_path_factory.mktemp("speech") / "model")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_reference()


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool()


@pytest.fixture(scope="module")
def expected(model: Any) -> dict[str, tuple[list[int], list[int]]]:
    return {name: reference(model, case) for name, case in CASES.items()}


def assert_clean(speech: Speech) -> None:
    for engine in (speech.thinker, speech.talker):
        assert_engine_clean(engine)


def run_thinker(
    engine: AREngine, prompt: Any, name: str = "r", params: SamplingParams = TEXT
) -> tuple[StageDone, list[StageEvent]]:
    submit_prompt(engine, name, prompt, params)
    events = drain(engine)
    assert isinstance(events[-1], StageDone), events[-1]
    return events[-1], events


def joined(events: list[StageEvent], name: str, port: str) -> Tensor:
    rows = [e.rows for e in events if isinstance(e, StageRows) and (e.request_id, e.port) == (name, port)]
    return torch.cat(rows)


def ours(case: Case, model: Any) -> Any:
    return case.prompt(model) if case.items else case.token_ids


@pytest.mark.parametrize("name", CASES)
def test_words_and_codes_equal_the_reference(
    name: str, folder: Path, model: Any, pool: ModelPool, expected: Any
) -> None:
    speech = Speech(make_engine(folder, "thinker", pool), make_engine(folder, "talker", pool))
    speech.submit(name, ours(CASES[name], model))
    speech.run()
    assert not speech.failed
    assert (speech.words[name], speech.codes[name]) == expected[name]


@pytest.mark.parametrize(
    ("thinker", "talker", "chunk"),
    [
        ({}, {}, 1),
        ({"max_num_batched_tokens": 5}, {"max_num_batched_tokens": 3}, 4),
        ({"max_num_seqs": 2, "block_size": 3}, {"max_num_seqs": 1}, 2),
        ({"prefix_caching": False}, {"block_size": 7}, 3),
        ({"num_blocks": 16}, {"num_blocks": 23}, 1),
    ],
)
def test_a_crowd_in_any_order_and_in_small_pools_changes_nothing(
    thinker: Any, talker: Any, chunk: int, folder: Path, model: Any, pool: ModelPool, expected: Any
) -> None:
    for names in (list(CASES), list(CASES)[::-1]):
        names = [name for name in names if "num_blocks" not in thinker or name != "all"]
        speech = Speech(
            make_engine(folder, "thinker", pool, **thinker), make_engine(folder, "talker", pool, **talker), chunk
        )
        for name in names:
            speech.submit(name, ours(CASES[name], model))
        speech.run()
        assert {name: (speech.words[name], speech.codes[name]) for name in names} == {n: expected[n] for n in names}
        assert_clean(speech)
        if "num_blocks" in thinker:
            preemptions = [engine.get_stats()["num_preemptions"] for engine in (speech.thinker, speech.talker)]
            assert min(preemptions) > 0, "the pools are meant to be too small"


def test_prefix_hits_give_the_same_words_codes_and_rows(
    folder: Path, model: Any, pool: ModelPool, expected: Any
) -> None:
    speech = Speech(make_engine(folder, "thinker", pool), make_engine(folder, "talker", pool))
    for turn in range(2):
        for name in CASES:
            speech.submit(f"{name} {turn}", ours(CASES[name], model))
        speech.run()
    for name in CASES:
        for turn in range(2):
            assert (speech.words[f"{name} {turn}"], speech.codes[f"{name} {turn}"]) == expected[name]
    hits = {e.request_id: e.metrics["cache_hits"] for e in speech.events["thinker"] if isinstance(e, StageDone)}
    assert all((hits[f"{name} 0"] == 0) and hits[f"{name} 1"] > len(CASES[name].token_ids) - 5 for name in CASES)


def test_the_same_tokens_around_another_picture_are_no_prefix_hit(folder: Path, model: Any, pool: ModelPool) -> None:
    one, other = make_case("i", seed=1), make_case("i", seed=5)
    other.token_ids = list(one.token_ids)
    engine = make_engine(folder, "thinker", pool, streamed=())
    metrics = [run_thinker(engine, case.prompt(model), str(i))[0] for i, case in enumerate((one, other, one))]
    assert [event.metrics["cache_hits"] for event in metrics] == [0, 4, 12], "the words before it alone"
    assert metrics[0].payload.meta["token_ids"] == metrics[2].payload.meta["token_ids"]
    assert metrics[0].payload.meta["token_ids"] != metrics[1].payload.meta["token_ids"]


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 4}])
def test_an_item_is_encoded_once_and_not_at_all_when_the_cache_serves_it(
    options: Any, folder: Path, model: Any, pool: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    plain = MediaEncoders.encode

    def counting(self: MediaEncoders, item: Any) -> Any:
        encoded.append(item.kind)
        return plain(self, item)

    monkeypatch.setattr(MediaEncoders, "encode", counting)
    engine = make_engine(folder, "thinker", pool, **options)
    for turn in range(2):
        run_thinker(engine, CASES["all"].prompt(model), str(turn))
        assert encoded == ["audio", "image", "video", "image"]


def test_streamed_rows_are_the_whole_tensors_given_once(folder: Path, model: Any, pool: ModelPool) -> None:
    prompt = CASES["all"].prompt(model)
    whole, _ = run_thinker(make_engine(folder, "thinker", pool, wanted=THINKER_PORTS, streamed=()), prompt)
    engine = make_engine(folder, "thinker", pool, wanted=["reply_states"], max_num_batched_tokens=7)
    done, events = run_thinker(engine, prompt)
    num_prompt, num_words = len(prompt.token_ids), len(done.payload.meta["token_ids"])
    assert set(done.payload.tensors) == {"reply_states"}
    lengths = {"prompt_states": num_prompt, "reply_states": num_words - 1, "prompt_positions": num_prompt}
    for port, length in lengths.items():
        rows = [event for event in events if isinstance(event, StageRows) and event.port == port]
        assert [event.is_last for event in rows] == [False] * (len(rows) - 1) + [True]
        joined = torch.cat([event.rows for event in rows])
        assert len(joined) == length
        torch.testing.assert_close(joined, whole.payload.tensors[port], rtol=1e-4, atol=1e-5)
        if port == "reply_states":
            assert len(rows) == num_words - 1, "a row comes as soon as it is computed"
    indices = torch.cat([item.indices for item in prompt.items])
    embeddings = whole.payload.tensors["prompt_states"][:, :32]
    assert not embeddings[indices].any() and embeddings.any(1).sum() == num_prompt - len(indices)


@pytest.mark.parametrize("num_words", [1, 2])
def test_a_reply_ends_with_its_last_row_or_says_that_it_has_none(num_words: int, folder: Path, pool: ModelPool) -> None:
    params = SamplingParams(temperature=0, max_tokens=num_words, ignore_eos=True)
    _, events = run_thinker(make_engine(folder, "thinker", pool), [5, 6], params=params)
    rows = [event for event in events if isinstance(event, StageRows) and event.port == "reply_states"]
    assert [(tuple(event.rows.shape), event.is_last) for event in rows] == [((num_words - 1, 64), True)]


def test_what_nobody_reads_is_neither_kept_nor_given(folder: Path, pool: ModelPool) -> None:
    silent, loud = (make_engine(folder, "thinker", pool, streamed=s, num_blocks=8) for s in ((), ["reply_states"]))
    done, events = run_thinker(silent, [5, 6])
    assert not done.payload.tensors and not any(isinstance(event, StageRows) for event in events)
    sizes = [engine.get_stats()["kv_pool_bytes"] for engine in (silent, loud)]
    assert sizes[1] - sizes[0] == 8 * 4 * 2 * 32 * 4  # embedding and last state of every slot


@pytest.mark.parametrize("seed", range(6))
def test_preemption_gives_no_row_twice(seed: int, folder: Path, pool: ModelPool) -> None:
    engine = make_engine(folder, "thinker", pool, num_blocks=9, prefix_caching=seed % 2 == 0)
    for name in range(3):
        submit_prompt(engine, str(name), [30 + seed, name + 5, 6, 7], LONG)
    events = drain(engine)
    assert engine.get_stats()["num_preemptions"] > 0
    for name in range(3):
        _, rows = run_thinker(make_engine(folder, "thinker", pool), [30 + seed, name + 5, 6, 7], params=LONG)
        for port in ("prompt_states", "reply_states"):
            given, expected = (joined(found, str(number), port) for found, number in ((events, name), (rows, "r")))
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_another_speaker_begins_another_way(folder: Path, model: Any, pool: ModelPool) -> None:
    speech = Speech(make_engine(folder, "thinker", pool), make_engine(folder, "talker", pool))
    speech.submit("Ethan", CASES["text"].token_ids, speaker="Ethan")
    speech.submit("Chelsie", CASES["text"].token_ids)
    speech.run()
    assert speech.codes["Ethan"] == reference(model, CASES["text"], "Ethan")[1] != speech.codes["Chelsie"]


def test_a_reply_of_one_token_is_not_spoken(folder: Path, pool: ModelPool) -> None:
    """Nothing follows its token, so that it has no state; the reference fails."""
    speech = Speech(make_engine(folder, "thinker", pool), make_engine(folder, "talker", pool))
    speech.submit("r", CASES["text"].token_ids, SamplingParams(temperature=0, max_tokens=1))
    speech.run()
    assert len(speech.words["r"]) == 1 and not speech.failed
    assert not len(speech.codes["r"])


def test_every_reply_chunk_is_consumed_once_and_only_when_read(folder: Path, pool: ModelPool) -> None:
    for chunk in (1, 4):
        speech = Speech(make_engine(folder, "thinker", pool), make_engine(folder, "talker", pool), chunk)
        speech.submit("r", CASES["text"].token_ids)
        while is_busy(speech.thinker):
            speech.step()
            assert speech.consumed() <= len(speech.codes["r"]) + 1, "at most the empty end besides"
        speech.run()
        assert speech.consumed() == speech.num_given["reply_states"] >= (len(speech.words["r"]) - 1) // chunk
        for port in ("prompt_states", "prompt_positions"):
            assert speech.consumed(port) == speech.num_given[port] > 0


def test_a_paused_thinker_writes_nothing_and_goes_on_where_it_stopped(
    folder: Path, pool: ModelPool, expected: Any
) -> None:
    speech = Speech(make_engine(folder, "thinker", pool), make_engine(folder, "talker", pool))
    for name in ("text", "other"):
        speech.submit(name, CASES["text"].token_ids)
    for _ in range(3):
        speech.step()
    speech.thinker.pause("text")
    before = list(speech.codes["text"])
    speech.run()
    assert "text" not in speech.words and speech.words["other"] == expected["text"][0]
    assert len(speech.codes["text"]) >= len(before) and not is_busy(speech.talker)
    speech.talker.pause("text")
    speech.thinker.resume("text")
    speech.run()
    assert speech.words["text"] == expected["text"][0] and speech.codes["text"] != expected["text"][1]
    speech.talker.resume("text")
    speech.run()
    assert speech.codes["text"] == expected["text"][1]
    assert_clean(speech)


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 9, 20])
def test_abort_frees_all_and_no_event_follows(steps: int, folder: Path, model: Any, pool: ModelPool) -> None:
    speech = Speech(make_engine(folder, "thinker", pool), make_engine(folder, "talker", pool))
    for name in ("image", "text"):
        speech.submit(name, ours(CASES[name], model))
    for _ in range(steps):
        speech.step()
    speech.abort("image")
    speech.abort("unknown")
    known = {part: len(events) for part, events in speech.events.items()}
    speech.run()
    later = [event for part, events in speech.events.items() for event in events[known[part] :]]
    assert {event.request_id for event in later} == {"text"}
    assert_clean(speech)


def test_an_image_that_does_not_fit_its_placeholders_fails_alone(
    folder: Path, model: Any, pool: ModelPool, expected: Any
) -> None:
    bad = make_case("i", seed=1).prompt(model)
    item = bad.items[0]
    short = MediaItem("image", item.indices[:-1], item.inputs)
    speech = Speech(make_engine(folder, "thinker", pool, prefix_caching=False), make_engine(folder, "talker", pool))
    prompt = MediaPrompt(bad.token_ids, bad.content_ids, bad.positions, bad.position_delta, (short,))
    speech.submit("bad", prompt)
    speech.submit("text", CASES["text"].token_ids)
    speech.run()
    assert "image: got 6 rows from its encoder, expected 5" in str(speech.failed["bad"].error)
    assert (speech.words["text"], speech.codes["text"]) == expected["text"]
    assert_clean(speech)
