"""The aggregator: hands out seeds, merges losses, keeps the ledger, serves adapters. It never imports llama_cpp."""
