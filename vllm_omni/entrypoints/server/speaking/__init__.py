"""Text as speech: sentence by sentence, whole or while it comes."""
