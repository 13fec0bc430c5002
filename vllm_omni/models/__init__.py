"""Model families, a folder each, with a README: leaves that the registry alone names."""
