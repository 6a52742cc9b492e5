"""The search: what may be chosen, what a trial does, who proposes it, and when it ends."""
