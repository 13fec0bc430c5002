"""The tools around the tiny sound model: words for sounds, requests for the thinker, its text model, the detector."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AceStepPipeline
from PIL import Image
from support.tiny_audio import synthesised
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from tools.tiny.audio import audio_data, train_vae
from tools.tiny.audio.detect import hear
from tools.tiny.audio.evaluate import CASES, faults_of, prompts_for
from tools.tiny.audio.judge import judge
from tools.tiny.audio.loose import KINDS, answer_for, ask, loose_both, loose_sound, request
from tools.tiny.audio.prompt import sound_prompt
from tools.tiny.audio.render import render
from tools.tiny.audio.train_text import (
    LYRICS,
    PROMPT_KIND,
    batches,
    chat_prompt,
    example,
    train,
    train_tokenizer,
    training_example,
)
from tools.tiny.audio.words import FLATS, is_held_out, spell, wording
from tools.tiny.audio.world import (
    NOTES,
    TIMBRE_WORDS,
    TIMBRES,
    Sound,
    canonical,
    sample_chord,
    sample_sound,
)
from tools.tiny.audio.world import is_held_out as is_held_out_sound
from tools.tiny.image.render import draw_scene
from tools.tiny.image.world import sample_scene
from vllm_omni import Audio, OmniOutput, RequestStatus
from vllm_omni.models.qwen3.model import Qwen3Config
from vllm_omni.request import Completion, StageResult

NAMED = re.compile(r"(?<![a-z])([a-g])(#|b| sharp| flat)? ?([345])", re.IGNORECASE)
LOUDNESS_WORDS = re.compile(r"loud|soft|quiet|gentl|strong|forceful|volume", re.IGNORECASE)
SPEED_WORDS = re.compile(r"slow|fast|quick|rapid|short|long|hurry|pace|your time", re.IGNORECASE)


def read_notes(words: str) -> list[str]:
    """Every note that `words` name with its octave, by a grammar of the test's own."""
    black = {flat.lower(): sharp for sharp, flat in FLATS.items()}
    return [
        (black[f"{letter}b".lower()] if sign.lower() in ("b", " flat") else letter.upper() + "#" * bool(sign)) + octave
        for letter, sign, octave in NAMED.findall(words)
    ]


def read_canonical(words: str) -> Sound:
    """What canonical words mean."""
    notes = tuple(re.findall(r"[A-G]#?[345]", words))
    parts = words.split(", ")
    timbre = next(timbre for timbre, said in TIMBRE_WORDS.items() if said in parts)
    loudness = next((part for part in parts if part in ("loud", "soft")), None)
    speed = next((part for part in parts if part in ("slow", "fast")), None)
    return Sound(notes, timbre, words.startswith("chord"), loudness, speed)


def test_canonical_words_say_everything() -> None:
    rng = random.Random(0)
    for _ in range(300):
        sound = sample_sound(rng)
        assert read_canonical(canonical(sound)) == sound


def test_wordings_name_the_same_notes_in_the_same_order() -> None:
    rng = random.Random(1)
    for _ in range(1500):
        sound = sample_sound(rng)
        for words in (wording(sound, rng), loose_sound(sound, rng)):
            read, meant = read_notes(words), list(sound.notes)
            if read or any(note[-1] != "4" for note in meant):  # octaves are left out only if all are the fourth
                assert sorted(read) == sorted(meant) if sound.is_chord else read == meant, (words, canonical(sound))


def test_what_a_sound_leaves_open_no_words_say() -> None:
    rng = random.Random(2)
    for _ in range(1500):
        sound = sample_sound(rng)
        for words in (wording(sound, rng), loose_sound(sound, rng)):
            assert bool(LOUDNESS_WORDS.search(words)) == (sound.loudness is not None), (words, sound)
            assert bool(SPEED_WORDS.search(words)) == (sound.speed is not None), (words, sound)


def test_wordings_vary_and_depend_on_the_seed_alone() -> None:
    sound = Sound(("C4", "F#4", "G4"), "square", speed="fast")
    some = [wording(sound, random.Random(seed)) for seed in range(600)]
    assert some == [wording(sound, random.Random(seed)) for seed in range(600)]
    assert 0.24 < some.count(canonical(sound)) / 600 < 0.36 and len(set(some)) > 200


def test_no_wording_is_that_of_another_sound() -> None:
    """What is said means one thing: collisions between random sounds would be wrong labels."""
    rng = random.Random(3)
    meant: dict[str, tuple[object, ...]] = {}
    for _ in range(20_000):
        notes = tuple(rng.choice(("C4", "E4")) for _ in range(rng.randint(1, 2)))
        is_chord = len(set(notes)) == 2 and notes[0] == "C4" and rng.random() < 0.5
        sound = Sound(notes, rng.choice(TIMBRES), is_chord, rng.choice((None, "soft")), rng.choice((None, "fast")))
        meaning = (sound.notes, sound.timbre, sound.is_chord, sound.loudness, sound.speed)
        for words in (wording(sound, rng), loose_sound(sound, rng)):
            assert meant.setdefault(words.lower(), meaning) == meaning, words


def test_training_never_meets_what_is_held_out() -> None:
    rng = random.Random(4)
    for kind in (*KINDS, PROMPT_KIND):
        for held_out in (False, True):
            for _ in range(20 if held_out else 200):
                read, answer = example(kind, rng, held_out=held_out)
                told = read.split("user\n")[-1].split("<|im_end|>")[0] if kind in KINDS else caption(read)
                assert is_held_out(told) == held_out
                if said := re.search(r"(?:sound: |^)((?:chord of )?[A-G]#?[345].*)", answer):
                    assert is_held_out_sound(read_canonical(said[1])) == held_out


def caption(prompt: str) -> str:
    return prompt.split("# Caption\n")[1].split("\n\n# Metas")[0]


def test_answers_have_a_line_for_every_branch_that_is_asked_for() -> None:
    rng = random.Random(5)
    labels = {"scene": ["scene"], "sound": ["sound"], "both": ["scene", "sound"], "neither": []}
    for kind, expected in labels.items():
        for _ in range(200):
            lines = request(kind, rng)[1].split("\n")
            assert [line.split(": ")[0] for line in lines if ": " in line] == expected
            assert len(lines) == max(1, len(expected)) and all(lines)


def test_requests_for_both_come_in_either_order() -> None:
    rng = random.Random(6)
    sound = Sound(("C4",), "plucked", loudness="soft", speed="fast")
    first = Counter()
    for _ in range(400):
        scene = sample_scene(rng)
        words = loose_both(scene, sound, rng).lower()
        place = re.search(r"\bc ?4|\bc\b", words)
        assert place is not None, words
        first[place.start() < len(words) / 2] += 1
        assert answer_for(scene, sound).endswith("\nsound: C4, plucked string, soft, fast")
    assert 120 < first[True] < 280


def test_the_sound_models_prompt_is_the_pipelines_own() -> None:
    pipeline = object.__new__(AceStepPipeline)
    text, lyrics = AceStepPipeline._format_prompt(pipeline, "C4 then E4, sine", audio_duration=1.5)
    assert text == sound_prompt("C4 then E4, sine", 1.5) and lyrics == LYRICS


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(0, num_examples=8000)


def test_every_note_is_one_token_and_every_text_can_be_said(tokenizer: PreTrainedTokenizerFast) -> None:
    for name in NOTES:
        for text in (name, f" {name}", f" {name.lower()}", f" {spell(name, 'sharp', True)}"):
            assert len(tokenizer.tokenize(text)) == 1, text
    for text in ("F sharp 4 and Db5, 8-bit", "naïve 音 \n\n tabs\t", sound_prompt("c#4", 2)):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_is_what_the_thinker_is_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "play c4"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == chat_prompt("play c4")


def test_what_is_written_weighs_most_and_padding_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = batches(tokenizer, random.Random(7), 16)
    rng = random.Random(7)
    expected = sorted(written for _, written in (training_example(rng) for _ in range(16)))
    found = []
    for ids, targets, weights in parts:
        assert ids.shape == targets.shape == weights.shape and torch.equal(ids[:, 1:], targets[:, :-1])
        found += [tokenizer.decode(row[weight == 1]) for row, weight in zip(targets, weights, strict=True)]
        assert (targets[weights == 0] == 0).all()
    assert sorted(found) == expected


def test_training_resumes_and_gives_an_encoder_that_can_write(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for num_steps in (1, 2):
        trained = train(tmp_path, num_steps, batch_size=6, learning_rate=3e-3, judged=2, seed=0, num_examples=1)
    logged = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged == [1, 2]
    encoder = AutoModel.from_pretrained(tmp_path / "text_encoder").eval()
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert type(encoder).__name__ == "Qwen3Model"
    config = Qwen3Config.from_json(json.loads((tmp_path / "text_encoder/config.json").read_text()), "config.json")
    assert config.can_write and not config.has_head
    ids = reloaded(sound_prompt("F#4, saw", 2), return_tensors="pt")["input_ids"]
    assert ids.tolist() == [tokenizer(sound_prompt("F#4, saw", 2))["input_ids"]]
    with torch.no_grad():
        states = encoder(input_ids=ids).last_hidden_state
        expected = trained.eval()(input_ids=ids).logits
    torch.testing.assert_close(states @ encoder.get_input_embeddings().weight.T, expected)


def test_clean_recordings_are_heard_right() -> None:
    rng = random.Random(8)
    sounds = [sample_sound(rng) for _ in range(100)]
    wrong = [(canonical(sound), reason) for sound in sounds if (reason := judge(sound, render(sound)).complaint)]
    assert len(wrong) <= 1, wrong


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.01])
def test_waveforms_of_other_making_with_noise_are_heard_right(noise: float) -> None:
    rng = random.Random(9)
    sounds = [sample_sound(rng) for _ in range(60)]
    found = ((sound, judge(sound, synthesised(sound, noise, seed)).complaint) for seed, sound in enumerate(sounds))
    wrong = [(canonical(sound), reason) for sound, reason in found if reason]
    assert len(wrong) <= 1, wrong


def test_a_note_off_by_a_semitone_a_missing_one_and_another_order_are_caught() -> None:
    rng = random.Random(10)
    for _ in range(60):
        sound = sample_sound(rng)
        index = rng.randrange(len(sound.notes))
        place = NOTES.index(sound.notes[index])
        moved = NOTES[place + 1 if place + 1 < len(NOTES) else place - 1]
        others = [(*sound.notes[:index], moved, *sound.notes[index + 1 :])]
        if len(sound.notes) > 1:
            others.append((*sound.notes[:index], *sound.notes[index + 1 :]))
            others += [] if sound.is_chord or sound.notes == sound.notes[::-1] else [sound.notes[::-1]]
        for notes in others:
            verdict = judge(sound, render(replace(sound, notes=notes)))
            assert not verdict.notes_right, (canonical(sound), notes)


def test_notes_together_are_not_notes_in_a_row() -> None:
    rng = random.Random(11)
    for count in (2, 3):
        for timbre in TIMBRES:
            chord = Sound(sample_chord(rng, count), timbre, is_chord=True)
            row = replace(chord, is_chord=False)
            assert not judge(row, render(chord)).notes_right and not judge(chord, render(row)).notes_right


def test_an_octave_is_neither_missed_nor_made_up() -> None:
    for timbre in TIMBRES:
        for low, high in (("C3", "C4"), ("A4", "A5"), ("F#3", "F#5")):
            both = 0.5 * (render(Sound((low,), timbre)) + render(Sound((high,), timbre)))
            assert hear(both)[0].names == (low, high), (timbre, low)
            assert hear(render(Sound((low,), timbre)))[0].names == (low,)


def test_another_timbre_loudness_or_speed_is_caught_and_nothing_else() -> None:
    rng = random.Random(12)
    for _ in range(40):
        sound = replace(sample_sound(rng), loudness="loud", speed="slow")
        other = replace(sound, timbre=rng.choice([timbre for timbre in TIMBRES if timbre != sound.timbre]))
        verdict = judge(sound, render(other))
        assert verdict.notes_right and verdict.loudness_right and verdict.speed_right and not verdict.timbre_right
        assert not judge(sound, render(replace(sound, loudness="soft"))).loudness_right
        verdict = judge(sound, render(replace(sound, speed="fast")))
        assert verdict.notes_right and verdict.timbre_right and not verdict.speed_right


def test_a_repeated_note_is_heard_as_often_as_it_is_struck() -> None:
    for timbre in TIMBRES:
        twice = Sound(("E4", "E4"), timbre, speed="fast")
        once = Sound(("E4",), timbre, speed="slow")
        assert judge(twice, render(twice)).is_right and judge(once, render(once)).is_right
        assert not judge(twice, render(once)).notes_right and not judge(once, render(twice)).notes_right


def test_a_quarter_tone_is_between_two_notes() -> None:
    time = np.arange(8000) / 16_000
    for cents, expected in ((-40, "A4"), (0, "A4"), (40, "A4"), (60, "A#4"), (-60, "G#4")):
        heard = hear(0.8 * np.sin(2 * np.pi * 440 * 2 ** (cents / 1200) * time))
        assert [note.names for note in heard] == [(expected,)]


def test_silence_and_noise_are_no_notes_of_the_world() -> None:
    noise = np.random.default_rng(0).standard_normal(32_000)
    assert hear(np.zeros(32_000)) == [] and hear(1e-4 * noise) == []
    for sound in (Sound(("C4",), "sine"), Sound(("C4", "E4"), "saw", is_chord=True)):
        for samples in (np.zeros(32_000), 0.2 * noise, np.zeros(0)):
            verdict = judge(sound, samples)
            assert not (verdict.notes_right or verdict.timbre_right or verdict.is_right) and verdict.complaint


def answered(text: str, images: tuple[Image.Image, ...] = (), audios: tuple[Audio, ...] = ()) -> OmniOutput:
    results = {
        "thinker": StageResult(completions=(Completion(text, (1,), "stop"),)),
        "image": StageResult(images=images),
        "sound": StageResult(audios=audios),
    }
    return OmniOutput(request_id="1", status=RequestStatus.FINISHED, results=results)


def test_an_answer_is_right_only_with_its_words_its_picture_and_its_sound() -> None:
    rng = random.Random(13)
    for kind in KINDS:
        asked, other = ask(kind, rng, held_out=True), ask("both", rng)
        pictures = tuple(Image.fromarray(draw_scene(one.scene, rng)) for one in (asked, other) if one.scene)
        recordings = tuple(Audio(render(one.sound)[None], 16_000) for one in (asked, other) if one.sound)
        images, audios = (pictures[:1] if asked.scene else ()), (recordings[:1] if asked.sound else ())
        right = faults_of(asked, answered(asked.answer, images, audios))
        assert set(right.values()) == {None}
        assert set(right) == {"words"} | ({"picture"} if asked.scene else set()) | ({"sound"} if asked.sound else set())
        assert faults_of(asked, answered(other.answer, images, audios))["words"]
        assert faults_of(asked, answered(asked.answer, pictures, audios))["words"]
        assert faults_of(asked, answered(asked.answer, images, recordings))["words"]
        if asked.scene:
            assert faults_of(asked, answered(asked.answer, pictures[1:], audios))["picture"]
        if asked.sound:
            assert faults_of(asked, answered(asked.answer, images, recordings[1:]))["sound"]
            assert faults_of(asked, answered(asked.answer, images))["sound"]


def test_judged_prompts_are_distinct_held_out_and_of_their_kind() -> None:
    for case in CASES:
        prompts = prompts_for(case, 10, 1)
        assert len({words for words, _ in prompts}) == 10 and prompts == prompts_for(case, 10, 1)
        for words, sound in prompts:
            assert case.accepts(sound) and is_held_out(words) and is_held_out_sound(sound)


def test_latents_of_what_sounds_equal_those_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    torch.manual_seed(0)
    vae, rng = train_vae.fresh_model().eval(), random.Random(1)
    sounds = [sample_sound(rng) for _ in range(6)]
    samples = torch.stack([torch.from_numpy(render(sound)) for sound in sounds])[:, None]
    everything = audio_data.encode(vae, samples)
    assert torch.allclose(audio_data.Latents(vae).of(sounds), everything, atol=1e-4 * float(everything.abs().max()))


def test_the_published_autoencoder_equals_the_trained_one_and_its_posterior_is_finite() -> None:
    torch.manual_seed(0)
    vae = train_vae.fresh_model().eval()
    samples = train_vae.recordings(4, 0)
    with torch.no_grad():
        train_vae.normalise_latents(vae, samples)
        posterior = train_vae.published(vae).eval().encode(samples).latent_dist
        expected = vae.encode(samples).latent_dist.mean
    assert torch.allclose(posterior.mean, expected, atol=1e-4)
    assert posterior.std.isfinite().all() and posterior.std.max() < 1e-2
    assert torch.allclose(expected.std(dim=(0, 2)), torch.ones(16), atol=1e-2)
