"""The stage kind `music_prompt`: what a request for music says -> all that the stages of ACE-Step read."""
