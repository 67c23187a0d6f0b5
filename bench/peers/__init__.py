"""An update of ours and of other people's programs, in turns on one machine: `python -m bench.peers`."""
