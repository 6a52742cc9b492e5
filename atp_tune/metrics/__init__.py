"""Values and their standard errors: perplexity, KL, spread over draws, effect of BOS, speed."""
