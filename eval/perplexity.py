"""Perplexity of a language model on a text: standard error, bits per byte and, against a reference, KL and agreement.

    python eval/perplexity.py --model gemma-3-270m --dataset wikitext2
    python eval/perplexity.py --model quantized/ --reference gemma-3-270m --dataset wikitext2 --json out.json

Any Hugging Face causal language model can be scored, quantized by anyone or not.
"""

from __future__ import annotations

import sys

from llmq.evaluation import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
