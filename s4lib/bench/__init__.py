"""`s4 bench`: how fast steps, evaluation, loading and several processes are."""
