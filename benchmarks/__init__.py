"""One file per claim, peers in the same run; each prints a table and writes ``results/bench_NAME.json``."""
