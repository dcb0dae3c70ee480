"""The engine: llama.cpp through its low-level API. The only package of the training side that imports llama_cpp."""
