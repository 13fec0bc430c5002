"""What stages have in common that write codes of speech along a text, whatever their family."""
