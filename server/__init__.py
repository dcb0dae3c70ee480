"""The aggregator: hands out seeds, merges losses, keeps the ledger, serves adapters. Of all this only `inference` reaches llama.cpp."""
