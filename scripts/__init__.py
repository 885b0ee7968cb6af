"""Commands: a config dataclass gives the flags and the YAML, the packages do the work, a table shows what came out."""
