"""Pure values and their errors: perplexity, KL, their spread over draws, what BOS and speed were measured to be."""
