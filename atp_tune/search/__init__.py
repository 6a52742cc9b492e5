"""The search: space, context, objective, samplers, and the run of a study."""
