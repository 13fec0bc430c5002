"""How the small models that ship with the package are made: data, training, judging."""
