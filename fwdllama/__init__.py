"""Fine-tuning of quantised GGUF models with forward passes only.

A fine-tuned model is a base GGUF, an initial adapter, and a ledger of (seed, coefficient) entries; everything else
produces, moves, replays or scores ledger entries. Importing this package imports nothing else: no llama.cpp, no numpy.
"""

__version__ = "0.1.0"
