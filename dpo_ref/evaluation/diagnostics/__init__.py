"""Reference-policy diagnostics: what training did to single tokens, to whole responses and to the ranking of pairs."""
