"""What listens: the aggregator of federated runs, and the model server that answers with what they learned."""
