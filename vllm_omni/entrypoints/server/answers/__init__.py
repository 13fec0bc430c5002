"""From the outputs of a run to the bodies that clients of OpenAI's read."""
