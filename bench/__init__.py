"""Measurements, each a script of its own: `python -m bench.peers`. They write docs/measurements.md.

limit     how much each figure of the limit varies when it is measured again
peers     speed beside other engines and beside the limit
prefill   prompts of 32 to 8k tokens, attention's share of the peak, memory
scale     random weights in the shapes of real models, and the line through all their cycles
batch     1 to 32 sequences at once, and the knee that the cost model foretells
depth     decode behind up to 8k cached tokens
start     process start to first token, load, memory
quality   perplexity and KL divergence beside llama.cpp, per block format and mode
avx2      the avx2 path beside a llama.cpp built for AVX2
overhead  what the clock costs
summary   every line of what is to be reached, from the last run of each

`--dry` prints and writes nothing, `--help` lists what can be made shorter. Most work in stages
whose rounds are kept in build/bench: `--seconds 60` ends a run early, `--resume` goes on with it.
Not installed with the package, and no test: figures hold for the machine and the day they were
taken.
"""
