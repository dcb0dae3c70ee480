"""Everything that touches GGUF files: reading what a model is, reading, writing and validating adapters, quantising."""
