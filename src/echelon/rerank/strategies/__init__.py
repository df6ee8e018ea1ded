"""Which questions to ask: one generator for each way to sort, whoever answers."""
