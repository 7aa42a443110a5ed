"""Measurements, each a script of its own: `python -m bench.peers`. They write docs/measurements.md.

limit     how much each figure of the limit varies when it is measured again
peers     speed beside other engines and beside the limit
quality   perplexity and KL divergence beside llama.cpp
overhead  what the clock costs

`--dry` prints and writes nothing, `--help` lists what can be made shorter. Not installed with the
package, and no test: figures hold for the machine and the day they were taken.
"""
