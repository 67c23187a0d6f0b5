"""How fast hdfast is: `pytest bench/ --benchmark-only`, `python -m bench.costs`, `python -m bench.peers`."""
