"""What a model is worth: window NLLs, perplexity and KL with their errors, zero-shot tasks."""
