"""Voices that a user keeps: what is written is what is read, within limits, and nothing but names is ever followed."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.qwen3_tts import sound

from vllm_omni.config.schema import LimitsConfig, VoicesConfig
from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError, ResourceError
from vllm_omni.media.reference_sound import read_reference
from vllm_omni.voices import VoiceStore

SOUND = sound(1.0)
CONSENT = "Anna herself, by letter"


@pytest.fixture
def store(tmp_path: Path) -> VoiceStore:
    return VoiceStore(VoicesConfig(str(tmp_path / "voices"), max_voices=3, max_mb=0.4))


def test_a_kept_voice_is_the_same_for_another_process(store: VoiceStore) -> None:
    began = int(time.time())
    facts = store.add("Anna-2", SOUND, text=" Good morning. ", consent=CONSENT)
    voice = VoiceStore(store.config).get("Anna-2")
    np.testing.assert_array_equal(voice.sound, SOUND)
    assert voice.facts == facts == store.facts()[0]
    assert (facts.text, facts.consent, facts.duration_s) == ("Good morning.", CONSENT, 1.0)
    assert began <= facts.created <= time.time()
    (file,) = Path(store.config.folder).iterdir()
    assert facts.num_bytes == file.stat().st_size


def test_a_removed_voice_leaves_nothing_behind(store: VoiceStore) -> None:
    assert store.names() == store.facts() == []
    store.add("anna", SOUND, text=None, consent=CONSENT)
    store.remove("anna")
    assert store.names() == [] and not list(Path(store.config.folder).iterdir())
    with pytest.raises(InvalidRequestError, match="voice: got 'anna'"):
        store.get("anna")
    with pytest.raises(InvalidRequestError, match="voice: got 'anna'"):
        store.remove("anna")


@pytest.mark.parametrize("name", ["../anna", "anna/..", "/etc/passwd", "a.b", "", "a" * 65, "a\0", "ä", "a\n", None, 7])
def test_a_name_is_never_a_path(store: VoiceStore, name: str) -> None:
    secret = Path(store.config.folder).with_name("anna.safetensors")
    save_file({"sound": SOUND}, secret)
    for act in (store.get, store.remove, lambda given: store.add(given, SOUND, text=None, consent=CONSENT)):
        with pytest.raises(InvalidRequestError, match="name: got"):
            act(name)
    assert secret.is_file() and not Path(store.config.folder).exists()


def test_a_link_out_of_the_folder_is_not_followed(store: VoiceStore) -> None:
    store.add("anna", SOUND, text=None, consent=CONSENT)
    folder = Path(store.config.folder)
    outside = (folder / "anna.safetensors").rename(folder.with_name("outside.safetensors"))
    (folder / "anna.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="a link to"):
        store.get("anna")


def test_a_file_that_goes_meanwhile_hides_no_other_voice_and_stops_no_new_one(
    store: VoiceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process removes one between the look at the folder and that at the file; or a link leads to nothing."""
    store.add("anna", SOUND, text=None, consent=CONSENT)
    (Path(store.config.folder) / "broken.safetensors").symlink_to("nothing.safetensors")
    assert [each.name for each in store.facts()] == ["anna"]
    store.add("bert", SOUND, text=None, consent=CONSENT)
    monkeypatch.setattr(store, "names", lambda: ["anna", "gone"])
    assert [each.name for each in store.facts()] == ["anna"]


def test_a_damaged_file_hides_no_other_voice_is_named_and_can_be_removed(
    store: VoiceStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.add("anna", SOUND, text=None, consent=CONSENT)
    (Path(store.config.folder) / "bert.safetensors").write_bytes(b"no voice")
    assert [each.name for each in store.facts()] == ["anna"]
    assert "bert.safetensors" in caplog.text and "remove the file" in caplog.text
    with pytest.raises(CheckpointError, match=r"bert\.safetensors"):
        store.get("bert")
    store.remove("bert")
    assert store.names() == ["anna"]


@pytest.mark.parametrize("consent", [None, "", "  ", "x" * 501])
def test_no_voice_is_kept_without_consent(store: VoiceStore, consent: str | None) -> None:
    with pytest.raises(InvalidRequestError, match="consent: got"):
        store.add("anna", SOUND, text=None, consent=consent)
    assert store.names() == []


def test_number_and_bytes_are_limited_and_names_are_unique(store: VoiceStore) -> None:
    for name in ("a", "b", "c"):
        store.add(name, SOUND, text=None, consent=CONSENT)
    with pytest.raises(InvalidRequestError, match="name: got 'B', which is taken"):
        store.add("B", SOUND, text=None, consent=CONSENT)
    with pytest.raises(ResourceError, match=r"at most 3 \(voices.max_voices\)"):
        store.add("d", SOUND, text=None, consent=CONSENT)
    store.remove("a")
    with pytest.raises(ResourceError, match=r"at most 0.4 \(voices.max_mb\)"):
        store.add("d", sound(3.0), text=None, consent=CONSENT)
    assert store.names() == ["b", "c"]


@pytest.mark.parametrize(
    ("samples", "complaint"),
    [
        (SOUND[:2400], "got 0.10 s"),
        (np.zeros(61 * 24000, np.float32), "got 61.00 s"),
        (np.zeros(24000, np.float32), "got silence"),
        (np.full(24000, np.nan, np.float32), "NaN"),
    ],
)
def test_a_sound_in_which_no_voice_can_be_heard_is_refused(
    store: VoiceStore, samples: np.ndarray, complaint: str
) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        store.add("anna", samples, text=None, consent=CONSENT)
    with pytest.raises(InvalidRequestError, match=complaint):
        read_reference((samples, 24000), limits=LimitsConfig(), name="ref_audio")


def test_a_reference_of_another_rate_and_two_channels_becomes_one_at_24_khz() -> None:
    stereo = np.stack([SOUND, SOUND])
    np.testing.assert_allclose(read_reference((stereo, 24000), limits=LimitsConfig(), name="x"), SOUND, atol=1e-6)
    assert read_reference((SOUND, 48000), limits=LimitsConfig(), name="x").shape == (12000,)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"sound": SOUND}, {}),
        ({"sound": SOUND}, {"format": "vllm-omni voice 1", "consent": "", "created": "1"}),
        ({"sound": SOUND}, {"format": "vllm-omni voice 1", "consent": "yes", "created": "x"}),
        ({"sound": SOUND[:10]}, {"format": "vllm-omni voice 1", "consent": "yes", "created": "1"}),
        ({"other": SOUND}, {"format": "vllm-omni voice 1", "consent": "yes", "created": "1"}),
        (None, {}),
    ],
)
def test_a_file_that_is_no_voice_is_named(
    store: VoiceStore, tensors: dict[str, np.ndarray] | None, metadata: dict[str, str]
) -> None:
    file = Path(store.config.folder) / "anna.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"\xff" * 64) if tensors is None else save_file(tensors, file, metadata)
    with pytest.raises(CheckpointError, match=r"anna.safetensors: .*remove the file"):
        store.get("anna")


def test_a_store_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="which is no folder"):
        VoiceStore(VoicesConfig(str(tmp_path / "file")))
    with pytest.raises(ConfigError, match="max_voices: got 0"):
        VoicesConfig("x", max_voices=0)
