"""Quality at every size: methods, presets, bits and groups on one model, beside its peers, by one protocol.

    python eval/sweep.py --model gemma-3-270m --eval wikitext2-test.txt --eval-windows 12 \\
        --calib wikitext2-valid.txt --grid "gptq:w4g128,w3g128,w2g64 rtn:w4g128" --presets fast,balanced,best \\
        --json sweep.json --plot sweep.png
    python eval/sweep.py ... --ablation --grid gptq:w3g128 --json ablation.json     # what each step of the recipe buys
    python eval/sweep.py ... --peer Q4_K_M=model-Q4_K_M.gguf --peer mine=folder/    # checkpoints of others
    python eval/sweep.py --read sweep.json                                          # the table again

Perplexity, KL divergence and top-1 agreement against the unquantized model; bits a weight over the linears. Rows that
the JSON file holds are not done again, folders made with the same options are used again. Exit code 1 if a row failed.
"""

from __future__ import annotations

import sys

from llmq.sweep.command import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
