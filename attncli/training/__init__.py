"""A training run, watched at almost no cost: what each step did, and how to repeat the one that went wrong."""
