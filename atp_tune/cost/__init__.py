"""What a study will cost, before anything long runs."""
