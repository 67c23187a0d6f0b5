"""Which backend every op runs on, and whether update and acting are CUDA graphs: tried once for a machine and a model.

`trials` tries them, `search` does so in a process of its own and survives what goes wrong there, `choice` remembers
the result, and `settle` is what a run asks.
"""
