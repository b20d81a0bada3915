"""eval/sweep.py: many quantizations of one model, scored together beside its peers."""
