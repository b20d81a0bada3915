"""Speed of llmq beside other engines, on one machine in one run: ``eval/bench.py``."""
