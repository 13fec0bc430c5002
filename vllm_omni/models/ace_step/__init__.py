"""ACE-Step 1.5."""
